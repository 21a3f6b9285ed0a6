"""Supervised fine-tuning of the demo's random model, through the same Megatron actor that later trains without labels.

Cross-entropy is the policy gradient with an advantage of one everywhere: its gradient is that of -log p of the written
answers. So the warm start is a run of plain updates, and needs no code of its own in the actor.
"""

from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from megatron_coreward.actor.setup import ActorSetup
from megatron_coreward.algorithms.aggregation import token_weights
from megatron_coreward.cluster.actor_group import ActorGroup
from megatron_coreward.cluster.placement import START_LIMIT_S, ReservedPlacement
from megatron_coreward.cluster.ray_start import start_ray
from megatron_coreward.config.schema import ActorSettings, LossSettings
from megatron_coreward.data.prompts import build_prompts
from megatron_coreward.planner.placement import ResourceRequest
from megatron_coreward.types import Sequences, TrainBatch

BATCH_SIZE = 32
LEARNING_RATE = 2e-3
WARMUP_STEPS = 60
SMOOTHING = 20  # steps over which the loss is averaged before it is held against the target


def warm_start(
    source: Path,
    target: Path,
    tokenizer: Any,
    examples: Sequence[tuple[str, str]],
    *,
    max_steps: int,
    target_loss: float = 0.0,
    seed: int,
    on_step: Callable[[int, float], None],
) -> int:
    """Fine-tunes the model in `source` on (question, answer) pairs and writes it to `target`.

    Small models learn to add all of a sudden, at a step that depends on the seed: so a loss ends this, not a number of
    steps.

    Args:
        target_loss: mean loss over the last steps, in nats a token, at which it is enough.
        on_step: hears the number of each step done, from 1, and that mean loss.

    Returns:
        The number of steps done.
    """
    prompts, responses = _tokenise(tokenizer, examples)
    longest = max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
    start_ray()
    setup = _actor_setup(source, longest, max_steps, seed)
    placement = ReservedPlacement(ResourceRequest.of_actors(setup.settings), limit_s=START_LIMIT_S)
    actors = ActorGroup(setup, placement)
    try:
        actors.wait()
        order = np.random.default_rng(seed)
        losses: deque[float] = deque(maxlen=SMOOTHING)
        for step in range(1, max_steps + 1):
            chosen = order.choice(len(examples), BATCH_SIZE, replace=False)
            report = actors.update(_batch([prompts[i] for i in chosen], [responses[i] for i in chosen]))
            losses.append(report["nll"] / report["tokens"])
            on_step(step, fmean(losses))
            if len(losses) == SMOOTHING and fmean(losses) < target_loss:
                break
        actors.call("export_hf", "policy", target.resolve())
        return step
    finally:
        actors.shutdown()
        placement.release()


def _actor_setup(source: Path, longest: int, max_steps: int, seed: int) -> ActorSetup:
    settings = ActorSettings(
        data_parallel=2,
        lr=LEARNING_RATE,
        lr_schedule="constant",
        lr_warmup=min(1.0, WARMUP_STEPS / max_steps),
        adam_beta2=0.95,
        weight_decay=0.0,
        tokens_per_microbatch=2048,
    )
    return ActorSetup(
        settings=settings,
        loss=LossSettings(kl_coef=0.0),
        hf_path=source.resolve(),
        megatron_path=None,
        dtype="float32",
        temperature=1.0,
        max_sequence_length=longest,
        total_updates=max_steps,
        seed=seed,
        teacher=False,
        frozen_reference=False,
    )


def _tokenise(
    tokenizer: Any, examples: Sequence[tuple[str, str]]
) -> tuple[list[np.ndarray[Any, Any]], list[np.ndarray[Any, Any]]]:
    asked = build_prompts(tokenizer, [[{"role": "user", "content": question}] for question, _ in examples])
    answers = tokenizer([answer for _, answer in examples], add_special_tokens=False)["input_ids"]
    responses = [np.asarray([*ids, tokenizer.eos_token_id], dtype=np.int32) for ids in answers]
    return [prompt.token_ids for prompt in asked], responses


def _batch(prompts: Sequence[Any], responses: Sequence[Any]) -> TrainBatch:
    return TrainBatch(
        sequences=Sequences(
            [np.concatenate([p, r]).astype(np.int32) for p, r in zip(prompts, responses, strict=True)],
            np.asarray([len(p) for p in prompts], dtype=np.int32),
        ),
        advantages=np.ones(len(prompts), dtype=np.float32),
        token_weights=token_weights([len(r) for r in responses], "token-mean", 0),
        rollout_logprobs=None,
        old_logprobs=None,
        reference_logprobs=None,
        kl_coef=0.0,
    )
