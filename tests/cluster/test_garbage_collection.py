"""The cycle collector rests during a step, and is afterwards as it was."""

import gc

import pytest

from megatron_coreward.cluster.garbage_collection import garbage_collection_paused


@pytest.mark.parametrize("on", [True, False])
def test_it_is_as_it_was_even_after_an_error(on: bool) -> None:
    if not on:
        gc.disable()
    try:
        with pytest.raises(ZeroDivisionError), garbage_collection_paused():
            1 / int(gc.isenabled())  # an error only while the collector rests
        assert gc.isenabled() is on
    finally:
        gc.enable()


def test_as_a_decorator_it_pauses_every_call() -> None:
    @garbage_collection_paused()
    def seen() -> bool:
        return gc.isenabled()

    assert [seen(), seen(), gc.isenabled()] == [False, False, True]
