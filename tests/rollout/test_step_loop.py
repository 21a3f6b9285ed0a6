"""The loop over an engine's steps, without an engine: versions, room, roles, interruptions, aborts, errors."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import pairwise

import pytest

from megatron_coreward.rollout.requests import Fed, GroupName, SamplingRequest
from megatron_coreward.rollout.step_loop import Drawn, Sample, StepLoop
from megatron_coreward.types import EngineInterval, Role

pytestmark = pytest.mark.timeout(60)


class Counting:
    """Draws the version of its weights, with it as a negative log-prob, until a sample has its length."""

    def __init__(self) -> None:
        self.version = 0
        self.samples: dict[int, tuple[list[int], int]] = {}  # what was drawn, and how long it will be
        self.added: list[tuple[list[int], int, int]] = []  # prompt, seed, tokens to draw
        self.most = 0
        self.on_step: Callable[[], None] = lambda: time.sleep(0.0005)

    def add(self, number: int, prompt: list[int], request: SamplingRequest, seed: int, max_tokens: int) -> None:
        self.added.append((prompt, seed, max_tokens))
        self.samples[number] = ([], max_tokens)
        self.most = max(self.most, len(self.samples))

    def step(self) -> Mapping[int, Drawn]:
        self.on_step()
        ended = {}
        for number, (tokens, length) in list(self.samples.items()):
            tokens.append(self.version)
            if len(tokens) == length:
                ended[number] = Drawn(tokens, [-float(t) for t in tokens], "length")
                del self.samples[number]
        return ended

    def withdraw(self, numbers: Iterable[int]) -> Mapping[int, Drawn]:
        drawn = {number: self.samples.pop(number)[0] for number in numbers}
        return {number: Drawn(tokens, [-float(t) for t in tokens], None) for number, tokens in drawn.items()}


@pytest.fixture
def steps() -> Counting:
    return Counting()


@pytest.fixture
def loop(steps: Counting) -> Iterator[StepLoop]:
    loop = StepLoop(steps, 4, lambda seed: 1000 * seed)
    yield loop
    loop.close()


def fed(place: int, n: int = 2, length: int = 30, role: Role = "policy") -> Fed:
    request = SamplingRequest([7, 8], n, seed=place + 1, temperature=1.0, top_p=1.0, max_tokens=length)
    return Fed(GroupName(1, role, place), request, tuple(range(n)))


def take(loop: StepLoop, count: int) -> list[Sample]:
    ended: list[Sample] = []
    while len(ended) < count:
        ended += loop.take(10.0)[0]
    return ended


def update(loop: StepLoop, steps: Counting, version: int) -> None:
    with loop.standing_still(new_weights=True):
        assert not steps.samples
        before = len(steps.added)
        time.sleep(0.01)
        assert len(steps.added) == before
        steps.version = version
    time.sleep(0.005)
    assert not steps.samples  # the weights were not said to be in order
    loop.go_on(version)


def test_every_token_has_the_version_that_drew_it_and_none_is_lost(loop: StepLoop, steps: Counting) -> None:
    loop.feed([fed(place, n=3, length=60) for place in range(3)])
    loop.go_on(0)
    for version in (2, 4, 6):
        time.sleep(0.02)
        update(loop, steps, version)
    ended = take(loop, 9)
    assert sorted((sample.name.place, sample.index) for sample in ended) == [(p, i) for p in range(3) for i in range(3)]
    assert steps.most == 4  # of nine: no more than there is room for
    for sample in ended:
        assert len(sample.token_ids) == 60
        borders = [*[first for first, _ in sample.starts], 60]
        lengths = [end - begin for begin, end in pairwise(borders)]
        of_spans = [v for (_, v), length in zip(sample.starts, lengths, strict=True) for _ in range(length)]
        assert of_spans == sample.token_ids
        assert sample.logprobs == [-float(token) for token in sample.token_ids]
    assert max(len(sample.starts) for sample in ended) > 1


def test_a_sample_goes_on_behind_what_it_has_with_another_seed(loop: StepLoop, steps: Counting) -> None:
    loop.feed([fed(0, n=1, length=50)])
    loop.go_on(0)
    time.sleep(0.01)
    update(loop, steps, 2)
    (sample,) = take(loop, 1)
    (prompt, seed, length), (longer, other, rest) = steps.added
    drawn = len(longer) - 2
    assert (prompt, seed, length) == ([7, 8], 1000, 50)
    assert (longer, other, rest) == ([7, 8, *[0] * drawn], 1000 * (1000 * 1000 + drawn), 50 - drawn)
    assert [version for _, version in sample.starts] == [0, 2]


def test_no_two_samples_of_a_group_go_on_with_one_seed(loop: StepLoop, steps: Counting) -> None:
    """Also if sample 1 began a step after sample 0, so that number and tokens have the same sum for both."""
    request = SamplingRequest([7, 8], 2, seed=1, temperature=1.0, top_p=1.0, max_tokens=400)
    others = [Fed(GroupName(1, "policy", 0), request, (1,))]

    def on_step() -> None:
        if others:
            loop.feed([others.pop()])
        time.sleep(0.0005)

    steps.on_step = on_step
    loop.feed([Fed(GroupName(1, "policy", 0), request, (0,))])
    loop.go_on(0)
    time.sleep(0.01)
    update(loop, steps, 2)
    take(loop, 2)
    (_, _, (first, one, _), (second, other, _)) = steps.added
    assert len(first) == len(second) + 1
    assert one != other


def test_groups_are_drawn_from_weights_of_their_role_alone(loop: StepLoop, steps: Counting) -> None:
    loop.feed([fed(0, length=400), fed(1, role="teacher", length=5)])
    loop.go_on(0)
    time.sleep(0.01)
    update(loop, steps, 1)
    assert {sample.name.role for sample in take(loop, 2)} == {"teacher"}
    assert loop.take(0.02)[0] == []
    update(loop, steps, 2)
    assert {tuple(version for _, version in sample.starts) for sample in take(loop, 2)} == {(0, 2)}


def test_an_aborted_group_ends_at_once_and_its_tokens_are_counted(loop: StepLoop, steps: Counting) -> None:
    loop.feed([fed(0, n=3, length=10**6), fed(1, n=2, length=20)])
    loop.go_on(0)
    time.sleep(0.02)
    loop.abort([GroupName(1, "policy", 0)])
    samples: list[Sample] = []
    count = tokens = 0
    while len(samples) < 2 or not count:
        ended, aborted, _ = loop.take(1.0)
        assert {name.place for name, _ in aborted} <= {0}
        samples, count, tokens = samples + ended, count + len(aborted), tokens + sum(drawn for _, drawn in aborted)
    assert {sample.name.place for sample in samples} == {1}
    assert count == 3
    assert tokens >= 3


def test_an_interruption_without_new_weights_leaves_the_version(loop: StepLoop, steps: Counting) -> None:
    loop.feed([fed(0, n=1, length=60)])
    loop.go_on(4)
    time.sleep(0.01)
    with loop.standing_still():
        assert not steps.samples
    (sample,) = take(loop, 1)
    assert sample.starts == [(0, 4)]
    assert sample.cuts == [len(steps.added[1][0]) - 2]  # for a stop string that begins before and ends behind it


def test_an_error_of_the_engine_reaches_whoever_takes(loop: StepLoop, steps: Counting) -> None:
    def fail() -> None:
        raise ConnectionError("a worker is gone")

    steps.on_step = fail
    loop.feed([fed(0)])
    loop.go_on(0)
    with pytest.raises(ConnectionError):
        take(loop, 1)
    with loop.standing_still():  # and nobody waits for the loop for ever
        pass


def test_intervals_tell_when_the_engine_drew(loop: StepLoop, steps: Counting) -> None:
    begin = time.time()
    loop.feed([fed(0, n=4, length=20)])
    loop.go_on(2)
    intervals: list[EngineInterval] = []
    while not intervals:
        intervals += loop.take(0.01)[2]
    (interval,) = intervals
    assert (interval.kind, interval.version, interval.sequences) == ("sample", 2, 4.0)
    assert begin <= interval.begin < interval.end <= time.time()


def test_samples_that_end_soon_after_each_other_are_taken_together(steps: Counting) -> None:
    loop = StepLoop(steps, 64, lambda seed: seed)
    steps.on_step = lambda: time.sleep(0.0005)
    loop.feed([fed(place, n=1, length=20 + place % 4) for place in range(8)])
    loop.go_on(0)
    begin = time.perf_counter()
    ended = loop.take(10.0)[0]
    assert len(ended) > 2
    while len(ended) < 8:
        ended += loop.take(10.0)[0]
    assert time.perf_counter() - begin < 5.0
    loop.close()


def test_nothing_is_withdrawn_from_an_engine_that_somebody_else_uses(loop: StepLoop, steps: Counting) -> None:
    withdrawn: list[list[int]] = []
    withdraw = steps.withdraw
    steps.withdraw = lambda numbers: withdraw(withdrawn.append(list(numbers)) or withdrawn[-1])  # type: ignore
    loop.feed([fed(0, n=2, length=10**6)])
    loop.go_on(0)
    with loop.standing_still():
        withdrawn.clear()
        loop.abort([GroupName(1, "policy", 0)])
        assert loop.take(0.05)[1] == []
    aborted: list[tuple[GroupName, int]] = []
    while len(aborted) < 2:
        aborted += loop.take(10.0)[1]
    assert withdrawn == []  # both waited, and the engine had neither
    assert [name for name, _ in aborted] == [GroupName(1, "policy", 0)] * 2


def test_many_interruptions_at_any_moment_lose_nothing(loop: StepLoop, steps: Counting) -> None:
    steps.on_step = lambda: None
    loop.feed([fed(place, n=4, length=500) for place in range(5)])
    loop.go_on(0)
    stop = threading.Event()

    def interrupt() -> None:
        while not stop.is_set():
            with loop.standing_still():
                assert not steps.samples

    thread = threading.Thread(target=interrupt)
    thread.start()
    ended = take(loop, 20)
    stop.set()
    thread.join()
    assert {len(sample.token_ids) for sample in ended} == {500}
    assert {tuple(sample.starts) for sample in ended} == {((0, 0),)}
