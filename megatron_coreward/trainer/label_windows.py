"""For which steps the teacher draws labels when a step is at hand: that one, or a window of steps that begins with it.

The teacher moves slowly. With `teacher.lookahead: L` it labels up to L + 1 steps at once, with one set of weights: one
weight sync instead of L + 1. Pure.
"""

from collections.abc import Callable


def window_between_checkpoints(
    step: int, lookahead: int, last: int, every: int, lacking: Callable[[int], bool]
) -> list[int]:
    """The steps to label now. Windows begin after checkpoints, and none crosses one: what a resumed run labels is what
    an uninterrupted one labelled.

    Args:
        last: the last step that may be labelled now.
        every: steps between checkpoints; 0: there are none.
        lacking: whether a step has no labels.
    """
    after_checkpoint = (step - 1) % every if every else step - 1
    if after_checkpoint % (lookahead + 1) and not lacking(step):
        return []  # within a window that is labelled
    return [s for s in range(step, min(step + lookahead, last) + 1) if lacking(s)]


def window_ahead(first: int, drawn_for: int, lookahead: int, last: int, lacking: Callable[[int], bool]) -> list[int]:
    """The steps to label now, if the policy draws for the steps up to `drawn_for` now: none if these have labels."""
    if not any(lacking(s) for s in range(first, drawn_for + 1)):
        return []
    return [s for s in range(first, min(drawn_for + lookahead, last) + 1) if lacking(s)]
