"""Each sign appears beyond its limit, not before, and stays silent without its metrics."""

import numpy as np
import pytest

from megatron_coreward.config.guard import GuardSettings
from megatron_coreward.guard.indicators import METRICS, anchor_limit, find_indicators
from tests.guard.rows import CHANGE, SIGNS, STEADY

SETTINGS = GuardSettings()


def names(now: dict[str, float], base: dict[str, float] = STEADY, settings: GuardSettings = SETTINGS) -> list[str]:
    return [indicator.name for indicator in find_indicators(base, now, settings)]


def test_chance_alarms_no_more_often_with_few_anchors_than_with_many() -> None:
    """300 healthy runs of 30 draws each, in which every anchor has a probability of its own that does not change."""
    generator = np.random.default_rng(1)

    def alarms(questions: int, wide: bool) -> float:
        settings, hits = GuardSettings(anchors=questions), 0
        for _ in range(300):
            sure = generator.beta(7.7, 1.3, questions)  # as clear as the majority of 7 of 8 rollouts
            agreement = generator.binomial(4, sure, (30, questions)).mean(axis=1) / 4
            pairs = np.append(agreement[:1], (agreement[1:] + agreement[:-1]) / 2)
            worst = float((np.maximum(pairs, agreement) / np.maximum.accumulate(pairs)).min())  # `trainer.anchors.kept`
            row = {"anchor/kept": worst} | ({"anchor/questions": float(questions)} if wide else {})
            hits += bool(find_indicators({}, row, settings))
        return hits / 300

    found = {questions: alarms(questions, wide=True) for questions in (8, 16, 32, 48, 64)}
    assert max(found.values()) < 0.1, found
    assert alarms(32, wide=False) > 0.3  # what the limit would do without it
    assert alarms(16, wide=False) > 0.7


def test_the_limit_of_anchors_widens_with_the_standard_error_of_a_draw() -> None:
    settings = GuardSettings(anchor_fall=0.1)
    assert [round(anchor_limit(settings, q), 3) for q in (None, 64, 55, 32, 16, 0.2)] == [
        0.1,
        0.1,
        0.1,
        0.131,
        0.185,
        1,
    ]
    assert anchor_limit(GuardSettings(anchor_fall=0.1, anchor_rollouts=8), 32) == 0.1


def test_a_steady_policy_shows_none() -> None:
    assert names(STEADY) == []
    assert set(STEADY) | {"teacher_vote/share", "rollout/teacher_stopped_share"} == set(METRICS)


@pytest.mark.parametrize("name", SIGNS)
def test_each_sign_is_found_and_named_with_its_numbers(name: str) -> None:
    (indicator,) = find_indicators(STEADY, STEADY | SIGNS[name], SETTINGS)
    assert indicator.name == name
    assert indicator.damage == (name not in CHANGE)
    assert "limit" in indicator.words or "of the way" in indicator.words


@pytest.mark.parametrize(
    ("key", "within", "beyond", "name"),
    [
        ("rollout/entropy", 0.11, 0.099, "entropy_fall"),
        ("rollout/entropy", 1.49, 1.5, "entropy_rise"),
        ("rollout/response_tokens_mean", 151.0, 150.0, "length"),
        ("vote/label_variety", 0.46, 0.45, "variety"),
        ("vote/no_answer_rate", 0.10, 0.111, "no_answer"),
        ("rollout/truncated_share", 0.21, 0.221, "truncated"),
        ("label/teacher_agreement", 0.61, 0.599, "agreement"),
        ("label/view_agreement", 0.51, 0.499, "agreement"),
        ("loss/kl", 0.099, 0.1, "kl"),
        ("vote/entropy", 0.081, 0.079, "vote_entropy"),
        ("advantage/zero_variance_share", 0.79, 0.8, "saturation"),
        ("label/flip_rate", 0.041, 0.039, "locking"),
        ("anchor/kept", 0.92, 0.909, "anchors"),
        ("rollout/repeated_ngrams", 0.14, 0.151, "repetition"),
        ("label/flip_rate", 0.49, 0.51, "label_flips"),  # 1.25 times the 40% of rollouts beside their majority
    ],
)
def test_the_limits_are_where_the_settings_put_them(key: str, within: float, beyond: float, name: str) -> None:
    assert names(STEADY | {key: within}) == []
    assert names(STEADY | {key: beyond}) == [name]


def test_consensus_needs_vote_share_and_distinct_answers_both() -> None:
    stable = STEADY | {"label/flip_rate": 0.05}
    assert names(stable | {"vote/share": 0.9}) == []
    assert names(stable | {"vote/distinct_answers": 1.2}) == []
    assert names(stable | {"vote/share": 0.9, "vote/distinct_answers": 1.2}) == ["consensus"]


def test_flips_are_held_against_the_votes_that_labelled() -> None:
    surer_teacher = STEADY | {"label/flip_rate": 0.3, "teacher_vote/share": 0.9}
    assert names(surer_teacher) == ["label_flips"]
    assert names(surer_teacher | {"teacher_vote/share": 0.6}) == []


def test_flips_are_held_against_the_policys_votes_if_those_of_the_teacher_end_early() -> None:
    """Groups that ended early have the answers that decided them, which agree more than full groups do."""
    ended_early = STEADY | {"teacher_vote/share": 0.95, "rollout/teacher_stopped_share": 0.8}
    assert names(ended_early | {"label/flip_rate": 0.3}) == []
    assert names(ended_early | {"label/flip_rate": 0.51}) == ["label_flips"]


def test_few_flips_are_no_sign_however_sure_the_votes_are() -> None:
    sure = STEADY | {"vote/share": 1.0, "label/flip_rate": 0.09}
    assert "label_flips" not in names(sure)


@pytest.mark.parametrize("key", METRICS)
def test_a_metric_that_a_run_does_not_have_silences_its_sign_and_nothing_else(key: str) -> None:
    without = {name: value for name, value in STEADY.items() if name != key}
    assert names(without, without) == []
    for changes in SIGNS.values():
        assert set(names((without | changes), without)) <= set(names(STEADY | changes))


def test_a_unanimous_or_answerless_start_is_no_division_by_zero() -> None:
    base = STEADY | {"vote/share": 1.0, "vote/distinct_answers": 1.0, "rollout/entropy": 0.0, "vote/label_variety": 0.0}
    assert isinstance(names(base, base), list)
