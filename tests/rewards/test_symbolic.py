"""The processes for symbolic comparison: light, started late, killed on time, replaced, and never waited for."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from megatron_coreward.errors import RunError
from megatron_coreward.rewards import symbolic
from megatron_coreward.rewards.symbolic import SymbolicPool

TOWER = r"\sum_{k=1}^{3} 9^{9^{9^{9}}}"  # one big-integer operation that ends neither soon nor on a Python signal
others: set[int] = set()
GRACE_S = 30.0  # for the start of a process on a crowded machine

pytestmark = pytest.mark.timeout(120)


def workers(of: int | None = None) -> set[int]:
    """Ids of the processes that are children of this one, or of another, and not the business of other test modules."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes()
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (FileNotFoundError, ProcessLookupError):  # it ended meanwhile
                continue
            if parent == (of or os.getpid()) and b"symbolic_worker.py" in command:
                found.add(int(entry.name))
    return found - others


def comparing() -> int:
    """The process that compares: the one that the only comparison process has forked."""
    (loaded,) = workers()
    deadline = time.monotonic() + GRACE_S
    while not (forked := workers(loaded)):
        assert time.monotonic() < deadline, "no process was forked"
        time.sleep(0.01)
    return forked.pop()


@pytest.fixture(scope="module", autouse=True)
def know_others() -> None:
    others.update(workers())


@pytest.fixture
def pool() -> Iterator[SymbolicPool]:
    """A pool that waits long enough for any honest pair on any machine."""
    pool = SymbolicPool(timeout_s=60.0)
    yield pool
    pool.close()
    assert not workers()


@pytest.fixture(scope="module")
def shared() -> Iterator[SymbolicPool]:
    pool = SymbolicPool(timeout_s=60.0)
    yield pool
    pool.close()


def test_no_process_before_the_first_pair_and_one_for_all_after(pool: SymbolicPool) -> None:
    assert not workers()
    assert pool.equivalent("x", "y") is False
    started = workers()
    assert len(started) == 1
    assert pool.equivalent("x+x", "2x") is True
    assert workers() == started


def test_a_process_is_kept_however_large_its_parent_is(pool: SymbolicPool) -> None:
    """On Linux a new process inherits the parent's peak memory as its own until it has a larger one."""
    ballast = np.ones(600 << 20, dtype=np.uint8)
    assert pool.equivalent("x", "y") is False
    started = workers()
    assert len(started) == 1
    assert pool.equivalent("x+x", "2x") is True
    assert workers() == started
    assert len(ballast)


def test_a_pair_that_runs_over_the_limit_gives_none_on_time_and_the_next_is_answered(pool: SymbolicPool) -> None:
    pool.equivalent("x", "y")
    loaded, first = workers(), comparing()
    pool._timeout_s = 1.0
    start = time.monotonic()
    assert pool.equivalent(TOWER, "1") is None
    assert 0.9 < time.monotonic() - start < 1.0 + GRACE_S
    assert comparing() != first
    assert workers() == loaded  # math-verify is not loaded again
    pool._timeout_s = 60.0
    assert pool.equivalent("x+x", "2x") is True


@pytest.mark.long
def test_a_process_that_does_not_report_in_time_is_given_up_with_its_comparison(pool: SymbolicPool) -> None:
    """Even where nobody reports that the kernel has ended the comparison."""
    pool.equivalent("x", "y")
    (loaded,), first = workers(), comparing()
    pool._timeout_s = 0.5
    os.kill(loaded, signal.SIGSTOP)
    assert pool.equivalent(TOWER, "1") is None
    assert loaded not in workers()
    assert not Path(f"/proc/{first}").exists() or "State:\tZ" in Path(f"/proc/{first}/status").read_text()
    pool._timeout_s = 60.0
    assert pool.equivalent("x+x", "2x") is True


@pytest.mark.long
@pytest.mark.parametrize("which", ["comparing", "loaded"])
def test_a_process_that_dies_under_a_pair_gives_none_and_the_next_is_answered(pool: SymbolicPool, which: str) -> None:
    pool.equivalent("x", "y")
    victim = comparing() if which == "comparing" else workers().pop()
    pool._timeout_s = 5.0
    threading.Timer(0.3, os.kill, (victim, signal.SIGKILL)).start()
    start = time.monotonic()
    assert pool.equivalent(TOWER, "1") is None
    assert time.monotonic() - start < 5.0 + GRACE_S
    pool._timeout_s = 60.0
    assert pool.equivalent("x+x", "2x") is True
    assert len(workers()) == 1


@pytest.mark.parametrize("which", ["comparing", "loaded"])
def test_a_process_that_died_idle_costs_no_pair(pool: SymbolicPool, which: str) -> None:
    pool.equivalent("x", "y")
    os.kill(comparing() if which == "comparing" else workers().pop(), signal.SIGKILL)
    time.sleep(0.2)
    assert pool.equivalent("x+x", "2x") is True


def test_answers_stay_with_their_pairs_whatever_dies_when(pool: SymbolicPool) -> None:
    """The comparing process is killed at random moments while pairs with known answers go through it."""
    pool.equivalent("x", "y")
    done = threading.Event()

    def kill() -> None:
        chance = random.Random(0)
        while not done.wait(chance.uniform(0.0, 0.03)):
            for process in workers():
                for victim in workers(process):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(victim, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        graded_answers = [(n % 2 == 0, pool.equivalent(rf"\sqrt{{{n * n}}}", str(n + n % 2))) for n in range(2, 300)]
    finally:
        done.set()
        killer.join()
    assert {graded for right, graded in graded_answers if right} in ({True}, {True, None})
    assert {graded for right, graded in graded_answers if not right} in ({False}, {False, None})


def test_memory_is_limited(pool: SymbolicPool) -> None:
    pool.equivalent("x", "y")
    worker = comparing()
    limits = Path(f"/proc/{worker}/limits").read_text().splitlines()
    (address_space,) = [line for line in limits if line.startswith("Max address space")]
    assert address_space.split()[3] == str(2 << 30)


def test_a_process_is_light_whatever_its_parent_has_loaded(pool: SymbolicPool) -> None:
    assert np.ones(1).any()
    assert "/numpy" in Path("/proc/self/maps").read_text()
    pool.equivalent("x", "y")
    worker = comparing()
    libraries = Path(f"/proc/{worker}/maps").read_text()
    assert not [name for name in ("/numpy", "/torch", "/pyarrow", "/ray", "/vllm") if name in libraries]
    descriptors = {os.readlink(entry) for entry in Path(f"/proc/{worker}/fd").iterdir()}
    assert all(target.startswith("pipe:") or target == "/dev/null" for target in descriptors), descriptors


@pytest.mark.long
def test_a_process_does_not_outlive_a_parent_that_was_killed_while_it_worked() -> None:
    program = (
        "import threading, time\n"
        "from megatron_coreward.rewards.symbolic import SymbolicPool\n"
        "pool = SymbolicPool(2.0, 1)\n"
        "pool.equivalent(r'\\sum_{k=1}^{3}k', '6')\n"  # with math-verify loaded
        f"threading.Thread(target=pool.equivalent, args=({TOWER!r}, '1'), daemon=True).start()\n"
        "while pool._idle.qsize():\n"
        "    time.sleep(0.05)\n"
        "time.sleep(0.5)\n"
        "print('at work', flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline().strip() == "at work"
        (loaded,) = workers(parent.pid)
        left = {loaded, *workers(loaded)}
        assert len(left) == 2
        parent.kill()
    deadline = time.monotonic() + 2.0 + 1.0 + GRACE_S
    while any(Path(f"/proc/{worker}").exists() for worker in left):
        assert time.monotonic() < deadline, "still running"
        time.sleep(0.1)


def test_many_threads_share_the_processes_and_get_their_own_answers() -> None:
    pool = SymbolicPool(timeout_s=60.0, num_workers=2)
    wrong: list[int] = []

    def compare(n: int) -> None:
        if (
            pool.equivalent(rf"\sqrt{{{n * n}}}", str(n)) is not True
            or pool.equivalent(f"{n}x", f"{n + 1}x") is not False
        ):
            wrong.append(n)

    threads = [threading.Thread(target=compare, args=(n,)) for n in range(2, 14)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(workers()) == 2
    pool.close()
    assert wrong == []
    assert not workers()


def test_a_process_that_cannot_start_is_an_error_and_not_a_verdict(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "math_verify.py").write_text("raise ImportError('no sympy here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(RunError, match="ImportError: no sympy here"):
        SymbolicPool(1.0).equivalent(r"\sum_{k=1}^{3}k", "6")  # what only math-verify reads
    monkeypatch.setattr(symbolic, "WORKER_PROGRAM", tmp_path / "missing.py")
    with pytest.raises(RunError, match="exit status 2"):
        SymbolicPool(1.0).equivalent("x", "y")


def test_what_a_library_prints_is_not_taken_for_an_answer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "math_verify.py").write_text(
        "print('loading', flush=True)\n"
        "LatexExtractionConfig = dict\n"
        "def parse(text, *_, **__):\n"
        "    print('parsing', flush=True)\n"
        "    return text\n"
        "def verify(a, b, **_):\n"
        "    return a.lower() == b.lower()\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    pool = SymbolicPool(60.0)
    assert pool.equivalent(r"\sum x", r"\sum X") is True
    assert pool.equivalent(r"\sum x", r"\sum y") is False
    pool.close()


def test_a_process_that_has_grown_is_retired_with_its_answer_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    greedy = tmp_path / "symbolic_worker.py"
    greedy.write_text(symbolic.WORKER_PROGRAM.read_text().replace("512 << 10", "1"))
    monkeypatch.setattr(symbolic, "WORKER_PROGRAM", greedy)
    pool = SymbolicPool(60.0)
    pool.equivalent("x", "y")
    time.sleep(0.5)  # until the first has left and the second is there
    second = comparing()
    assert pool.equivalent("x+x", "2x") is True
    assert pool.equivalent("x+x", "3x") is False
    assert comparing() != second
    pool.close()


@pytest.mark.parametrize(("timeout_s", "num_workers"), [(0.0, 1), (-1.0, 1), (1.0, 0)])
def test_a_pool_without_time_or_processes_is_refused(timeout_s: float, num_workers: int) -> None:
    with pytest.raises(ValueError, match="need timeout_s > 0"):
        SymbolicPool(timeout_s, num_workers)


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        (r"\sqrt{8}", r"2\sqrt{2}", True),
        (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}", True),
        ("(x+1)^{2}", "x^{2}+2x+1", True),
        (r"[0,\infty)", r"x\ge0", True),
        ("4+6i", "6i+4", True),
        (r"\sqrt{8}", r"3\sqrt{2}", False),
        ("x+1", "x+2", False),
        ("5x=1", "1", False),  # holds in one direction of math-verify only
        (r"\frac{", "1", False),
    ],
)
def test_verdicts_are_those_of_mathematics_and_symmetric(shared: SymbolicPool, a: str, b: str, same: bool) -> None:
    assert shared.equivalent(a, b) is same
    assert shared.equivalent(b, a) is same
