"""A weight sync: one call to each side, the names of versions, and the gate that refuses wrong weights."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_coreward.cluster.weight_sync import CALIBRATED, WeightSync, canary_tokens, open_sync
from megatron_coreward.errors import RunError
from megatron_coreward.types import WeightVersion
from tests.trainer.fakes import FakeActors, FakeEngines, make_config, make_problem
from tests.trainer.test_loop import make_sync


def sync_of(events: list[str], engine_score: float = -1.0, **options: Any) -> WeightSync:
    return make_sync(FakeActors(events), FakeEngines(events, engine_score), **options)


def test_every_policy_and_teacher_has_a_number_of_its_own_which_names_it() -> None:
    versions = [WeightVersion(role, updates) for updates in range(3) for role in ("policy", "teacher")]
    assert [version.number for version in versions] == [0, 1, 2, 3, 4, 5]
    assert [WeightVersion.of(number) for number in range(6)] == versions


def test_a_sync_is_one_call_to_the_engines_and_one_to_the_actors() -> None:
    events: list[str] = []
    sync = sync_of(events)
    sync.sync_weights("policy", 0)
    assert events == ["open", "receive 0", "canary", "send policy", "stats policy"]
    events.clear()
    sync.sync_weights("teacher", 0)  # the same sender
    assert events == ["receive 1", "canary", "send teacher", "stats teacher"]


def test_engines_without_memory_to_compute_score_the_canary_when_they_have_got_it() -> None:
    events: list[str] = []
    sync = sync_of(events, wake_caches=lambda: events.append("wake"))
    sync.sync_weights("policy", 0)
    assert events == ["open", "receive 0", "send policy", "wake", "canary", "stats policy"]


def test_the_same_version_is_not_sent_twice() -> None:
    events: list[str] = []
    sync = sync_of(events)
    assert sync.sync_weights("policy", 0) is not None
    events.clear()
    assert sync.sync_weights("policy", 0) is None
    assert events == []
    assert sync.sync_weights("teacher", 0) is not None
    assert sync.sync_weights("policy", 0) is not None  # the engines held the teacher since


def test_wrong_weights_in_an_engine_are_refused_and_sent_again() -> None:
    events: list[str] = []
    sync = sync_of(events, engine_score=-1.01)
    for _ in range(2):
        with pytest.raises(RunError, match=r"weight sync.*1.00e-02.*sync.max_logprob_gap"):
            sync.sync_weights("policy", 0)
    assert events.count("receive 0") == 2


def test_a_gap_that_is_not_a_number_is_refused() -> None:
    with pytest.raises(RunError, match="nan"):
        sync_of([], engine_score=float("nan")).sync_weights("policy", 0)


def test_the_first_sync_of_rounded_weights_sets_the_limit_for_later_ones() -> None:
    sync = sync_of([], engine_score=-1.02, max_gap=0.5, calibrate_above=1e-3)
    first = sync.sync_weights("policy", 0)
    assert first is not None
    assert first.canary_gap == pytest.approx(0.02, rel=1e-3)
    assert first.limit == pytest.approx(CALIBRATED * 0.02, rel=1e-3)
    sync._engines.held = -1.3  # type: ignore[attr-defined]
    with pytest.raises(RunError, match="3.00e-01 nats on average; allowed: 1e-01"):
        sync.sync_weights("policy", 1)


@pytest.mark.parametrize(("gap", "limit"), [(0.0, 1e-3), (0.3, 0.5)])
def test_a_calibrated_limit_stays_between_what_rounding_makes_and_what_the_config_allows(
    gap: float, limit: float
) -> None:
    report = sync_of([], engine_score=-1.0 - gap, max_gap=0.5, calibrate_above=1e-3).sync_weights("policy", 0)
    assert report is not None
    assert report.limit == limit


@pytest.mark.parametrize(("known", "limit"), [(None, 0.1), (0.03, 0.03)])
def test_a_limit_that_an_earlier_attempt_has_calibrated_is_not_calibrated_again(
    known: float | None, limit: float
) -> None:
    config = make_config(**{"model.dtype": "bfloat16", "sync.max_logprob_gap": 0.5})
    events: list[str] = []
    processes: Any = SimpleNamespace(
        actors=FakeActors(events),
        engines=FakeEngines(events, -1.02),
        transport="gloo",
        colocation=None,
        watchdog=SimpleNamespace(get=lambda calls, awaited: list(calls)),
    )
    sync = open_sync(config, processes, np.arange(3, dtype=np.int32), known)
    report = sync.sync_weights("policy", 0)
    assert report is not None
    assert report.limit == pytest.approx(limit, rel=1e-3)


def test_after_an_error_all_parties_are_notified_and_meet_again() -> None:
    events: list[str] = []
    given_up: list[str] = []
    sync = sync_of(events, given_up=given_up)
    sync.sync_weights("policy", 0)
    before = sync.open()
    sync._wait = lambda refs: (_ for _ in ()).throw(RunError("a rank is gone"))
    with pytest.raises(RunError, match="a rank is gone"):
        sync.sync_weights("policy", 1)
    assert given_up == [f"{before.name}: a rank is gone"]
    sync._wait = list
    sync.sync_weights("policy", 1)
    assert events.count("open") == 2
    assert sync.open().name != before.name  # nothing of the former transfer can be taken for one of the new


def test_a_replaced_engine_makes_all_meet_again_and_gets_the_weights() -> None:
    events: list[str] = []
    sync = sync_of(events)
    sync.sync_weights("policy", 0)
    sync.reset()
    assert sync.engine_epoch == 1
    assert sync.sync_weights("policy", 0) is not None
    assert events.count("open") == 2


def test_the_canary_is_text_of_the_first_questions() -> None:
    problems = [make_problem(number) for number in range(9)]  # two tokens each
    assert canary_tokens(problems, 5).tolist() == [10, 1, 11, 1, 12]
    with pytest.raises(ValueError, match="0 tokens"):
        canary_tokens([])
