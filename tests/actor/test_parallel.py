"""The limit of open files of a rank, which is too low by default for some hundred ranks."""

import resource

import pytest

from megatron_coreward.actor.parallel import FILES_OF_A_RANK, GROUPS_OF_A_RANK, allow_connections
from megatron_coreward.errors import RunError


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
    ("before", "world_size", "after"),
    [
        ((1024, 1_048_576), 8, 1024),  # enough
        ((1024, 1_048_576), 4096, FILES_OF_A_RANK + GROUPS_OF_A_RANK * 4096),
        ((1024, resource.RLIM_INFINITY), 4096, FILES_OF_A_RANK + GROUPS_OF_A_RANK * 4096),
        ((1024, 8192), 4096, 8192),  # as far as it goes
        ((1_048_576, 1_048_576), 4096, 1_048_576),  # never lowered
        ((resource.RLIM_INFINITY, resource.RLIM_INFINITY), 4096, resource.RLIM_INFINITY),
    ],
)
def test_the_limit_is_raised_as_far_as_the_ranks_need(
    before: tuple[int, int], world_size: int, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = Limits(*before)
    monkeypatch.setattr(resource, "getrlimit", limits.getrlimit)
    monkeypatch.setattr(resource, "setrlimit", limits.setrlimit)
    allow_connections(world_size)
    assert limits.now == (after, before[1])


def test_a_hard_limit_below_one_connection_a_rank_is_an_error_with_the_way_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(resource, "getrlimit", Limits(1024, 4096).getrlimit)
    with pytest.raises(RunError, match=r"may open 4,096 files .ulimit -Hn.*4,096 ranks.*at least 4,608"):
        allow_connections(4096)


def test_the_real_limit_of_this_process_suffices_for_a_few_ranks() -> None:
    allow_connections(8)
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= FILES_OF_A_RANK + GROUPS_OF_A_RANK * 8
