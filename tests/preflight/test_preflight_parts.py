"""What the checks before a run rest on: bounds, tables and the light tokenizer agree with what they stand for."""

import importlib.util
import re
from pathlib import Path

import pytest

from megatron_coreward.config.architecture import parse_architecture
from megatron_coreward.config.load import parse_config
from megatron_coreward.config.schema import RunConfig
from megatron_coreward.data.parquet import Message
from megatron_coreward.data.prompts import build_prompts
from megatron_coreward.demo.tokenizer import byte_level_tokenizer, word_level_tokenizer
from megatron_coreward.planner.models import published_architecture
from megatron_coreward.preflight import machine, memory
from megatron_coreward.preflight.model import CPU_HEAD_SIZES
from megatron_coreward.preflight.packages import requirements
from megatron_coreward.preflight.prompts import ShortPrompts
from megatron_coreward.preflight.resume import FIXED
from megatron_coreward.preflight.tokenizer import FileTokenizer

CONVERSATIONS: list[tuple[Message, ...]] = [
    (Message(role="user", content="What is 2 + 3?"),),
    (Message(role="system", content="Be brief."), Message(role="user", content="Größe? 3½ € 🙂\n\\boxed{}")),
    (
        Message(role="user", content="ten plus ten"),
        Message(role="assistant", content="20"),
        Message(role="user", content="x" * 3000),
    ),
]
SHAPE = {
    "model_type": "qwen3",
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 96,
    "vocab_size": 256,
    "max_position_embeddings": 4096,
}


def config(*overrides: str) -> RunConfig:
    tree = {
        "run_dir": "run",
        "steps": 10,
        "method": "majority_voting",
        "model": {"hf_path": "model"},
        "data": {"train_files": ["a.parquet"]},
    }
    return parse_config(tree, overrides)


@pytest.mark.parametrize("make", [byte_level_tokenizer, word_level_tokenizer])
def test_the_light_tokenizer_gives_the_prompts_of_transformers(tmp_path: Path, make: object) -> None:
    tokenizer = make()  # type: ignore[operator]
    tokenizer.save_pretrained(tmp_path)
    light = FileTokenizer(tmp_path)
    for ours, theirs in zip(build_prompts(light, CONVERSATIONS), build_prompts(tokenizer, CONVERSATIONS), strict=True):
        assert ours.text == theirs.text
        assert ours.token_ids.tolist() == theirs.token_ids.tolist()
    assert light.num_ids == len(tokenizer)


@pytest.mark.parametrize("limit", [20, 60, 100, 2000, 5000])
def test_no_prompt_over_the_limit_is_taken_for_a_short_one(tmp_path: Path, limit: int) -> None:
    byte_level_tokenizer().save_pretrained(tmp_path)
    tokenizer = FileTokenizer(tmp_path)
    many = [(Message(role="user", content="y" * length),) for length in range(1, 200, 7)] + CONVERSATIONS
    exact = [len(prompt.token_ids) for prompt in build_prompts(tokenizer, many)]
    quick = [len(prompt.token_ids) for prompt in build_prompts(ShortPrompts(tokenizer, limit), many)]
    assert [n > limit for n in quick] == [n > limit for n in exact]
    assert all(q in (0, n) for q, n in zip(quick, exact, strict=True))


def test_the_head_sizes_are_those_of_the_engine() -> None:
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("vLLM is not installed")
    source = Path(spec.submodule_search_locations[0]) / "v1/attention/backends/cpu_attn.py"
    found = re.search(r"def get_supported_head_sizes\(cls\).*?return \[([\d, ]+)\]", source.read_text(), re.DOTALL)
    assert found is not None
    assert tuple(int(size) for size in found[1].split(",")) == CPU_HEAD_SIZES


def test_every_fixed_key_exists() -> None:
    for key in FIXED:
        model: object = config()
        for name in key.split("."):
            assert name in type(model).model_fields, key  # type: ignore[attr-defined]
            model = getattr(model, name)


@pytest.mark.parametrize(
    ("visible", "expected"),
    [(None, 4), ("0,1", 2), ("", 0), ("-1", 0), ("0,-1,2", 1), ("MIG-a,MIG-b,MIG-c", 3), (" 2 ", 1)],
)
def test_visible_devices_are_counted_as_cuda_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str | None, expected: int
) -> None:
    for name in ("nvidia0", "nvidia1", "nvidia2", "nvidia3", "nvidiactl", "nvidia-uvm", "nvidia-caps"):
        (tmp_path / name).touch()
    monkeypatch.setattr(machine, "installed", lambda name: "2.13.0")
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert machine.visible_gpus(tmp_path) == expected
    assert machine.visible_gpus(tmp_path / "none") == 0
    monkeypatch.setattr(machine, "installed", lambda name: "2.13.0+cpu")
    assert machine.visible_gpus(tmp_path) == 0


def test_bytes_are_counted_by_hand() -> None:
    arch = parse_architecture(SHAPE, "test")
    attention = 64 * 128 * 2 + 64 * 64 * 2 + 2 * 32  # q, o; k, v; the norms of q and k
    total = 2 * (attention + 3 * 64 * 96 + 2 * 64) + 2 * 256 * 64 + 64
    assert memory.parameters(arch) == (total, 0)
    caches = {"key-value caches (rollout.kv_cache_gib)": 2**30}
    counted = memory.host_memory(config("loss.kl_coef=0", "actor.data_parallel=2"), arch)
    assert counted.pop("micro-batches (actor.tokens_per_microbatch)") > 2 * 6 * 2**20
    assert counted == caches | {
        "weights and gradients": 2 * total * (2 + 4),
        "optimizer": total * 12,
        "engines": total * 2,
    }
    with_teacher = memory.host_memory(config("method=co_rewarding_ii", "model.dtype=float32"), arch)
    assert (with_teacher["optimizer"], with_teacher["teacher"]) == (total * 8, total * (8 + 4))
    # One checkpoint at the end: weights, main parameters and moments; and the final model.
    assert machine.least_disk(config(), arch) == total * (2 + 12) + total * 2
    assert machine.least_disk(config("checkpoint.every=1"), arch) == 4 * total * (2 + 12) + total * 2


def test_experts_are_shared_by_fewer_ranks() -> None:
    experts = {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    arch = parse_architecture(SHAPE | experts, "test")
    dense, expert = memory.parameters(arch)
    assert expert == 2 * 4 * 3 * 64 * 32
    spread = memory.host_memory(config("actor.data_parallel=4", "actor.expert_parallel=2"), arch)
    assert spread["weights and gradients"] == (4 * dense + 2 * expert) * (2 + 4)


def test_the_key_that_makes_a_run_fit_is_named() -> None:
    """Qwen3-8B on one GPU of 80 GB for the actor does not fit; a layout over four of them does, with smaller packs."""
    arch = published_architecture("Qwen3-8B-Base")
    cramped = config("actor.data_parallel=4", "actor.tensor_parallel=2", "actor.sequence_parallel=true")
    free = 79 * 2**30
    (problem,) = memory.gpu_problems(cramped, arch, free, free)
    assert problem.startswith("memory: actor, stage 0: needs")
    remedy = re.search(r"; (actor\.\S+=\S+) makes it fit$", problem)
    assert remedy is not None, problem
    changed = config("actor.data_parallel=4", "actor.tensor_parallel=2", "actor.sequence_parallel=true", remedy[1])
    assert list(memory.gpu_problems(changed, arch, free, free)) == []
    (hopeless,) = memory.gpu_problems(config("rollout.gpu_memory_utilization=0.9"), arch, free, free)
    assert "choose a smaller model, more GPUs" in hopeless


@pytest.mark.parametrize("placement", ["disaggregated", "colocated"])
def test_engines_claim_their_share_of_the_whole_gpu_not_of_what_is_free(placement: str) -> None:
    """Somebody holds 20 of 80 GiB: 0.7 of the GPU is 56 GiB and fits what is free, 0.8 is 64 GiB and does not."""
    arch, total, free = parse_architecture(SHAPE, "test"), 80 * 2**30, 60 * 2**30
    placed = f"rollout.placement={placement}"
    assert list(memory.gpu_problems(config(placed, "rollout.gpu_memory_utilization=0.7"), arch, free, total)) == []
    claimed = config(placed, "rollout.gpu_memory_utilization=0.8")
    (problem,) = memory.gpu_problems(claimed, arch, free, total)
    assert re.search(r"64\.0 GiB.*60\.0 GiB.*; rollout\.gpu_memory_utilization=0\.75? makes it fit$", problem)
    assert list(memory.gpu_problems(claimed, arch, total, total)) == []


def test_one_sequence_is_the_smallest_micro_batch_that_is_proposed() -> None:
    longest = config().data.max_prompt_tokens + config().rollout.max_response_tokens
    changes = list(memory._changes(config(f"actor.tokens_per_microbatch={3 * longest}")))
    tokens = [
        change["actor.tokens_per_microbatch"] for change in changes if set(change) == {"actor.tokens_per_microbatch"}
    ]
    assert tokens == [3 * longest // 2, longest]


def test_free_and_whole_memory_are_those_of_the_fullest_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_ask_driver", lambda query: ["70000, 81559", "[N/A], 81559", "20000, 81559", ""])
    assert machine.gpu_memory() == (20_000 * 2**20, 81_559 * 2**20)
    monkeypatch.setattr(machine, "_ask_driver", lambda query: [])
    assert machine.gpu_memory() is None


def test_a_host_that_is_too_small_is_reported_the_packs_that_fit() -> None:
    arch = parse_architecture(SHAPE | {"vocab_size": 151_936}, "test")
    needed = sum(memory.host_memory(config(), arch).values())
    assert list(memory.host_problems(config(), arch, needed)) == []
    (problem,) = memory.host_problems(config(), arch, needed - 1)
    assert re.search(r"memory: the run needs .* if answers .* actor\.tokens_per_microbatch=8192 makes it fit$", problem)


def test_requirements_are_those_of_the_project() -> None:
    names = {wanted.name for wanted in requirements()}
    assert {"numpy", "pyarrow", "torch", "ray", "megatron-core", "transformers"} <= names
