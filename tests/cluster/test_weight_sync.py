"""Publishing: the order of the transfer, the version numbers, and the gate that refuses wrong weights."""

import numpy as np
import pytest

from megatron_coreward.cluster.weight_sync import WeightSync, weight_version
from megatron_coreward.errors import RunError
from tests.trainer.fakes import ROUTE, FakeActors, FakeEngines


def make_sync(events: list[str], engine_score: float = -1.0, waited: list[list[str]] | None = None) -> WeightSync:
    def wait(refs: list[str]) -> list[list[str]]:
        if waited is not None:
            waited.append(refs)
        return [[] for _ in refs]

    return WeightSync(
        FakeActors(events),
        FakeEngines(events, engine_score),
        wait,
        route=ROUTE,
        num_buckets=3,
        canary=np.arange(5, dtype=np.int32),
        max_gap=1e-3,
    )


def test_every_policy_and_teacher_has_its_own_version() -> None:
    versions = [weight_version(role, updates) for updates in range(3) for role in ("policy", "teacher")]
    assert versions == [0, 1, 2, 3, 4, 5]


def test_a_bucket_is_written_while_the_one_before_it_is_loaded() -> None:
    events: list[str] = []
    waited: list[list[str]] = []
    make_sync(events, waited=waited).sync_weights("policy", 0)
    transfer = [e for e in events if e.startswith(("write", "load"))]
    assert transfer == ["write policy 0", "load 0", "write policy 1", "load 1", "write policy 2", "load 2"]
    # bucket 2 goes into the slot of bucket 0, so bucket 0 must have been loaded before it is written
    assert waited == [["written 0"], ["written 1", "loaded 0"], ["written 2", "loaded 1"], ["loaded 2"]]


def test_the_same_version_is_not_sent_twice() -> None:
    events: list[str] = []
    sync = make_sync(events)
    assert sync.sync_weights("policy", 0) is not None
    events.clear()
    assert sync.sync_weights("policy", 0) is None
    assert events == []
    assert sync.sync_weights("teacher", 1) is not None
    assert sync.sync_weights("policy", 0) is not None  # the engines held the teacher since


def test_wrong_weights_in_an_engine_are_refused_and_sent_anew() -> None:
    events: list[str] = []
    sync = make_sync(events, engine_score=-1.01)
    for _ in range(2):
        with pytest.raises(RunError, match=r"weight sync.*1.00e-02.*sync.max_logprob_gap"):
            sync.sync_weights("policy", 0)
    assert events.count("finish 0") == 2


def test_a_gap_that_is_not_a_number_is_refused() -> None:
    with pytest.raises(RunError, match="nan"):
        make_sync([], engine_score=float("nan")).sync_weights("policy", 0)
