"""Python's cycle collector, kept out of the way of a step."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def garbage_collection_paused() -> Iterator[None]:
    """No search for cycles within. Also a decorator.

    A step makes hundreds of thousands of objects that all stay until its end, and hardly a cycle. The collector would
    look through them again and again while they grow; it does so afterwards, when most of them are gone.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
