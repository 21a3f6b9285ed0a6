"""Throughput of a whole training step, beside bare vLLM and a bare Megatron loop on the same work in the same run.

    python benchmarks/bench_step.py [--steps 8] [--tensor-parallel 2] [--engines 1] [--streaming] [--long-tailed]

The work: a tiny Qwen3 (4 layers of 128) with random weights, 32 prompts x 8 completions of 64 tokens, one update a
batch, no KL. With `--long-tailed`, responses have the lengths of the model of long_tailed.py (12 tokens and 20 times as
many in the mean, cut off at 384), and the step alone is measured, as in peer_trl.py. `--streaming` lets rollouts go
ahead by a step, with partial ones going on under new weights. Prints one JSON object. Ratios are taken within the run;
absolute numbers hang on the machine.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.long_tailed import write_long_tailed_model
from megatron_coreward.cluster.processes import processes
from megatron_coreward.cluster.ray_start import start_ray, stop_ray
from megatron_coreward.cluster.rollout_engines import open_rollout_engines
from megatron_coreward.cluster.weight_sync import canary_tokens
from megatron_coreward.config.load import parse_config
from megatron_coreward.demo.model import write_model
from megatron_coreward.demo.tokenizer import byte_level_tokenizer
from megatron_coreward.rewards.equivalence import AnswerEquivalence
from megatron_coreward.rewards.methods import METHODS
from megatron_coreward.telemetry.timing import PhaseTimer
from megatron_coreward.trainer.checkpoints import CheckpointWriter
from megatron_coreward.trainer.experience import Collector
from megatron_coreward.trainer.loop import Trainer
from megatron_coreward.trainer.schedule import RolloutSchedule
from megatron_coreward.trainer.streaming import StreamingSchedule
from megatron_coreward.types import Problem, Prompt

PROMPTS, SAMPLES, PROMPT_TOKENS, RESPONSE_TOKENS = 32, 8, 32, 64
LONG_RESPONSE_TOKENS, MEAN_TOKENS = 384, 12  # with --long-tailed
STREAMING = {"schedule": "streaming", "max_staleness": 1, "partial": True}
PHASES = ("sync", "rollout", "token_stats", "rewards", "update")


def median_seconds(call: Callable[[], Any], repeats: int) -> float:
    """Median wall time of a call, after one that is not counted."""
    call()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def make_problems(tokenizer: Any) -> list[Problem]:
    rng = np.random.default_rng(0)
    problems = []
    for i in range(PROMPTS):
        text = "".join(chr(65 + letter) for letter in rng.integers(0, 26, PROMPT_TOKENS))
        prompt = Prompt(text, np.asarray(tokenizer(text).input_ids, dtype=np.int32))
        problems.append(Problem(f"bench/{i}", {"original": prompt}, ground_truth="1", source="bench"))
    return problems


class BareEngine:
    """vLLM as its own documentation uses it: an `LLM`, `generate`, nothing else."""

    def __init__(self, model: str, max_len: int) -> None:
        from megatron_coreward.rollout.environment import prepare

        prepare(1)
        from vllm import LLM

        self._llm = LLM(
            model,
            dtype="float32",
            max_model_len=max_len,
            max_num_seqs=256,
            kv_cache_memory_bytes=2**28,
            enforce_eager=True,
            enable_chunked_prefill=False,
            max_num_batched_tokens=8192,
            load_format="dummy",
        )

    def generate(self, prompts: list[list[int]]) -> float:
        """Tokens a second for `SAMPLES` seeded samples of every prompt."""
        from vllm import SamplingParams

        params = [
            SamplingParams(n=SAMPLES, temperature=1.0, max_tokens=RESPONSE_TOKENS, seed=i, logprobs=0, ignore_eos=True)
            for i in range(len(prompts))
        ]
        begin = time.perf_counter()
        outputs = self._llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        tokens = sum(len(c.token_ids) for output in outputs for c in output.outputs)
        return tokens / (time.perf_counter() - begin)


class BareMegatron:
    """One rank of a plain Megatron training loop: forward, cross-entropy, backward, optimizer, on one padded batch."""

    def start(self, setup: Any, rank: int, address: str, port: int) -> None:
        from megatron_coreward.actor.actor import MegatronActor

        self._actor = MegatronActor(setup, rank, address, port)

    def address(self) -> tuple[str, int]:
        from megatron_coreward.actor.worker import ActorWorker

        return ActorWorker().address()

    def update(self, ids: Any, micro_batch: int) -> float:
        """Seconds of one optimizer step on [S, L] tokens."""
        import torch
        from megatron.core.packed_seq_params import PackedSeqParams
        from megatron.core.pipeline_parallel import get_forward_backward_func

        actor = self._actor
        length = ids.shape[1]
        bounds = torch.arange(0, micro_batch * length + 1, length, dtype=torch.int32)
        packed = PackedSeqParams("thd", bounds, bounds, None, None, length, length)

        def step(batches: Any, model: Any) -> Any:
            tokens = torch.from_numpy(next(batches)).long().view(1, -1)
            hidden = model(tokens, torch.arange(tokens.shape[1])[None], None, packed_seq_params=packed)

            def loss(hidden: Any) -> Any:  # Megatron's own: the logits of all tokens
                logits, _ = model.module.output_layer(hidden, weight=model.module.output_weight)
                losses = model.module.compute_language_model_loss(tokens, logits)
                return losses.mean(), torch.ones((), dtype=torch.int), {}

            return hidden, loss

        begin = time.perf_counter()
        for chunk in actor.policy:
            chunk.zero_grad_buffer()
        actor.optimizer.zero_grad()
        cuts = [ids[i : i + micro_batch] for i in range(0, len(ids), micro_batch)]
        get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=iter(cuts),
            model=actor.policy[0],
            num_microbatches=len(cuts),
            seq_length=micro_batch * length,
            micro_batch_size=1,
            forward_only=False,
        )
        actor.optimizer.step()
        return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--data-parallel", type=int, default=2)
    parser.add_argument("--engines", type=int, default=2)
    parser.add_argument(
        "--tokens-per-microbatch", type=int, default=2048, help="what stays in a core's cache is faster"
    )
    parser.add_argument("--streaming", action="store_true")
    parser.add_argument("--long-tailed", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(run(Path(folder), options)))


def run(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    import ray

    tokenizer = byte_level_tokenizer()
    if options.long_tailed:
        write_long_tailed_model(folder / "model", MEAN_TOKENS)
    else:
        write_model(folder / "model", tokenizer)
    config = parse_config(
        {
            "run_dir": str(folder / "run"),
            "steps": options.steps + 2,
            "method": "majority_voting",
            "model": {"hf_path": str(folder / "model"), "dtype": "float32"},
            "data": {"train_files": ["none"], "batch_size": PROMPTS, "max_prompt_tokens": PROMPT_TOKENS},
            "actor": {
                "tensor_parallel": options.tensor_parallel,
                "data_parallel": options.data_parallel,
                "tokens_per_microbatch": options.tokens_per_microbatch,
            },
            "rollout": {
                "n": SAMPLES,
                "max_response_tokens": LONG_RESPONSE_TOKENS if options.long_tailed else RESPONSE_TOKENS,
                "num_engines": options.engines,
                "kv_cache_gib": 0.25,
                **(STREAMING if options.streaming else {}),
            },
            "loss": {"kl_coef": 0, "mismatch_correction": "tis" if options.streaming else "off"},
        }
    )
    problems = make_problems(tokenizer)
    rows = []
    method = METHODS[config.method]
    with processes(config) as running, AnswerEquivalence("exact") as equivalence:
        engines = open_rollout_engines(config, running, canary_tokens(problems))
        schedule = (StreamingSchedule if options.streaming else RolloutSchedule)(
            config, method.needs, engines, lambda step: problems
        )
        collector = Collector(config, method, running.actors, schedule, equivalence, lambda step: problems)
        trainer = Trainer(
            config=config,
            needs=method.needs,
            actors=running.actors,
            collect=collector.collect,
            checkpoints=CheckpointWriter(config, running.actors),
        )
        for step in range(1, options.steps + 3):
            timer = PhaseTimer()
            result = trainer.step(step, timer)
            rows.append(result.metrics | timer.metrics())
        setup = running.actors.setup
        engines.close()
    rows = rows[1:-1]  # the first step warms up; the last one has nothing drawn ahead of it
    median = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
    response_tokens = median["rollout/response_tokens_mean"] * PROMPTS * SAMPLES
    mean_step = statistics.fmean(row["step_time_s"] for row in rows)
    if options.long_tailed or options.streaming:
        stop_ray()
        return {
            "work": f"{PROMPTS} prompts x {SAMPLES}, up to {config.rollout.max_response_tokens} tokens",
            "layout": {k: getattr(options, k) for k in ("tensor_parallel", "data_parallel", "engines", "streaming")},
            "step_s": mean_step,
            "samples_per_s": PROMPTS * SAMPLES / mean_step,
            "response_tokens_mean": statistics.fmean(row["rollout/response_tokens_mean"] for row in rows),
        }
    trained_tokens = response_tokens + PROMPTS * SAMPLES * PROMPT_TOKENS

    start_ray()
    prompts = [p.prompts["original"].token_ids.tolist() for p in problems]
    engine = ray.remote(BareEngine).options(num_cpus=0)
    bare = [engine.remote(str(folder / "model"), PROMPT_TOKENS + RESPONSE_TOKENS + 1) for _ in range(options.engines)]
    micro_batch_plans = [prompts[i :: options.engines] for i in range(options.engines)]
    ray.get([b.generate.remote(s) for b, s in zip(bare, micro_batch_plans, strict=True)])
    rates = [
        sum(ray.get([b.generate.remote(s) for b, s in zip(bare, micro_batch_plans, strict=True)])) for _ in range(3)
    ]
    for b in bare:
        ray.kill(b)

    rank_class = ray.remote(BareMegatron).options(num_cpus=0)
    ranks = [rank_class.remote() for _ in range(setup.settings.world_size)]
    address, port = ray.get(ranks[0].address.remote())
    ray.get([rank.start.remote(setup, i, address, port) for i, rank in enumerate(ranks)])
    ids = np.random.default_rng(0).integers(
        3, len(tokenizer), (PROMPTS * SAMPLES // options.data_parallel, PROMPT_TOKENS + RESPONSE_TOKENS)
    )
    micro_batch = 64  # divides the batch of a rank
    seconds = median_seconds(lambda: ray.get([r.update.remote(ids, micro_batch) for r in ranks]), options.steps)
    stop_ray()

    bare_update = PROMPTS * SAMPLES * (PROMPT_TOKENS + RESPONSE_TOKENS) / seconds
    update = trained_tokens / median["time/update_s"]
    rollout_rate = response_tokens / median["time/rollout_s"]
    return {
        "work": f"{PROMPTS} prompts x {SAMPLES} x {RESPONSE_TOKENS} tokens",
        "layout": {k: getattr(options, k) for k in ("tensor_parallel", "data_parallel", "engines")},
        "step_s": median["step_time_s"],
        "samples_per_s": PROMPTS * SAMPLES / median["step_time_s"],
        "rollout_tokens_per_s": rollout_rate,
        "bare_vllm_tokens_per_s": statistics.median(rates),
        "rollout_over_bare_vllm": rollout_rate / statistics.median(rates),
        "update_tokens_per_s": update,
        "bare_megatron_tokens_per_s": bare_update,
        "update_over_bare_megatron": update / bare_update,
        "sync_s": median["time/sync_s"],
        "phases_s": {phase: median[f"time/{phase}_s"] for phase in PHASES},
        "outside_share": median["time/outside_share"],
        "response_tokens_mean": median["rollout/response_tokens_mean"],
    }


if __name__ == "__main__":
    main()
