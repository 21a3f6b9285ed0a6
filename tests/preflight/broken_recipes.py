"""What can be wrong with a recipe and what it names, and what must be said of it: the table of `test_preflight.py`."""

import json
import os
import struct
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file, save_file

from megatron_coreward.config.load import dump_config, load_config
from megatron_coreward.data.parquet import write_rows
from megatron_coreward.preflight import machine, packages
from megatron_coreward.rollout import sockets
from tests.preflight.recipe_world import QUESTIONS, rows, write_model

Break = Callable[[Path, pytest.MonkeyPatch], None]


@dataclass(frozen=True)
class Case:
    """Something wrong with the world, and what the message must say."""

    message: str  # a regular expression
    changes: tuple[str, ...] = ()
    do: Break | None = None


def key(*changes: str, says: str) -> Case:
    return Case(says, changes)


def broken(do: Break, *changes: str, says: str) -> Case:
    return Case(says, changes, do)


def without(package: str) -> Break:
    def do(_: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, package, None)

    return do


def text(path: str, content: str | bytes) -> Break:
    def do(world: Path, _: pytest.MonkeyPatch) -> None:
        (world / path).parent.mkdir(parents=True, exist_ok=True)
        (world / path).write_bytes(content if isinstance(content, bytes) else content.encode())

    return do


def edit(path: str, **changes: Any) -> Break:
    def do(world: Path, _: pytest.MonkeyPatch) -> None:
        (world / path).write_text(json.dumps(json.loads((world / path).read_text()) | changes))

    return do


def together(*steps: Break) -> Break:
    def do(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for step in steps:
            step(world, monkeypatch)

    return do


def remove(*paths: str) -> Break:
    def do(world: Path, _: pytest.MonkeyPatch) -> None:
        for path in paths:
            (world / path).unlink()

    return do


def cut(path: str, nbytes: int) -> Break:
    def do(world: Path, _: pytest.MonkeyPatch) -> None:
        content = (world / path).read_bytes()
        (world / path).write_bytes(content[: len(content) - nbytes] if nbytes > 0 else content + b"\0" * -nbytes)

    return do


def tensors(change: Callable[[dict[str, Any]], None]) -> Break:
    def do(world: Path, _: pytest.MonkeyPatch) -> None:
        found = load_file(world / "model/model.safetensors")
        change(found)
        save_file(found, world / "model/model.safetensors")

    return do


def data(name: str, texts: Sequence[str], ground_truth: str | None = "1", first: int = 0) -> Break:
    return lambda world, _: write_rows(world / f"{name}.parquet", rows(texts, ground_truth, first), split="train")


def table(name: str, content: dict[str, list[Any]]) -> Break:
    return lambda world, _: pq.write_table(pa.table(content), world / f"{name}.parquet")


def patch(target: Any, name: str, value: Any) -> Break:
    return lambda _, monkeypatch: monkeypatch.setattr(target, name, value)


def version(package: str, found: str | None) -> Break:
    real = packages.installed
    return patch(packages, "installed", lambda name: found if name == package else real(name))


def resumed(*made_with: str, config: str | None = None) -> Break:
    """The run directory has a checkpoint of a run of this recipe with these changes."""

    def do(world: Path, _: pytest.MonkeyPatch) -> None:
        (world / "run/checkpoints/step_000004").mkdir(parents=True)
        written = dump_config(load_config(world / "recipe.yaml", made_with)) if config is None else config
        (world / "run/config.yaml").write_text(written)

    return do


def environment(**variables: str) -> Break:
    def do(_: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return do


def link(path: str, target: str) -> Break:
    def do(world: Path, _: pytest.MonkeyPatch) -> None:
        (world / target).mkdir(parents=True, exist_ok=True)
        (world / path).parent.mkdir(parents=True, exist_ok=True)
        (world / path).symlink_to(world / target)

    return do


def header(content: bytes) -> bytes:
    return struct.pack("<Q", len(content)) + content


CASES: dict[str, Case] = {
    # keys and types
    "unknown key": key("actor.lrr=1", says="recipe.yaml: unknown key 'actor.lrr'; did you mean 'actor.lr'"),
    "unknown group": key("rolout.n=4", says="unknown key 'rolout'; did you mean 'rollout'"),
    "unknown key of no likeness": key("actor.qqq=1", says="unknown key 'actor.qqq'; allowed: tensor_parallel, "),
    "text for a number": key("steps=many", says="steps: .*valid integer.*found 'many'"),
    "fraction for a count": key("rollout.n=2.5", says="rollout.n: .*found 2.5"),
    "out of range": key("rollout.n=1", says="rollout.n: .*greater than or equal to 2, found 1"),
    "negative rate": key("actor.lr=-1e-5", says="actor.lr: .*greater than 0, found -1e-05"),
    "infinite": key("actor.lr=.inf", says="actor.lr: inf is no finite number"),
    "not a number": key("loss.clip_low=.nan", says="loss.clip_low: .*found nan"),
    "no such method": key("method=grpo", says="method: .*'co_rewarding_i'.*found 'grpo'"),
    "no such dtype": key("model.dtype=float16", says="model.dtype: .*'float32' or 'bfloat16'.*found 'float16'"),
    "a value for a group": key("actor=3", says="actor: .*found 3"),
    "no override": key("steps", says="override 'steps': expected key=value"),
    "into a value": key("steps.x=1", says="override 'steps.x=1': steps is a value"),
    "bad YAML in an override": key("steps=[", says="override 'steps=\\[': not valid YAML"),
    "bad YAML": broken(text("recipe.yaml", "a: ["), says="recipe.yaml: not valid YAML"),
    "no text": broken(text("recipe.yaml", b"\xff\xfe\x00"), says="recipe.yaml: not UTF-8 text, line 1"),
    "a list": broken(text("recipe.yaml", "- 1"), says="recipe.yaml: expected keys and values, found list"),
    "an empty recipe": broken(text("recipe.yaml", "steps: 3"), says="key 'model' is missing"),
    "no recipe": broken(remove("recipe.yaml"), says="config file recipe.yaml does not exist"),
    # layouts and combinations
    "heads": key("actor.tensor_parallel=3", says=r"actor.tensor_parallel: 3 does not divide .*\(4\); allowed: 1, 2, 4"),
    "layers": key("actor.pipeline_parallel=3", says="4 layers do not divide over 3 stages; actor.first_stage_layers 1"),
    "chunks without stages": key("actor.virtual_pipeline=2", says="actor.virtual_pipeline: 2 needs actor.pipeline_par"),
    "chunks": key("actor.pipeline_parallel=2", "actor.virtual_pipeline=4", says="4 does not divide"),
    "experts of a dense model": key("actor.expert_parallel=2", says="actor.expert_parallel: 2 for a model without"),
    "experts": key("model.hf_path=experts", "actor.expert_parallel=3", says=r"3 does not divide the model's experts"),
    "experts without sequence parallel": key(
        "model.hf_path=experts", "actor.tensor_parallel=2", says="actor.sequence_parallel: Megatron needs true"
    ),
    "sequence parallel alone": key("actor.sequence_parallel=true", says="actor.sequence_parallel: true needs actor"),
    "engine heads": key("rollout.tensor_parallel=3", says="rollout.tensor_parallel: 3 does not divide"),
    "engine vocabulary": broken(
        lambda world, _: write_model(world / "model", {"num_attention_heads": 128, "num_key_value_heads": 128}),
        "rollout.tensor_parallel=128",
        says="rollout.tensor_parallel: 128 does not divide the model's vocabulary as vLLM pads it",
    ),
    "ranks without work": key(
        "data.batch_size=1",
        "rollout.n=2",
        "actor.data_parallel=8",
        says="actor.data_parallel: 8 ranks for a batch of 4",
    ),
    "updates": key("loss.updates_per_batch=3", says="loss.updates_per_batch: 3 does not divide the batch's groups"),
    "positions": key("rollout.max_response_tokens=4000", says="4512 tokens, the model has positions for 4096"),
    "micro-batch": key("actor.tokens_per_microbatch=1000", says="1000 does not hold one sequence .* = 1536"),
    "no teacher": key("loss.kl_reference=teacher", says="loss.kl_reference: teacher, but method co_rewarding_i keeps"),
    "decay": key("teacher.decay_start=0.99999", says="teacher.decay_start: 0.99999 is above teacher.decay_end"),
    "least rate": key("actor.min_lr=1", says="actor.min_lr: 1.0 is above actor.lr"),
    "clip": key("loss.clip_high=0.1", says="loss.clip_high: 0.1 is below loss.clip_low"),
    "gap below bf16": key(
        "sync.max_logprob_gap=1e-5", says="sync.max_logprob_gap: 1e-05 .*bfloat16; allowed: 0.001 or"
    ),
    "no rephrasings": key(
        "data.rephrased_files=[]", says="data.rephrased_files: method co_rewarding_i needs rephrased"
    ),
    "Transformer Engine without a GPU": key("actor.backend=te", says="actor.backend: te .*needs a GPU, found none"),
    # the model's files
    "no model": key("model.hf_path=nowhere", says="model.hf_path: no config.json in nowhere"),
    "config.json is no JSON": broken(cut("model/config.json", 9), says="model/config.json: not valid JSON"),
    "config.json is a list": broken(
        text("model/config.json", "[]"), says="config.json: expected an object, found list"
    ),
    "family": broken(
        edit("model/config.json", model_type="gpt2"), says="model_type is 'gpt2'; supported: qwen2, qwen3"
    ),
    "missing size": broken(
        edit("model/config.json", hidden_size=None), says="config.json: key 'hidden_size' is missing"
    ),
    "size as text": broken(
        edit("model/config.json", hidden_size="64"), says="hidden_size is '64'; allowed: a whole num"
    ),
    "no heads": broken(
        edit("model/config.json", num_attention_heads=0), says="num_attention_heads is 0; allowed: a who"
    ),
    "activation": broken(edit("model/config.json", hidden_act="gelu"), says="hidden_act is 'gelu'; supported: silu"),
    "sliding window": broken(edit("model/config.json", use_sliding_window=True), says="use_sliding_window is true"),
    "rope": broken(edit("model/config.json", rope_scaling={"rope_type": "yarn"}), says="rope scaling of type 'yarn'"),
    "rope without numbers": broken(
        edit("model/config.json", rope_scaling={"rope_type": "llama3"}),
        says="model/config.json: key 'rope_scaling.factor' is missing",
    ),
    "head size": broken(
        lambda world, _: write_model(world / "model", {"head_dim": 24}),
        says="model.hf_path: head_dim is 24; without a GPU .* 32, 64, 80",
    ),
    "code in the model": broken(
        edit("model/config.json", auto_map={"AutoModelForCausalLM": "evil.Model"}), says="auto_map, .*never run"
    ),
    "code in the tokenizer": broken(
        edit("model/tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.T", None]}), says="auto_map, .*never run"
    ),
    "no weights": broken(remove("model/model.safetensors"), says=r"model.hf_path: no \*.safetensors files in model"),
    "truncated weights": broken(cut("model/model.safetensors", 7), says="model.safetensors: truncated or damaged"),
    "weights too long": broken(cut("model/model.safetensors", -7), says="model.safetensors: truncated or damaged"),
    "weights are text": broken(text("model/model.safetensors", "version https://git-lfs"), says="truncated or damaged"),
    "weights' header": broken(text("model/model.safetensors", header(b"{]")), says="truncated or damaged"),
    "integers": broken(
        tensors(lambda t: t.update({"model.norm.weight": np.zeros(64, np.int8)})), says="has dtype I8; supported: F64"
    ),
    "tensor missing": broken(
        tensors(lambda t: t.pop("model.norm.weight")), says="1 tensors are missing in model, first 'model.norm.weight'"
    ),
    "tensor left over": broken(
        tensors(lambda t: t.update({"model.extra": np.zeros(3, np.float16)})),
        says="no place in a qwen3 model, first 'mo",
    ),
    "other shape": broken(
        edit("model/config.json", vocab_size=384), says=r"has shape \(320, 64\), .* asks for \(384, 64"
    ),
    "shard missing": broken(
        lambda world, _: os.rename(world / "model/model.safetensors", world / "model/model-00001-of-00002.safetensors"),
        says="model-00002-of-00002.safetensors is missing",
    ),
    "index names no file": broken(
        text("model/model.safetensors.index.json", '{"weight_map": {"a": "b.safetensors"}}'),
        says="b.safetensors is miss",
    ),
    "a file beside the index": broken(
        together(
            text("model/model.safetensors.index.json", '{"weight_map": {"a": "model.safetensors"}}'),
            text("model/stray.safetensors", ""),
        ),
        says="stray.safetensors lies beside the files that model.safetensors.index.json names",
    ),
    "index leads outside": broken(
        text("model/model.safetensors.index.json", '{"weight_map": {"a": "../x.safetensors"}}'),
        says="outside of the mod",
    ),
    "index is damaged": broken(text("model/model.safetensors.index.json", "{}"), says="no index of safetensors files"),
    "no Megatron checkpoint": key(
        "model.megatron_path=nowhere", says="model.megatron_path: nowhere is no Megatron dist"
    ),
    "Megatron checkpoint of another format": broken(
        text("mcore/metadata.json", '{"sharded_backend": "zarr"}'), "model.megatron_path=mcore", says="of format 'zarr'"
    ),
    "Megatron checkpoint with holes": broken(
        text("mcore/metadata.json", '{"sharded_backend": "torch_dist"}'),
        "model.megatron_path=mcore",
        says="mcore/.metadata is missing",
    ),
    # the tokenizer
    "no tokenizer": broken(remove("model/tokenizer.json"), says="model.hf_path: no tokenizer in model"),
    "damaged tokenizer": broken(cut("model/tokenizer.json", 20), says="model/tokenizer.json: not a tokenizer"),
    "damaged tokenizer config": broken(
        text("model/tokenizer_config.json", "{"), says="tokenizer_config.json: not valid"
    ),
    "tokenizer larger than the embedding": broken(
        lambda world, _: write_model(world / "small", {"vocab_size": 256}),
        "model.hf_path=small",
        says=r"token ids up to 258, the model's embedding 256 rows \(vocab_size",
    ),
    "chat template": broken(
        edit("model/tokenizer_config.json", chat_template="{% for m in %}"), says="chat template is damaged"
    ),
    "chat template without a default": broken(
        edit("model/tokenizer_config.json", chat_template=[{"name": "tools", "template": "x"}]),
        says="no entry named def",
    ),
    "template refuses system messages": broken(
        edit(
            "model/tokenizer_config.json",
            chat_template="{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}x",
        ),
        says=r"chat template refused a conversation \(no system role\)",
    ),
    "end of sequence is no token": broken(
        edit("model/tokenizer_config.json", eos_token="<stop>"),
        says="eos_token '<stop>' .* is no token of tokenizer.json",
    ),
    "no end of sequence": broken(
        together(edit("model/tokenizer_config.json", eos_token=None), edit("model/config.json", eos_token_id=None)),
        says="no end-of-sequence token in model",
    ),
    # the questions
    "no data file": key("data.train_files=[none.parquet]", says="data.train_files: none.parquet does not exist"),
    "no validation file": key("data.val_files=[none.parquet]", says="data.val_files: none.parquet does not exist"),
    "no data": key("data.train_files=[]", says="data.train_files: .*at least 1"),
    "a file twice": key("data.val_files=[val.parquet,val.parquet]", says="data.val_files: val.parquet is given twice"),
    "originals as rephrasings": key(
        "data.rephrased_files=[train.parquet]", says="train.parquet is in data.train_files too"
    ),
    "damaged data": broken(cut("train.parquet", 40), says="train.parquet: found a file that does not read as parquet"),
    "text for parquet": broken(
        text("val.parquet", "a,b"), says="data.val_files: val.parquet: found a file that does not"
    ),
    "no rows": broken(data("train", []), says="train.parquet: found no rows"),
    "column missing": broken(table("train", {"question": ["1+1"]}), says="found no column prompt, only question"),
    "prompt as text": broken(
        table("train", {"prompt": ["1+1"], "data_source": ["s"], "extra_info": [{"index": 1}]}),
        says="column prompt: found type string; allowed: a list of structs",
    ),
    "blank question": broken(data("train", [" "] * QUESTIONS), says="row 0, column prompt: found a blank user message"),
    "too few pairs": broken(data("rephrased", ["a"] * 3), says=r"there is no rephrasing \(5 such rows in all\)"),
    "no pairs": broken(
        data("rephrased", ["a"] * QUESTIONS, first=50), says=r"there is no original \(8 such rows in all\)"
    ),
    "prompt over length": broken(
        data("train", ["x" * 900] * QUESTIONS),
        says="data.max_prompt_tokens: found 512, but 8 of 8 problems .* longest of [0-9]+ tokens .* limit of at least",
    ),
    "all dropped": broken(
        data("val", ["x" * 900] * QUESTIONS), "data.over_length=drop", says="8 of 8 problems have a longer prompt"
    ),
    "batch larger than the data": key("data.batch_size=16", says="data.batch_size: found 16, but only 8 problems"),
    "no answers to learn from": broken(
        data("train", ["a"] * QUESTIONS, ground_truth=None),
        "method=ground_truth",
        says="needs reward_model.ground_truth, and 8 of",
    ),
    "no answers to validate": broken(
        data("val", ["a"], ground_truth=None), says="data.val_files: 1 questions have no reward_mod"
    ),
    "the best of a set that is not validated on": broken(
        data("other", ["a"]),
        "data.val_files=[val.parquet,other.parquet]",
        "checkpoint.best_metric=val/gsm8k/avg@8",
        says="checkpoint.best_metric: found 'val/gsm8k/avg@8', .* called gsm8k; allowed: set/val, set/other",
    ),
    "the best of one of one set": key(
        "checkpoint.best_metric=val/set/avg@8",
        says="checkpoint.best_metric: found 'val/set/avg@8', but one validation set has no name; allowed: val/avg@8",
    ),
    # the machine
    "GPUs": broken(
        patch(machine, "visible_gpus", lambda: 2),
        "actor.tensor_parallel=2",
        says="2 actor ranks and 1 engine ranks need 3 GPUs, found 2 on this machine",
    ),
    "memory": key(
        "rollout.kv_cache_gib=4096", says=r"memory: .*\(key-value caches \(rollout.kv_cache_gib\): 4096.0 GiB"
    ),
    "memory of the model": broken(
        patch(machine, "available_memory", lambda: 1 << 20),
        says="memory: the run needs .* if answers are as long .* are available",
    ),
    "shared memory": broken(
        patch(machine, "free_bytes", lambda folder: 1000), says="sync.bucket_mib: 256 takes .* in /dev/shm .* are free"
    ),
    "disk": broken(
        patch(machine, "free_bytes", lambda folder: 1000),
        says="run_dir: checkpoints and the final model take .* at least",
    ),
    "old package": broken(
        version("transformers", "4.50.0"), says=r"package transformers: found 4.50.0; allowed: <6,>=5"
    ),
    "other torch": broken(version("torch", "2.9.1"), says="package torch: found 2.9.1; allowed: ==2.13.0"),
    "no package": broken(
        version("megatron-core", None), says="package megatron-core: not installed; allowed: ==0.16.1"
    ),
    "no wandb": broken(
        without("wandb"),
        "telemetry.wandb_project=p",
        says="telemetry.wandb_project is 'p', but the package wandb is not inst",
    ),
    "no mlflow": broken(
        without("mlflow"),
        "telemetry.mlflow_experiment=p",
        says="telemetry.mlflow_experiment is 'p', but the package mlflow is not inst",
    ),
    "no mlflow server": key(
        "telemetry.mlflow_experiment=p", says="telemetry.mlflow_experiment is 'p', but no server is named"
    ),
    # the run directory
    "run_dir is a file": key("run_dir=recipe.yaml", says="run_dir: recipe.yaml is a file"),
    "run_dir below a file": key("run_dir=recipe.yaml/run", says="recipe.yaml/run cannot be made, .* is a file"),
    "run_dir not writable": key("run_dir=/proc/run", says=r"run_dir: /proc/run cannot be written \(/proc: "),
    "run_dir is the model": key("run_dir=model", says="run_dir: model would overwrite model.hf_path model"),
    "run_dir leads outside": broken(
        link("run/checkpoints", "elsewhere"),
        says="run/checkpoints is a link to .*elsewhere, outside of the run directory",
    ),
    "the log of events leads outside": broken(
        link("run/events.log", "elsewhere"),
        says="run/events.log is a link to .*elsewhere, outside of the run directory",
    ),
    "another method": broken(
        resumed("method=majority_voting"),
        says="method: 'co_rewarding_i', but the run in run was made with 'majority_vot",
    ),
    "a mixture in place of a method": broken(
        resumed(),
        "method={co_rewarding_i: 1, empo: 0.5}",
        says="method: '1.0 x co_rewarding_i . 0.5 x empo', but the run in run was made with 'co_rewarding_i'",
    ),
    "a mixture in another order": broken(
        resumed("method={empo: 0.5, co_rewarding_i: 1}"),
        "method={co_rewarding_i: 1, empo: 0.5}",
        says="method: '1.0 x co_rewarding_i . 0.5 x empo', but the run in run was made with '0.5 x empo . 1.0 x",
    ),
    "a method that reads labels in secret": key(
        "method=tests.rewards.own_methods:Peeks",
        says="method: tests.rewards.own_methods:Peeks: the method asks for the data set's answer, but does not decl",
    ),
    "a method that is nowhere": key(
        "method=tests.nowhere:Method", says="method: tests.nowhere:Method: there is no module tests.nowhere"
    ),
    "a mixture of advantages": key(
        "method={restrain: 1, empo: 1}", says="method: restrain gives advantages of its own, so it cannot be mixed"
    ),
    "another model": broken(
        resumed("model.hf_path=experts"), says="model.hf_path: 'model', but the run in run was made with 'experts'"
    ),
    "another rate": broken(resumed(), "actor.lr=1e-5", says="actor.lr: 1e-05, but the run in run was made with 3e-06"),
    "another value of a renamed key": broken(
        resumed(config="rewards: {answer_forms: [plain]}"),
        says=r"rewards.answer_formats: \['boxed'\], but the run in run was made with \['plain'\]",
    ),
    "other data": broken(resumed(), "data.train_files=[val.parquet]", says="data.train_files: .*was made with"),
    "other questions left out": broken(
        resumed(), "data.unpaired=drop", says="data.unpaired: 'drop', but the run in run was made with 'error'"
    ),
    "questions without ground truth left out": broken(
        resumed(), "data.missing_gold=drop", says="data.missing_gold: 'drop', but the run in run was made with 'error'"
    ),
    "no resume": broken(resumed(), "checkpoint.resume=never", says="holds checkpoints and checkpoint.resume is never"),
    "damaged config of the run": broken(resumed(config="a: ["), says="run/config.yaml is damaged"),
    # what the file system and the environment say
    "a name that is too long": key(
        f"run_dir=runs/{'r' * 300}", says="run_dir: File name too long: a name of 300 bytes"
    ),
    "a path that is too long": key(
        f"run_dir={'/'.join(['r' * 200] * 25)}", says="File name too long; choose a shorter"
    ),
    "a data file with a name that is too long": key(
        f"data.train_files=[{'d' * 300}.parquet]", says="d+.parquet: File name too long; choose a shorter name"
    ),
    "a model with a name that is too long": key(
        f"model.hf_path={'m' * 300}", says="model.hf_path: .*File name too long"
    ),
    "a folder in the place of the metrics": broken(
        text("run/metrics.jsonl/file", ""), says="run/metrics.jsonl is no file, and the run needs one of this name"
    ),
    "a file in the place of the rollouts": broken(
        text("run/rollouts", ""), says="run/rollouts is no directory, and the run needs one of this name; move it away"
    ),
    "damaged metrics": broken(
        together(resumed(), text("run/metrics.jsonl", '{"step": 1, "step_time_s": 1}\n{"step": \n')),
        says="run_dir: run/metrics.jsonl, line 2: not JSON .*; restore the file, or remove the line",
    ),
    "damaged labels": broken(
        together(resumed(), text("run/labels.jsonl", '{"step": 1}\n')),
        says="run_dir: run/labels.jsonl, line 1: not the labels of a step .*; remove the file: checkpoints have copies",
    ),
    "replaced data": broken(
        together(resumed(), text("run/checkpoints/step_000004/inputs.json", '{"data.train_files[0]": "another"}')),
        says="data.train_files.0.: train.parquet, not the file that run/checkpoints/step_000004 was made from; restore",
    ),
    "a TMPDIR that is too long": broken(
        together(environment(TMPDIR="/" + "t" * 60), patch(sockets, "FALLBACK", Path("/nowhere"))),
        says="TMPDIR: /t+ has 61 bytes, and /nowhere cannot be written instead; allowed: up to 39 for Ray's sockets",
    ),
    "a garbage RAY_ADDRESS": broken(
        environment(RAY_ADDRESS="\x1b[2J over there"),
        says=r"RAY_ADDRESS: found '\\x1b\[2J over there'; allowed: HOST:PORT",
    ),
    "a RAY_ADDRESS without a port": broken(
        environment(RAY_ADDRESS="head-node"), says="RAY_ADDRESS: found 'head-node'; allowed: HOST:PORT of the head node"
    ),
    "a dead RAY_ADDRESS": broken(
        environment(RAY_ADDRESS="127.0.0.1:1"),
        says="RAY_ADDRESS: nothing answers at 127.0.0.1:1 within 5 s .Connection refused.; start the cluster",
    ),
    "a RAY_ADDRESS that nobody knows": broken(
        environment(RAY_ADDRESS="head.invalid:6379"), says="RAY_ADDRESS: nothing answers at head.invalid:6379"
    ),
}
