"""Bytes on a GPU: what an actor rank of each pipeline stage holds at most, and what an engine worker has left.

Weights, gradients, optimizer and teacher are exact (`planner.parameters`). Activations, logits and what an engine needs
beside weights and cache are formulas over the settings; runtime and fragmentation are assumptions.

What lives when. An actor's static parts stay on the GPU for the whole run. On top of them come, one at a time:
  update      activations of the micro-batches in flight, and what scoring a chunk of tokens takes;
  step        of the optimizer, then of the EMA: what is computed on the way, and state that is offloaded between steps;
  checkpoint  the optimizer's and the teacher's shards, gathered over data-parallel ranks (`actor.state.begin_save`).
Colocated, the engine beside a rank is awake while it samples and receives weights, and asleep during the rest.
"""

from dataclasses import dataclass, replace
from functools import cache
from math import prod

from megatron_coreward.config.accelerator import RECIPES
from megatron_coreward.config.architecture import Architecture
from megatron_coreward.config.layout_rules import VLLM_VOCAB_MULTIPLE
from megatron_coreward.config.methods import needs_of
from megatron_coreward.config.schema import ActorSettings, RunConfig
from megatron_coreward.planner.hardware import GIB, Assumptions, Gpu
from megatron_coreward.planner.parameters import layer_shapes, stage_parameters
from megatron_coreward.weights.buckets import ITEM_BYTES
from megatron_coreward.weights.layouts import ActorLayout, EngineLayout

MOMENT_BYTES, MAIN_BYTES, TEACHER_BYTES, GRADIENT_BYTES = 8, 4, 8, 4  # an element
# Of actor.token_stats: logits of a chunk at most, and elements of a slice of the output layer's gradient.
CHUNK_LOGITS, WEIGHT_SLICE = 1 << 28, 1 << 26
# Of what a step computes on the way, an element: two numbers by torch's Adam, shard by shard (fused ones need none);
# three by the EMA, of actor.teacher's groups.
ADAM_BYTES, EMA_BYTES, EMA_GROUP = 8, 12, 1 << 25


@dataclass(frozen=True, slots=True)
class StageMemory:
    """Bytes of a rank of one pipeline stage, the fullest over data-parallel ranks."""

    stage: int
    static: dict[str, int]  # for the whole run
    update: dict[str, int]  # while it accumulates gradients or scores
    step: dict[str, int]  # while the optimizer or the EMA steps, whichever takes more
    checkpoint: int  # while a checkpoint is begun
    buckets: int  # of the weight sync
    runtime: int
    fragmentation: int
    while_sampling: int  # colocated, when everything that neither a weight sync nor the canary needs is offloaded

    @property
    def resident(self) -> int:
        """Between updates."""
        return sum(self.static.values()) + self.buckets + self.runtime

    @property
    def peak(self) -> int:
        return self.resident + sum(self.fullest.values()) + self.fragmentation

    @property
    def fullest(self) -> dict[str, int]:
        """What is there for a while only, at the peak."""
        return max((self.update, self.step, {"checkpoint": self.checkpoint}), key=lambda parts: sum(parts.values()))

    @property
    def at_peak(self) -> dict[str, int]:
        """What is there at the peak, part by part."""
        return {**self.static, **self.fullest}

    @property
    def parts(self) -> dict[str, int]:
        """All of it, part by part; update, step and checkpoint are never there together."""
        return {
            **self.static,
            **self.update,
            "step": sum(self.step.values()),
            "checkpoint": self.checkpoint,
            "buckets": self.buckets,
            "runtime": self.runtime,
            "fragmentation": self.fragmentation,
        }


@dataclass(frozen=True, slots=True)
class EngineMemory:
    """Bytes of an engine worker, and what its cache holds."""

    claimed: int  # rollout.gpu_memory_utilization of the GPU
    weights: int
    overhead: int
    cache: int  # what is left for keys and values; negative: nothing is
    cache_bytes_per_token: int
    asleep: int

    @property
    def cache_tokens(self) -> int:
        return max(0, self.cache) // self.cache_bytes_per_token


def actor_memory(config: RunConfig, arch: Architecture, assumptions: Assumptions) -> tuple[StageMemory, ...]:
    """Of every pipeline stage.

    Raises:
        InputError: a layout that cannot hold the model.
    """
    a, layout, item = config.actor, ActorLayout.of(config.actor), ITEM_BYTES[config.model.dtype]
    teacher = needs_of(config.method).teacher
    frozen = keeps_reference(config)
    stages = []
    for stage in range(layout.pipeline_parallel):
        held = stage_parameters(arch, layout, stage)
        optimizer = (MOMENT_BYTES + (MAIN_BYTES if item == 2 else 0)) * held.owned
        ema = TEACHER_BYTES * held.owned * teacher
        static = {
            "weights": item * held.numel,
            "gradients": GRADIENT_BYTES * held.numel,
            "optimizer": optimizer * (not a.offload_optimizer),
            "teacher": ema * (not a.offload_teacher) + item * held.numel * teacher,
            "reference": item * held.numel * frozen,
            "FP8 copies": fp8_copies(arch, a, layout, stage, models=1 + teacher + frozen),
        }
        update = {
            "activations": activation_bytes(arch, a, stage, item, assumptions),
            "scoring": scoring_bytes(arch, a, stage, item),
        }
        adam: dict[str, int] = {"Adam": ADAM_BYTES * min(held.largest, held.owned)}
        averaging: dict[str, int] = {
            "teacher's state": ema * a.offload_teacher,
            "EMA": EMA_BYTES * min(max(held.largest, EMA_GROUP), held.owned) * teacher,
        }
        larger: dict[str, int] = max(adam, averaging, key=lambda parts: sum(parts.values()))
        step = {"optimizer's state": optimizer * a.offload_optimizer, **larger}
        checkpoint = 4 * held.numel  # main parameters, moments and teacher are gathered one after the other
        total = sum(static.values()) + max(sum(update.values()), sum(step.values()), checkpoint)
        buckets = bucket_bytes(config, assumptions)
        stages.append(
            StageMemory(
                stage=stage,
                static=static,
                update=update,
                step=step,
                checkpoint=checkpoint,
                buckets=buckets,
                runtime=assumptions.runtime_bytes,
                fragmentation=int(assumptions.fragmentation * total),
                while_sampling=item * held.numel * (1 + teacher)
                + canary_copies(arch, a, layout, stage, teacher)
                + buckets
                + assumptions.runtime_bytes,
            )
        )
    return tuple(stages)


def fp8_copies(arch: Architecture, a: ActorSettings, layout: ActorLayout, stage: int, models: int) -> int:
    """What Transformer Engine keeps of the layers' weights in FP8: each as it is and transposed, a byte each.

    Weights that are kept in FP8 themselves have no copies. A frozen model computes in BF16 if scales have a memory.
    """
    if a.fp8 is None:
        return 0
    frozen = 0 if RECIPES[a.fp8].keeps_state else models - 1
    return 2 * _layer_elements(arch, layout, stage) * (frozen + (not a.fp8_params))


def canary_copies(arch: Architecture, a: ActorSettings, layout: ActorLayout, stage: int, teacher: bool) -> int:
    """What scoring the canary keeps of the layers' weights in FP8 for a moment, when the engines have allocated their
    caches: a byte each, without the transposed ones, of one model at a time (`MegatronActor.token_stats`)."""
    if a.fp8 is None or RECIPES[a.fp8].keeps_state or (a.fp8_params and not teacher):
        return 0
    return _layer_elements(arch, layout, stage)


def _layer_elements(arch: Architecture, layout: ActorLayout, stage: int) -> int:
    """Of the weights of all layers on a rank of a stage that can be in FP8."""
    shapes = layer_shapes(arch, layout.tensor_parallel, layout.expert_tp_size, layout.expert_parallel)
    elements = sum((*shapes.attention, *shapes.mlp, *shapes.experts))
    return elements * sum(len(layers) for layers in layout.chunks(arch.num_layers)[stage])


def keeps_reference(config: RunConfig) -> bool:
    """Whether a frozen copy of the starting weights is kept (`trainer.run`)."""
    return bool(config.loss.kl_coef) and config.loss.kl_reference == "frozen"


def microbatch_tokens(a: ActorSettings) -> int:
    """A context-parallel rank's tokens of the largest micro-batch, a multiple of the tensor-parallel size."""
    return a.tokens_per_microbatch // a.context_parallel // a.tensor_parallel * a.tensor_parallel


def in_flight(layout: ActorLayout, stage: int, num_layers: int) -> int:
    """Layers whose activations a stage keeps at most, counted once a micro-batch, with enough micro-batches.

    Megatron's schedules: 1F1B keeps as many micro-batches as stages follow, itself included; the interleaved one
    2 (stages after it) + (chunks - 1) x stages + 1 chunks.
    """
    pp, vpp = layout.pipeline_parallel, layout.virtual_pipeline
    chunk = len(layout.chunks(num_layers)[stage][0])
    if vpp == 1:
        return chunk * (pp - stage)
    return chunk * (2 * (pp - stage - 1) + (vpp - 1) * pp + 1)


def activation_bytes(arch: Architecture, a: ActorSettings, stage: int, item: int, assumptions: Assumptions) -> int:
    """What is kept for the backward pass, with fused attention and no dropout.

    Recomputation of whole layers keeps the input of each layer, and everything of the one that is being recomputed.
    """
    tokens, layers = microbatch_tokens(a), in_flight(ActorLayout.of(a), stage, arch.num_layers)
    full = layer_activation_bytes(arch, a, item, assumptions)
    if a.recompute != "full":  # what `selective` saves is not counted
        return int(tokens * full * layers)
    spread = a.tensor_parallel if a.sequence_parallel else 1
    return int(tokens * (item * arch.hidden_size / spread * layers + full))


def layer_activation_bytes(arch: Architecture, a: ActorSettings, item: int, assumptions: Assumptions) -> float:
    """Of one layer, a token of a micro-batch."""
    tp = a.tensor_parallel
    spread = tp if a.sequence_parallel else 1  # sequence parallelism cuts what tensor parallelism leaves whole
    h, d = arch.hidden_size, arch.head_dim
    q, kv = arch.num_heads * d / tp, max(arch.num_kv_heads / tp, 1) * d
    norms = 4 * h / spread  # input and output of both
    attention = (q + 2 * kv) + q + (q + kv if arch.qk_norm else 0)  # queries, keys, values; output; before their norms
    softmax = 4 * arch.num_heads / tp  # fp32, a row each
    if arch.experts is None:
        mlp = 3 * arch.ffn_size / tp  # gate and up, and their product
        return item * (norms + attention + mlp) + softmax
    e = arch.experts
    copies = e.top_k * (assumptions.expert_imbalance if a.expert_parallel > 1 else 1.0)
    # Every token goes to top_k experts: it is copied in and out whole, and in between it is cut over expert-tensor-
    # parallel ranks, over which Megatron gathers tokens. Sequence parallelism has spread the tokens over ranks before.
    expert_tp = ActorLayout.of(a).expert_tp_size
    experts = copies * expert_tp / tp * (2 * h + 3 * e.ffn_size / expert_tp)
    router = 4 * 2 * e.num / spread
    return item * (norms + attention + experts) + softmax + router


def scoring_bytes(arch: Architecture, a: ActorSettings, stage: int, item: int, chunk_logits: int = CHUNK_LOGITS) -> int:
    """On the last stage: logits of a chunk at 6 bytes each, a slice of the weight's gradient, and of the micro-batch
    the hidden states, their scored rows and the gradients of both."""
    if stage != a.pipeline_parallel - 1:
        return 0
    tokens, columns = microbatch_tokens(a), arch.padded_vocab_size(a.tensor_parallel) // a.tensor_parallel
    chunk = min(tokens * columns, max(chunk_logits, columns))
    return 6 * chunk + item * WEIGHT_SLICE + 4 * item * tokens * arch.hidden_size


def bucket_bytes(config: RunConfig, assumptions: Assumptions) -> int:
    """Of the weight sync: two buckets, whatever the model's largest tensor, and connections to those who take part."""
    return int(2 * config.sync.bucket_mib * 2**20 + sync_peers(config) * assumptions.connection_mib * 2**20)


def sync_peers(config: RunConfig) -> int:
    """Ranks that an engine's worker receives from, about: one of each group that holds a part of the model."""
    a, r = config.actor, config.rollout
    return a.pipeline_parallel * a.expert_parallel * max(1, a.tensor_parallel // r.tensor_parallel)


def engine_memory(config: RunConfig, arch: Architecture, gpu: Gpu, assumptions: Assumptions) -> EngineMemory:
    """Of a worker of an engine.

    Raises:
        InputError: an engine that cannot hold the model.
    """
    r, item = config.rollout, ITEM_BYTES[config.model.dtype]
    claimed = int(r.gpu_memory_utilization * gpu.memory_bytes)
    weights = item * worker_elements(arch, r.tensor_parallel)
    logits = 8 * r.max_num_seqs * arch.vocab_size  # in fp32, and a copy
    overhead = int(assumptions.engine_gib * GIB) + logits + bucket_bytes(config, assumptions)
    return EngineMemory(
        claimed=claimed,
        weights=weights,
        overhead=overhead,
        cache=claimed - weights - overhead,
        cache_bytes_per_token=cache_bytes_per_token(arch, r.tensor_parallel, item),
        asleep=int(assumptions.asleep_gib * GIB),
    )


def cache_bytes_per_token(arch: Architecture, tensor_parallel: int, item: int) -> int:
    """Keys and values on one worker; workers beyond the number of heads have copies."""
    return 2 * arch.num_layers * max(arch.num_kv_heads // tensor_parallel, 1) * arch.head_dim * item


@cache
def worker_elements(arch: Architecture, tensor_parallel: int) -> int:
    """Parameters on the first worker of an engine. All layers are alike: two small models show it."""
    layout = EngineLayout(tensor_parallel=tensor_parallel)
    layout.check(arch)

    def count(layers: int) -> int:
        small = replace(arch, num_layers=layers)
        return sum(prod(stop - start for start, stop in block.bounds) for block in layout.needed(0, small))

    padding = -arch.vocab_size % VLLM_VOCAB_MULTIPLE * arch.hidden_size  # of embedding and head, on some worker
    one = count(1)
    return one + (arch.num_layers - 1) * (count(2) - one) + padding * (1 if arch.tied else 2)
