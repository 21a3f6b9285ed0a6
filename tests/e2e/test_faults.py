"""A run that is killed, stopped or damaged loses nothing: it ends with the metrics and weights of one that was not."""

import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from megatron_coreward.checkpoint.store import checkpoint_path, saved_steps
from megatron_coreward.config.schema import RunConfig
from megatron_coreward.telemetry.jsonl import read_rows
from megatron_coreward.telemetry.rollout_dump import rollouts_path
from tests.checkpoint.test_store import flip
from tests.e2e.conftest import Task
from tools.soak import Attempt, comparable_rows, digest, last_step, leftover_segments

pytestmark = [pytest.mark.e2e, pytest.mark.ray, pytest.mark.engine, pytest.mark.timeout(900)]

OPTIONS = ("steps=4", "checkpoint.every=1", "validation.every=2", "telemetry.console=plain")


def make_config(task: Task, name: str, method: str, *overrides: str) -> RunConfig:
    return task.config(method, *OPTIONS, f"run_dir={task.folder / 'faults' / name}", *overrides)


STARTED: list[Attempt] = []


def start(config: RunConfig) -> Attempt:
    STARTED.append(Attempt.start(config))
    return STARTED[-1]


@pytest.fixture(autouse=True)
def _end_what_was_started() -> Iterator[None]:
    yield
    while STARTED:
        STARTED.pop().end()


def run_to_end(config: RunConfig) -> str:
    attempt = start(config)
    status, output = attempt.wait()
    assert status == 0, output
    assert attempt.orphans() == []
    return output


@pytest.fixture(scope="module")
def reference(task: Task) -> Callable[[str], Path]:
    """The run directory of a method's run that nothing has disturbed."""
    done: dict[str, Path] = {}

    def of(method: str) -> Path:
        if method not in done:
            config = make_config(task, f"reference-{method}", method)
            run_to_end(config)
            done[method] = config.run_dir
        return done[method]

    return of


def wait_for(attempt: Attempt, condition: Callable[[], bool], timeout_s: float = 240) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert attempt.process.poll() is None, attempt.wait()[1]
        assert time.monotonic() < deadline, "what was waited for did not happen"
        time.sleep(0.01)


def assert_same(run_dir: Path, expected: Path) -> None:
    assert comparable_rows(run_dir) == comparable_rows(expected)
    assert digest(run_dir) == digest(expected)
    assert leftover_segments() == []


def in_update_of(config: RunConfig, step: int) -> Callable[[], bool]:
    """The rollout log of a step appears right before its update."""
    return rollouts_path(config.run_dir, step).exists


@pytest.mark.parametrize("method", ["co_rewarding_ii", pytest.param("co_rewarding_i", marks=pytest.mark.slow)])
def test_killed_in_an_update_and_with_a_damaged_checkpoint_it_goes_on_without_sampling_again(
    task: Task, reference: Callable[[str], Path], method: str
) -> None:
    expected = reference(method)
    config = make_config(task, f"killed-{method}", method)
    attempt = start(config)
    wait_for(attempt, in_update_of(config, 4))
    os.killpg(attempt.process.pid, signal.SIGKILL)
    assert attempt.wait()[0] == -signal.SIGKILL
    assert attempt.orphans() == []
    newest = saved_steps(config.run_dir)[-1]
    assert newest in (2, 3)  # the third may have been under way
    damaged = next((checkpoint_path(config.run_dir, newest) / "megatron").glob("*.distcp"))
    flip(damaged)

    output = run_to_end(config)
    assert f"damaged checkpoint, set aside as damaged_step_{newest:06d}" in output
    assert damaged.name in output
    assert f"resumed after step {newest - 1}" in output
    rows = {row["step"]: row for row in read_rows(config.run_dir / "metrics.jsonl")}
    for step in range(newest, 5):  # done again, from the rollout log: no engine was asked
        assert "time/rollout_s" not in rows[step]
        assert "rollout/tokens_per_s" not in rows[step]
        assert float(rows[step]["time/update_s"] or 0) > 0
    assert_same(config.run_dir, expected)


@pytest.mark.slow
@pytest.mark.parametrize("placement", ["disaggregated", "colocated"])
def test_sigterm_saves_says_how_to_go_on_and_exits_with_0(
    task: Task, reference: Callable[[str], Path], placement: str
) -> None:
    expected = reference("co_rewarding_ii")
    options = ("checkpoint.every=0", f"rollout.placement={placement}")
    config = make_config(task, f"stopped-{placement}", "co_rewarding_ii", *options)
    attempt = start(config)
    wait_for(attempt, lambda: last_step(config.run_dir) >= 2)
    begin = time.monotonic()
    os.kill(attempt.process.pid, signal.SIGTERM)
    status, output = attempt.wait()
    assert status == 0, output
    assert time.monotonic() - begin < 60
    assert re.search(r"stopped by SIGTERM; the same command goes on after step [23], in ", output)
    assert attempt.orphans() == []
    assert len(saved_steps(config.run_dir)) == 1
    run_to_end(config)
    assert_same(config.run_dir, expected)


@pytest.mark.slow
def test_an_engine_that_dies_is_started_again_and_the_run_goes_on(task: Task, reference: Callable[[str], Path]) -> None:
    expected = reference("co_rewarding_ii")
    config = make_config(task, "engine", "co_rewarding_ii")
    attempt = start(config)
    wait_for(attempt, lambda: last_step(config.run_dir) >= 1)
    kill_one(attempt, "engine")
    status, output = attempt.wait()
    assert status == 0, output
    assert "engine 0 died" in (config.run_dir / "events.log").read_text()
    assert attempt.orphans() == []
    assert_same(config.run_dir, expected)


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_run_with_its_name_and_by_setting_all_are_started_again(
    task: Task, reference: Callable[[str], Path]
) -> None:
    expected = reference("co_rewarding_ii")
    config = make_config(task, "rank", "co_rewarding_ii")
    attempt = start(config)
    wait_for(attempt, lambda: bool(saved_steps(config.run_dir)))
    kill_one(attempt, "rank")
    status, output = attempt.wait()
    assert status == 1
    assert re.search(r"the run failed: actor rank [01] died during .* the same command goes on after step", output)
    assert attempt.orphans() == []
    assert leftover_segments() == []

    again = make_config(task, "rank", "co_rewarding_ii", "faults.max_restarts=1")
    attempt = start(again)
    wait_for(attempt, lambda: last_step(config.run_dir) >= 3)
    kill_one(attempt, "rank")
    status, output = attempt.wait()
    assert status == 0, output
    assert attempt.orphans() == []
    assert_same(config.run_dir, expected)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["actor.pipeline_parallel", "actor.data_parallel"])
def test_resumed_under_another_layout_losses_agree(task: Task, reference: Callable[[str], Path], layout: str) -> None:
    expected = reference("co_rewarding_ii")
    config = make_config(task, f"layout-{layout}", "co_rewarding_ii", "actor.tensor_parallel=1", f"{layout}=2")
    shutil.copytree(expected, config.run_dir)
    shutil.rmtree(config.run_dir / "hf")
    shutil.rmtree(checkpoint_path(config.run_dir, 4))
    output = run_to_end(config)
    assert "made with other settings: " in output
    assert f"{layout} (1, now 2)" in output
    found, wanted = (read_rows(folder / "metrics.jsonl")[-1] for folder in (config.run_dir, expected))
    assert found["step"] == wanted["step"] == 4
    assert "time/rollout_s" in found  # other sums, other last bits: what was drawn under the old layout is not used
    for key in ("loss/policy", "loss/total", "loss/kl", "rollout/entropy"):
        assert found[key] == pytest.approx(wanted[key], abs=1e-4), key


def kill_one(attempt: Attempt, kind: str) -> None:
    victim: psutil.Process = attempt.victims(kind)[-1]
    victim.kill()
