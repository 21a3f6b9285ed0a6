"""The methods beyond those of the paper, each against its formula with numbers worked out by hand."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from megatron_coreward.rewards.context import BatchRewardContext
from megatron_coreward.rewards.equivalence import AnswerEquivalence
from megatron_coreward.rewards.methods import METHODS
from megatron_coreward.rewards.methods.base import GroupReward, Method, leader
from megatron_coreward.rewards.methods.evol_rl import similarities
from megatron_coreward.rewards.methods.random_reward import RandomReward
from megatron_coreward.rewards.methods.restrain import Restrain
from megatron_coreward.rewards.methods.scrl import Scrl
from megatron_coreward.types import RolloutGroup, TokenStats
from tests.rewards.groups import group


def judge(
    method: Method | str,
    *groups: RolloutGroup,
    entropies: Sequence[float] = (),
    min_margin: float = 0.0,
) -> GroupReward:
    """What a method makes of the first group. Entropies are those of its rollouts, equal on each token."""
    found = METHODS[method] if isinstance(method, str) else method
    stats = None
    if found.needs.token_stats:
        values = [
            np.full(len(c.token_ids), h, np.float32) for c, h in zip(groups[0].completions, entropies, strict=True)
        ]
        stats = TokenStats(logprobs=values, entropy=values, self_certainty=values)
    context = BatchRewardContext(
        found.needs, AnswerEquivalence("exact"), policy_groups=groups, token_stats=stats, min_margin=min_margin
    )
    return found.score(groups[0], context)


def said(responses: Sequence[tuple[str | None, Sequence[int]]], logprobs: Sequence[float] = ()) -> RolloutGroup:
    """A group of (answer, token ids); log-probs are the same on each token of a rollout."""
    plain = group([answer for answer, _ in responses])
    completions = tuple(
        replace(
            completion,
            token_ids=np.array(tokens, dtype=np.int32),
            logprobs=np.full(len(tokens), logprobs[place] if logprobs else 0.0, dtype=np.float32),
        )
        for place, (completion, (_, tokens)) in enumerate(zip(plain.completions, responses, strict=True))
    )
    return replace(plain, completions=completions)


class TestSelfHarmony:
    # a: shares 1/2 and 1/8, harmonic mean 1/5; b: 1/4 and 1/2, mean 1/3; c has none in the second view.
    original = group(["a", "a", "a", "a", "b", "b", "c", None])
    rephrased = group(["b", "b", "b", "b", "a", "d", "d", "d"], view="rephrased")

    def test_the_label_has_the_highest_harmonic_mean_of_both_views(self) -> None:
        first = judge("self_harmony", self.original, self.rephrased)
        assert first.label == "b"
        np.testing.assert_array_equal(first.rewards, [0, 0, 0, 0, 1, 1, 0, 0])

    def test_both_views_are_rewarded_against_the_same_label(self) -> None:
        second = judge("self_harmony", self.rephrased, self.original)
        assert second.label == "b"
        np.testing.assert_array_equal(second.rewards, [1, 1, 1, 1, 0, 0, 0, 0])

    def test_views_without_an_answer_in_common_have_no_label(self) -> None:
        apart = judge("self_harmony", group(["a", "a"]), group(["b", None], view="rephrased"))
        assert apart.label is None
        np.testing.assert_array_equal(apart.rewards, [0, 0])

    @pytest.mark.parametrize(("min_margin", "label"), [(0.13, "b"), (0.14, None)])  # 1/3 - 1/5 = 0.133
    def test_a_lead_below_the_least_margin_gives_no_label(self, min_margin: float, label: str | None) -> None:
        assert judge("self_harmony", self.original, self.rephrased, min_margin=min_margin).label == label


class TestRestrain:
    def test_advantages_are_the_weighed_sum_over_all_answers_as_labels(self) -> None:
        method = Restrain(centre=1.0, width=0.5, min_share=0.25, penalty=0.5)
        found = judge(method, group(["a", "a", "a", "b"]))
        g_a, g_b = np.exp(-0.125), np.exp(-1.125)  # (3/4 - 1)^2 / 0.5 and (1/4 - 1)^2 / 0.5
        w_a, w_b = g_a / (g_a + g_b), g_b / (g_a + g_b)
        assert w_a == pytest.approx(0.7311, abs=1e-4)
        # One of four differs: the lone rollout is 3/4 from the mean, the others 1/4; the std with ddof=1 is 1/2.
        of_a, of_b = np.array([0.5, 0.5, 0.5, -1.5]), np.array([-0.5, -0.5, -0.5, 1.5])
        np.testing.assert_allclose(found.advantages, g_a * (w_a * of_a + w_b * of_b), rtol=1e-4)
        np.testing.assert_allclose(found.rewards, [w_a, w_a, w_a, w_b], rtol=1e-5)
        assert found.label == "a"

    def test_a_group_without_a_consensus_is_penalised_as_a_whole(self) -> None:
        method = Restrain(centre=1.0, width=0.5, min_share=0.5, penalty=2.0)
        found = judge(method, group(["a", "b", "c", None]))
        assert found.label is None
        np.testing.assert_array_equal(found.rewards, [0, 0, 0, 0])
        np.testing.assert_allclose(found.advantages, [-2 * np.exp(-1.125)] * 4, rtol=1e-5)

    def test_without_any_answer_the_group_is_penalised(self) -> None:
        found = judge("restrain", group([None, None]))
        assert found.advantages is not None
        assert (found.advantages < 0).all()

    def test_a_unanimous_group_teaches_nothing(self) -> None:
        np.testing.assert_array_equal(judge("restrain", group(["a", "a", "a"])).advantages, [0, 0, 0])


class TestScrl:
    # a has 5/8, b 1/8 with high entropy, c 1/8 with low entropy; one has no answer. The mean entropy is 1.
    answers = group(["a", "a", "a", "a", "a", "b", "c", None])
    entropies = (1.0, 1.0, 1.0, 1.0, 1.0, 2.0, 0.0, 1.0)

    def test_a_strict_majority_is_positive_and_a_rare_unsure_answer_negative(self) -> None:
        found = judge(Scrl(), self.answers, entropies=self.entropies)
        assert found.label == "a"
        b, c = 1 / 8 - 0.15 - 0.1 * (2 - 1), -0.1 * (0 - 1)  # c is rare, but sure: it is not negative
        np.testing.assert_allclose(found.rewards, [5 / 8] * 5 + [b, c, -1], rtol=1e-5)

    @pytest.mark.parametrize(
        "answers",
        [["a", "a", "a", "b", "c", "d", "e", "f"], ["a", "a", "a", "a", "b", "b", "b", "b"]],
        ids=["too small a share", "too small a lead"],
    )
    def test_a_weak_majority_gives_no_positive_label(self, answers: list[str]) -> None:
        found = judge("scrl", group(answers), entropies=[1.0] * 8)
        assert found.label is None
        assert found.rewards.max() <= 0

    def test_thresholds_are_those_that_it_was_made_with(self) -> None:
        weak = group(["a", "a", "a", "b", "c", "d", "e", "f"])
        assert judge(Scrl(min_share=0.375, min_lead=0.125), weak, entropies=[1.0] * 8).label == "a"

    def test_without_any_answer_every_rollout_gets_minus_one(self) -> None:
        found = judge("scrl", group([None, None]), entropies=(1.0, 2.0))
        np.testing.assert_array_equal(found.rewards, [-1, -1])


def test_empo_rewards_the_share_of_the_group_that_means_the_same() -> None:
    found = judge("empo", group(["a", "a", "b", None]))
    assert found.label is None
    np.testing.assert_array_equal(found.rewards, [0.5, 0.5, 0.25, 0])


class TestEvolRl:
    # Pairs of tokens: (1, 2) twice for two rollouts, other ones for the third; two wrong ones, one without an answer.
    responses = (
        ("a", [1, 2]),
        ("a", [1, 2]),
        ("a", [3, 4]),
        ("b", [1, 2]),
        ("c", [5, 6]),
        (None, [7, 8]),
    )

    def test_the_majority_decides_the_sign_and_novelty_the_size(self) -> None:
        found = judge("evol_rl", said(self.responses))
        assert found.label == "a"
        # Of the right ones, two have mean 1/2 within their side and largest 1; the third has 0 and 0. Of the wrong
        # ones, the first has 0 within its side and largest 1; the second has 0 and 0. The last has no answer.
        np.testing.assert_allclose(found.rewards, [0.5, 0.5, 1.0, -1.0, -0.5, -1.0])

    def test_equal_novelties_are_in_the_middle_and_one_alone_at_the_top(self) -> None:
        found = judge("evol_rl", said([("a", [1, 2]), ("a", [1, 2]), ("b", [1, 2])]))
        np.testing.assert_allclose(found.rewards, [0.75, 0.75, -0.5])

    def test_without_a_label_nothing_is_rewarded(self) -> None:
        np.testing.assert_array_equal(judge("evol_rl", said([(None, [1, 2]), (None, [3, 4])])).rewards, [0, 0])

    def test_similarity_is_the_cosine_of_counts_of_token_pairs(self) -> None:
        tokens = [np.array(ids, dtype=np.int32) for ids in ([1, 2, 3], [1, 2, 1, 2], [4], [])]
        found = similarities(tokens)
        # (12, 23) against (12 twice, 21): 2 / (sqrt 2 sqrt 5)
        np.testing.assert_allclose(found[0], [1, 2 / np.sqrt(10), 0, 0], rtol=1e-5)


class TestConfidenceVoting:
    # Three unsure rollouts for a, weight 3 e^-2 = 0.41; two sure ones for b, weight 2 e^-0.1 = 1.81.
    group = said(
        [("a", [1, 2]), ("a", [1]), ("a", [1]), ("b", [1]), ("b", [1])], logprobs=[-2.0, -2.0, -2.0, -0.1, -0.1]
    )

    def test_the_surer_answer_outweighs_the_more_frequent_one(self) -> None:
        found = judge("confidence_voting", self.group)
        assert found.label == "b"
        np.testing.assert_array_equal(found.rewards, [0, 0, 0, 1, 1])

    def test_with_equal_confidence_it_is_the_majority(self) -> None:
        assert judge("confidence_voting", said([("a", [1]), ("a", [1, 2]), ("b", [1])])).label == "a"

    def test_the_least_margin_is_a_share_of_the_weight(self) -> None:
        weight_a, weight_b = 3 * np.exp(-2.0), 2 * np.exp(-0.1)
        lead = (weight_b - weight_a) / (weight_a + weight_b)
        for margin, label in ((lead - 1e-3, "b"), (lead + 1e-3, None)):
            assert judge("confidence_voting", self.group, min_margin=margin).label == label


class TestRandomReward:
    def test_coins_fall_evenly_and_on_no_answer_in_particular(self) -> None:
        coins = np.concatenate([judge("random_reward", group(["a"] * 64, uid=f"q{i}")).rewards for i in range(32)])
        assert set(coins.tolist()) == {0.0, 1.0}
        assert coins.mean() == pytest.approx(0.5, abs=4 * 0.5 / np.sqrt(len(coins)))

    def test_a_repeated_run_tosses_the_same_coins_and_other_weights_toss_others(self) -> None:
        rollouts = group(["a"] * 64)
        later = replace(rollouts, completions=tuple(replace(c, weight_version=3) for c in rollouts.completions))
        first, again, other = (judge(RandomReward(), g).rewards for g in (rollouts, rollouts, later))
        np.testing.assert_array_equal(first, again)
        assert (first != other).any()


def test_a_leader_is_above_zero_and_the_first_of_several() -> None:
    assert leader(np.float32([])) is None
    assert leader(np.float32([0, 0])) is None
    assert leader(np.float32([0.2, 0.5, 0.5])) == 1
    assert leader(np.float32([0.2, 0.5, 0.5]), 0.1) is None
    assert leader(np.float32([0.3]), 0.3 - 1e-6) == 0


def test_classes_span_the_groups_and_are_spelled_as_first_seen() -> None:
    needs = METHODS["self_harmony"].needs
    groups = [group(["1/2", None, "2"]), group(["2", "0.5"], view="rephrased")]
    context = BatchRewardContext(needs, AnswerEquivalence("math"), policy_groups=groups)
    classes = context.answer_classes("q", ("original", "rephrased"), "policy")
    assert [of_group.tolist() for of_group in classes.of_groups] == [[0, -1, 1], [1, 0]]
    assert classes.spellings == ("1/2", "2")
    np.testing.assert_allclose(classes.shares(0), [1 / 3, 1 / 3])
    np.testing.assert_allclose(classes.shares(1), [0.5, 0.5])
