"""Methods by import path and by entry point, checked before a run starts, and mixtures of methods."""

import importlib.metadata
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_coreward.config import plugins
from megatron_coreward.config.load import parse_config
from megatron_coreward.config.methods import method_title, needs_of
from megatron_coreward.config.needs import together
from megatron_coreward.errors import InputError
from megatron_coreward.preflight import method as preflight
from megatron_coreward.rewards.context import BatchRewardContext
from megatron_coreward.rewards.equivalence import AnswerEquivalence
from megatron_coreward.rewards.methods import METHODS, method_of
from megatron_coreward.rewards.methods.base import GroupReward, Needs
from megatron_coreward.types import VIEWS, TokenStats, View
from tests.rewards.groups import group

OWN = "tests.rewards.own_methods"


def config(method: Any, *overrides: str) -> Any:
    return parse_config(
        {
            "run_dir": "run",
            "steps": 1,
            "method": method,
            "model": {"hf_path": "model"},
            "data": {"train_files": ["a.parquet"]},
        },
        overrides,
    )


def problems(method: Any, *overrides: str) -> list[str]:
    """What is said about a method before a run starts, by the config or by the preflight."""
    try:
        return list(preflight.problems(config(method, *overrides)))
    except InputError as error:
        return [str(error)]


@pytest.mark.parametrize("name", ["FirstAnswer", "FIRST_ANSWER", "ReadsLabels"])
def test_a_class_or_an_instance_is_a_method_by_its_import_path(name: str) -> None:
    assert problems(f"{OWN}:{name}") == []
    assert method_of(f"{OWN}:{name}") is method_of(f"{OWN}:{name}")
    assert needs_of(f"{OWN}:{name}").ground_truth is (name == "ReadsLabels")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tests.nowhere:Method", "there is no module tests.nowhere; it must be installed, or its folder on PYTHONPATH"),
        (f"{OWN}:FirstAnswr", "module tests.rewards.own_methods has no 'FirstAnswr'; did you mean 'FirstAnswer'?"),
        (f"{OWN}:NeedsArguments", "cannot be made without arguments"),
        (f"{OWN}:NoName", "has no `name`"),
        (f"{OWN}:NoNeeds", "has no `needs`; expected rewards.methods.base.Needs, found 'everything'"),
        (f"{OWN}:np", "has no `name`"),
        (f"{OWN}:WrongSignature", "its `score` must take (group, context), found (group:"),
        (f"{OWN}:ClaimsNothing", "does not say whether it is label-free"),
        (f"{OWN}:ClaimsTooMuch", "says `label_free = True`, and its needs name the data set's answers"),
        (f"{OWN}:ClaimsTooLittle", "says `label_free = False`, and its needs do not name the data set's answers"),
        (f"{OWN}:Peeks", "asks for the data set's answer, but does not declare it in its needs"),
        (f"{OWN}:AsksTheTeacher", "asks for a vote of the teacher, but does not declare it in its needs"),
        (f"{OWN}:WrongShape", "rewards must be an array with one number for each of the 4 rollouts"),
        (f"{OWN}:NotFinite", "rewards must be finite"),
        (f"{OWN}:NoReward", "`score` must return a GroupReward, found NoneType"),
        (f"{OWN}:Fails", "failed on made-up rollouts with ValueError: no such thing"),
        (f"{OWN}:HiddenAdvantages", "does not say `own_advantages = True`"),
        (f"{OWN}:FailsOnSilence", "IndexError: list index out of range (their answers: (None, None, None, None))"),
        (f"{OWN}:FailsOnAgreement", "rewards must be finite"),
        (f"{OWN}:FailsAlone", "IndexError: list index out of range (their answers: ('1',))"),
        (f"{OWN}:LengthPenalty", "its needs name no view, so it can only be mixed with a method that does"),
    ],
)
def test_what_is_wrong_with_a_method_is_one_message_before_anything_starts(name: str, message: str) -> None:
    (said,) = problems(name)
    assert said.startswith("method: ")
    assert name in said
    assert message in said
    assert problems({"majority_voting": 1.0, name: 0.5}) == ([] if name.endswith("LengthPenalty") else [said])


def test_a_method_that_reads_more_of_the_teacher_than_its_vote_is_refused_if_votes_end_early() -> None:
    early = ("teacher.early_stop=true", "rollout.schedule=streaming")
    assert problems(f"{OWN}:SharesOfTheTeacher") == problems(f"{OWN}:VotesOfTheTeacher", *early) == []
    said = "the method reads all answers of the teacher, of which teacher.early_stop: true leaves those that decide"
    for method in (f"{OWN}:SharesOfTheTeacher", {"co_rewarding_ii": 1.0, f"{OWN}:SharesOfTheTeacher": 0.5}):
        (problem,) = problems(method, *early)
        assert problem.startswith(f"method: {OWN}:SharesOfTheTeacher: {said}")


def test_an_error_inside_a_module_is_told_as_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "broken_method.py").write_text("import a_module_that_is_not_there\n")
    (tmp_path / "raising_method.py").write_text("1 / 0\n")
    assert problems("broken_method:M") == [
        "method: broken_method:M: importing broken_method failed: No module named 'a_module_that_is_not_there'"
    ]
    assert problems("raising_method:M") == [
        "method: raising_method:M: importing raising_method failed: ZeroDivisionError: division by zero"
    ]
    sys.modules.pop("raising_method", None)


def test_an_entry_point_is_a_method_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    point = importlib.metadata.EntryPoint("first", f"{OWN}:FirstAnswer", plugins.GROUP)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda *, group: [point] if group == plugins.GROUP else [])
    assert problems("first") == []
    assert method_of("first").name == "first_answer"
    assert "expected one of" in problems("second")[0]


def test_every_method_of_the_table_passes_the_trial_of_strangers() -> None:
    from megatron_coreward.rewards.trial import try_method

    for name, method in METHODS.items():
        try_method(name, method)


def test_what_is_not_finite_is_no_advantage() -> None:
    bad, good = np.float32([1, np.nan]), np.float32([1, 0])
    with pytest.raises(ValueError, match=r"advantages must be finite numbers, found \[1.0, nan\]"):
        GroupReward(None, good, bad).advantages_of_group()
    with pytest.raises(ValueError, match="rewards must be finite"):
        GroupReward(None, bad).advantages_of_group()


class TestMixtures:
    original = group(["1", "1", "2", None], lengths=[2, 4, 8, 8])
    rephrased = group(["2", "2", "2", "1"], view="rephrased", lengths=[1, 1, 1, 4])

    def score(self, setting: dict[str, float], view: View = "original") -> GroupReward:
        method = method_of(setting)
        groups = [g for g in (self.original, self.rephrased) if g.view in method.needs.views]
        ramp = [np.full(len(c.token_ids), 2.0, np.float32) for g in groups for c in g.completions]
        context = BatchRewardContext(
            method.needs,
            AnswerEquivalence("exact"),
            policy_groups=groups,
            token_stats=TokenStats(ramp, ramp, ramp),
            ground_truths={"q": "2"},
        )
        return method.score(next(g for g in groups if g.view == view), context)

    def test_rewards_are_the_weighted_sum_and_the_label_is_the_first(self) -> None:
        found = self.score({f"{OWN}:LengthPenalty": 0.5, "majority_voting": 2.0, "ground_truth": -1.0})
        assert found.label == "1"
        np.testing.assert_allclose(found.rewards, [2 - 0.125, 2 - 0.25, -1 - 0.5, -0.5])
        assert self.score({"ground_truth": 1.0, "majority_voting": 1.0}).label == "2"

    def test_a_part_judges_the_views_that_it_names_and_one_that_names_none_judges_all(self) -> None:
        setting = {"co_rewarding_i": 1.0, "majority_voting": 10.0, f"{OWN}:LengthPenalty": 0.1}
        np.testing.assert_allclose(self.score(setting).rewards, [9.975, 9.95, 0.9, -0.1], rtol=1e-6)
        np.testing.assert_allclose(self.score(setting, "rephrased").rewards, [-0.025, -0.025, -0.025, 0.9], rtol=1e-6)

    def test_needs_are_those_of_all_parts(self) -> None:
        assert needs_of({"co_rewarding_i": 1.0, "entropy": 0.1}) == Needs(views=VIEWS, token_stats=True)
        crossed = needs_of({"co_rewarding_i+ii_original": 1.0, f"{OWN}:LengthPenalty": 1.0})
        assert crossed == Needs(teacher=True, teacher_views=("rephrased",))
        assert together([Needs(views=()), Needs(views=("rephrased",))]).views == ("rephrased",)

    def test_a_part_cannot_read_what_another_part_declares(self) -> None:
        with pytest.raises(PermissionError, match="data set's answer"):
            self.score({"ground_truth": 1.0, f"{OWN}:Peeks": 1.0})
        assert self.score({"ground_truth": 1.0, f"{OWN}:ReadsLabels": 1.0}).label == "2"

    def test_every_other_source_is_narrowed_as_well(self) -> None:
        from megatron_coreward.rewards.methods.permission import NarrowedContext

        whole = Needs(views=VIEWS, token_stats=True, ground_truth=True)
        context = BatchRewardContext(
            whole,
            AnswerEquivalence("exact"),
            policy_groups=[self.original],
            token_stats=TokenStats(*([[np.ones(n, np.float32) for n in (2, 4, 8, 8)]] * 3)),
            ground_truths={"q": "2"},
        )
        narrow = NarrowedContext(Needs(), context)
        assert narrow.label_from_vote("q", "original", "policy") == "1"
        for ask in (
            lambda: narrow.ground_truth("q"),
            lambda: narrow.sequence_means(self.original, "entropy"),
            lambda: narrow.label_from_vote("q", "rephrased", "policy"),
            lambda: narrow.label_from_vote("q", "original", "teacher"),
            lambda: narrow.answer_classes("q", VIEWS, "policy"),
        ):
            with pytest.raises(PermissionError, match="does not declare"):
                ask()

    def test_advantages_cannot_be_mixed(self) -> None:
        assert problems({"restrain": 1.0, "empo": 1.0}) == [
            "method: restrain gives advantages of its own, so it cannot be mixed"
        ]

    def test_advantages_that_nobody_announced_are_not_dropped(self) -> None:
        with pytest.raises(InputError, match="first_answer gives advantages for question q without saying so"):
            self.score({"majority_voting": 1.0, f"{OWN}:HiddenAdvantages": 1.0})

    def test_its_name_says_what_is_mixed(self) -> None:
        assert method_of({"empo": 1.0, "entropy": 0.1}).name == "1.0 x empo + 0.1 x entropy"
        assert method_title("empo") == "empo"
