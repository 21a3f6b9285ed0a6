"""Seconds of a training step, phase by phase, each as long as its slowest resource takes (a roofline).

A phase's seconds are a sum over what cannot overlap (compute or HBM, whichever is longer; links; fixed overheads); the
entry with the most seconds is the phase's bound. Phases follow each other, as `trainer.loop` runs them; engines idle
while the actor trains and the other way round, under either placement. With `rollout.max_staleness` they do not: the
policy's rollouts of a step are drawn while the actors learn from the step before, and `overlapped` is what that saves.
What else overlaps or is spared is not counted, and `uncounted` says so.

Not modelled: rewards, checkpoints, validation, draws of the guard's anchor questions, the driver, the start of a run.
"""

import math
from dataclasses import dataclass
from functools import cache

from megatron_coreward.config.architecture import Architecture
from megatron_coreward.config.methods import needs_of
from megatron_coreward.config.schema import RunConfig
from megatron_coreward.planner.hardware import Assumptions, Gpu
from megatron_coreward.planner.memory import EngineMemory, microbatch_tokens, sync_peers
from megatron_coreward.planner.parameters import stage_parameters
from megatron_coreward.weights.buckets import ITEM_BYTES
from megatron_coreward.weights.layouts import ActorLayout, EngineLayout
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
    labelled: int  # sequences that vote and are not trained on: the teacher's, and those of rollout.votes beyond n
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
    needs = needs_of(config.method)
    views, teacher, r = len(needs.views), needs.teacher, config.rollout
    statistics = needs.token_stats or config.loss.updates_per_batch > 1
    return Work(
        trained=config.data.batch_size * views * r.n,
        labelled=config.data.batch_size
        * (len(needs.sampled_views("teacher")) * config.teacher.n + views * (r.num_samples - r.n)),
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
# Bytes an element that adding a BF16 gradient to the fp32 one moves: written, read, and the sum read and written.
GRADIENT_TRAFFIC = 2 + 2 + 4 + 4


@dataclass(frozen=True, slots=True)
class ActorTimes:
    scoring: Phase
    update: Phase


def actor_times(config: RunConfig, arch: Architecture, gpu: Gpu, assumptions: Assumptions) -> ActorTimes:
    """Forward passes over the batch, and the update."""
    a, layout, todo = config.actor, ActorLayout.of(config.actor), work(config, assumptions)
    stages, tp, item = a.pipeline_parallel, a.tensor_parallel, ITEM_BYTES[config.model.dtype]
    tokens = todo.tokens / a.data_parallel / a.context_parallel  # of a rank; passing keys and values is not counted
    per_pack = min(assumptions.packing * microbatch_tokens(a), tokens)
    packs = math.ceil(tokens / per_pack / config.loss.updates_per_batch) * config.loss.updates_per_batch
    if a.virtual_pipeline > 1:
        packs = math.ceil(packs / stages) * stages
    per_pack = tokens / packs
    layers = [sum(map(len, chunks)) for chunks in layout.chunks(arch.num_layers)]  # of each stage

    layer = layer_seconds(arch, layout, per_pack, (todo.prompt + todo.response) / 2, gpu, assumptions)
    scored = per_pack * todo.response / (todo.prompt + todo.response)  # tokens that meet the output layer
    head = scored * head_flops(arch) / tp / product_rate(scored, gpu, assumptions)

    hidden = per_pack * arch.hidden_size * item * max(layers)
    reduced = 1 if arch.experts else 2  # all-reduces of a layer, each of twice its share of the volume
    tensor = reduced * 2 * (tp - 1) / tp * hidden / link_bytes_s(tp, gpu, assumptions)
    expert = expert_seconds(arch, layout, hidden, gpu, assumptions)

    held = max((stage_parameters(arch, layout, stage) for stage in (0, stages - 1)), key=lambda s: s.numel)

    def phase(name: str, passes: float, of_head: float, travels: float, fills: int, **more: float) -> Phase:
        """Passes of the rank's micro-batches through the slowest stage's layers, and through the output layer,
        filling and emptying the pipeline `fills` times."""
        of_stages = [passes * n * layer for n in layers]
        of_stages[-1] += of_head * head
        seconds = {
            "compute": packs * max(of_stages),
            "layer overhead": packs * passes * max(layers) * assumptions.layer_overhead_s,
            "tensor-parallel link": travels * packs * tensor,
            "expert-parallel link": travels * packs * expert,
        }
        if name == "update":  # each micro-batch adds its gradients to the fp32 ones
            seconds["gradients (HBM)"] = packs * GRADIENT_TRAFFIC * held.numel / gpu.hbm_bytes_s
        idle = fills * (stages - 1) / a.virtual_pipeline / packs  # share of the busy time
        return Phase(name, {**seconds, "pipeline bubble": idle * sum(seconds.values()), **more})

    updates = config.loss.updates_per_batch
    ring = (a.data_parallel - 1) / a.data_parallel * held.numel * (4 + item)
    step = held.owned * (4 + 2 * 4 + 2 * 8 + item) + 3 * 4 * held.numel
    recompute = a.recompute == "full"
    return ActorTimes(
        scoring=phase("scoring", todo.passes, todo.passes, todo.passes, 1),
        update=phase(
            "update",
            4 if recompute else 3,  # the backward pass computes twice as much as the forward pass
            4,  # whose logits are computed again
            3 if recompute else 2,
            updates,
            **{
                "data-parallel link": updates * ring / link_bytes_s(tp * a.data_parallel, gpu, assumptions),
                "optimizer (HBM)": updates * step / gpu.hbm_bytes_s,
            },
        ),
    )


def link_bytes_s(ranks: int, gpu: Gpu, assumptions: Assumptions) -> float:
    """Bytes a second between neighbours of a group whose members lie `ranks` apart."""
    within = ranks <= assumptions.gpus_per_node
    return assumptions.link_efficiency * (gpu.nvlink_bytes_s if within else gpu.network_bytes_s)


def expert_seconds(arch: Architecture, layout: ActorLayout, hidden: float, gpu: Gpu, assumptions: Assumptions) -> float:
    """To bring `hidden` bytes of activations to their experts and back; nothing for a dense model."""
    if arch.experts is None:
        return 0.0
    ranks, expert_tp = layout.expert_parallel, layout.expert_tp_size
    copies = 2 * arch.experts.top_k * hidden / layout.tensor_parallel  # from every rank
    others = (ranks - 1) / ranks
    away = max(0.0, 1 - assumptions.gpus_per_node / (ranks * expert_tp))  # on other nodes
    far, near = link_bytes_s(MANY, gpu, assumptions), link_bytes_s(1, gpu, assumptions)
    gathered = (expert_tp - 1) / link_bytes_s(expert_tp, gpu, assumptions)
    return copies * (max(away / far, (others - away) / near) + gathered)


def product_rate(tokens: float, gpu: Gpu, assumptions: Assumptions) -> float:
    """Operations a second of a product over this many tokens: few do not fill a GPU."""
    filled = tokens / (tokens + assumptions.half_rate_tokens)
    return assumptions.matmul_efficiency * filled * gpu.bf16_flops


def layer_seconds(
    arch: Architecture, layout: ActorLayout, tokens: float, context: float, gpu: Gpu, assumptions: Assumptions
) -> float:
    """Of one layer on a rank, forwards, for a micro-batch of this many tokens: products alone."""
    tp = layout.tensor_parallel
    dense = tokens * layer_flops(arch, context) / tp
    if arch.experts is None:
        return dense / product_rate(tokens, gpu, assumptions)
    e = arch.experts
    routed = tokens * 6 * arch.hidden_size * e.ffn_size * e.top_k / tp
    # Tokens that one expert meets: of all ranks over which experts are spread, each with its part of a micro-batch.
    met = tokens / tp * layout.expert_parallel * layout.expert_tp_size * e.top_k / e.num
    imbalance = assumptions.expert_imbalance if layout.expert_parallel > 1 else 1.0
    rest = (dense - routed) / product_rate(tokens, gpu, assumptions)
    return rest + imbalance * routed / product_rate(met, gpu, assumptions)


def head_layers(arch: Architecture, config: RunConfig, assumptions: Assumptions) -> float:
    """What the output layer costs an update, in layers: how many fewer the last pipeline stage should have."""
    todo = work(config, assumptions)
    share = todo.response / (todo.prompt + todo.response)
    passes = 4 / (4 if config.actor.recompute == "full" else 3)
    return passes * share * head_flops(arch) / layer_flops(arch, (todo.prompt + todo.response) / 2)


# ---- the engines -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RolloutTime:
    phase: Phase
    of_policy: float  # seconds of the phase in which the policy samples; the teacher does in the others
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
    concurrent, seconds_of = 1, []
    fit = max(1, int(memory.cache_tokens / (todo.prompt + todo.response)))
    for sequences in (todo.trained, todo.labelled):
        mine = math.ceil(sequences / r.num_engines)
        if mine == 0:
            continue
        before = sum(seconds.values())
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
        seconds_of.append(sum(seconds.values()) - before)
    phase = Phase("rollout", seconds)
    of_policy = seconds_of[0] if needs_of(config.method).teacher else phase.seconds  # else all sequences are its own
    return RolloutTime(phase, of_policy, concurrent, todo.sampled / phase.seconds)


def _weights_read(arch: Architecture, alive: float) -> float:
    """Weights that one decoding step of this many sequences reads: of experts, those that some token goes to."""
    dense = num_parameters(arch) - (0 if arch.tied else arch.vocab_size * arch.hidden_size)
    if arch.experts is None:
        return dense
    e = arch.experts
    experts = arch.num_layers * e.num * 3 * arch.hidden_size * e.ffn_size
    touched = 1 - math.pow(1 - e.top_k / e.num, max(alive, 1.0))
    return dense - experts + touched * experts


# ---- what goes on at the same time -----------------------------------------------------------------------------------


def overlapped(config: RunConfig, rollout: RolloutTime, actor: ActorTimes) -> float:
    """Seconds, in the mean over the steps, in which engines draw for the next step while actors learn.

    Under the deterministic schedule nothing is drawn ahead across a checkpoint, so the step after one waits.
    """
    if not config.rollout.max_staleness:
        return 0.0
    every = config.checkpoint.every if config.rollout.schedule == "deterministic" else 0
    waiting = math.ceil(config.steps / (every or config.steps))
    learning = actor.scoring.seconds + actor.update.seconds
    return (1 - waiting / config.steps) * min(rollout.of_policy, learning)


def uncounted(config: RunConfig) -> list[str]:
    """What of the settings makes a step shorter than it is predicted: a sentence for each, with its key."""
    r, t = config.rollout, config.teacher
    notes = []
    if r.schedule == "streaming" and r.max_staleness:
        notes.append(
            f"rollout.schedule: streaming with rollout.max_staleness: {r.max_staleness} begins later steps while the "
            "longest responses of a step are unfinished; here every step waits for its longest"
        )
    if needs_of(config.method).teacher:
        if t.engines:
            notes.append(
                f"teacher.engines: {t.engines} lets policy and teacher sample at once, each on its own engines; here "
                "they sample one after the other, each on all engines"
            )
        if t.lookahead:
            notes.append(
                f"teacher.lookahead: {t.lookahead} labels several steps at once; here the teacher labels each step, "
                "after a weight sync of its own"
            )
        if t.early_stop:
            notes.append(
                "teacher.early_stop: true ends groups whose vote is decided; here the teacher completes all of them"
            )
    return notes


# ---- the weight sync -------------------------------------------------------------------------------------------------


def transfers(config: RunConfig, arch: Architecture) -> TransferPlan:
    """The plan of one weight sync."""
    target = EngineLayout(num_engines=config.rollout.num_engines, tensor_parallel=config.rollout.tensor_parallel)
    return plan_transfers(ActorLayout.of(config.actor), target, ModelTensors(arch, config.model.dtype))


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
