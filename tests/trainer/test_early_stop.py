"""A teacher's group ends when its vote is decided, and what it spared is counted low rather than high."""

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


def test_what_was_spared_is_estimated_by_the_samples_that_ended() -> None:
    def group(*lengths: int) -> RolloutGroup:
        completions = tuple(completion("7", length) for length in lengths)
        return RolloutGroup("a", "original", "teacher", Prompt("?", np.arange(2, dtype=np.int32)), completions)

    found = early_stop_metrics([group(10, 10, 10), group(10, 10, 10, 10)], n=4, aborted_tokens=4.0)
    assert found == {
        "rollout/teacher_tokens_saved": pytest.approx(6 / 80),  # one sample of 10 tokens, 4 of which were drawn
        "rollout/teacher_aborted_share": 1 / 8,
        "rollout/teacher_stopped_share": 0.5,
    }
    assert early_stop_metrics([group(2, 2)], n=4, aborted_tokens=50.0)["rollout/teacher_tokens_saved"] == 0.0
    assert early_stop_metrics([], n=4, aborted_tokens=0.0) == {}
