"""The simulation of rollouts gives what can be computed by hand, and orders the schedules as they must be ordered."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import simulate_rollouts
from benchmarks.simulate_rollouts import SCHEDULES, Lengths, Machine, Schedule, simulate


def lengths(*values: int) -> Lengths:
    return np.array(values, dtype=np.int64)


def test_one_engine_and_one_sequence_take_as_many_steps_as_tokens() -> None:
    machine = Machine(engines=1, slots=1, half=1.0, update=0.0, group=1)
    outcome = simulate(machine, [lengths(10)], Schedule(fixed_shares=True))
    assert (outcome.seconds, outcome.tokens, outcome.busy) == (pytest.approx(20), 10, pytest.approx(20))


def test_sequences_at_once_share_their_steps() -> None:
    machine = Machine(engines=1, slots=2, half=1.0, update=0.0, group=2)
    outcome = simulate(machine, [lengths(10, 4)], Schedule(fixed_shares=True))
    assert outcome.seconds == pytest.approx(4 * 3 + 6 * 2)  # four steps with both, six with one


def test_an_engine_is_idle_while_another_draws_its_longest_sample_and_while_actors_learn() -> None:
    machine = Machine(engines=2, slots=1, half=1.0, update=1.0, group=1)
    outcome = simulate(machine, [lengths(30, 10)], Schedule(fixed_shares=True))
    update = machine.least_seconds(40)
    assert update == pytest.approx(40)
    assert outcome.seconds == pytest.approx(60 + update)
    assert outcome.idle_share(machine) == pytest.approx(1 - (60 + 20) / (2 * 100))


def test_groups_go_to_the_engine_that_has_room() -> None:
    machine = Machine(engines=2, slots=1, half=1.0, update=0.0, group=1)
    batch = [lengths(30, 10, 30, 10)]  # fixed shares give both long ones to one engine
    fixed, streamed = (simulate(machine, batch, Schedule(fixed_shares=share)) for share in (True, False))
    assert (fixed.seconds, streamed.seconds) == (pytest.approx(120), pytest.approx(80))


def test_a_weight_sync_waits_for_long_samples_unless_they_go_on_with_new_weights() -> None:
    machine = Machine(engines=1, slots=2, half=1e9, update=0.1, group=1)
    batches = [lengths(10, 10), lengths(10, 100), lengths(10, 10), lengths(10, 10)]
    waiting, partial = (
        simulate(machine, batches, Schedule(staleness=1, partial=together)) for together in (False, True)
    )
    assert partial.seconds < waiting.seconds


def test_work_ahead_is_faster_and_draws_the_same_tokens() -> None:
    machine = Machine(engines=4, slots=16)
    rng = np.random.default_rng(1)
    batches = [np.exp(rng.normal(4, 1, 256)).astype(np.int64) + 1 for _ in range(5)]
    outcomes = {name: simulate(machine, batches, schedule) for name, schedule in SCHEDULES.items()}
    assert {outcome.tokens for outcome in outcomes.values()} == {sum(int(batch.sum()) for batch in batches)}
    order = ("staleness 0", "staleness 1", "staleness 1, partial", "staleness 2, partial")
    seconds = [outcomes[name].seconds for name in order]
    assert seconds == sorted(seconds, reverse=True)
    assert all(0 <= outcome.idle_share(machine) < 1 for outcome in outcomes.values())
    assert all(0 < outcome.rate_share(machine) <= 1 for outcome in outcomes.values())


def test_the_command_reads_recorded_lengths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = {"role": ["policy", "policy", "teacher"], "token_ids": [[1] * 7, [1] * 9, [1] * 1000]}
    pq.write_table(pa.table(rows), tmp_path / "step_000001.parquet")
    command = ["simulate_rollouts.py", "--lengths", str(tmp_path), "--engines", "2", "--sequences", "32", "--json"]
    monkeypatch.setattr(sys, "argv", command)
    simulate_rollouts.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["lengths"]["mean"] == 8
    assert set(result["by_sequences"]["32"]) == set(SCHEDULES)
