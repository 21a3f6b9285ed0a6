"""How the layers of a model are divided over pipeline stages. Pure.

The first and the last stage may have other numbers of layers than the stages between them, which are equal: Megatron's
`num_layers_in_first_pipeline_stage` and `num_layers_in_last_pipeline_stage`. The last stage computes the output layer
besides, which is worth several layers of a small model with a large vocabulary.
"""

from functools import cache

from megatron_coreward.errors import InputError


def divide_layers(num_layers: int, stages: int, first: int | None = None, last: int | None = None) -> tuple[int, ...]:
    """Layers of every stage.

    Args:
        first, last: layers of the first and the last stage; None: as many as those between.

    Raises:
        InputError: they do not divide; names values that would.
    """
    given = [n for n in (first, last) if n is not None]
    between, rest = stages - len(given), num_layers - sum(given)
    if rest < between or (rest % between if between else rest):
        also = f" after {sum(given)} of the first or last stage" if given else ""
        instead = balanced_ends(num_layers, stages)
        fits = (
            f"actor.first_stage_layers {instead[0]} with actor.last_stage_layers {instead[1]} do"
            if instead is not None
            else f"at most {num_layers} stages are possible"
        )
        raise InputError(
            f"actor.pipeline_parallel: {num_layers} layers do not divide over {stages} stages{also}; {fits}"
        )
    sizes = [rest // between if between else 0] * stages
    sizes[0] = sizes[0] if first is None else first
    sizes[-1] = sizes[-1] if last is None else last
    return tuple(sizes)


@cache
def balanced_ends(num_layers: int, stages: int, head: float = 0.0, multiple: int = 1) -> tuple[int, int] | None:
    """Layers of the first and the last stage such that the slowest stage is as fast as it can be; None: there are none.

    Args:
        head: what the output layer costs beside the last stage's layers, in layers.
        multiple: the layers of every stage are a multiple of this (model chunks of a virtual pipeline).
    """
    best: tuple[tuple[float, float], int, int] | None = None
    sizes = range(multiple, num_layers, multiple)
    for first in sizes:
        for last in sizes:
            rest, between = num_layers - first - last, stages - 2
            if rest < 0 or (rest % (between * multiple) or not rest if between else rest):
                continue
            costs = [first, last + head, *([rest / between] if between else [])]
            key = (max(costs), -min(costs))
            if best is None or key < best[0]:
                best = key, first, last
    return None if best is None else best[1:]
