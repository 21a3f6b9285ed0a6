"""How far ahead groups may begin, and how old their tokens are then."""

import numpy as np
import pytest

from megatron_coreward.trainer.label_windows import window_ahead, window_between_checkpoints
from megatron_coreward.trainer.staleness import last_to_draw, staleness_metrics, token_ages, versions_allowed
from megatron_coreward.types import Completion, RolloutGroup, WeightVersion
from tests.trainer.fakes import make_problem


def group(*completions: Completion) -> RolloutGroup:
    return RolloutGroup("fake/0", "original", "policy", make_problem(0).prompts["original"], completions)


def completion(tokens: int, update: int, *later: tuple[int, int]) -> Completion:
    zeros = np.zeros(tokens)
    versions = tuple((first, WeightVersion("policy", other).number) for first, other in later)
    first = WeightVersion("policy", update).number
    return Completion(zeros.astype(np.int32), zeros.astype(np.float32), "", None, "stop", first, versions)


@pytest.mark.parametrize("staleness", [0, 1, 3])
def test_the_oldest_token_of_the_last_step_that_may_begin_is_as_old_as_it_may_be(staleness: int) -> None:
    for step in (1, 5, 9):
        last = last_to_draw(step, staleness, 100)
        drawn = group(completion(3, step - 1))  # by the weights with which the step learns
        assert token_ages([drawn], last - 1, 1).max() == staleness
    assert last_to_draw(9, staleness, 9) == 9


def test_ages_are_those_of_tokens_in_steps_of_several_updates() -> None:
    drawn = [group(completion(4, 2, (1, 4), (3, 6)), completion(2, 6))]
    assert token_ages(drawn, 6, 2).tolist() == [2, 1, 1, 0, 0, 0]
    assert staleness_metrics(drawn, 6, 2) == {
        "rollout/staleness": pytest.approx(4 / 6),
        "rollout/staleness_max": 2,
        "rollout/continued_share": 0.5,
    }


def test_the_versions_that_a_step_may_learn_from_are_those_of_its_last_steps() -> None:
    assert set(versions_allowed(6, 2, 2)) == {12, 8, 4}
    assert set(versions_allowed(1, 1, 5)) == {2, 0}  # there were none before
    assert set(versions_allowed(3, 1, 0)) == {6}


def test_windows_begin_after_checkpoints_and_cross_none() -> None:
    windows: list[list[int]] = []

    def lacking(step: int) -> bool:
        return all(step not in window for window in windows)

    for step in range(1, 11):
        border = step + -step % 5
        windows.append(window_between_checkpoints(step, 2, border, 5, lacking))
    assert windows == [[1, 2, 3], [], [], [4, 5], [], [6, 7, 8], [], [], [9, 10], []]


def test_a_window_ahead_begins_when_a_step_that_is_drawn_for_lacks_labels() -> None:
    def lacking(labelled: set[int]) -> list[int]:
        return window_ahead(3, 4, 2, 9, lambda s: s not in labelled)

    assert lacking(set()) == [3, 4, 5, 6]
    assert lacking({3, 4}) == []
    assert lacking({3}) == [4, 5, 6]
    assert window_ahead(8, 9, 5, 9, lambda s: True) == [8, 9]
