"""Which rollouts are trained on is a seeded choice among those that voted."""

import numpy as np

from megatron_coreward.trainer.choice import chosen_rollouts, part_of, spread
from megatron_coreward.types import Completion, Prompt, RolloutGroup


def group(size: int, uid: str = "a") -> RolloutGroup:
    completions = tuple(
        Completion(np.array([i], np.int32), np.zeros(1, np.float32), str(i), None, "stop", 0) for i in range(size)
    )
    return RolloutGroup(uid, "original", "policy", Prompt("?", np.arange(2, dtype=np.int32)), completions)


def test_n_of_the_rollouts_are_chosen_by_seed_step_and_question() -> None:
    rows = chosen_rollouts(group(64), 32, run_seed=1, step=3)
    assert len(set(rows.tolist())) == 32
    assert rows.tolist() == sorted(rows.tolist())
    assert rows.tolist() == chosen_rollouts(group(64), 32, 1, 3).tolist()
    others = [chosen_rollouts(group(64), 32, 2, 3), chosen_rollouts(group(64), 32, 1, 4)]
    others.append(chosen_rollouts(group(64, "b"), 32, 1, 3))
    assert all(rows.tolist() != other.tolist() for other in others)


def test_every_rollout_is_as_likely_as_another() -> None:
    counts = np.zeros(8)
    for step in range(400):
        counts[chosen_rollouts(group(8), 4, 1, step)] += 1
    assert np.abs(counts - 200).max() < 45  # 4.5 standard deviations


def test_all_are_chosen_if_there_are_no_more() -> None:
    whole = group(4)
    rows = chosen_rollouts(whole, 4, 1, 1)
    assert rows.tolist() == [0, 1, 2, 3]
    assert part_of(whole, rows) is whole
    assert chosen_rollouts(whole, 8, 1, 1).tolist() == [0, 1, 2, 3]


def test_a_part_has_the_chosen_completions_and_values_are_spread_to_their_places() -> None:
    rows = np.array([1, 3], dtype=np.int32)
    assert [c.text for c in part_of(group(4), rows).completions] == ["1", "3"]
    np.testing.assert_array_equal(spread(np.array([5, 6], np.float32), rows, 4), [np.nan, 5, np.nan, 6])
