"""Router replay: a token goes to the experts that the rollout engine chose for it, in training as in the rollout.

Engine and actor round differently, and where two experts are nearly as good they choose different ones: then the policy
that trains is not the one that sampled (R3, "Stabilizing MoE Reinforcement Learning by Aligning Training and
Inference Routers", arXiv 2510.11370). What is replayed is the choice alone: the weights of the chosen experts are the
router's own, with their gradient.

Megatron-core (0.16 and 0.19) asks an object in every router for the choice. Its own `RouterReplay` keeps all of them in
a list of the process and wants to be told before each pass whether that is a recomputation, which a pipeline's
schedules do not say. `LayerReplay` stands in its place and finds out.

Invariants (tests/actor/test_router_replay.py):
  1. With the experts that the router would choose itself, nothing changes: neither loss nor gradients.
  2. Under every layout, with recomputation too, the experts are those that were asked for.
"""

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.router import TopKRouter

from megatron_coreward.config.schema import ActorSettings

OWN_CHOICE = -1  # in the place of an expert: the router chooses for this token


class LayerReplay:
    """The choices of one layer's router, micro-batch after micro-batch."""

    def __init__(self, layer: int, recomputed: bool, sequence_parallel: bool) -> None:
        """
        Args:
            layer: number of the layer in the model, from 0.
            recomputed: the router runs again in the backward pass.
            sequence_parallel: it sees a tensor-parallel rank's part of the tokens alone.
        """
        self.layer = layer
        self._recomputed, self._sequence_parallel = recomputed, sequence_parallel
        self._current: torch.Tensor | None = None
        self._waiting: deque[torch.Tensor | None] = deque()  # passes whose recomputation is to come
        self._remembers = False

    def forget(self) -> None:
        """Nothing is to be recomputed: an update begins. One that failed has left passes behind."""
        self._waiting.clear()

    def begin(self, experts: torch.Tensor | None, backward: bool) -> None:
        """The next pass of this layer is that of another micro-batch.

        Args:
            experts: [T, top k] of the rank's tokens, `OWN_CHOICE` for those without a given choice; None: for all.
            backward: the pass has a backward pass.
        """
        if experts is not None and self._sequence_parallel:
            ranks, rank = (
                parallel_state.get_tensor_model_parallel_world_size(),
                parallel_state.get_tensor_model_parallel_rank(),
            )
            experts = experts.chunk(ranks)[rank]
        self._current = experts
        self._remembers = backward and self._recomputed

    def get_replay_topk(
        self,
        scores: torch.Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: Callable[..., tuple[torch.Tensor, torch.Tensor]] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores and numbers, [T, top k] each, of the experts that the tokens go to. Megatron's name and arguments."""
        assert default_compute_topk is not None
        values, own = default_compute_topk(scores, topk, num_groups=num_groups, group_topk=group_topk)
        asked = self._of_this_pass()
        if asked is None:
            return values, own
        chosen = torch.where(asked == OWN_CHOICE, own, asked.to(own.dtype))
        return scores.gather(1, chosen), chosen

    def _of_this_pass(self) -> torch.Tensor | None:
        """What is recomputed runs first without a gradient, then again with one, micro-batches in the same order."""
        if not self._remembers:
            return self._current
        if torch.is_grad_enabled():
            return self._waiting.popleft()
        self._waiting.append(self._current)
        return self._current


def attach_replay(model: torch.nn.Module, settings: ActorSettings) -> tuple[LayerReplay, ...]:
    """Gives every router of a model chunk a replay."""
    found = []
    for router in (module for module in model.modules() if isinstance(module, TopKRouter)):
        assert router.layer_number is not None
        replay = LayerReplay(router.layer_number - 1, settings.recompute != "none", settings.sequence_parallel)
        router.router_replay = replay
        found.append(replay)
    return tuple(found)


def replays_of(chunks: list[Any]) -> Iterator[LayerReplay]:
    """Those of a policy's chunks; none if experts are not replayed."""
    for chunk in chunks:
        yield from chunk.module.replays
