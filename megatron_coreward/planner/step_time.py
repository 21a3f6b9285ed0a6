"""Seconds of a training step, phase by phase, each as long as its slowest resource takes (a roofline).

A phase's seconds are a sum over what cannot overlap (compute or HBM, whichever is longer; links; fixed overheads); the
entry with the most seconds is the phase's bound. Phases follow each other, as `trainer.loop` runs them; engines idle
while the actor trains and the other way round, under either placement.

Not modelled: rewards, checkpoints, validation, the driver, the start of a run.
"""

import math
from dataclasses import dataclass
from functools import cache

from megatron_coreward.config.architecture import Architecture
from megatron_coreward.config.schema import TEACHER_METHODS, TWO_VIEW_METHODS, RunConfig
from megatron_coreward.planner.hardware import Assumptions, Gpu
from megatron_coreward.planner.memory import EngineMemory, microbatch_tokens, sync_peers
from megatron_coreward.planner.parameters import actor_layout, stage_parameters
from megatron_coreward.rewards.methods import METHODS
from megatron_coreward.weights.buckets import ITEM_BYTES
from megatron_coreward.weights.layouts import EngineLayout
from megatron_coreward.weights.mapping import hf_tensors
from megatron_coreward.weights.plan import ModelTensors, TransferPlan, plan_transfers


@dataclass(frozen=True, slots=True)
class Phase:
    """A part of a step: seconds by the resource that takes them."""

    name: str
    seconds_by: dict[str, float]

    @property
    def seconds(self) -> float:
        return sum(self.seconds_by.values())

    @property
    def bound(self) -> str:
        return max(self.seconds_by, key=lambda resource: self.seconds_by[resource])


@dataclass(frozen=True, slots=True)
class Work:
    """What a step has to do, whatever the layout."""

    trained: int  # sequences that the policy samples and that are trained on
    labelled: int  # sequences that the teacher samples
    prompt: float  # mean tokens
    response: float
    longest: int  # tokens of the longest response
    passes: int  # forward passes of the actor beside the update: reference, statistics, old log-probs
    syncs: int  # of weights to the engines

    @property
    def tokens(self) -> float:
        """Of prompts and responses that are trained on."""
        return self.trained * (self.prompt + self.response)

    @property
    def sampled(self) -> float:
        return (self.trained + self.labelled) * self.response


def work(config: RunConfig, assumptions: Assumptions) -> Work:
    views = 2 if config.method in TWO_VIEW_METHODS else 1
    teacher = config.method in TEACHER_METHODS
    statistics = METHODS[config.method].needs.token_stats or config.loss.updates_per_batch > 1
    return Work(
        trained=config.data.batch_size * views * config.rollout.n,
        labelled=config.data.batch_size * views * config.teacher.n * teacher,
        prompt=assumptions.mean_prompt * config.data.max_prompt_tokens,
        response=assumptions.mean_response * config.rollout.max_response_tokens,
        longest=config.rollout.max_response_tokens,
        passes=bool(config.loss.kl_coef) + statistics,
        syncs=2 if teacher else 1,
    )


# ---- arithmetic of the model -----------------------------------------------------------------------------------------


def layer_flops(arch: Architecture, context: float) -> float:
    """Forward, a token: products with weights (2 a weight) and with keys and values of `context` tokens."""
    return 2 * layer_weights(arch) + 4 * arch.num_heads * arch.head_dim * context


def layer_weights(arch: Architecture) -> int:
    """Weights that one token meets in a layer."""
    h, d = arch.hidden_size, arch.head_dim
    attention = (2 * arch.num_heads + 2 * arch.num_kv_heads) * d * h
    if arch.experts is None:
        return attention + 3 * h * arch.ffn_size
    return attention + h * arch.experts.num + 3 * h * arch.experts.ffn_size * arch.experts.top_k


def head_flops(arch: Architecture) -> float:
    return 2 * arch.vocab_size * arch.hidden_size


@cache
def num_parameters(arch: Architecture) -> int:
    """Of the HF checkpoint."""
    sizes = 0
    for shape in hf_tensors(arch).values():
        numel = 1
        for size in shape:
            numel *= size
        sizes += numel
    return sizes


# ---- the actor -------------------------------------------------------------------------------------------------------


MANY = 1 << 30  # ranks: more than a node has


@dataclass(frozen=True, slots=True)
class ActorTimes:
    scoring: Phase
    update: Phase


def actor_times(config: RunConfig, arch: Architecture, gpu: Gpu, assumptions: Assumptions) -> ActorTimes:
    """Forward passes over the batch, and the update."""
    a, layout, todo = config.actor, actor_layout(config.actor), work(config, assumptions)
    item, stages = ITEM_BYTES[config.model.dtype], a.pipeline_parallel
    tokens = todo.tokens / a.data_parallel / a.context_parallel  # of a rank; passing keys and values is not counted
    per_pack = min(assumptions.packing * microbatch_tokens(a), tokens)
    packs = math.ceil(tokens / per_pack / config.loss.updates_per_batch) * config.loss.updates_per_batch
    if a.virtual_pipeline > 1:
        packs = math.ceil(packs / stages) * stages
    per_pack = tokens / packs

    context = (todo.prompt + todo.response) / 2
    layers = arch.num_layers / stages * layer_flops(arch, context)
    if arch.experts is not None and a.expert_parallel > 1:
        e = arch.experts
        routed = 6 * arch.hidden_size * e.ffn_size * e.top_k * arch.num_layers / stages
        layers += (assumptions.expert_imbalance - 1) * routed
    forward = per_pack * (layers + head_flops(arch)) / a.tensor_parallel  # of the last stage, the slowest
    compute = forward / (assumptions.matmul_efficiency * gpu.bf16_flops)

    def link(ranks: int) -> float:
        """Bytes a second between neighbours of a group whose members lie so far apart."""
        within = ranks <= assumptions.gpus_per_node
        return assumptions.link_efficiency * (gpu.nvlink_bytes_s if within else gpu.network_bytes_s)

    hidden = per_pack * arch.hidden_size * item * arch.num_layers / stages
    reduced = 1 if arch.experts else 2  # all-reduces of a layer, each of twice its share of the volume
    tensor = reduced * 2 * (a.tensor_parallel - 1) / a.tensor_parallel * hidden / link(a.tensor_parallel)
    expert = 0.0
    if arch.experts is not None:
        copies = 2 * arch.experts.top_k * hidden / a.tensor_parallel  # to the experts and back, from every rank
        others = (a.expert_parallel - 1) / a.expert_parallel
        away = max(0.0, 1 - assumptions.gpus_per_node / (a.expert_parallel * a.tensor_parallel))  # on other nodes
        expert = copies * max(away / link(MANY), (others - away) / link(1))
        expert += copies * (a.tensor_parallel - 1) / link(a.tensor_parallel)  # gathered over expert-tensor-parallel

    updates = config.loss.updates_per_batch

    def phase(name: str, computes: float, travels: float, colocation: int, **more: float) -> Phase:
        """Forward passes' worth of computing and travelling over the rank's micro-batches, in pipeline `turns`."""
        seconds = {
            "compute": computes * packs * compute,
            "tensor-parallel link": travels * packs * tensor,
            "expert-parallel link": travels * packs * expert,
        }
        idle = colocation * (stages - 1) / a.virtual_pipeline / packs  # share of the busy time
        return Phase(name, {**seconds, "pipeline bubble": idle * sum(seconds.values()), **more})

    held = max((stage_parameters(arch, layout, stage) for stage in (0, stages - 1)), key=lambda s: s.numel)
    ring = (a.data_parallel - 1) / a.data_parallel * held.numel * (4 + item)
    step = held.owned * (4 + 2 * 4 + 2 * 8 + item) + 3 * 4 * held.numel
    recompute = a.recompute == "full"
    return ActorTimes(
        scoring=phase("scoring", todo.passes, todo.passes, 1),
        update=phase(
            "update",
            4 if recompute else 3,  # the backward pass computes twice as much as the forward pass
            3 if recompute else 2,
            updates,
            **{
                "data-parallel link": updates * ring / link(a.tensor_parallel * a.data_parallel),
                "optimizer (HBM)": updates * step / gpu.hbm_bytes_s,
            },
        ),
    )


# ---- the engines -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RolloutTime:
    phase: Phase
    concurrent: int  # sequences that an engine decodes at once
    tokens_s: float  # sampled, of all engines together


def rollout_time(
    config: RunConfig, arch: Architecture, gpu: Gpu, memory: EngineMemory, assumptions: Assumptions
) -> RolloutTime:
    """Of all sequences of a step, the policy's and then the teacher's.

    An engine decodes until its longest response is complete. Each decoding step reads all weights that it needs and the
    cache of every running sequence, or computes for longer than that takes.
    """
    r, todo, item = config.rollout, work(config, assumptions), ITEM_BYTES[config.model.dtype]
    tp = r.tensor_parallel
    seconds = dict.fromkeys(("HBM", "compute", "iterations", "tensor-parallel link"), 0.0)
    concurrent = 1
    fit = max(1, int(memory.cache_tokens / (todo.prompt + todo.response)))
    for sequences in (todo.trained, todo.labelled):
        mine = math.ceil(sequences / r.num_engines)
        if mine == 0:
            continue
        at_once = min(mine, r.max_num_seqs, fit)
        concurrent = max(concurrent, at_once)
        sampled = mine * todo.response
        iterations = todo.longest + (mine / at_once - 1) * todo.response
        weights = iterations * item * _weights_read(arch, sampled / iterations) / tp
        cache = sampled * (todo.prompt + todo.response / 2) * memory.cache_bytes_per_token
        reading = (weights + cache) / (assumptions.decode_efficiency * gpu.hbm_bytes_s)
        context = todo.prompt + todo.response / 2
        flops = sampled * (arch.num_layers * layer_flops(arch, context) + head_flops(arch))
        prompts = mine / r.n * todo.prompt  # a prompt is read once for all of its samples
        flops += prompts * arch.num_layers * layer_flops(arch, todo.prompt / 2)
        computing = flops / tp / (assumptions.matmul_efficiency * gpu.bf16_flops)
        seconds["HBM" if reading >= computing else "compute"] += max(reading, computing)
        seconds["iterations"] += iterations * assumptions.iteration_overhead_s
        seconds["iterations"] += sampled * assumptions.sequence_overhead_s
        if tp > 1:
            volume = 2 * 2 * (tp - 1) / tp * sampled * arch.hidden_size * item * arch.num_layers
            rate = gpu.nvlink_bytes_s if tp <= assumptions.gpus_per_node else gpu.network_bytes_s
            latency = iterations * 2 * arch.num_layers * assumptions.allreduce_latency_s
            seconds["tensor-parallel link"] += latency + volume / (assumptions.link_efficiency * rate)
    phase = Phase("rollout", seconds)
    return RolloutTime(phase, concurrent, todo.sampled / phase.seconds)


def _weights_read(arch: Architecture, alive: float) -> float:
    """Weights that one decoding step of so many sequences reads: of experts, those that some token goes to."""
    dense = num_parameters(arch) - (0 if arch.tied else arch.vocab_size * arch.hidden_size)
    if arch.experts is None:
        return dense
    e = arch.experts
    experts = arch.num_layers * e.num * 3 * arch.hidden_size * e.ffn_size
    touched = 1 - math.pow(1 - e.top_k / e.num, max(alive, 1.0))
    return dense - experts + touched * experts


# ---- the weight sync -------------------------------------------------------------------------------------------------


def transfers(config: RunConfig, arch: Architecture) -> TransferPlan:
    """The plan of one weight sync."""
    target = EngineLayout(num_engines=config.rollout.num_engines, tensor_parallel=config.rollout.tensor_parallel)
    return plan_transfers(actor_layout(config.actor), target, ModelTensors(arch, config.model.dtype))


def sync_time(busiest_bytes: float, config: RunConfig, arch: Architecture, gpu: Gpu, assumptions: Assumptions) -> Phase:
    """Bytes of the busiest sender or receiver over its share of the network, and what its messages cost: one from each
    peer in every bucket."""
    syncs = work(config, assumptions).syncs
    rate = assumptions.link_efficiency * gpu.network_bytes_s
    model_bytes = ITEM_BYTES[config.model.dtype] * num_parameters(arch)
    messages = math.ceil(model_bytes / (config.sync.bucket_mib * 2**20)) * sync_peers(config)
    return Phase(
        "sync",
        {"network": syncs * busiest_bytes / rate, "messages": syncs * messages * assumptions.message_overhead_s},
    )
