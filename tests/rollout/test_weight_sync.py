"""After an update of its weights, an engine is the model that was sent: transformers, token for token."""

from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_coreward.errors import RunError
from megatron_coreward.rollout.requests import SamplingRequest
from megatron_coreward.weights.layouts import ActorLayout, EngineLayout
from megatron_coreward.weights.spec import Transport
from tests.rollout import vllm_reload
from tests.rollout.conftest import KINDS, Engines, tensor_parallel
from tests.rollout.engine_process import EngineProcess, sync

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


CASES: dict[str, tuple[str, Transport, ActorLayout]] = {
    "untied": ("untied", "shared_memory", ActorLayout(tensor_parallel=2)),
    "tied": ("tied", "shared_memory", ActorLayout(data_parallel=2)),
    "tied, TP 2": ("tied, TP 2", "shared_memory", ActorLayout(tensor_parallel=2)),
    "tied, TP 2, over gloo": ("tied, TP 2", "gloo", ActorLayout(pipeline_parallel=2)),
    "experts": ("experts", "shared_memory", ActorLayout(tensor_parallel=2)),
    "experts, TP 2, over gloo": (
        "experts, TP 2",
        "gloo",
        ActorLayout(tensor_parallel=2, data_parallel=2, expert_parallel=2),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_each_of_two_syncs_makes_the_engine_the_model_that_was_sent(
    case: str, engine_of: Engines, checkpoint: Callable[[str, int], Path]
) -> None:
    kind, transport, actor = CASES[case]
    engine = engine_of(kind)
    answers = []
    for version in (1, 2):
        path = checkpoint(kind, version)
        sync(engine, path, version, transport=transport, actor=actor, engines=EngineLayout(1, tensor_parallel(kind)))
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


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_sync_leaves_bit_for_bit_what_vllms_own_reload_does(
    kind: str, engine_of: Engines, checkpoint: Callable[[str, int], Path]
) -> None:
    engine, path = engine_of(kind), checkpoint(kind, 5)
    found = []
    for number in range(2):  # the first sync records the places, the second one knows them
        engine.in_workers(vllm_reload.spoil)
        sync(engine, checkpoint(kind, 4 + number), 4 + number, engines=EngineLayout(1, tensor_parallel(kind)))
    found.append((engine.in_workers(vllm_reload.parameters), [engine.score(prompt) for prompt in PROMPTS]))
    engine.in_workers(vllm_reload.spoil)
    engine.in_workers(vllm_reload.reload, path)
    found.append((engine.in_workers(vllm_reload.parameters), [engine.score(prompt) for prompt in PROMPTS]))
    (ours, our_scores), (theirs, their_scores) = found
    assert ours == theirs
    for one, other in zip(our_scores, their_scores, strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_allclose(our_scores[0], logprobs(reference(path), PROMPTS[0]), atol=1e-4)


@pytest.mark.parametrize("kind", ["untied", "tied, TP 2", "experts"])
def test_a_sync_that_failed_half_way_leaves_an_engine_that_takes_the_next(
    kind: str, engine_of: Engines, checkpoint: Callable[[str, int], Path]
) -> None:
    """A tensor-parallel engine too: none of its workers raises within vLLM."""
    engine, path, engines = engine_of(kind), checkpoint(kind, 4), EngineLayout(1, tensor_parallel(kind))
    with pytest.raises(
        RunError, match="given up.*rank . of the actor.*'model.layers.1.post_attention_layernorm.weight'"
    ):
        sync(engine, checkpoint(kind, 3), 3, engines=engines, lacking="model.layers.1.post_attention_layernorm.weight")
    assert engine.version() is None
    with pytest.raises(RunError, match="no weights were synced"):
        engine.sample([greedy([5])], 3)
    sync(engine, path, 4, engines=engines)
    np.testing.assert_allclose(engine.score(PROMPTS[0]), logprobs(reference(path), PROMPTS[0]), atol=1e-4)


def test_weights_of_another_version_are_refused(engine_of: Engines, checkpoint: Callable[[str, int], Path]) -> None:
    engine = engine_of("tied")
    with pytest.raises(RunError, match="bucket 0 of version 3 .* expected bucket 0 of version 5"):
        sync(engine, checkpoint("tied", 3), 3, expected=5)
    assert engine.version() is None


def test_weights_of_another_model_are_refused_before_any_is_loaded(
    engine_of: Engines, checkpoint: Callable[[str, int], Path], tmp_path: Path
) -> None:
    """What vLLM's loaders take is compared with what the plan brings."""
    engine, path = engine_of("tied"), checkpoint("tied", 3)
    with pytest.raises(RunError, match=r"this vLLM takes \[\(\(0, 259\), \(0, 64\)\)\] of 'model.embed_tokens.weight'"):
        sync(engine, path, 3, engines=EngineLayout(1, 2))  # the plan of an engine with two workers
    sync(engine, path, 3)
    np.testing.assert_allclose(engine.score(PROMPTS[0]), logprobs(reference(path), PROMPTS[0]), atol=1e-4)


def test_the_engine_refuses_to_sample_with_other_weights_than_were_asked_for(
    synced: Callable[[str, int], Any],
) -> None:
    engine = synced("tied", 4)
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
    sync(engine, checkpoint("tied, TP 2", 1), 1, engines=EngineLayout(1, 2))
    workers = [
        p for p in psutil.Process(engine.pid).children(recursive=True) if "VLLM::Worker" in " ".join(p.cmdline())
    ]
    assert len(workers) == 2
    workers[1].kill()
    with pytest.raises(BrokenProcessPool):
        engine.sample([greedy(p) for p in PROMPTS], 1)
    assert psutil.wait_procs(workers, timeout=60)[1] == []
