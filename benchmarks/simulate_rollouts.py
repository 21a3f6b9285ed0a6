"""How much of the engines' time is idle, by how rollouts wait for each other: a simulation of many engines.

    python benchmarks/simulate_rollouts.py [--lengths FOLDER/rollouts] [--engines 64] [--sequences 2048 16384] [--json]

Response lengths are those of recorded rollouts (`rollouts/*.parquet` of a run), drawn with replacement; without any,
they are log-normal (median 600 tokens, sigma 0.9, cut off at 3,072), which is an assumption and printed as one.

The model of an engine: up to `--slots` sequences are decoded at once, and a step of the engine takes
`1 + sequences / --half` units of time, so a token is cheapest when the slots are full. The model of the actors: an
update takes `--update` of the time in which the engines, all slots full, would draw the batch.

What is compared, each over `--steps` steps of one batch:
  barrier       each engine has a fixed share of the groups; all wait for the slowest sample, then for the update.
  staleness 0   groups go to engines as they have room; the update still waits for the slowest sample.
  staleness k   engines go on with later batches while the actors learn, up to k updates ahead. A weight sync waits
                until what is being drawn has ended.
  partial       likewise, but a weight sync pauses what is being drawn, which goes on with the new weights.

Idle is the share of engine time in which nothing is decoded; the rate is tokens a second, over that of all engines with
all slots full (an engine that decodes its last long sequence is busy, and slow). Ends with one JSON object under
`--json`.
"""

import argparse
import heapq
import json
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Lengths = NDArray[np.int64]


@dataclass(frozen=True)
class Machine:
    """Engines and actors, in units of the time in which an engine of one sequence draws a token."""

    engines: int = 64
    slots: int = 256  # sequences that an engine decodes at once
    half: float = 128.0  # sequences at once at which a step takes twice as long as with none
    update: float = 0.5  # time of an update over the least time of its batch's rollouts
    group: int = 8  # samples of a question, which one engine draws

    def step_seconds(self, sequences: int) -> float:
        """Time of one decoding step."""
        return 1.0 + sequences / self.half

    def least_seconds(self, tokens: int) -> float:
        """Time for that many tokens with all slots of all engines full."""
        return tokens / (self.engines * self.slots) * self.step_seconds(self.slots)


@dataclass(frozen=True)
class Outcome:
    """A simulated run."""

    seconds: float
    tokens: int
    busy: float  # engine seconds in which something was decoded

    def idle_share(self, machine: Machine) -> float:
        """Share of engine time in which nothing was decoded."""
        return 1.0 - self.busy / (self.seconds * machine.engines)

    def rate_share(self, machine: Machine) -> float:
        """Tokens a second over what all engines draw with all slots full."""
        return machine.least_seconds(self.tokens) / self.seconds


class _Engine:
    """One engine: the sequences that it decodes, and those that wait for a slot."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.now = self.busy = 0.0
        self.drawn = 0.0  # tokens that each running sequence has drawn since the engine began
        self.running: list[tuple[float, int]] = []  # (value of `drawn` at which it ends, batch)
        self.waiting: deque[tuple[int, int]] = deque()  # (length, batch)

    @property
    def load(self) -> int:
        return len(self.running) + len(self.waiting)

    def next_end(self) -> float:
        """When the next sequence ends."""
        if not self.running:
            return math.inf
        return self.now + (self.running[0][0] - self.drawn) * self.machine.step_seconds(len(self.running))

    def advance(self, until: float) -> list[int]:
        """Decodes up to a time, at most to the next end; the batches of the sequences that ended."""
        ended = []
        if self.running:
            self.busy += until - self.now
            self.drawn += (until - self.now) / self.machine.step_seconds(len(self.running))
            while self.running and self.running[0][0] <= self.drawn + 1e-6:
                ended.append(heapq.heappop(self.running)[1])
        self.now = until
        return ended

    def admit(self) -> None:
        """Begins what waits, if there is room."""
        while self.waiting and len(self.running) < self.machine.slots:
            length, batch = self.waiting.popleft()
            heapq.heappush(self.running, (self.drawn + length, batch))


class _Simulation:
    """Engines, the groups that wait for them, and the actors."""

    def __init__(self, machine: Machine, batches: Sequence[Lengths], schedule: "Schedule") -> None:
        self.machine, self.batches, self.schedule = machine, batches, schedule
        self.engines = [_Engine(machine) for _ in range(machine.engines)]
        self.ends: list[tuple[float, int]] = []  # next ends of engines; outdated ones are recognised and left out
        self.queue: deque[tuple[int, Lengths]] = deque()  # groups that no engine has
        self.open = [len(batch) for batch in batches]  # sequences of each batch that have not ended
        self.fed = self.updates = 0
        self.now, self.update_end = 0.0, math.inf
        self.draining = False

    def run(self) -> Outcome:
        self._feed()
        while self.updates < len(self.batches):
            if self.draining and not any(engine.running for engine in self.engines):
                self.draining = False  # the weights are synced
            if not self.draining:
                self._give()
            if self.update_end == math.inf and self.open[self.updates] == 0:
                tokens = int(self.batches[self.updates].sum())
                self.update_end = self.now + self.machine.update * self.machine.least_seconds(tokens)
            self._next_event()
        for engine in self.engines:
            engine.advance(self.now)
        return Outcome(self.now, int(sum(b.sum() for b in self.batches)), sum(e.busy for e in self.engines))

    def _next_event(self) -> None:
        while self.ends and not self._due(*self.ends[0]):
            heapq.heappop(self.ends)
        if not self.ends or self.update_end <= self.ends[0][0]:
            self.now, self.update_end = self.update_end, math.inf
            self.updates += 1
            self.draining = self.schedule.staleness > 0 and not self.schedule.partial
            self._feed()
            return
        self.now, place = heapq.heappop(self.ends)
        engine = self.engines[place]
        for batch in engine.advance(self.now):
            self.open[batch] -= 1
        if not self.draining:
            engine.admit()
        self._note(place)

    def _due(self, time: float, place: int) -> bool:
        return abs(self.engines[place].next_end() - time) <= 1e-9 * max(1.0, time)

    def _note(self, place: int) -> None:
        end = self.engines[place].next_end()
        if end < math.inf:
            heapq.heappush(self.ends, (end, place))

    def _begin(self, place: int, groups: Sequence[tuple[int, Lengths]]) -> None:
        engine = self.engines[place]
        for batch, group in groups:
            engine.waiting.extend((int(length), batch) for length in group)
        for batch in engine.advance(self.now):
            self.open[batch] -= 1
        engine.admit()
        self._note(place)

    def _feed(self) -> None:
        """Lets the batches be sampled whose weights would be new enough."""
        while self.fed < len(self.batches) and self.fed <= self.updates + self.schedule.staleness:
            batch, size = self.batches[self.fed], self.machine.group
            self.queue.extend((self.fed, batch[i : i + size]) for i in range(0, len(batch), size))
            self.fed += 1

    def _give(self) -> None:
        """Groups go to engines: all of them, round after round, or each to the engine with the most room."""
        if not self.queue:
            return
        if self.schedule.fixed_shares:
            groups, n = list(self.queue), self.machine.engines
            self.queue.clear()
            for place in range(n):
                self._begin(place, groups[place::n])
            return
        loads = [(engine.load, place) for place, engine in enumerate(self.engines)]
        heapq.heapify(loads)
        taken: dict[int, list[tuple[int, Lengths]]] = {}
        while self.queue and loads[0][0] + len(self.queue[0][1]) <= self.machine.slots:
            load, place = loads[0]
            group = self.queue.popleft()
            taken.setdefault(place, []).append(group)
            heapq.heapreplace(loads, (load + len(group[1]), place))
        for place, mine in taken.items():
            self._begin(place, mine)


@dataclass(frozen=True)
class Schedule:
    """How rollouts wait for each other and for updates."""

    fixed_shares: bool = False  # an engine has its share of the groups from the beginning
    staleness: int = 0  # a batch may be sampled from once the update that many batches before it is done
    partial: bool = False  # what is being drawn goes on under new weights; else a weight sync waits for it to end


def simulate(machine: Machine, batches: Sequence[Lengths], schedule: Schedule) -> Outcome:
    """One run over batches of response lengths; groups are `machine.group` sequences after each other.

    The update of a batch begins once all its sequences have ended and the update before is done.
    """
    return _Simulation(machine, batches, schedule).run()


SCHEDULES = {
    "barrier": Schedule(fixed_shares=True),
    "staleness 0": Schedule(),
    "staleness 1": Schedule(staleness=1),
    "staleness 2": Schedule(staleness=2),
    "staleness 1, partial": Schedule(staleness=1, partial=True),
    "staleness 2, partial": Schedule(staleness=2, partial=True),
}


def recorded_lengths(folder: Path) -> Lengths:
    """Response lengths of the policy's rollouts in a run's dump."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    lengths = []
    for path in sorted(folder.glob("step_*.parquet")):
        table = pq.read_table(path, columns=["role", "token_ids"])
        policy = table.filter(pc.equal(table["role"], "policy"))
        lengths.append(pc.list_value_length(policy["token_ids"]).to_numpy())
    if not lengths:
        raise SystemExit(f"{folder}: no rollouts (step_*.parquet)")
    return np.concatenate(lengths).astype(np.int64)


def assumed_lengths(rng: np.random.Generator) -> Lengths:
    """Log-normal lengths, cut off at 3,072 tokens."""
    return np.clip(np.exp(rng.normal(np.log(600), 0.9, 100_000)), 1, 3072).astype(np.int64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=Path, help="folder with the rollouts of a run")
    parser.add_argument("--engines", type=int, default=Machine.engines)
    parser.add_argument("--slots", type=int, default=Machine.slots)
    parser.add_argument("--half", type=float, default=Machine.half)
    parser.add_argument("--update", type=float, default=Machine.update)
    parser.add_argument("--sequences", type=int, nargs="+", default=[2048, 16384])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    known = recorded_lengths(options.lengths) if options.lengths else assumed_lengths(rng)
    quantiles = {f"p{q}": int(np.percentile(known, q)) for q in (50, 90, 99)}
    print(f"lengths: {options.lengths or 'log-normal (assumed)'}, mean {known.mean():.0f}, {quantiles}")
    machine = Machine(options.engines, options.slots, options.half, options.update)
    results: dict[str, dict[str, dict[str, float]]] = {}
    for sequences in options.sequences:
        batches = [rng.choice(known, sequences) for _ in range(options.steps)]
        outcomes = {name: simulate(machine, batches, schedule) for name, schedule in SCHEDULES.items()}
        of_size = {
            name: {
                "idle_share": o.idle_share(machine),
                "rate_share": o.rate_share(machine),
                "speedup": outcomes["barrier"].seconds / o.seconds,
            }
            for name, o in outcomes.items()
        }
        results[str(sequences)] = of_size
        print(f"\n{sequences} sequences a batch, {machine.engines} engines of {machine.slots} slots")
        for name, row in of_size.items():
            shares = f"{row['idle_share']:>8.1%} idle{row['rate_share']:>8.1%} of the rate"
            print(f"  {name:<22}{shares}{row['speedup']:>8.2f}x")
    if options.json:
        print(json.dumps({"lengths": {"mean": float(known.mean()), **quantiles}, "by_sequences": results}))


if __name__ == "__main__":
    main()
