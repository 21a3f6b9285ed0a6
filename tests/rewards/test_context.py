"""A method sees what it declared and nothing else, and what it sees is right."""

import numpy as np
import pytest

from megatron_coreward.rewards import context as evidence_module
from megatron_coreward.rewards.context import BatchRewardContext
from megatron_coreward.rewards.equivalence import AnswerEquivalence
from megatron_coreward.rewards.methods.base import Needs, RewardContext
from megatron_coreward.types import FloatArray, TokenStats
from tests.rewards.groups import group

EXACT = AnswerEquivalence("exact")
EVERYTHING = Needs(views=("original", "rephrased"), teacher=True, token_stats=True, ground_truth=True)


def stats(*entropies: list[float]) -> TokenStats:
    arrays = [np.array(values, dtype=np.float32) for values in entropies]
    return TokenStats(logprobs=arrays, entropy=arrays, self_certainty=[10 * array for array in arrays])


def full(needs: Needs) -> BatchRewardContext:
    return BatchRewardContext(
        needs,
        EXACT,
        policy_groups=[group(["1", "1"]), group(["2", None], view="rephrased")],
        teacher_groups=[group(["3", "3"], role="teacher"), group(["4"], view="rephrased", role="teacher")],
        token_stats=stats([1, 2], [3, 4], [5, 6], [7, 8]),
        ground_truths={"q": "5", "unknown": None},
    )


def test_everything_declared_is_there() -> None:
    context: RewardContext = full(EVERYTHING)
    assert context.label_from_vote("q", "original", "policy") == "1"
    assert context.label_from_vote("q", "rephrased", "policy") == "2"
    assert context.label_from_vote("q", "original", "teacher") == "3"
    assert context.label_from_vote("q", "rephrased", "teacher") == "4"
    assert context.ground_truth("q") == "5"
    assert context.ground_truth("unknown") is None


def test_what_the_needs_do_not_name_is_refused() -> None:
    context = full(Needs())
    assert context.label_from_vote("q", "original", "policy") == "1"
    with pytest.raises(PermissionError, match="teacher"):
        context.label_from_vote("q", "original", "teacher")
    with pytest.raises(PermissionError, match="rephrased"):
        context.label_from_vote("q", "rephrased", "policy")
    with pytest.raises(PermissionError, match="data set's answer"):
        context.ground_truth("q")
    with pytest.raises(PermissionError, match="token statistics"):
        context.sequence_means(group(["1", "1"]), "entropy")


def test_what_is_declared_and_missing_is_named_before_any_method_runs() -> None:
    groups = [group(["1", "1"])]
    for needs, match in (
        (Needs(teacher=True), "teacher"),
        (Needs(token_stats=True), "statistics"),
        (Needs(ground_truth=True), "answers"),
    ):
        with pytest.raises(ValueError, match=match):
            BatchRewardContext(needs, EXACT, policy_groups=groups)


def test_unknown_questions_and_groups_are_named() -> None:
    context = full(EVERYTHING)
    with pytest.raises(KeyError, match="the policy has no rollouts of other"):
        context.label_from_vote("other", "original", "policy")
    with pytest.raises(KeyError, match="other"):
        context.ground_truth("other")
    with pytest.raises(KeyError, match="other"):
        context.sequence_means(group(["1"], uid="other"), "entropy")


def test_sequence_means_follow_the_order_of_groups_and_completions() -> None:
    groups = [group(["1", "2"], lengths=[1, 3]), group(["1", "1", "1"], view="rephrased", lengths=[2, 1, 2])]
    context = BatchRewardContext(
        EVERYTHING,
        EXACT,
        policy_groups=groups,
        teacher_groups=[group(["3"], role="teacher")],
        token_stats=stats([1], [1, 2, 6], [0, 1], [7], [2, 2]),
        ground_truths={},
    )
    np.testing.assert_array_equal(context.sequence_means(groups[0], "entropy"), np.float32([1, 3]))
    np.testing.assert_array_equal(context.sequence_means(groups[1], "entropy"), np.float32([0.5, 7, 2]))
    np.testing.assert_array_equal(context.sequence_means(groups[1], "self_certainty"), np.float32([5, 70, 20]))
    assert context.sequence_means(groups[0], "entropy").dtype == np.float32


@pytest.mark.parametrize("entropies", [[[1, 2]], [[1, 2], [3]], [[1, 2], [3, 4], [5, 6]], []])
def test_statistics_that_do_not_fit_the_completions_are_refused(entropies: list[list[float]]) -> None:
    with pytest.raises(ValueError, match="entropy does not have one entry for each token"):
        BatchRewardContext(
            Needs(token_stats=True), EXACT, policy_groups=[group(["1", "2"])], token_stats=stats(*entropies)
        )


def test_a_mean_over_no_tokens_is_refused() -> None:
    groups = [group(["1", None], lengths=[2, 0])]
    with pytest.raises(ValueError, match=r"rollout 1 of q \(original\) has no tokens"):
        BatchRewardContext(Needs(token_stats=True), EXACT, policy_groups=groups, token_stats=stats([1, 2], []))


def test_groups_in_the_wrong_list_or_twice_are_refused() -> None:
    with pytest.raises(ValueError, match="two groups of q"):
        BatchRewardContext(Needs(), EXACT, policy_groups=[group(["1"]), group(["2"])])
    with pytest.raises(ValueError, match="among those of the policy is teacher's"):
        BatchRewardContext(Needs(), EXACT, policy_groups=[group(["1"], role="teacher")])


@pytest.mark.parametrize(
    ("label", "expected"), [("2", [0, 1, 0, 0]), ("9", [0, 0, 0, 0]), (None, [0, 0, 0, 0]), ("", [0, 0, 0, 0])]
)
def test_matches_are_ones_for_equivalent_answers_only(label: str | None, expected: list[float]) -> None:
    context = full(Needs())
    matches: FloatArray = context.matches(group(["1", "2", None, ""]), label)
    assert matches.dtype == np.float32
    np.testing.assert_array_equal(matches, expected)


def test_matches_follow_the_judge() -> None:
    context = BatchRewardContext(Needs(), AnswerEquivalence("math"), policy_groups=[])
    np.testing.assert_array_equal(context.matches(group(["0.5", r"\frac12", "0.51"]), "1/2"), [1, 1, 0])


def test_each_vote_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[list[str | None]] = []
    count = evidence_module.majority_vote

    def spy(answers: list[str | None], equivalence: AnswerEquivalence, min_margin: float) -> object:
        counted.append(answers)
        return count(answers, equivalence, min_margin)

    monkeypatch.setattr(evidence_module, "majority_vote", spy)
    context = full(EVERYTHING)
    for _ in range(3):
        context.label_from_vote("q", "original", "policy")
        assert len(context.votes()) == 4
    assert sorted(map(str, counted)) == sorted(map(str, [["1", "1"], ["2", None], ["3", "3"], ["4"]]))


def test_a_margin_makes_votes_abstain() -> None:
    context = BatchRewardContext(Needs(), EXACT, policy_groups=[group(["1", "1", "2"])], min_margin=0.5)
    assert context.label_from_vote("q", "original", "policy") is None
    assert context.vote("q", "original", "policy").abstained
