"""After an update of its weights, an engine is the model that was sent: transformers, token for token."""

import struct
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from megatron_coreward.weights.segment import open_segment
from megatron_coreward.weights.send import HeldBlock
from transformers import AutoModelForCausalLM

from megatron_coreward.errors import RunError
from megatron_coreward.rollout.engine import SamplingRequest
from megatron_coreward.weights.buckets import SegmentLayout, TensorMeta
from tests.rollout.conftest import KINDS, Engines
from tests.rollout.engine_process import EngineProcess, send, two_ranks

pytestmark = [pytest.mark.engine, pytest.mark.timeout(400)]

NUM_NEW = 24
# Longer than a block of the key-value cache (128 tokens on CPU), so that a second request would find it cached.
PROMPTS = [np.random.default_rng(i).integers(3, 250, 140 + 7 * i).tolist() for i in range(3)]


def greedy(prompt: list[int]) -> SamplingRequest:
    return SamplingRequest(prompt, n=1, seed=0, temperature=0.0, top_p=1.0, max_tokens=NUM_NEW)


def reference(checkpoint: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()


@torch.no_grad()
def logprobs(model: Any, tokens: list[int]) -> np.ndarray:
    """[P - 1] of tokens 2 to P."""
    rows = model(torch.tensor([tokens])).logits[0, :-1].log_softmax(-1)
    return rows.gather(-1, torch.tensor(tokens[1:])[:, None])[:, 0].numpy()


def continuation(model: Any, prompt: list[int]) -> list[int]:
    tokens = model.generate(torch.tensor([prompt]), max_new_tokens=NUM_NEW, do_sample=False)
    return tokens[0, len(prompt) :].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_each_of_two_updates_makes_the_engine_the_model_that_was_sent(
    kind: str, engine_of: Engines, checkpoint: Callable[[str, int], Path]
) -> None:
    engine = engine_of(kind)
    answers = []
    for version in (1, 2):
        path = checkpoint(kind, version)
        assert send(engine, *two_ranks(path), version) > 10
        assert engine.version() == version
        model = reference(path)
        # The engine has the prompts' keys and values of the version before in its cache, were it not cleared.
        samples = [group[0] for group in engine.sample([greedy(p) for p in PROMPTS], version)]
        for prompt, sample in zip(PROMPTS, samples, strict=True):
            assert sample.token_ids.tolist() == continuation(model, prompt)
            expected = logprobs(model, prompt + sample.token_ids.tolist())
            np.testing.assert_allclose(sample.logprobs, expected[len(prompt) - 1 :], atol=1e-4)
            np.testing.assert_allclose(engine.score(prompt), expected[: len(prompt) - 1], atol=1e-4)
            assert sample.weight_version == version
        answers.append([sample.token_ids.tolist() for sample in samples])
    assert answers[0] != answers[1]


def test_a_tensor_that_is_missing_ends_the_update_and_the_next_full_one_is_right(
    engine_of: Engines, checkpoint: Callable[[str, int], Path]
) -> None:
    engine, path = engine_of("tied"), checkpoint("tied", 3)
    metas, ranks = two_ranks(path)
    for lacking in ("model.layers.1.mlp.up_proj.weight", "model.norm.weight"):
        layer = lacking.removesuffix(".weight").replace("up_proj", "gate_up_proj")
        with pytest.raises(RuntimeError, match=f"1 layers did not get all their weights, first '{layer}'"):
            send(engine, [meta for meta in metas if meta.name != lacking], ranks, 3)
        assert engine.version() is None
        with pytest.raises(RunError, match="no weights were published"):
            engine.sample([greedy([5])], 3)
    send(engine, metas, ranks, 3)
    np.testing.assert_allclose(engine.score(PROMPTS[0]), logprobs(reference(path), PROMPTS[0]), atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loaded", [0, 3])
def test_an_update_that_is_left_half_way_is_given_up_for_the_next(
    kind: str, loaded: int, engine_of: Engines, checkpoint: Callable[[str, int], Path]
) -> None:
    """As where another engine dies while all are being updated: nobody finishes what was begun."""
    engine, path = engine_of(kind), checkpoint(kind, 4)

    class Interrupted:
        def __getattr__(self, method: str) -> Callable[..., Any]:
            return getattr(engine, method)

        def load_bucket(self, bucket: int, *args: Any) -> None:
            if bucket == loaded:
                raise InterruptedError
            engine.load_bucket(bucket, *args)

    with pytest.raises(InterruptedError):
        send(Interrupted(), *two_ranks(checkpoint(kind, 3)), 3)
    assert engine.version() is None
    with pytest.raises(RunError, match="no weights were published"):
        engine.sample([greedy([5])], 3)
    send(engine, *two_ranks(path), 4)
    np.testing.assert_allclose(engine.score(PROMPTS[0]), logprobs(reference(path), PROMPTS[0]), atol=1e-4)


def test_a_tied_head_needs_the_embedding_and_only_the_embedding(
    engine_of: Engines, checkpoint: Callable[[str, int], Path]
) -> None:
    engine = engine_of("tied")
    metas, ranks = two_ranks(checkpoint("tied", 3))
    embedding = next(meta for meta in metas if meta.name == "model.embed_tokens.weight")
    with pytest.raises(RuntimeError, match="'model.embed_tokens.weight', to which 'lm_head.weight' is tied, is not"):
        send(engine, [meta for meta in metas if meta != embedding], ranks, 3)
    head = TensorMeta("lm_head.weight", embedding.shape, "float32")
    with pytest.raises(RuntimeError, match="'lm_head.weight' is tied to 'model.embed_tokens.weight' in this engine"):
        send(engine, [*metas, head], ranks, 3)


@pytest.mark.parametrize("name", ["model.layers.7.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.bias"])
def test_a_tensor_that_the_model_does_not_have_ends_the_update(
    name: str, engine_of: Engines, checkpoint: Callable[[str, int], Path]
) -> None:
    engine = engine_of("tied")
    metas, ranks = two_ranks(checkpoint("tied", 3))
    meta = TensorMeta(name, (128,), "float32")
    block = HeldBlock(name, (slice(None),), lambda: torch.zeros(128))
    with pytest.raises((RuntimeError, ValueError), match=r"no (module or )?parameter|no parameter for|layers.7"):
        send(engine, [*metas, meta], [[*ranks[0], block], ranks[1]], 3)
    assert engine.version() is None


def test_buckets_must_come_in_turn_and_all_of_them(engine_of: Engines, checkpoint: Callable[[str, int], Path]) -> None:
    engine = engine_of("tied")
    metas, ranks = two_ranks(checkpoint("tied", 3))

    class SkipsOne:
        def __getattr__(self, method: str) -> Callable[..., Any]:
            return getattr(engine, method)

        def load_bucket(self, bucket: int, *args: Any) -> None:
            if bucket != 2:
                engine.load_bucket(bucket, *args)

    with pytest.raises(RuntimeError, match="bucket 3 arrived, bucket 2 is next"):
        send(SkipsOne(), metas, ranks, 3)
    assert engine.version() is None


class Interferes:
    """An engine before whose third bucket something happens to the segment."""

    def __init__(self, engine: Any, damage: Callable[[SegmentLayout, Any], None]) -> None:
        self._engine, self._damage = engine, damage

    def __getattr__(self, method: str) -> Callable[..., Any]:
        return getattr(self._engine, method)

    def start_update(self, init_info: dict[str, Any]) -> None:
        self._layout = SegmentLayout.from_json(init_info)
        self._engine.start_update(init_info)

    def load_bucket(self, bucket: int, *args: Any) -> None:
        if bucket == 2:
            self._damage(self._layout, open_segment(self._layout, writable=True))
        self._engine.load_bucket(bucket, *args)


def flip_a_bit(layout: SegmentLayout, memory: Any) -> None:
    memory[layout.slot_start(2)] ^= 1


def take_a_mark_away(layout: SegmentLayout, memory: Any) -> None:
    """As if rank 1 had not written: the mark of bucket 0 is still in the slot."""
    struct.pack_into("<2q", memory, layout.mark_start(2, 1), 3, 0)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip_a_bit, r"block .* of '.*' is not what its sender wrote"),
        (take_a_mark_away, "rank 1 left bucket 0 of version 3 in the slot, expected bucket 2 of version 3"),
    ],
)
def test_a_bucket_that_is_damaged_or_incomplete_is_never_served(
    damage: Callable[..., None], message: str, engine_of: Engines, checkpoint: Callable[[str, int], Path]
) -> None:
    engine = engine_of("tied")
    with pytest.raises(RuntimeError, match=message):
        send(Interferes(engine, damage), *two_ranks(checkpoint("tied", 3)), 3)
    assert engine.version() is None
    with pytest.raises(RunError, match="no weights were published"):
        engine.sample([greedy([5])], 3)


def test_the_engine_refuses_to_sample_with_other_weights_than_were_asked_for(
    published: Callable[[str, int], Any],
) -> None:
    engine = published("tied", 4)
    with pytest.raises(RunError, match="holds weights of version 4, expected version 5"):
        engine.sample([greedy([5, 6])], 5)


def test_an_engine_ends_with_any_of_its_processes(
    start_engine: Callable[[str], EngineProcess],
    checkpoint: Callable[[str, int], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Or else nobody would know that it cannot answer any more."""
    monkeypatch.setenv("VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS", "3")  # how long the others are asked to leave
    engine = start_engine("tied, TP 2")
    send(engine, *two_ranks(checkpoint("tied, TP 2", 1)), 1)
    workers = [
        p for p in psutil.Process(engine.pid).children(recursive=True) if "VLLM::Worker" in " ".join(p.cmdline())
    ]
    assert len(workers) == 2
    workers[1].kill()
    with pytest.raises(BrokenProcessPool):
        engine.sample([greedy(p) for p in PROMPTS], 1)
    assert psutil.wait_procs(workers, timeout=60)[1] == []


def test_a_tensor_parallel_engine_says_what_was_wrong_with_an_update_and_is_not_used_again(
    engine_of: Engines, checkpoint: Callable[[str, int], Path]
) -> None:
    engine = engine_of("tied, TP 2")
    metas, ranks = two_ranks(checkpoint("tied, TP 2", 1))
    with pytest.raises(RuntimeError, match="layers did not get all their weights, first 'model.norm'"):
        send(engine, [meta for meta in metas if meta.name != "model.norm.weight"], ranks, 1)
    with pytest.raises(RunError, match="cannot be used any more since an update failed.*'model.norm'"):
        send(engine, metas, ranks, 1)
    assert engine.version() is None
    engine_of.end("tied, TP 2")
