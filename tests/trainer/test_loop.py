"""The step does what the paper's algorithm says, in its order, for every method by the same code."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

import numpy as np
import pytest

from megatron_coreward.cluster.rollout_engines import RolloutEngines
from megatron_coreward.cluster.weight_sync import WeightSync
from megatron_coreward.config.methods import TEACHER_METHODS, TWO_VIEW_METHODS, MethodName
from megatron_coreward.rewards.equivalence import AnswerEquivalence
from megatron_coreward.rewards.methods import METHODS
from megatron_coreward.telemetry.timing import PhaseTimer
from megatron_coreward.trainer.checkpoints import CheckpointWriter
from megatron_coreward.trainer.experience import Collector
from megatron_coreward.trainer.loop import Trainer
from megatron_coreward.trainer.rollout_log import LoggedCollector, RolloutLog
from megatron_coreward.trainer.schedule import RolloutSchedule
from megatron_coreward.trainer.streaming import StreamingSchedule
from megatron_coreward.types import Problem
from tests.trainer.fakes import SPEC, FakeActors, FakeEngines, make_config, make_problem

CANARY = np.arange(4, dtype=np.int32)


def make_sync(actors: FakeActors, engines: FakeEngines, given_up: list[str] | None = None, **more: Any) -> WeightSync:
    """A weight sync whose calls are done when they are made."""
    told = given_up if given_up is not None else []
    settings = {"spec": SPEC, "canary": CANARY, "max_gap": 1e-3} | more
    return WeightSync(actors, engines, list, lambda spec, reason: told.append(f"{spec.name}: {reason}"), **settings)


def make_trainer(
    method: str,
    *,
    actors: FakeActors | None = None,
    engines: FakeEngines | None = None,
    sync: WeightSync | None = None,
    more_of_engines: Mapping[str, Any] | None = None,
    log: RolloutLog | None = None,
    problems_of: Callable[[int], Sequence[Problem]] | None = None,
    more: Mapping[str, Any] | None = None,
    **changes: Any,
) -> tuple[Trainer, list[str], FakeActors, FakeEngines]:
    """A trainer over fakes. `more_of_engines` and `more`: further arguments of `RolloutEngines` and of `Trainer`."""
    actors = actors or FakeActors([])
    engines = engines or FakeEngines(actors.events)
    config, problems = make_config(method, **changes), [make_problem(0), make_problem(1)]
    problems_of = problems_of or (lambda step: problems)
    rollout_engines = RolloutEngines(engines, sync or make_sync(actors, engines), **(more_of_engines or {}))
    logged = (lambda step: False) if log is None else log.has
    schedule = StreamingSchedule if config.rollout.schedule == "streaming" else RolloutSchedule
    source = schedule(config, METHODS[method].needs, rollout_engines, problems_of, logged)
    collector = Collector(config, METHODS[method], actors, source, AnswerEquivalence("exact"), problems_of)
    trainer = Trainer(
        config=config,
        needs=METHODS[method].needs,
        actors=actors,
        collect=(collector if log is None else LoggedCollector(collector, log)).collect,
        **{"checkpoints": CheckpointWriter(config, actors)} | dict(more or {}),
    )
    return trainer, actors.events, actors, engines


def story(events: list[str]) -> list[str]:
    """The events without the details of a weight sync."""
    return [
        e for e in events if e.split()[0] in ("teacher", "receive", "sample", "stats", "update") and e != "stats policy"
    ]


def test_co_rewarding_i_syncs_samples_both_views_and_updates() -> None:
    trainer, events, actors, engines = make_trainer("co_rewarding_i")
    trainer.step(1, PhaseTimer())
    assert story(events) == ["receive 0", "sample 0", "stats reference", "update"]
    assert [tuple(r.prompt) for r in engines.requests] == [(10, 1), (10, 2), (11, 1), (11, 2)]
    assert [r.n for r in engines.requests] == [4] * 4
    assert len(actors.batches[0]) == 16


def test_co_rewarding_ii_updates_the_teacher_first_and_samples_it_before_the_policy() -> None:
    trainer, events, actors, engines = make_trainer("co_rewarding_ii")
    trainer.step(1, PhaseTimer())
    assert story(events) == [
        "teacher 0.9900",
        "receive 1",
        "stats teacher",  # the canary of the sync
        "sample 1",
        "receive 0",
        "sample 0",
        "stats teacher",  # the KL reference
        "update",
    ]
    assert [r.n for r in engines.requests] == [3, 3, 4, 4]
    assert len(actors.batches[0]) == 8  # the teacher's completions are not trained on


def test_i_and_ii_on_the_originals_samples_one_view_a_role() -> None:
    trainer, _, actors, engines = make_trainer("co_rewarding_i+ii_original")
    trainer.step(1, PhaseTimer())
    assert [tuple(r.prompt) for r in engines.requests] == [(10, 2), (11, 2), (10, 1), (11, 1)]  # the teacher's first
    assert [r.n for r in engines.requests] == [3, 3, 4, 4]
    assert len(actors.batches[0]) == 8


def test_later_steps_sync_the_weights_of_later_updates() -> None:
    trainer, events, _, _ = make_trainer("co_rewarding_ii")
    trainer.step(1, PhaseTimer())
    events.clear()
    trainer.step(2, PhaseTimer())
    assert [e for e in events if e.startswith("receive")] == ["receive 3", "receive 2"]


@pytest.mark.parametrize("method", get_args(MethodName))
def test_every_method_runs_and_gets_what_it_needs(method: MethodName) -> None:
    trainer, events, actors, _ = make_trainer(method)
    result = trainer.step(1, PhaseTimer())
    needs = METHODS[method].needs
    assert any(e.startswith("teacher") for e in events) == needs.teacher == (method in TEACHER_METHODS)
    assert (len(needs.views) == 2) == (method in TWO_VIEW_METHODS)
    for role, groups in (("policy", lambda g: g.rewards is not None), ("teacher", lambda g: g.rewards is None)):
        assert {g.group.view for g in result.scored if groups(g)} == set(needs.sampled_views(role))
    ground_truths = {problem.uid: problem.ground_truth for problem in (make_problem(0), make_problem(1))}
    assert [g.ground_truth for g in result.scored] == [
        ground_truths[g.group.uid] for g in result.scored
    ]  # for people, in the dump
    assert np.isfinite(actors.batches[0].advantages).all()
    assert result.metrics["reward/mean"] == pytest.approx(
        np.mean([r for g in result.scored if g.rewards is not None for r in g.rewards])
    )


def test_rewards_become_advantages_of_the_batch_in_order() -> None:
    trainer, _, actors, _ = make_trainer("majority_voting")
    result = trainer.step(1, PhaseTimer())
    groups = [g for g in result.scored if g.advantages is not None]
    expected = np.concatenate([g.advantages for g in groups if g.advantages is not None])
    np.testing.assert_array_equal(actors.batches[0].advantages, expected)
    # answers 0, 1, 2, 0: the vote is 0, so rewards are 1, 0, 0, 1
    assert groups[0].label == "0"
    np.testing.assert_array_equal(groups[0].rewards, [1, 0, 0, 1])
    np.testing.assert_allclose(
        groups[0].advantages, np.array([1, -1, -1, 1]) * 0.5 / (np.sqrt(1 / 3) + 1e-6), rtol=1e-6
    )


def test_one_update_a_batch_reads_no_old_log_probs() -> None:
    trainer, events, actors, _ = make_trainer("majority_voting", **{"loss.kl_coef": 0})
    trainer.step(1, PhaseTimer())
    assert story(events) == ["receive 0", "sample 0", "update"]
    assert actors.batches[0].old_logprobs is None
    assert actors.batches[0].reference_logprobs is None


def test_several_updates_a_batch_read_old_log_probs_and_cut_whole_groups() -> None:
    trainer, _, actors, _ = make_trainer("majority_voting", **{"loss.updates_per_batch": 2})
    trainer.step(1, PhaseTimer())
    assert [len(batch) for batch in actors.batches] == [4, 4]
    assert all(batch.old_logprobs is not None for batch in actors.batches)
    assert trainer.state.num_updates == 2
    tokens = [sum(n - 2 for n in batch.sequences.lengths) for batch in actors.batches]
    for batch, count in zip(actors.batches, tokens, strict=True):
        np.testing.assert_allclose(batch.token_weights, 1 / count, rtol=1e-6)


def test_requests_of_a_step_are_seeded_by_what_is_sampled() -> None:
    one, other = make_trainer("co_rewarding_ii"), make_trainer("co_rewarding_ii")
    for trainer, _, _, _ in (one, other):
        trainer.step(3, PhaseTimer())
    seeds = [r.seed for r in one[3].requests]
    assert seeds == [r.seed for r in other[3].requests]
    assert len(set(seeds)) == len(seeds)
    one[3].requests.clear()
    one[0].step(4, PhaseTimer())
    assert not set(seeds) & {r.seed for r in one[3].requests}


def test_the_limit_of_the_canary_is_part_of_where_a_run_stands() -> None:
    trainer, *_ = make_trainer("co_rewarding_i", **{"sync.max_logprob_gap": 0.5})
    trainer._complete(1, {"sync/canary_limit": 0.02}, PhaseTimer())
    trainer._complete(2, {}, PhaseTimer())  # a step without a weight sync
    assert (trainer.state.step, trainer.state.canary_limit, trainer.state.canary_allowed) == (2, 0.02, 0.5)
    trainer._complete(3, {"sync/canary_limit": 0.03}, PhaseTimer())  # of the teacher's engines
    trainer._complete(4, {"sync/canary_limit": 0.02}, PhaseTimer())
    assert trainer.state.canary_limit == 0.03


def test_all_rollouts_vote_and_a_seeded_choice_of_them_is_trained_on() -> None:
    trainer, _, actors, engines = make_trainer("majority_voting", **{"rollout.votes": 7})
    result = trainer.step(1, PhaseTimer())
    assert [r.n for r in engines.requests] == [7, 7]
    (batch,) = actors.batches
    assert len(batch) == 8  # rollout.n of either question
    for item, part in zip(result.scored, (slice(0, 4), slice(4, 8)), strict=True):
        assert item.rewards is not None
        assert item.advantages is not None
        assert item.label == "0"  # of seven: 0, 1, 2, 0, 1, 2, 0
        assert item.rewards.tolist() == [1, 0, 0, 1, 0, 0, 1]
        trained = ~np.isnan(item.advantages)
        assert trained.sum() == 4
        np.testing.assert_array_equal(batch.advantages[part], item.advantages[trained])
        np.testing.assert_allclose(batch.advantages[part].sum(), 0, atol=1e-6)  # normalised over those trained on
