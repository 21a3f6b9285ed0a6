"""Streamed groups on a real engine: the samples of a call, weights that change under them, votes that end early."""

import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_coreward.errors import RunError
from megatron_coreward.rollout.requests import Fed, GroupName, SamplingRequest, Taken
from megatron_coreward.types import Completion
from tests.rollout.conftest import Engines
from tests.rollout.engine_process import EngineProcess, sync

pytestmark = [pytest.mark.engine, pytest.mark.timeout(400)]

PROMPT = list(range(10, 40))
REQUEST = SamplingRequest(PROMPT, n=4, seed=1, temperature=1.0, top_p=1.0, max_tokens=40)


def fed(place: int, request: SamplingRequest = REQUEST) -> Fed:
    return Fed(GroupName(1, "policy", place), request, tuple(range(request.n)))


def take(engine: Any, count: int) -> dict[tuple[int, int], Completion]:
    """The next samples that end, by place of the group and number."""
    found: dict[tuple[int, int], Completion] = {}
    while len(found) < count:
        taken: Taken = engine.take(0, 20.0)
        (completions,) = taken.completions
        found |= {(name.place, i): c for (name, i), c in zip(taken.ended, completions, strict=True)}
    return found


def equal(one: Completion, other: Completion) -> bool:
    return one.token_ids.tolist() == other.token_ids.tolist() and one.text == other.text


@torch.no_grad()
def logprobs(path: Path, completion: Completion) -> np.ndarray[Any, Any]:
    """[L] of a completion's tokens under the weights of a checkpoint."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    rows = model(torch.tensor([PROMPT + completion.token_ids.tolist()])).logits[0, len(PROMPT) - 1 : -1]
    chosen = torch.as_tensor(completion.token_ids, dtype=torch.long)[:, None]
    values: np.ndarray[Any, Any] = rows.log_softmax(-1).gather(-1, chosen)[:, 0].numpy()
    return values


@pytest.fixture
def engine(synced: Callable[[str, int], Any]) -> Any:
    return synced("untied", 4)


def test_what_is_streamed_is_what_a_call_draws(engine: Any) -> None:
    requests = [replace(REQUEST, seed=seed, prompt=PROMPT[seed:]) for seed in range(6)]
    expected = engine.sample(requests, 4)
    engine.feed([fed(place, request) for place, request in enumerate(requests)])
    engine.go_on(4)
    found = take(engine, 24)
    for (place, i), completion in found.items():
        assert equal(completion, expected[place][i])
        np.testing.assert_allclose(completion.logprobs, expected[place][i].logprobs, atol=1e-5)
        assert completion.finish_reason == expected[place][i].finish_reason
        assert (completion.weight_version, completion.later_versions) == (4, ())


def test_without_log_probs_the_tokens_are_the_same(engine: Any) -> None:
    quiet = replace(REQUEST, logprobs=False)
    ((expected,), (found,)) = engine.sample([REQUEST], 4), engine.sample([quiet], 4)
    assert all(equal(one, other) for one, other in zip(expected, found, strict=True))
    assert [len(c.logprobs) for c in found] == [0] * 4
    engine.feed([fed(0, quiet)])
    engine.go_on(4)
    assert all(equal(c, expected[i]) and len(c.logprobs) == 0 for (_, i), c in take(engine, 4).items())


@pytest.mark.parametrize("kind", ["untied", "tied, TP 2"])
def test_samples_go_on_with_new_weights_and_each_token_has_the_log_prob_of_those_that_drew_it(
    kind: str, synced: Callable[[str, int], Any], checkpoint: Callable[[str, int], Path]
) -> None:
    from megatron_coreward.weights.layouts import EngineLayout
    from tests.rollout.conftest import tensor_parallel

    engine, layout = synced(kind, 4), EngineLayout(1, tensor_parallel(kind))
    long = replace(REQUEST, max_tokens=400, n=8)
    engine.feed([fed(0, long)])
    engine.go_on(4)
    time.sleep(0.6)
    for version in (6, 8):
        sync(engine, checkpoint(kind, version), version, engines=layout)
        assert np.isfinite(engine.score(PROMPT)).all()  # the canary, with nothing else in the engine
        with pytest.raises(RunError, match=f"holds weights of version {version}, expected version 4"):
            engine.go_on(4)
        engine.go_on(version)
        time.sleep(0.6)
    found = take(engine, 8)
    continued = [c for c in found.values() if len(c.later_versions) > 0]
    assert continued
    for completion in found.values():
        versions = completion.token_versions
        assert set(versions.tolist()) <= {4, 6, 8}
        assert len(completion.logprobs) == len(completion.token_ids) <= 400
        for version in set(versions.tolist()):
            expected = logprobs(checkpoint(kind, version), completion)
            drawn = versions == version
            np.testing.assert_allclose(completion.logprobs[drawn], expected[drawn], atol=2e-4)
    synced(kind, 4)


def test_a_call_in_between_is_alone_in_the_engine(engine: Any) -> None:
    expected, score = engine.sample([REQUEST], 4), engine.score(PROMPT)
    engine.feed([fed(place, replace(REQUEST, n=16, max_tokens=300, seed=place)) for place in range(4)])
    engine.go_on(4)
    time.sleep(0.5)
    np.testing.assert_array_equal(engine.score(PROMPT), score)
    between = engine.sample([REQUEST], 4)
    assert all(equal(one, other) for one, other in zip(between[0], expected[0], strict=True))
    assert len(take(engine, 64)) == 64


def test_an_aborted_group_frees_the_engine(engine: Any, checkpoint: Callable[[str, int], Path]) -> None:
    engine.feed([fed(0, replace(REQUEST, n=32, max_tokens=400)), fed(1)])
    engine.go_on(4)
    time.sleep(0.2)
    engine.abort([GroupName(1, "policy", 0)])
    ended: set[int] = set()
    aborted = tokens = count = 0
    while count < 4 or not aborted:
        taken: Taken = engine.take(0, 5.0)
        ended |= {name.place for name, _ in taken.ended if name.place == 1}
        count += sum(name.place == 1 for name, _ in taken.ended)
        aborted, tokens = aborted + len(taken.aborted), tokens + sum(drawn for _, drawn in taken.aborted)
    assert ended == {1}
    assert 0 < aborted <= 32
    assert tokens >= 0
    sync(engine, checkpoint("untied", 4), 4)  # its cache is empty, or else the engine would refuse it


def test_a_stop_string_across_an_interruption_ends_the_sample(
    engine: Any, checkpoint: Callable[[str, int], Path]
) -> None:
    """Interrupted so often that some strings begin before an interruption and end behind it."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint("untied", 4))
    (plain,) = engine.sample([replace(REQUEST, n=8, max_tokens=100)], 4)
    long = max(plain, key=lambda c: len(c.token_ids))
    letters = [tokenizer.decode(long.token_ids[i : i + 1], skip_special_tokens=True) for i in range(40)]
    pairs = (a + b for a, b in pairwise(letters[10:]) if a and b and a + b == (a + b).strip())
    stops = tuple(dict.fromkeys(pairs))
    engine.feed([fed(0, replace(REQUEST, n=8, max_tokens=100, stop=stops))])
    engine.go_on(4)
    for _ in range(20):
        engine.score(PROMPT)
    # Bytes that are no character are held back until the next ones show what they become: such a string is seen later.
    whole, ended = [stop for stop in stops if "\ufffd" not in stop], 0
    assert whole
    for completion in take(engine, 8).values():
        before = tokenizer.decode(completion.token_ids[:-1], skip_special_tokens=True)
        assert not any(stop in before for stop in whole)
        if any(stop in tokenizer.decode(completion.token_ids, skip_special_tokens=True) for stop in whole):
            assert completion.finish_reason == "stop"
        ended += completion.finish_reason == "stop"
    assert ended


def test_a_request_that_does_not_fit_is_refused_when_it_is_fed(engine: Any) -> None:
    with pytest.raises(ValueError, match="does not fit"):
        engine.feed([fed(0, replace(REQUEST, max_tokens=500))])


def test_what_is_fed_to_an_engine_without_weights_waits(
    start_engine: Callable[[str], EngineProcess], engine_of: Engines, checkpoint: Callable[[str, int], Path]
) -> None:
    engine = start_engine("untied")
    engine.feed([fed(0)])
    with pytest.raises(RunError, match="no weights were synced"):
        engine.go_on(4)
    assert engine.take(0, 0.1).ended == ()
    sync(engine, checkpoint("untied", 4), 4)
    assert engine.take(0, 0.1).ended == ()
    engine.go_on(4)
    assert len(take(engine, 4)) == 4
