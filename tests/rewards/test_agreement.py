"""The label metrics are the counts they say they are, and absent where there is nothing to count."""

from math import log

import numpy as np
import pytest

from megatron_coreward.rewards.agreement import (
    agreement_metrics,
    ground_truth_metrics,
    relation_metrics,
    reward_metrics,
    vote_metrics,
)
from megatron_coreward.rewards.context import GroupKey
from megatron_coreward.rewards.equivalence import AnswerEquivalence
from megatron_coreward.rewards.methods.base import GroupReward
from megatron_coreward.rewards.voting import Vote, majority_vote
from tests.rewards.groups import group

# Of three answers against one, as a share of log 4; one against one is log 2 = log 4 / 2.
H_3_1 = (3 / 4 * log(4 / 3) + 1 / 4 * log(4)) / log(4)
EXACT, MATH = AnswerEquivalence("exact"), AnswerEquivalence("math")

ANSWERS: dict[GroupKey, list[str | None]] = {
    ("a", "original", "policy"): ["1", "1", "1", "2"],  # share 3/4, margin 1/2
    ("a", "rephrased", "policy"): ["1", "2", None, ""],  # share 1/4, tie, half without an answer
    ("b", "original", "policy"): ["3", "3", "3", "3"],
    ("b", "rephrased", "policy"): ["4", "4", "5", "4"],
    ("a", "original", "teacher"): ["1", "2", "2", "2"],
    ("b", "original", "teacher"): ["3", "3", None, None],
}


def votes(equivalence: AnswerEquivalence = EXACT, min_margin: float = 0.0) -> dict[GroupKey, Vote]:
    return {key: majority_vote(answers, equivalence, min_margin) for key, answers in ANSWERS.items()}


def test_vote_metrics_are_means_over_the_votes_of_a_role() -> None:
    assert vote_metrics(votes()) == pytest.approx(
        {
            "vote/share": (3 / 4 + 1 / 4 + 1 + 3 / 4) / 4,
            "vote/margin": (1 / 2 + 0 + 1 + 1 / 2) / 4,
            "vote/tie_rate": 1 / 4,
            "vote/abstention_rate": 0,
            "vote/no_answer_rate": 2 / 16,
            "vote/distinct_answers": (2 + 2 + 1 + 2) / 4,
            "vote/entropy": (H_3_1 + 1 / 2 + 0 + H_3_1) / 4,
            "vote/label_variety": 1,
            "teacher_vote/share": (3 / 4 + 1 / 2) / 2,
            "teacher_vote/margin": (1 / 2 + 1 / 2) / 2,
            "teacher_vote/tie_rate": 0,
            "teacher_vote/abstention_rate": 0,
            "teacher_vote/no_answer_rate": 2 / 8,
            "teacher_vote/distinct_answers": (2 + 1) / 2,
            "teacher_vote/entropy": (H_3_1 + 0) / 2,
            "teacher_vote/label_variety": 1,
        }
    )
    assert vote_metrics(votes(min_margin=0.2))["vote/abstention_rate"] == 1 / 4


def test_label_variety_falls_when_all_questions_get_one_label() -> None:
    alike = {(uid, "original", "policy"): majority_vote(["7", "7", uid]) for uid in "abcd"}
    assert vote_metrics(alike)["vote/label_variety"] == 1 / 4
    one_without = {**alike, ("e", "original", "policy"): majority_vote([None, None])}
    assert vote_metrics(one_without)["vote/label_variety"] == 1 / 4
    assert "vote/label_variety" not in vote_metrics({("e", "original", "policy"): majority_vote([None])})


def test_agreement_pairs_views_of_a_role_and_roles_on_a_view() -> None:
    assert agreement_metrics(votes(), EXACT) == {"label/view_agreement": 1 / 2, "label/teacher_agreement": 1 / 2}


def test_an_abstaining_vote_agrees_with_nothing() -> None:
    assert agreement_metrics(votes(min_margin=0.6), EXACT)["label/view_agreement"] == 0


def test_metrics_without_anything_to_count_are_absent() -> None:
    only_policy = {key: vote for key, vote in votes().items() if key[1:] == ("original", "policy")}
    assert set(vote_metrics(only_policy)) == {key for key in vote_metrics(votes()) if key.startswith("vote/")}
    assert agreement_metrics(only_policy, EXACT) == {}
    assert vote_metrics({}) == agreement_metrics({}, EXACT) == relation_metrics({}, {}, MATH) == {}
    assert reward_metrics([], []) == ground_truth_metrics([], [], {}, EXACT) == {}
    unknown = ground_truth_metrics([group(["1"])], [GroupReward("1", np.float32([1]))], {"q": None}, EXACT)
    assert unknown == {}


def test_relation_metrics_tell_changed_labels_from_changed_company() -> None:
    groups: dict[GroupKey, list[str | None]] = {
        ("a", "original", "policy"): ["1", "1", "1.0", "2"],  # the same label, one more winner
        ("b", "original", "policy"): ["3", "3", "1/2", "0.5", ".5"],  # another label: 2 winners out, 3 in
        ("c", "original", "policy"): ["7", "8", None],  # nothing changes
        ("d", "original", "policy"): [None],  # no labels at all
    }
    exact = {key: majority_vote(answers, EXACT) for key, answers in groups.items()}
    math = {key: majority_vote(answers, MATH) for key, answers in groups.items()}
    assert relation_metrics(exact, math, MATH) == {
        "vote/exact_vs_math_disagreement": 1 / 4,
        "vote/exact_vs_math_changed_rollouts": (1 + 5) / 13,
    }
    with pytest.raises(ValueError, match="same groups"):
        relation_metrics(exact, {}, MATH)


def test_reward_metrics_count_groups_that_teach_nothing() -> None:
    group_rewards = [GroupReward("1", np.float32([1, 1, 0, 0])), GroupReward(None, np.float32([0, 0, 0, 0]))]
    advantages = [np.float32([0.8, 0.8, -0.8, -0.8]), np.float32([0, 0, 0, 0])]
    assert reward_metrics(group_rewards, advantages) == {
        "reward/mean": 0.25,
        "reward/std": pytest.approx(np.sqrt(3) / 4),
        "advantage/zero_variance_share": 0.5,
        "label/missing_rate": 0.5,
    }


def test_gold_metrics_score_labels_and_rollouts_where_gold_is_known() -> None:
    groups = [group(["1", "2"], uid="a"), group(["0.5", None], uid="b"), group(["9", "9"], uid="unknown")]
    group_rewards = [
        GroupReward("2", np.float32([0, 1])),
        GroupReward("1/2", np.float32([1, 0])),
        GroupReward("9", np.float32([1, 1])),
    ]
    ground_truths = {"a": "1", "b": ".5", "unknown": None}
    metrics = ground_truth_metrics(groups, group_rewards, ground_truths, MATH)
    assert metrics.pop("label/accuracy_low") == pytest.approx(0.0945, abs=1e-4)  # Wilson, 1 of 2
    assert metrics.pop("label/accuracy_high") == pytest.approx(0.9055, abs=1e-4)
    # Of question a the wrong rollout was rewarded instead of the right one; of question b the right one was.
    assert metrics == {"label/accuracy": 1 / 2, "rollout/accuracy": 2 / 4, "reward/accuracy": 2 / 4}
    missing = [GroupReward(None, group_rewards[0].rewards), group_rewards[1], group_rewards[2]]
    assert ground_truth_metrics(groups, missing, ground_truths, MATH)["label/accuracy"] == 1 / 2
    without = [GroupReward(None, group_reward.rewards) for group_reward in group_rewards]
    assert ground_truth_metrics(groups, without, ground_truths, MATH) == {
        "rollout/accuracy": 2 / 4,
        "reward/accuracy": 2 / 4,
    }


@pytest.mark.parametrize(
    ("rewards", "rightly"),
    [
        ([1, 1, 0, 0], 4 / 4),
        ([0, 0, 1, 1], 0 / 4),
        ([1, 1, 1, 1], 2 / 4),  # all rewarded alike
        ([0, 0, 0, 0], 2 / 4),
        ([-0.1, -0.2, -0.3, -0.9], 3 / 4),  # certainty: above the mean, which is -0.375, are three
    ],
)
def test_a_rollout_is_rewarded_rightly_if_it_gets_more_for_a_right_answer(rewards: list[float], rightly: float) -> None:
    metrics = ground_truth_metrics(
        [group(["5", "5", "6", None])], [GroupReward(None, np.float32(rewards))], {"q": "5"}, EXACT
    )
    assert metrics["reward/accuracy"] == rightly
