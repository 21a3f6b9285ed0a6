#!/usr/bin/env python3
"""Figures of the GPU path on one card: what this project does with it, beside bare vLLM and the card's own peak.

    python tools/bench_gpu.py --dry-run                    # what would run, whether it fits; needs no GPU
    python tools/bench_gpu.py --out gpu.jsonl              # everything, run after run, each in processes of its own
    python tools/bench_gpu.py --out gpu.jsonl --only actor # one group: actor, rollout or train
    python tools/bench_gpu.py --table gpu.jsonl            # the table in Markdown, for docs/gpu.md

The model has random weights in the shape of a published one, and the demo's tokenizer: speed depends on neither. Every
run ends within --limit seconds and appends one JSON object to --out, so that they may be spread over several calls.

A figure that was not taken is "not measured" in the table; nothing is computed from assumptions.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from megatron_coreward.commands.arguments import whole
from megatron_coreward.config.accelerator import GpuSupport, machine_problems, model_problems, setting_problems
from megatron_coreward.config.architecture import Architecture
from megatron_coreward.config.load import parse_config
from megatron_coreward.config.methods import needs_of
from megatron_coreward.config.schema import RunConfig
from megatron_coreward.planner.hardware import GPUS, Assumptions
from megatron_coreward.planner.memory import actor_memory, engine_memory
from megatron_coreward.planner.models import CONFIGS, published_architecture
from megatron_coreward.planner.plan import Machine, actor_problems, engine_problems
from megatron_coreward.planner.step_time import head_flops, layer_flops, num_parameters
from megatron_coreward.weights.mapping import hf_tensors

GPU = GPUS["h200"]
H200 = GpuSupport(1, (9, 0), (13, 0), {"transformer-engine": (2, 11, 0)})
FP8 = ("tensorwise", "blockwise", "delayed")
METHODS = ("co_rewarding_i", "co_rewarding_ii")
PROMPT, RESPONSE, SEQUENCES = 128, 896, 256  # tokens of a sequence, sequences of an update: 262,144 tokens
ROLLOUT_PROMPTS, ROLLOUT_N, ROLLOUT_TOKENS = 64, 8, 512
TRAIN_STEPS, SKIPPED_STEPS = 20, 5  # the first steps compile kernels
SHAPE, MICROBATCH = "Qwen3-1.7B-Base", 16384  # unless --shape and --tokens-per-microbatch say otherwise


@dataclass(frozen=True, slots=True)
class Run:
    """One measurement: a process of its own."""

    group: str  # actor, rollout or train
    name: str
    overrides: tuple[str, ...] = ()


def runs(only: str | None = None) -> list[Run]:
    """Everything there is to measure, in an order in which each builds on what the ones before have shown."""
    actor = [Run("actor", "actor bf16"), *(Run("actor", f"actor fp8 {r}", (f"actor.fp8={r}",)) for r in FP8)]
    actor.append(Run("actor", "actor fp8 weights", ("actor.fp8=tensorwise", "actor.fp8_params=true")))
    rollout = [Run("rollout", name) for name in ("rollout bare", "rollout bf16")]
    rollout.append(Run("rollout", "rollout fp8", ("rollout.quantization=fp8",)))
    train = [
        Run("train", f"train {method} {precision}", (f"method={method}", *overrides))
        for method in METHODS
        for precision, overrides in (("bf16", ()), ("fp8", ("actor.fp8=tensorwise",)))
    ]
    return [run for run in (*actor, *rollout, *train) if only in (None, run.group)]


def config_of(run: Run, model: Path, folder: Path, microbatch: int = MICROBATCH) -> RunConfig:
    """The configuration that a run measures.

    Args:
        microbatch: tokens of one.
    """
    tree: dict[str, Any] = {
        "run_dir": str(folder / run.name.replace(" ", "_")),
        "steps": TRAIN_STEPS,
        "method": METHODS[0],
        "model": {"hf_path": str(model)},
        "data": {
            "train_files": [str(folder / "train.parquet")],
            "rephrased_files": [str(folder / "train_rephrased.parquet")],
            "batch_size": 16,
            "max_prompt_tokens": PROMPT,
            "system_prompt": None,
        },
        "actor": {"tokens_per_microbatch": microbatch, "backend": "te"},
        "rollout": {
            "placement": "colocated",
            "n": 8,
            "max_response_tokens": ROLLOUT_TOKENS,
            "max_num_seqs": 512,
            "gpu_memory_utilization": 0.6,
        },
        "validation": {"every": 0, "at_start": False},
        "telemetry": {"console": "plain"},
    }
    return parse_config(tree, run.overrides, where=run.name)


# ---- what would run --------------------------------------------------------------------------------------------------


def planned(run: Run, config: RunConfig, arch: Architecture) -> tuple[int, list[str]]:
    """Bytes at the peak, as the planner checks them, and what of it the card cannot hold."""
    machine = Machine(GPU, "disaggregated" if run.group == "actor" else "colocated", Assumptions())
    (stage,), engine = actor_memory(config, arch, machine.assumptions), engine_memory(config, arch, GPU, Assumptions())
    if run.group == "actor":
        return stage.peak, list(actor_problems((stage,), engine, machine))
    if run.group == "rollout":
        room = [f"{engine.cache / 2**30:.0f} GiB are left for the cache"] if engine.cache <= 0 else []
        return engine.claimed, room
    problems = [*actor_problems((stage,), engine, machine), *engine_problems(config, (stage,), engine, machine)]
    return max(stage.peak + engine.asleep, stage.while_sampling + engine.claimed), problems


def dry_run(shape: str, microbatch: int = MICROBATCH) -> Iterator[str]:
    """A line for each run, and what keeps it from running on one H200."""
    arch = published_architecture(shape)
    for run in runs():
        config = config_of(run, Path(shape), Path("bench"), microbatch)
        peak, beyond = planned(run, config, arch)
        problems = [*setting_problems(config), *model_problems(config, arch), *machine_problems(config, H200), *beyond]
        of = f"{peak / 2**30:.0f} of {GPU.memory_bytes / 2**30:.0f} GiB"
        graded = f"{of}: {'; '.join(problems)}" if problems else f"fits, {of}"
        yield f"{run.name:28} {graded}"


# ---- the model -------------------------------------------------------------------------------------------------------


def write_random_model(directory: Path, shape: str, device: str = "cuda") -> Path:
    """A Hugging Face directory in the shape of a published model: random BF16 weights, the demo's tokenizer."""
    import torch
    from safetensors.torch import save_file

    from megatron_coreward.demo.tokenizer import word_level_tokenizer

    if (directory / "model.safetensors.index.json").is_file():
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    arch, tokenizer = published_architecture(shape), word_level_tokenizer()
    class_names = {"qwen3": "Qwen3ForCausalLM", "qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM"}
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    content = {**CONFIGS[shape], **ends, "architectures": [class_names[arch.family]]}
    content |= {"hidden_act": "silu", "torch_dtype": "bfloat16", "attention_bias": False}
    (directory / "config.json").write_text(json.dumps(content, indent=2))
    (directory / "generation_config.json").write_text(json.dumps(ends))
    tokenizer.save_pretrained(directory)
    generator = torch.Generator(device).manual_seed(0)
    names: dict[str, str] = {}
    pending: dict[str, torch.Tensor] = {}

    def flush() -> None:
        file = f"model-{len(set(names.values())) + 1:05d}.safetensors"
        save_file(pending, directory / file, metadata={"format": "pt"})
        names.update(dict.fromkeys(pending, file))
        pending.clear()

    for name, size in hf_tensors(arch).items():
        if name.endswith("norm.weight"):
            pending[name] = torch.ones(size, dtype=torch.bfloat16)
        else:
            values = torch.randn(size, generator=generator, device=device, dtype=torch.float32).mul_(0.02)
            pending[name] = values.to("cpu", torch.bfloat16)
        if sum(t.nbytes for t in pending.values()) > 2**31:
            flush()
    if pending:
        flush()
    if device == "cuda":
        torch.cuda.empty_cache()  # the run that follows may be that of another process
    total = sum(2 * torch.Size(size).numel() for size in hf_tensors(arch).values())
    index = {"metadata": {"total_size": total}, "weight_map": names}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


# ---- the runs --------------------------------------------------------------------------------------------------------


def timed(call: Callable[[], Any], repeats: int, warm_up: int = 2) -> list[float]:
    """Seconds of each call, the GPU waited for."""
    import torch

    seconds = []
    for i in range(warm_up + repeats):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        torch.cuda.synchronize()
        if i >= warm_up:
            seconds.append(time.perf_counter() - begin)
    return seconds


def update_flops(arch: Architecture, length: int, tokens: int) -> float:
    """Of an update: forward, and twice as much backward; a token meets half of its sequence on average.

    The output layer is counted for every token, though only responses meet it. Recomputation and padding are not.
    """
    return 3.0 * tokens * (arch.num_layers * layer_flops(arch, length / 2) + head_flops(arch))


def bench_actor(config: RunConfig, arch: Architecture) -> dict[str, Any]:
    """Tokens/s and model FLOPs utilisation of the update, and of scoring."""
    import numpy as np
    import torch

    from megatron_coreward.actor.actor import MegatronActor
    from megatron_coreward.actor.packing import plan_packs, shares
    from megatron_coreward.cluster.processes import actor_setup
    from megatron_coreward.config.accelerator import sequence_multiple, token_alignment
    from megatron_coreward.types import Sequences, TrainBatch
    from megatron_coreward.weights.ports import free_port

    length = PROMPT + RESPONSE
    actor = MegatronActor(actor_setup(config, length), 0, "127.0.0.1", free_port())
    rng = np.random.default_rng(0)
    ids = [rng.integers(0, arch.vocab_size, length).astype(np.int32) for _ in range(SEQUENCES)]
    sequences = Sequences(ids, np.full(SEQUENCES, PROMPT, dtype=np.int32))
    batch = TrainBatch(
        sequences=sequences,
        advantages=rng.normal(size=SEQUENCES).astype(np.float32),
        token_weights=np.full(SEQUENCES, 1 / (SEQUENCES * RESPONSE), dtype=np.float32),
        rollout_logprobs=None,
        old_logprobs=None,
        reference_logprobs=None,
        kl_coef=0.0,
    )
    settings = config.actor
    align, pad = token_alignment(settings), sequence_multiple(settings)
    plan = plan_packs(sequences.lengths, 1, settings.tokens_per_microbatch, align=align, pad=pad)
    (share,) = shares(plan)
    torch.cuda.reset_peak_memory_stats()
    update = statistics.median(timed(lambda: actor.update(batch, share), 5))
    peak = torch.cuda.max_memory_allocated()
    scoring = statistics.median(timed(lambda: actor.token_stats(sequences, share, "policy", 1.0), 3, 1))
    tokens = SEQUENCES * length
    rate = update_flops(arch, length, tokens) / update
    computes = actor.describe()
    actor.shutdown()
    return {
        "update_tokens_s": tokens / update,
        "mfu_of_bf16_peak": rate / GPU.bf16_flops,
        "scoring_tokens_s": tokens / scoring,
        "peak_gib": peak / 2**30,
        "packs": plan.num_packs,
        **computes,
    }


def bench_rollout(run: Run, config: RunConfig, arch: Architecture) -> dict[str, Any]:
    """Sampled tokens/s of the engine; `rollout bare`: of vLLM as its documentation uses it, with the same settings."""
    import numpy as np

    r = config.rollout
    prompts = [np.random.default_rng(i).integers(3, 60, PROMPT).tolist() for i in range(ROLLOUT_PROMPTS)]
    limit = PROMPT + ROLLOUT_TOKENS + 1
    if run.name == "rollout bare":
        from vllm import LLM, SamplingParams

        llm = LLM(
            str(config.model.hf_path),
            dtype=config.model.dtype,
            max_model_len=limit,
            max_num_seqs=r.max_num_seqs,
            gpu_memory_utilization=r.gpu_memory_utilization,
            seed=config.seed,
        )
        inputs: list[Any] = [{"prompt_token_ids": prompt} for prompt in prompts]

        def sample(seed: int) -> int:
            params = SamplingParams(n=ROLLOUT_N, temperature=1.0, max_tokens=ROLLOUT_TOKENS, seed=seed, logprobs=0)
            outputs = llm.generate(inputs, params, use_tqdm=False)
            return sum(len(one.token_ids) for output in outputs for one in output.outputs)
    else:
        from megatron_coreward.rollout.engine import RolloutEngine
        from megatron_coreward.rollout.requests import SamplingRequest
        from megatron_coreward.rollout.setup import EngineSetup

        setup = EngineSetup(
            config.model.hf_path,
            dtype=config.model.dtype,
            max_model_len=limit,
            max_num_seqs=r.max_num_seqs,
            gpu_memory_utilization=r.gpu_memory_utilization,
            quantization=r.quantization,
            own_weights=0,
        )
        engine = RolloutEngine(setup)

        def sample(seed: int) -> int:
            requests = [
                SamplingRequest(p, ROLLOUT_N, seed + i, 1.0, 1.0, ROLLOUT_TOKENS) for i, p in enumerate(prompts)
            ]
            return sum(len(one.token_ids) for samples in engine.sample(requests, 0) for one in samples)

    sample(1)
    rates = []
    for seed in (1000, 2000, 3000):
        begin = time.perf_counter()
        tokens = sample(seed)
        rates.append(tokens / (time.perf_counter() - begin))
    return {"rollout_tokens_s": statistics.median(rates)}


def bench_train(config: RunConfig, arch: Architecture) -> dict[str, Any]:
    """A colocated training run from end to end: phases, switches, sync, what lies outside, peak memory of the card."""
    import threading

    from megatron_coreward.telemetry.jsonl import read_rows
    from megatron_coreward.trainer.run import train

    used: list[int] = []
    done = threading.Event()

    def watch() -> None:
        while not done.wait(1.0):
            output = _nvidia_smi("memory.used")
            used.extend(int(line) for line in output.splitlines() if line.strip().isdigit())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        train(config)
    finally:
        done.set()
        watcher.join()
    return figures_of_run(list(read_rows(config.run_dir / "metrics.jsonl")), arch, config) | {
        "card_peak_gib": max(used, default=0) / 1024
    }


def figures_of_run(rows: Sequence[Mapping[str, Any]], arch: Architecture, config: RunConfig) -> dict[str, Any]:
    """Medians over the steps after the first few. Pure."""
    counted = [row for row in rows if int(row["step"]) > SKIPPED_STEPS]

    def median(key: str) -> float:
        return statistics.median(float(row.get(key) or 0.0) for row in counted)

    syncs = 2 if needs_of(config.method).teacher else 1
    sync = median("time/sync_s") / syncs
    step = median("step_time_s")
    phases = [key for key in counted[0] if key.startswith("time/") and key.endswith("_s") and "." not in key]
    return {
        "steps": len(rows),
        "step_s": step,
        "sync_s": sync,
        "sync_gb_s": 2 * num_parameters(arch) / 1e9 / sync if sync else 0.0,
        "switch_s": median("time/switch_s"),
        "outside_share": median("time/outside_share"),
        "shares": {key.removeprefix("time/").removesuffix("_s"): median(key) / step for key in phases},
        "logprob_gap": median("sync/logprob_gap"),
        "canary_gap": median("sync/canary_gap"),
        "finite": all(float(row["optim/grad_norm"]) < float("inf") for row in rows if "optim/grad_norm" in row),
    }


def _nvidia_smi(field: str) -> str:
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits"]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False).stdout.strip()


def perform(run: Run, shape: str, folder: Path, microbatch: int) -> dict[str, Any]:
    """The run, in this process; with what it ran on."""
    import importlib.metadata

    import torch

    from megatron_coreward.demo.task import make_splits, write_parquet

    arch = published_architecture(shape)
    model = write_random_model(folder / shape, shape)
    if not (folder / "train.parquet").is_file():
        write_parquet(folder, make_splits(1, num_train=512, num_heldout=16, num_sft=0))
    config = config_of(run, model, folder, microbatch)
    begin = time.perf_counter()
    if run.group == "actor":
        figures = bench_actor(config, arch)
    elif run.group == "rollout":
        figures = bench_rollout(run, config, arch)
    else:
        figures = bench_train(config, arch)
    names = ("torch", "megatron-core", "transformer-engine", "vllm", "ray")
    return {
        "run": run.name,
        "shape": shape,
        "tokens_per_microbatch": microbatch,
        "figures": figures,
        "seconds": time.perf_counter() - begin,
        "gpu": torch.cuda.get_device_name(),
        "driver": _nvidia_smi("driver_version"),
        "versions": {name: importlib.metadata.version(name) for name in names},
        "command": " ".join(["python", "tools/bench_gpu.py", *sys.argv[1:]]),
    }


# ---- the table -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Aim:
    """A figure of the table, and what it should be."""

    what: str
    value: Callable[[Mapping[str, Mapping[str, Any]]], float | None]
    form: str = "{:,.0f}"
    least: float | None = None
    most: float | None = None

    def row(self, figures: Mapping[str, Mapping[str, Any]]) -> str:
        value = self.value(figures)
        aim = f"≥ {self.least}" if self.least is not None else f"≤ {self.most}" if self.most is not None else ""
        if value is None:
            return f"| {self.what} | not measured | {aim} |  |"
        met = ""
        if self.least is not None or self.most is not None:
            met = "yes" if (self.least or value) <= value <= (self.most if self.most is not None else value) else "no"
        return f"| {self.what} | {self.form.format(value)} | {aim} | {met} |"


def _of(run: str, key: str) -> Callable[[Mapping[str, Mapping[str, Any]]], float | None]:
    return lambda figures: figures[run][key] if run in figures else None


def _ratio(one: tuple[str, str], other: tuple[str, str]) -> Callable[[Mapping[str, Mapping[str, Any]]], float | None]:
    def value(figures: Mapping[str, Mapping[str, Any]]) -> float | None:
        a, b = _of(*one)(figures), _of(*other)(figures)
        return None if a is None or not b else a / b

    return value


def aims(shape: str) -> list[Aim]:
    """The figures that `docs/gpu.md` asks for, with the aims that hold for this shape."""
    billions = num_parameters(published_architecture(shape)) / 1e9
    tokens = "update_tokens_s"
    table = [
        Aim("update, BF16, tokens/s", _of("actor bf16", tokens)),
        Aim("update, BF16, share of the BF16 peak (MFU)", _of("actor bf16", "mfu_of_bf16_peak"), "{:.3f}", least=0.45),
    ]
    for recipe in FP8:
        table.append(Aim(f"update, FP8 {recipe}, tokens/s", _of(f"actor fp8 {recipe}", tokens)))
        least = 1.3 if recipe == "tensorwise" and billions >= 4 else None
        pair = ((f"actor fp8 {recipe}", tokens), ("actor bf16", tokens))
        table.append(Aim(f"update, FP8 {recipe}, over BF16", _ratio(*pair), "{:.2f}", least=least))
    rate = "rollout_tokens_s"
    bare = ("rollout bare", rate)
    table += [
        Aim("update, BF16, peak memory, GiB", _of("actor bf16", "peak_gib"), "{:.1f}"),
        Aim("update, FP8 weights, peak memory, GiB", _of("actor fp8 weights", "peak_gib"), "{:.1f}"),
        Aim("rollout, BF16, tokens/s", _of("rollout bf16", rate)),
        Aim("rollout, BF16, over bare vLLM", _ratio(("rollout bf16", rate), bare), "{:.3f}", least=0.95),
        Aim("rollout, FP8, over bare vLLM in BF16", _ratio(("rollout fp8", rate), bare), "{:.3f}"),
    ]
    for run in (run.name for run in runs("train")):
        most = 0.3 if run.endswith("bf16") and 8 <= billions < 9 else None
        table += [
            Aim(f"{run}: step, s", _of(run, "step_s"), "{:.2f}"),
            Aim(f"{run}: sync, s each", _of(run, "sync_s"), "{:.3f}", most=most),
            Aim(f"{run}: sync, GB/s", _of(run, "sync_gb_s"), "{:.1f}"),
            Aim(f"{run}: both switches, s", _of(run, "switch_s"), "{:.2f}"),
            Aim(f"{run}: outside of all phases, share", _of(run, "outside_share"), "{:.3f}", most=0.03),
            Aim(f"{run}: gap of log-probs, actor to engine, nats", _of(run, "logprob_gap"), "{:.4f}"),
            Aim(f"{run}: peak memory of the card, GiB", _of(run, "card_peak_gib"), "{:.1f}"),
        ]
    return table


def table(results: Sequence[Mapping[str, Any]], shape: str = SHAPE) -> str:
    """Markdown: every figure with its aim, then the shares of the phases, then what all was measured on; one table for
    each shape and size of micro-batches, or that of `shape` if nothing was measured."""
    by_sizes: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for result in results:
        by_sizes.setdefault((str(result["shape"]), int(result["tokens_per_microbatch"])), []).append(result)
    return "\n\n".join(
        _table_of(*sizes, of_sizes) for sizes, of_sizes in (by_sizes or {(shape, MICROBATCH): []}).items()
    )


def _table_of(shape: str, microbatch: int, results: Sequence[Mapping[str, Any]]) -> str:
    figures = {str(result["run"]): result["figures"] for result in results}  # the last one of a name counts
    lines = [
        f"| {shape}, micro-batches of {microbatch:,} tokens | value | aim | met |",
        "|---|---|---|---|",
        *(aim.row(figures) for aim in aims(shape)),
    ]
    shared = {run: found["shares"] for run, found in figures.items() if "shares" in found}
    if shared:
        phases = sorted({phase for shares in shared.values() for phase in shares})
        lines += ["", f"| share of a step | {' | '.join(phases)} |", "|---" * (len(phases) + 1) + "|"]
        for run, shares in shared.items():
            lines.append(f"| {run} | " + " | ".join(f"{shares.get(phase, 0.0):.3f}" for phase in phases) + " |")
    for result in results:
        packages = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
        lines += [
            "",
            f"{result['run']}: {result['shape']} on {result['gpu']} (driver {result['driver']}), {packages}; ",
        ]
        lines[-1] += f"`{result['command']}`"
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    shapes = [name for name, config in CONFIGS.items() if "num_experts" not in config]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default=SHAPE, choices=shapes, help="whose sizes the model has")
    parser.add_argument(
        "--tokens-per-microbatch", type=whole(PROMPT + RESPONSE), default=MICROBATCH, help="of updates and scoring"
    )
    parser.add_argument("--only", choices=("actor", "rollout", "train"), help="one group of runs")
    parser.add_argument("--run", choices=[run.name for run in runs()], help="one run, in this process")
    parser.add_argument("--out", type=Path, help="file to which each run appends its JSON object")
    parser.add_argument("--work", type=Path, help="folder for model and runs; a temporary one if none is given")
    parser.add_argument("--limit", type=int, default=540, help="seconds that a run may take")
    parser.add_argument("--dry-run", action="store_true", help="say what would run, and whether it fits")
    parser.add_argument("--table", type=Path, metavar="OUT", help="print the table of such a file")
    given = parser.parse_args(arguments)
    if given.table is not None:
        print(table([json.loads(line) for line in given.table.read_text().splitlines()], given.shape))
        return 0
    if given.dry_run:
        print("\n".join(dry_run(given.shape, given.tokens_per_microbatch)))
        return 0
    if given.out is None:
        parser.error("--out is missing: the file that the results are appended to")
    if given.run is not None:
        with tempfile.TemporaryDirectory() as temporary:
            run = next(run for run in runs() if run.name == given.run)
            result = perform(run, given.shape, given.work or Path(temporary), given.tokens_per_microbatch)
        with given.out.open("a") as file:
            file.write(json.dumps(result) + "\n")
        return 0
    failed = 0
    with tempfile.TemporaryDirectory() as temporary:
        work = given.work or Path(temporary)
        for run in runs(given.only):
            command = [sys.executable, __file__, "--run", run.name, "--shape", given.shape, "--out", str(given.out)]
            command += ["--tokens-per-microbatch", str(given.tokens_per_microbatch)]
            try:
                status = subprocess.run([*command, "--work", str(work)], timeout=given.limit, check=False).returncode
            except subprocess.TimeoutExpired:
                status = -1
            print(f"{run.name}: {'done' if status == 0 else f'failed (status {status})'}", flush=True)
            failed += status != 0
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
