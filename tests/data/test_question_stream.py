"""Whatever each step draws, an epoch is every problem once, and a stream goes on from its state."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_coreward.data.question_stream import QuestionStream, StreamState
from megatron_coreward.errors import InputError

STEPS = st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=3), min_size=1, max_size=30)  # draws of each step


def draw_step(stream: QuestionStream, state: StreamState, counts: list[int]) -> tuple[list[int], StreamState]:
    held: list[int] = []
    for count in counts:
        drawn, state = stream.draw(state, count, held)
        assert len(drawn) == count
        held += drawn
    return held, state


@given(STEPS, st.integers(12, 17), st.integers(0, 3), st.booleans())
def test_every_problem_is_drawn_once_an_epoch_and_no_step_holds_one_twice(
    steps: list[list[int]], num_problems: int, seed: int, shuffle: bool
) -> None:
    stream, state = QuestionStream(num_problems, 12, seed, shuffle), StreamState()
    drawn: list[int] = []
    for counts in steps:
        held, state = draw_step(stream, state, counts)
        assert len(set(held)) == len(held)
        drawn += held
    times = Counter(drawn) + Counter(state.put_off)
    whole = state.position // num_problems
    assert set(times.values()) <= {whole, whole + 1}
    assert sum(times.values()) == state.position
    assert whole == 0 or len(times) == num_problems


@given(STEPS, st.integers(0, 29))
def test_a_stream_goes_on_from_its_state(steps: list[list[int]], cut: int) -> None:
    def run(steps: list[list[int]], state: StreamState) -> tuple[list[list[int]], StreamState]:
        stream, drawn = QuestionStream(13, 12, 5), []
        for counts in steps:
            held, state = draw_step(stream, state, counts)
            drawn.append(held)
        return drawn, state

    whole, end = run(steps, StreamState())
    first, state = run(steps[:cut], StreamState())
    second, end_again = run(steps[cut:], StreamState.of_json(state.to_json()))
    assert (first + second, end_again) == (whole, end)


def test_epochs_have_orders_of_their_own_unless_nothing_is_shuffled() -> None:
    shuffled, plain = QuestionStream(50, 10, 1), QuestionStream(50, 10, 1, shuffle=False)
    orders = []
    for stream in (shuffled, plain):
        epochs, state = [], StreamState()
        for _ in range(2):
            drawn: list[int] = []
            for _ in range(5):
                held, state = stream.draw(state, 10, ())
                drawn += held
            epochs.append(drawn)
        orders.append(epochs)
    assert orders[1] == [list(range(50))] * 2
    assert orders[0][0] != orders[0][1]


def test_too_few_problems_are_refused() -> None:
    with pytest.raises(InputError, match="rollout.resample_flat: a step may draw 12 questions, found 11"):
        QuestionStream(11, 12, 1)
