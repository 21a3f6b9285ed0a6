"""Each method's rule on evidence whose every source says something else."""

from typing import get_args

import numpy as np
import pytest

from megatron_coreward.config.methods import MethodName
from megatron_coreward.rewards.context import BatchRewardContext
from megatron_coreward.rewards.equivalence import AnswerEquivalence
from megatron_coreward.rewards.methods import METHODS
from megatron_coreward.rewards.methods.base import GroupReward, Needs
from megatron_coreward.types import RolloutGroup, TokenStats, View
from tests.rewards.groups import group

# Majorities: the policy says 1 on the original and 2 on the rephrasing, the teacher 3 and 4; the data set says 5.
POLICY: dict[View, RolloutGroup] = {
    "original": group(["1", "1", "1", "2", "3", "4", "5", None]),
    "rephrased": group(["2", "2", "2", "1", "3", "4", "5", None], view="rephrased"),
}
TEACHER = [group(["3", "3", "1"], role="teacher"), group(["4", "4", "2"], view="rephrased", role="teacher")]


def score(name: str, view: View = "original", **replaced: list[RolloutGroup]) -> GroupReward:
    method = METHODS[name]
    policy_groups = replaced.get("policy_groups", [POLICY[view] for view in method.needs.views])
    teacher_groups = replaced.get("teacher_groups", TEACHER)
    count = sum(len(group.completions) for group in policy_groups)
    ramp = [np.array([i, i + 1], dtype=np.float32) for i in range(count)]
    context = BatchRewardContext(
        method.needs,
        AnswerEquivalence("exact"),
        policy_groups=policy_groups,
        teacher_groups=teacher_groups,
        token_stats=TokenStats(logprobs=ramp, entropy=ramp, self_certainty=[2 * values for values in ramp]),
        ground_truths={"q": "5"},
    )
    return method.score(next(group for group in policy_groups if group.view == view), context)


def test_the_table_holds_exactly_the_methods_of_the_configuration() -> None:
    assert set(METHODS) == set(get_args(MethodName))
    assert all(method.name == name for name, method in METHODS.items())


@pytest.mark.parametrize(
    ("name", "needs"),
    [
        ("co_rewarding_i", Needs(views=("original", "rephrased"))),
        ("co_rewarding_ii", Needs(teacher=True)),
        ("co_rewarding_i+ii", Needs(views=("original", "rephrased"), teacher=True)),
        ("co_rewarding_i+ii_original", Needs(teacher=True, teacher_views=("rephrased",))),
        ("majority_voting", Needs()),
        ("ground_truth", Needs(ground_truth=True)),
        ("self_certainty", Needs(token_stats=True)),
        ("entropy", Needs(token_stats=True)),
        ("self_harmony", Needs(views=("original", "rephrased"))),
        ("restrain", Needs()),
        ("scrl", Needs(token_stats=True)),
        ("empo", Needs()),
        ("evol_rl", Needs()),
        ("confidence_voting", Needs()),
        ("random_reward", Needs()),
    ],
)
def test_a_method_needs_what_its_rule_reads_and_no_more(name: str, needs: Needs) -> None:
    assert METHODS[name].needs == needs


@pytest.mark.parametrize(
    ("name", "view", "label", "rewards"),
    [
        ("co_rewarding_i", "original", "2", [0, 0, 0, 1, 0, 0, 0, 0]),
        ("co_rewarding_i", "rephrased", "1", [0, 0, 0, 1, 0, 0, 0, 0]),
        ("co_rewarding_ii", "original", "3", [0, 0, 0, 0, 1, 0, 0, 0]),
        ("co_rewarding_i+ii", "original", "4", [0, 0, 0, 0, 0, 1, 0, 0]),
        ("co_rewarding_i+ii", "rephrased", "3", [0, 0, 0, 0, 1, 0, 0, 0]),
        ("co_rewarding_i+ii_original", "original", "4", [0, 0, 0, 0, 0, 1, 0, 0]),
        ("majority_voting", "original", "1", [1, 1, 1, 0, 0, 0, 0, 0]),
        ("ground_truth", "original", "5", [0, 0, 0, 0, 0, 0, 1, 0]),
    ],
)
def test_labels_come_from_the_source_the_method_names(name: str, view: View, label: str, rewards: list[int]) -> None:
    group_reward = score(name, view)
    assert group_reward.label == label
    assert group_reward.rewards.dtype == np.float32
    np.testing.assert_array_equal(group_reward.rewards, rewards)


def test_self_certainty_rewards_the_mean_distance_from_uniform() -> None:
    group_reward = score("self_certainty")
    assert group_reward.label is None
    np.testing.assert_array_equal(group_reward.rewards, np.float32([1, 3, 5, 7, 9, 11, 13, 15]))


def test_entropy_rewards_minus_the_mean_entropy() -> None:
    group_reward = score("entropy")
    assert group_reward.label is None
    np.testing.assert_array_equal(group_reward.rewards, -np.float32([0.5, 1.5, 2.5, 3.5, 4.5, 5.5, 6.5, 7.5]))


@pytest.mark.parametrize("name", ["co_rewarding_i", "co_rewarding_ii", "co_rewarding_i+ii", "majority_voting"])
def test_a_source_without_answers_gives_no_label_and_no_reward(name: str) -> None:
    silent = [group([None, ""], view=view) for view in METHODS[name].needs.views]
    teacher = [group([None], view=view, role="teacher") for view in METHODS[name].needs.views]
    group_reward = score(name, policy_groups=silent, teacher_groups=teacher)
    assert group_reward.label is None
    np.testing.assert_array_equal(group_reward.rewards, [0, 0])


def test_a_role_samples_the_views_that_are_asked_of_it() -> None:
    both, crossed = METHODS["co_rewarding_i+ii"].needs, METHODS["co_rewarding_i+ii_original"].needs
    assert both.sampled_views("teacher") == both.sampled_views("policy") == ("original", "rephrased")
    assert (crossed.sampled_views("policy"), crossed.sampled_views("teacher")) == (("original",), ("rephrased",))
    assert METHODS["majority_voting"].needs.sampled_views("teacher") == ()
    assert crossed.all_views == both.all_views == {"original", "rephrased"}


@pytest.mark.parametrize("name", sorted(METHODS))
def test_only_ground_truth_ever_reads_a_gold_answer(name: str) -> None:
    assert METHODS[name].needs.ground_truth is (name == "ground_truth")
