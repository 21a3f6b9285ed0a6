"""Megatron's DDP, distributed optimizer and learning-rate schedule around the model chunks."""

from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_coreward.config.schema import ActorSettings


def wrap_chunks(chunks: list[GPTModel]) -> list[DistributedDataParallel]:
    """Model chunks with contiguous parameter and gradient buffers, ready for the distributed optimizer."""
    config = chunks[0].config
    ddp = DistributedDataParallelConfig(
        use_distributed_optimizer=True, grad_reduce_in_fp32=True, fp8_param_gather=config.fp8_param
    )
    wrapped = [
        DistributedDataParallel(config, ddp, chunk, disable_bucketing=index > 0) for index, chunk in enumerate(chunks)
    ]
    config.finalize_model_grads_func = _finalize
    return wrapped


def _finalize(model: list[Any], num_tokens: torch.Tensor | None = None, **kwargs: Any) -> None:
    """Gradient reduction without Megatron's division by a token count: the token weights hold the normalisation."""
    finalize_model_grads(model, None, **kwargs)


def build_optimizer(
    model: list[DistributedDataParallel], settings: ActorSettings, dtype: torch.dtype
) -> MegatronOptimizer:
    """AdamW with fp32 main parameters and moments, sharded over data-parallel ranks; the moments are allocated here."""
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=settings.lr,
            min_lr=settings.min_lr,
            weight_decay=settings.weight_decay,
            adam_beta1=settings.adam_beta1,
            adam_beta2=settings.adam_beta2,
            adam_eps=settings.adam_eps,
            clip_grad=settings.clip_grad,
            use_distributed_optimizer=True,
            bf16=dtype == torch.bfloat16,
            params_dtype=dtype,
            fp8_recipe=settings.fp8 if settings.fp8_params else None,
        ),
        model,
    )
    for part in optimizer_parts(optimizer):
        _allocate_moments(part)
        if isinstance(part.optimizer, torch.optim.AdamW):
            for group in part.optimizer.param_groups:
                # One shard after the other. On a GPU torch would step all of them together, and hold the square roots
                # of all second moments meanwhile: 4 bytes a parameter that nothing else needs.
                group["foreach"] = False
    return optimizer


def adam_name(optimizer: MegatronOptimizer) -> str:
    """Whose Adam this is: Transformer Engine's or apex's fused one if they are installed, else torch's."""
    for part in optimizer_parts(optimizer):
        kind = type(part.optimizer)
        return f"{kind.__module__.split('.')[0]}.{kind.__qualname__}"
    return "none"


def optimizer_parts(optimizer: MegatronOptimizer) -> list[Any]:
    """The distributed optimizers with parameters on this rank (experts have one of their own)."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part for part in parts if not getattr(part, "is_stub_optimizer", False)]


def clip_gradients(optimizer: MegatronOptimizer, norm: float) -> None:
    """Scales all gradients down to the global norm that the settings allow, as Megatron's `step` does.

    Args:
        norm: of the gradients of all ranks (`optimizer.get_grad_norm`).
    """
    for part in optimizer_parts(optimizer):
        parameters = part.get_parameters()
        if parameters and part.config.clip_grad > 0:
            clip_grad_by_total_norm_fp32(parameters, max_norm=part.config.clip_grad, total_norm=norm)


MOMENTS = ("exp_avg", "exp_avg_sq")


def _allocate_moments(part: Any) -> None:
    """Gives every shard its (zero) moments before the first step, which is where Adam would: memory that will be needed
    should be missing at the start rather than later, and a checkpoint can be read into what is there."""
    for group in part.optimizer.param_groups:
        for shard in group["params"]:
            state = part.optimizer.state[shard]
            for name in MOMENTS:
                state[name] = torch.zeros_like(shard, dtype=torch.float32)
            if isinstance(part.optimizer, torch.optim.AdamW):
                state["step"] = torch.zeros(())


def step_count(optimizer: MegatronOptimizer) -> int:
    """Steps that Adam's bias correction has counted: kept per shard by torch, per group by fused optimizers."""
    for part in optimizer_parts(optimizer):
        for state in part.optimizer.state.values():
            if "step" in state:
                return int(state["step"])
        for group in part.optimizer.param_groups:
            return int(group.get("step", 0))
    return 0


def set_step_count(optimizer: MegatronOptimizer, count: int) -> None:
    """The inverse of `step_count`."""
    for part in optimizer_parts(optimizer):
        for state in part.optimizer.state.values():
            if "step" in state:
                state["step"].fill_(count)
        for group in part.optimizer.param_groups:
            if not isinstance(part.optimizer, torch.optim.AdamW):
                group["step"] = count


def build_scheduler(
    optimizer: MegatronOptimizer, settings: ActorSettings, total_updates: int
) -> OptimizerParamScheduler:
    """Warm-up, then decay over `total_updates` optimizer steps; advance it by 1 *before* each step.

    Step k (from 1) runs at lr(k): warm-up reaches the peak at its share of all steps, the decay would reach `min_lr`
    one step after the last, so that neither the first nor the last step is spent at a rate of zero. A checkpoint brings
    the position alone: the horizon is that of this run, which may have been prolonged.
    """
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=settings.lr if settings.lr_schedule == "constant" else settings.min_lr,
        lr_warmup_steps=round(settings.lr_warmup * total_updates),
        lr_decay_steps=total_updates + 1,
        lr_decay_style=settings.lr_schedule,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
