"""Groups of rollouts, handed to engines as these have room, and brought back as they are complete.

The next group goes to the engine that has the fewest samples on their way, if that has room: about as many as it draws
at once, and a few more, so that it need not wait for the driver. A thread listens to the engines, so that they are kept
busy while the driver waits for the actors.

Invariants (tests/cluster/test_group_stream.py):
  1. Every group that is submitted is complete once: when all its samples have ended, or when its watcher says so.
  2. A sample that has ended is never drawn again. When an engine dies, those of its samples that had not ended are
     drawn by other engines, and nothing else.
  3. Nothing is handed out from `halt` to `go_on`; engines stand still by themselves while they do anything else.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from megatron_coreward.cluster.watchdog import LOOK_EVERY_S, Watchdog, WorkerDied
from megatron_coreward.rollout.requests import Fed, GroupName, GroupRequest, Taken
from megatron_coreward.types import Completion, EngineInterval, Role, WeightVersion

PATIENCE_S = 10.0  # an engine that has nothing to report answers after this time


class StreamingEngines(Protocol):
    """What a stream needs of its engines (`cluster.engine_group.EngineSet`). Calls return at once; `ready` waits."""

    numbers: range

    def feed(self, place: int, fed: Sequence[Fed]) -> Any: ...
    def abort(self, place: int, names: Sequence[GroupName]) -> Any: ...
    def go_on(self, place: int, version: int) -> Any: ...
    def take(self, place: int, patience_s: float) -> Any: ...
    def ready(self, calls: Sequence[Any], patience_s: float) -> list[Any]: ...
    def result(self, call: Any) -> Taken | None: ...


@dataclass(slots=True)
class _Group:
    """A group that is not complete."""

    asked: GroupRequest
    ended: dict[int, Completion] = field(default_factory=dict)  # by the number of the sample
    place: int | None = None  # of the engine that draws it; None: it waits for one

    @property
    def lacking(self) -> int:
        return self.asked.request.n - len(self.ended)

    @property
    def to_draw(self) -> tuple[int, ...]:
        return tuple(i for i in range(self.asked.request.n) if i not in self.ended)


@dataclass(slots=True)
class _Call:
    """A call that an engine has not answered."""

    place: int
    start: int  # which of the processes that had this place was called
    takes: bool


class GroupStream:
    """The stream of some engines that hold the same weights."""

    def __init__(self, engines: StreamingEngines, room: int, watchdog: Watchdog) -> None:
        """Args:
        room: samples that an engine is given at once.
        """
        self._engines, self._room, self._watchdog = engines, room, watchdog
        num = len(engines.numbers)
        self._state = threading.Condition()
        self._waiting: dict[Role, deque[GroupName]] = {"policy": deque(), "teacher": deque()}
        self._groups: dict[GroupName, _Group] = {}
        self._complete: dict[GroupName, list[Completion]] = {}
        self._awaited: set[GroupName] = set()  # of those that `wait` waits for, those that are not complete
        # Samples that each engine has, by place: to count them each time would take longer than to draw them.
        self._on_their_way: dict[Role, list[int]] = {"policy": [0] * num, "teacher": [0] * num}
        self._starts = [0] * num  # how often each engine was started again
        self._dead: dict[int, WorkerDied] = {}  # by place
        self._error: BaseException | None = None
        self._calls: dict[Any, _Call] = {}
        self._version: int | None = None  # that engines draw from; None: they stand still
        self._aborted: list[tuple[GroupName, int]] = []  # samples, as `Taken` has them
        self._collected: int | None = None  # the last step of which groups were collected since the counts were taken
        self._intervals: list[EngineInterval] = []
        self._closed = False
        with self._state:
            for place in range(num):
                self._listen_to(place)
        self._thread = threading.Thread(target=self._listen, name="group stream", daemon=True)
        self._thread.start()

    def submit(self, groups: Iterable[GroupRequest]) -> None:
        """Takes groups to draw, in the order in which they are needed."""
        with self._state:
            for asked in groups:
                if asked.name in self._groups or asked.name in self._complete:
                    raise ValueError(f"{asked.name} was submitted before")
                self._groups[asked.name] = _Group(asked)
                self._waiting[asked.name.role].append(asked.name)
            self._hand_out()

    def halt(self) -> None:
        """Hands out nothing more until `go_on`: the engines are about to be asked for something else."""
        with self._state:
            self._version = None

    def go_on(self, version: int) -> None:
        """The engines hold these weights: groups of their role are drawn from them."""
        with self._state:
            self._version = version
            for place in self._alive():
                self._called(self._engines.go_on(place, version), place)
            self._hand_out()

    def wait(self, names: Sequence[GroupName]) -> None:
        """Returns when the groups are complete. One thread waits at a time.

        Raises:
            WorkerDied: an engine is gone. The others go on; it may be started again, and this be asked again.
            RunError: it takes too long.
        """
        with self._state:
            self._awaited = {name for name in names if name not in self._complete}
        self._until(lambda: not self._awaited)

    def settle(self) -> None:
        """Halts, and returns when no sample is on its way. Raises as `wait` does."""
        self.halt()
        self._until(lambda: not any(any(counts) for counts in self._on_their_way.values()))

    def collect(self, names: Sequence[GroupName]) -> list[list[Completion]]:
        """The completions of groups that are complete, in the order of their samples; they are forgotten here."""
        with self._state:
            self._collected = max((name.step for name in names), default=self._collected)
            return [self._complete.pop(name) for name in names]

    def in_flight(self, role: Role) -> bool:
        """Whether a group of this role is not complete."""
        with self._state:
            return any(name.role == role for name in self._groups)

    def stalled(self, role: Role) -> bool:
        """Whether groups of this role are not complete, and no engine may draw them: they wait for `go_on`."""
        with self._state:
            version = self._version
            return self.in_flight(role) and (version is None or WeightVersion.of(version).role != role)

    def gone(self, number: int, death: WorkerDied) -> None:
        """The engine of this number is dead, and is about to be started again: nothing is asked of its place until
        `restarted`, and nothing handed out until `go_on`."""
        with self._state:
            self._version = None
            place = self._engines.numbers.index(number)
            self._take_back(place)
            self._starts[place] += 1
            self._dead[place] = death

    def restarted(self, number: int) -> None:
        """The engine of this number was started again after it was `gone`."""
        with self._state:
            place = self._engines.numbers.index(number)
            del self._dead[place]
            self._listen_to(place)

    def take_metrics(self) -> dict[str, float]:
        """What was aborted of the steps whose groups were collected since this was asked last, and of those before as
        far as it was not known then; empty: none were collected."""
        with self._state:
            step, self._collected = self._collected, None
            if step is None:
                return {}
            tokens = [tokens for name, tokens in self._aborted if name.step <= step]
            self._aborted = [(name, tokens) for name, tokens in self._aborted if name.step > step]
        return {"rollout/aborted_samples": float(len(tokens)), "rollout/aborted_tokens": float(sum(tokens))}

    def take_intervals(self) -> list[EngineInterval]:
        """When the engines drew samples, as far as they have reported it since the last call."""
        with self._state:
            intervals, self._intervals = self._intervals, []
        return intervals

    def close(self) -> None:
        """Ends the thread; the engines are left as they are."""
        with self._state:
            self._closed = True
            self._state.notify_all()
        self._thread.join()

    def _until(self, reached: Callable[[], bool]) -> None:
        def ready() -> bool:
            with self._state:
                self._state.wait_for(lambda: reached() or self._dead or self._error, LOOK_EVERY_S)
                if self._error is not None:
                    raise self._error
                for death in self._dead.values():
                    raise death
                return reached()

        self._watchdog.until(ready, "rollouts", self._who)

    def _who(self) -> list[int]:
        """The engines that still draw."""
        with self._state:
            places = {group.place for group in self._groups.values() if group.place is not None}
        return [self._engines.numbers[place] for place in sorted(places)] or list(self._engines.numbers)

    def _alive(self) -> list[int]:
        return [place for place in range(len(self._starts)) if place not in self._dead]

    def _hand_out(self) -> None:
        """Gives groups to engines as long as one has room."""
        if self._version is None:
            return
        role = WeightVersion.of(self._version).role
        waiting, alive = self._waiting[role], self._alive()
        if not waiting or not alive:
            return
        on_their_way = self._on_their_way[role]
        fed: dict[int, list[Fed]] = {}
        while waiting:
            group = self._groups[waiting[0]]
            place = min(alive, key=on_their_way.__getitem__)
            if on_their_way[place] and on_their_way[place] + group.lacking > self._room:
                break
            waiting.popleft()
            group.place = place
            on_their_way[place] += group.lacking
            fed.setdefault(place, []).append(Fed(group.asked.name, group.asked.request, group.to_draw))
        for place, groups in fed.items():
            self._called(self._engines.feed(place, groups), place)

    def _called(self, call: Any, place: int, takes: bool = False) -> None:
        self._calls[call] = _Call(place, self._starts[place], takes)

    def _listen_to(self, place: int) -> None:
        self._called(self._engines.take(place, PATIENCE_S), place, takes=True)
        self._state.notify_all()

    def _listen(self) -> None:
        try:
            while True:
                with self._state:
                    self._state.wait_for(lambda: self._calls or self._closed)
                    if self._closed:
                        return
                    calls = list(self._calls)
                for call in self._engines.ready(calls, LOOK_EVERY_S):
                    self._answered(call)
        except BaseException as error:  # whoever waits next hears of it
            with self._state:
                self._error = error
                self._state.notify_all()

    def _answered(self, call: Any) -> None:
        with self._state:
            made = self._calls.pop(call)
        try:
            taken = self._engines.result(call)
        except WorkerDied as death:
            with self._state:
                if made.start == self._starts[made.place] and made.place not in self._dead:
                    self._take_back(made.place)
                    self._dead[made.place] = death
                    self._hand_out()
                    self._state.notify_all()
            return
        with self._state:
            if made.takes and made.start == self._starts[made.place] and made.place not in self._dead:
                assert taken is not None
                self._listen_to(made.place)
                self._took(taken)

    def _take_back(self, place: int) -> None:
        """What an engine that is gone had is given to others, before anything else."""
        for name, group in reversed(list(self._groups.items())):
            if group.place == place:
                group.place = None
                self._waiting[name.role].appendleft(name)
        for counts in self._on_their_way.values():
            counts[place] = 0

    def _took(self, taken: Taken) -> None:
        self._aborted += taken.aborted
        self._intervals += taken.intervals
        (completions,) = taken.completions
        for (name, sample), completion in zip(taken.ended, completions, strict=True):
            group = self._groups.get(name)
            if group is None:  # its watcher has ended it, and the sample ended before the engine heard of it
                self._aborted.append((name, len(completion.token_ids)))
                continue
            if sample in group.ended:
                continue
            assert group.place is not None  # what an engine says after it was given up is not heard
            on_their_way = self._on_their_way[name.role]
            group.ended[sample] = completion
            on_their_way[group.place] -= 1
            watcher = group.asked.watcher
            enough = watcher is not None and watcher.completed(sample, completion)
            if group.lacking and not enough:
                continue
            if group.lacking:
                on_their_way[group.place] -= group.lacking
                self._called(self._engines.abort(group.place, [name]), group.place)
            del self._groups[name]
            self._awaited.discard(name)
            self._complete[name] = [group.ended[i] for i in sorted(group.ended)]
        self._hand_out()
        self._state.notify_all()
