"""The engines of a run as the trainer asks them: awake, with the weights that are asked for, replaced when one dies.

Policy and teacher share the engines, one after the other, or the teacher has some of its own (`teacher.engines`). A
group of engines that hold the same weights is a side here: it has a weight sync, and a stream if groups are streamed.

Rollouts are functions of weights and seeds, so what is asked again after a death is answered the same.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from megatron_coreward.cluster.colocation import Colocation, GpuHandoff, no_handoff
from megatron_coreward.cluster.group_stream import GroupStream
from megatron_coreward.cluster.processes import Processes
from megatron_coreward.cluster.watchdog import WorkerDied
from megatron_coreward.cluster.weight_sync import ReceivingEngines, SyncReport, WeightSync, open_sync
from megatron_coreward.config.methods import needs_of
from megatron_coreward.config.schema import RunConfig
from megatron_coreward.rollout.requests import GroupName, GroupRequest, SamplingRequest
from megatron_coreward.telemetry.timing import PhaseTimer
from megatron_coreward.types import Completion, EngineInterval, IntArray, Role, WeightVersion

T = TypeVar("T")


class Engines(ReceivingEngines, Protocol):
    """What is needed of engines that hold the same weights (`cluster.engine_group.EngineSet`)."""

    numbers: range

    def begin_sampling(
        self, requests: Sequence[SamplingRequest], expected_version: int
    ) -> Callable[[], list[list[Completion]]]: ...
    def take_sampling_metrics(self) -> dict[str, float]: ...
    def take_intervals(self) -> list[EngineInterval]: ...


class RestartableEngines(Engines, Protocol):
    """All engines of a run (`cluster.engine_group.EngineGroup`)."""

    def restart(self, index: int) -> None: ...


@dataclass(frozen=True, slots=True)
class Side:
    """Engines that hold the same weights."""

    engines: Engines
    sync: WeightSync
    stream: GroupStream | None = None  # None: groups are not streamed


class RolloutEngines:
    """Engines, the weight syncs that serve them, and the GPUs that they may share with the actors."""

    def __init__(
        self,
        engines: RestartableEngines,
        sync: WeightSync,
        *,
        policy: Side | None = None,
        teacher: Side | None = None,
        partial: bool = False,
        colocation: Colocation | None = None,
        max_restarts: int = 0,
        notify: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Args:
        engines: all of them.
        sync: of those that sample for the policy.
        policy: these, if they are not all, or if groups are streamed.
        teacher: those that sample for the teacher; None: those of the policy do.
        partial: whether new weights may come in the middle of a streamed sample.
        colocation: that the syncs were opened with; None: the engines have GPUs of their own.
        max_restarts: engines that may be started again in a run; the next death ends it.
        """
        policy = policy or Side(engines, sync)
        self._sides: dict[Role, Side] = {"policy": policy, "teacher": teacher or policy}
        self._engines, self._partial = engines, partial
        self._handoff: GpuHandoff = colocation or no_handoff
        self._colocated = colocation is not None
        self._restarts_left, self._notify = max_restarts, notify
        self._reports: list[SyncReport] = []
        self._intervals: list[EngineInterval] = []

    @property
    def shared(self) -> bool:
        """Whether policy and teacher sample on the same engines."""
        return self._sides["policy"] is self._sides["teacher"]

    def run(self, ask: Callable[[], T], timer: PhaseTimer) -> T:
        """`ask()`, which syncs weights and samples, and once more for every engine that dies in it, or in its restart.

        Raises WorkerDied for an actor rank, and for an engine if no restart is left.
        """
        dead: WorkerDied | None = None
        while True:
            try:
                if dead is not None:
                    self._start_again(dead)
                    dead = None
                if self._colocated:
                    for side in self._all_sides():
                        side.sync.invalidate()  # the engines have lost their weights when they were put to sleep
                with self._handoff(timer):
                    return ask()
            except WorkerDied as death:
                if death.kind != "engine" or self._restarts_left == 0:
                    raise
                self._restarts_left -= 1
                self._notify(
                    f"{death}; starting it again ({self._restarts_left} restarts left, faults.engine_restarts)"
                )
                dead = death

    def _start_again(self, death: WorkerDied) -> None:
        number = death.index
        of_it = [side for side in self._all_sides() if self.shared or number in side.engines.numbers]
        streams = [side.stream for side in of_it if side.stream is not None]
        for stream in streams:  # before there is a process that would be asked in the name of the dead one
            stream.gone(number, death)
        self._engines.restart(number)
        for side in of_it:
            side.sync.reset()
        for stream in streams:
            stream.restarted(number)

    def sync_weights(self, role: Role, num_updates: int, timer: PhaseTimer) -> int:
        """Brings a role's present weights to its engines, unless they hold them already; returns their version.

        What is streamed stands still from here until `go_on`; samples that have begun go on then if they may (partial
        rollouts), and are waited for here if not. If actors and engines share GPUs, samples have begun only if an
        engine died: the others slept since, have no weights to end them with, and go on with those of the same update.
        """
        side, version = self._sides[role], WeightVersion(role, num_updates)
        if side.stream is not None:
            if self._partial or self._colocated or side.sync.holds(version):
                side.stream.halt()
            else:
                with timer.phase("rollout"):
                    side.stream.settle()
        begin = time.time()
        with timer.phase("sync"):
            report = side.sync.sync_weights(role, num_updates)
        if report is not None:
            self._reports.append(report)
            end = time.time()
            self._intervals += [
                EngineInterval(number, "sync", version.number, begin, end) for number in side.engines.numbers
            ]
        return version.number

    def begin_sampling(
        self, requests: Sequence[SamplingRequest], expected_version: int
    ) -> Callable[[], list[list[Completion]]]:
        """Lets the engines of the version's role begin; the result waits for the completions of all requests, in their
        order. What is streamed stands still meanwhile."""
        return self._of(expected_version).engines.begin_sampling(requests, expected_version)

    def sample(self, requests: Sequence[SamplingRequest], expected_version: int) -> list[list[Completion]]:
        """Completions of all requests, in their order."""
        return self.begin_sampling(requests, expected_version)()

    def submit(self, groups: Sequence[GroupRequest]) -> None:
        """Takes groups of one role to be streamed, in the order in which they are needed."""
        if groups:
            self._stream(groups[0].name.role).submit(groups)

    def go_on(self, version: int) -> None:
        """Lets the groups of this version's role be drawn from it; `sync_weights` has brought it."""
        self._stream(WeightVersion.of(version).role).go_on(version)

    def wait(self, names: Sequence[GroupName], timer: PhaseTimer) -> None:
        """Returns when streamed groups are complete (`GroupStream.wait`)."""
        with timer.phase("rollout"):
            for role in dict.fromkeys(name.role for name in names):
                self._stream(role).wait([name for name in names if name.role == role])

    def collect(self, names: Sequence[GroupName]) -> list[list[Completion]]:
        """The completions of complete groups of one role."""
        return self._stream(names[0].role).collect(names) if names else []

    def in_flight(self, role: Role) -> bool:
        """Whether a streamed group of this role is not complete."""
        return self._stream(role).in_flight(role)

    def stalled(self, role: Role) -> bool:
        """Whether streamed groups of this role wait for weights, after a validation or an engine's death."""
        return self._stream(role).stalled(role)

    @property
    def epoch(self) -> int:
        """Grows when an engine is started again: rollouts that were in flight before are lost."""
        return sum(side.sync.engine_epoch for side in self._all_sides())

    def take_syncs(self) -> list[SyncReport]:
        """The weight syncs since this was asked last."""
        reports, self._reports = self._reports, []
        return reports

    def take_sampling_metrics(self) -> dict[str, float]:
        """How long the slowest and the fastest engine sampled for the policy since this was asked last; if groups are
        streamed, what was aborted instead (`GroupStream.take_metrics`); empty: nothing."""
        metrics = self._sides["policy"].engines.take_sampling_metrics()
        streams = [side.stream for side in self._all_sides() if side.stream is not None]
        if streams:
            metrics = {}  # those were of a validation or of anchors
        for stream in streams:
            for key, value in stream.take_metrics().items():
                metrics[key] = metrics.get(key, 0.0) + value
        return metrics

    def take_intervals(self) -> list[EngineInterval]:
        """When each engine sampled and received weights, as far as it is known since this was asked last."""
        intervals, self._intervals = self._intervals, []
        for side in self._all_sides():
            intervals += side.engines.take_intervals()
            if side.stream is not None:
                intervals += side.stream.take_intervals()
        return intervals

    def close(self) -> None:
        """Ends what this process does for the streams."""
        for side in self._all_sides():
            if side.stream is not None:
                side.stream.close()

    def _all_sides(self) -> list[Side]:
        return [self._sides["policy"]] if self.shared else list(self._sides.values())

    def _of(self, version: int) -> Side:
        return self._sides[WeightVersion.of(version).role]

    def _stream(self, role: Role) -> GroupStream:
        stream = self._sides[role].stream
        assert stream is not None, "rollout.schedule is not streaming"
        return stream


def open_rollout_engines(
    config: RunConfig,
    processes: Processes,
    canary: IntArray,
    notify: Callable[[str], None] = lambda text: None,
    canary_limit: float | None = None,
) -> RolloutEngines:
    """The engines of a run, with the weight syncs that it is configured for.

    Args:
        canary: tokens whose log-probs check every weight sync (`weight_sync.canary_tokens`).
        canary_limit: what an earlier attempt of the run found that they may differ by.
    """
    group = processes.engines

    def side(numbers: range, roles: tuple[Role, ...]) -> Side:
        engines = group if numbers == group.numbers else group.part(numbers)
        sync = open_sync(config, processes, canary, canary_limit, engines=engines, roles=roles)
        if processes.colocation is not None:
            sync.open()  # buckets take memory on the GPU, which the first handoff has to know of
        stream = None
        if config.rollout.schedule == "streaming":
            stream = GroupStream(engines, room_of(config.rollout.max_num_seqs), processes.watchdog)
        return Side(engines, sync, stream)

    num, own = config.rollout.num_engines, config.teacher.engines
    if own and needs_of(config.method).teacher:
        policy, teacher = side(range(num - own), ("policy",)), side(range(num - own, num), ("teacher",))
    else:
        policy, teacher = side(range(num), ("policy", "teacher")), None
    return RolloutEngines(
        group,
        policy.sync,
        policy=policy,
        teacher=teacher,
        partial=config.rollout.partial,
        colocation=processes.colocation,
        max_restarts=config.faults.engine_restarts,
        notify=notify,
    )


def room_of(max_num_seqs: int) -> int:
    """Samples that an engine is given at once: a quarter more than it draws, so that it need not wait for others."""
    return max_num_seqs + -(-max_num_seqs // 4)
