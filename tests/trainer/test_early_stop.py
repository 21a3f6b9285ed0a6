"""A teacher's group ends when its vote is decided, and what that spares is estimated."""

import numpy as np
import pytest

from megatron_coreward.rollout.requests import SamplingRequest
from megatron_coreward.trainer.early_stop import early_stop_metrics, early_vote_watchers
from megatron_coreward.types import Completion, Prompt, RolloutGroup
from tests.trainer.fakes import make_config, make_problem

REQUEST = SamplingRequest([1, 2], 5, 0, 1.0, 1.0, 8)


def completion(answer: str | None, length: int = 3) -> Completion:
    return Completion(np.ones(length, np.int32), np.zeros(length, np.float32), "", answer, "stop", 1)


def test_a_watcher_ends_the_teachers_group_when_nothing_can_change_its_label() -> None:
    changes = {"teacher.early_stop": "true", "rollout.schedule": "streaming"}
    watch = early_vote_watchers(make_config("co_rewarding_ii", **changes))
    watcher = watch("teacher", make_problem(0), "original", REQUEST)
    assert watcher is not None
    assert [watcher.completed(sample, completion("7")) for sample in (4, 1, 2)] == [False, False, True]
    assert watch("policy", make_problem(0), "original", REQUEST) is None


def test_the_runs_margin_and_relation_count() -> None:
    changes = {"teacher.early_stop": "true", "rollout.schedule": "streaming", "rewards.min_margin": "0.6"}
    watch = early_vote_watchers(make_config("co_rewarding_ii", **changes))
    watcher = watch("teacher", make_problem(0), "original", REQUEST)
    assert watcher is not None
    assert [watcher.completed(sample, completion("7")) for sample in range(4)] == [False, False, False, True]


def test_without_early_stop_nobody_watches() -> None:
    assert early_vote_watchers(make_config("co_rewarding_ii"))("teacher", make_problem(0), "original", REQUEST) is None


def test_what_was_spared_is_estimated_from_the_tokens_to_an_end() -> None:
    def group(*lengths: int) -> RolloutGroup:
        completions = tuple(completion("7", length) for length in lengths)
        return RolloutGroup("a", "original", "teacher", Prompt("?", np.arange(2, dtype=np.int32)), completions)

    groups = [group(10, 10, 10), group(10, 10, 10, 10)]
    found = early_stop_metrics(groups, n=4, aborted_tokens=7.0, max_tokens=100)
    assert found == {
        "rollout/teacher_tokens_saved": pytest.approx(11 / (77 + 11)),  # 77 tokens, 7 ends: 11 more for the aborted one
        "rollout/teacher_aborted_share": 1 / 8,
        "rollout/teacher_stopped_share": 0.5,
    }
    at_the_limit = early_stop_metrics(groups, n=4, aborted_tokens=7.0, max_tokens=10)
    assert at_the_limit["rollout/teacher_tokens_saved"] == pytest.approx(3 / 80)
    assert early_stop_metrics([group(2, 2)], n=2, aborted_tokens=0.0, max_tokens=9)["rollout/teacher_tokens_saved"] == 0
    assert early_stop_metrics([], n=4, aborted_tokens=0.0, max_tokens=9) == {}


def test_the_estimate_is_right_if_every_token_is_as_likely_to_be_the_last() -> None:
    rng, n, full, drawn, aborted_tokens = np.random.default_rng(0), 8, 0, 0, 0.0
    groups = []
    for _ in range(500):
        lengths = np.sort(rng.geometric(1 / 50, n))
        cut = int(lengths[4])  # the vote is decided when five have ended
        full += int(lengths.sum())
        drawn += int(np.minimum(lengths, cut).sum())
        aborted_tokens += float((n - (lengths <= cut).sum()) * cut)
        ended = tuple(completion("7", int(length)) for length in lengths[lengths <= cut])
        groups.append(RolloutGroup("a", "original", "teacher", Prompt("?", np.arange(2, dtype=np.int32)), ended))
    found = early_stop_metrics(groups, n, aborted_tokens, max_tokens=10_000)
    assert found["rollout/teacher_tokens_saved"] == pytest.approx(1 - drawn / full, abs=0.02)
