"""A sender that fails says so to all others, and a lost peer is an error that a run recovers from."""

from collections.abc import Callable

import pytest
import torch

from megatron_coreward.errors import RunError
from megatron_coreward.weights.layouts import ActorLayout, EngineLayout
from megatron_coreward.weights.senders.base import Sender
from tests.weights.ranks import spec_of


class Meeting:
    def __init__(self) -> None:
        self.reasons: list[str] = []
        self.parties = 0

    def give_up(self, reason: str) -> None:
        self.reasons.append(reason)

    def everybody(self, occasion: str, size: int) -> None:
        self.parties = size


class Failing(Sender):
    """Fails in its second bucket."""

    def __init__(self, error: Exception) -> None:
        self.error, self.meeting, self.rank = error, Meeting(), 3  # type: ignore[assignment]
        self.spec = spec_of("gloo", ActorLayout(2), EngineLayout(3, 2), 0)
        self.messages, self._failed, self._syncs, self.closed = [[], []], False, 0, 0

    def _begin(self) -> None: ...

    def _packer(self, role: str, version: int, bucket: int) -> Callable[[int, torch.Tensor], None]:
        return lambda number, memory: None

    def _send(self, bucket: int, write: Callable[[int, torch.Tensor], None]) -> None:
        if bucket == 1:
            raise self.error

    def _end(self) -> None: ...

    def close(self) -> None:
        self.closed += 1


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (RuntimeError("Connection closed by peer"), RunError),
        (RunError("engine 1 gave up"), RunError),
        (ValueError("a block of another shape"), ValueError),
        (torch.OutOfMemoryError("CUDA out of memory"), torch.OutOfMemoryError),
    ],
)
def test_a_failure_ends_the_sender_for_all_and_a_lost_peer_is_no_end_of_the_run(
    error: Exception, kind: type[Exception]
) -> None:
    sender = Failing(error)
    with pytest.raises(kind, match=str(error)):
        sender.send("policy", 2)
    assert sender.closed == 1
    assert sender.meeting.reasons == [f"rank 3 of the actor: {error}"]  # type: ignore[attr-defined]
    assert sender.meeting.parties == 2 + 3 * 2  # type: ignore[attr-defined]
    with pytest.raises(RunError, match="this sender failed before"):
        sender.send("policy", 4)
