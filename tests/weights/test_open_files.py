"""The limit of open files of a process that connects to many others, which is too low by default for some 80."""

import resource
import subprocess
import sys

import pytest

from megatron_coreward.errors import RunError
from megatron_coreward.weights.open_files import CONNECTIONS, OTHER_FILES, allow_connections

WANTED = OTHER_FILES + CONNECTIONS * 4096


class Limits:
    """The limits of a process that is not this one."""

    def __init__(self, soft: int, hard: int) -> None:
        self.now = (soft, hard)

    def getrlimit(self, which: int) -> tuple[int, int]:
        assert which == resource.RLIMIT_NOFILE
        return self.now

    def setrlimit(self, which: int, limits: tuple[int, int]) -> None:
        assert which == resource.RLIMIT_NOFILE
        self.now = limits


@pytest.mark.parametrize(
    ("before", "processes", "after"),
    [
        ((1024, 1_048_576), 8, 1024),  # enough
        ((1024, 1_048_576), 128, OTHER_FILES + CONNECTIONS * 128),
        ((1024, 1_048_576), 4096, WANTED),
        ((1024, resource.RLIM_INFINITY), 4096, WANTED),
        ((1024, 8192), 4096, 8192),  # as far as it goes
        ((256, 512), 1, 512),
        ((1_048_576, 1_048_576), 4096, 1_048_576),  # never lowered
        ((resource.RLIM_INFINITY, resource.RLIM_INFINITY), 4096, resource.RLIM_INFINITY),
    ],
)
def test_the_limit_is_raised_as_far_as_connections_need(
    before: tuple[int, int], processes: int, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = Limits(*before)
    monkeypatch.setattr(resource, "getrlimit", limits.getrlimit)
    monkeypatch.setattr(resource, "setrlimit", limits.setrlimit)
    allow_connections(processes)
    assert limits.now == (after, before[1])


def test_a_hard_limit_below_one_connection_to_each_is_an_error_with_the_way_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(resource, "getrlimit", Limits(1024, 4000).getrlimit)
    with pytest.raises(RunError, match=r"may open 4,000 files .ulimit -Hn.*4,096 processes.*allowed: 66,048 or more"):
        allow_connections(4096)


def test_the_limit_of_a_real_process_is_raised() -> None:
    code = (
        "import resource as r; from megatron_coreward.weights.open_files import allow_connections\n"
        "r.setrlimit(r.RLIMIT_NOFILE, (256, r.getrlimit(r.RLIMIT_NOFILE)[1]))\n"
        "allow_connections(8); print(r.getrlimit(r.RLIMIT_NOFILE)[0])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert int(done.stdout) == OTHER_FILES + CONNECTIONS * 8
