"""Programs that want to do harm do none, at both levels; programs that compute get their results."""

import os
import time
from pathlib import Path

import pytest

from megatron_coreward.evaluation.sandbox import LEVELS, Isolation, Limits, Outcome, best_isolation, run_python

QUICK = Limits(seconds=1.0)

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Isolation:
    if request.param == "namespaces" and best_isolation() != "namespaces":
        pytest.skip("this machine allows no user namespaces")
    return request.param


def refused(program: str, level: Isolation, **limits: float) -> None:
    """The program's attempt fails: it does not get to print."""
    outcome = run_python(f"{program}\nprint('done')", limits=Limits(**limits), isolation=level)
    assert outcome.status == "failed"
    assert "done" not in outcome.output


def test_a_program_reads_its_input_and_prints(level: Isolation) -> None:
    program = "import threading\nt = threading.Thread(target=lambda: print(int(input()) + 1))\nt.start()\nt.join()"
    assert run_python(program, "41\n", isolation=level) == Outcome("ok", "42\n")


def test_a_program_that_fails_says_so(level: Isolation) -> None:
    assert run_python("print('é')\nraise SystemExit(3)", isolation=level) == Outcome("failed", "é\n")


@pytest.mark.long
def test_one_that_never_ends_is_ended(level: Isolation) -> None:
    for program in (
        "while True: pass",
        "import signal, time\nfor n in range(1, 65):\n try: signal.signal(n, signal.SIG_IGN)\n except Exception: pass\n"
        "while True: time.sleep(1)",
    ):
        begin = time.monotonic()
        assert run_python(program, limits=QUICK, isolation=level).status == "timeout"
        assert time.monotonic() - begin < QUICK.seconds + 5


def test_memory_is_limited(level: Isolation) -> None:
    refused("x = bytearray(600 << 20)", level, memory_bytes=512 << 20)


def test_it_starts_no_process(level: Isolation) -> None:
    refused("import os\nos.fork()", level)
    refused("import subprocess\nsubprocess.run(['/bin/true'])", level)
    refused("import multiprocessing as m\nm.Process(target=print).start()", level)


def test_it_has_no_network(level: Isolation) -> None:
    refused("import socket\nsocket.socket()", level)
    refused("import socket\nsocket.socket(socket.AF_UNIX)", level)


def test_it_cannot_end_others(level: Isolation) -> None:
    refused(f"import os\nos.kill({os.getpid()}, 15)", level)
    refused("import os\nos.killpg(0, 9)", level)


def test_what_it_prints_and_writes_is_bounded(level: Isolation) -> None:
    limits = Limits(seconds=3.0, output_bytes=1 << 16)
    outcome = run_python("while True: print('x' * 1000, flush=True)", limits=limits, isolation=level)
    assert outcome.status != "ok"
    assert len(outcome.output) <= 1 << 16
    refused("open('large', 'wb').write(bytes(1 << 20))", level, output_bytes=1 << 16)


def test_it_sees_no_environment(level: Isolation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_TOKEN", "secret")
    outcome = run_python("import os\nprint('A_TOKEN' in os.environ)", isolation=level)
    assert outcome == Outcome("ok", "False\n")


def test_it_works_in_an_empty_folder_that_goes(level: Isolation) -> None:
    outcome = run_python("import os\nopen('x', 'w').write('1')\nprint(os.getcwd(), *os.listdir())", isolation=level)
    folder, *names = outcome.output.split()
    assert set(names) == {"program.py", "x"}
    assert not (Path(folder) / "x").exists()


class TestNamespaces:
    @pytest.fixture(autouse=True)
    def _available(self) -> None:
        if best_isolation() != "namespaces":
            pytest.skip("this machine allows no user namespaces")

    def test_nothing_outside_changes(self, tmp_path: Path) -> None:
        here = Path(__file__).resolve()
        for target in (tmp_path / "new", here.with_name("new"), Path.home() / "coreward-new"):
            run_python(f"open({str(target)!r}, 'w').write('x')", isolation="namespaces")
            assert not target.exists()
        refused(f"open({str(here)!r}, 'a')", "namespaces")

    def test_it_cannot_undo_its_confinement(self) -> None:
        program = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
libc.unshare(0x10020000)  # new user and mount namespaces of its own, in which it has all capabilities
attempts = [libc.mount(None, b'/', None, 32 | 4096, None), libc.umount2(b'/proc', 2), libc.umount2(b'/tmp', 2)]
print(attempts, os.access('/etc/passwd', os.W_OK))
"""
        assert run_python(program, isolation="namespaces") == Outcome("ok", "[-1, -1, -1] False\n")

    def test_it_sees_no_other_process(self) -> None:
        outcome = run_python(
            "import os\nprint([n for n in os.listdir('/proc') if n.isdigit()])", isolation="namespaces"
        )
        assert outcome == Outcome("ok", "['1']\n")
