"""What the keys for GPUs need, checked before anything starts. Pure: config, architecture and a machine's description.

FP8 needs, by recipe (Transformer Engine 2.11, `pytorch/quantization.py` and `pytorch/utils.py`; Megatron-Core 0.16.1,
`fp8_utils.get_fp8_recipe`):

| recipe | one scale for | compute capability | CUDA | Transformer Engine | sizes in multiples of |
|---|---|---|---|---|---|
| delayed | a tensor, from former steps | 8.9 | 12.1 | 1.0 | 16 |
| tensorwise | a tensor | 8.9 | 12.1 | 2.2 | 16 |
| blockwise | 128 x 128 weights, 1 x 128 activations | 9.0 | 12.9 | 2.3 | 128 |
| mxfp8 | 32 elements | 10.0, below 12.0 | 12.8 | 2.1 | 32 |
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from megatron_coreward.config.architecture import Architecture
from megatron_coreward.config.schema import ActorSettings, RunConfig
from megatron_coreward.config.stages import divide_layers
from megatron_coreward.errors import InputError

Version = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Recipe:
    """What one way to scale FP8 numbers needs."""

    least_capability: Version
    below_capability: Version | None
    least_engine: Version  # Transformer Engine
    least_cuda: Version
    multiple: int  # of the sizes of every matrix: FP8 products read whole blocks
    keeps_state: bool  # scales depend on former micro-batches
    parameters: bool  # weights may be kept in it (`actor.fp8_params`)
    format: str  # Megatron's name; hybrid: E4M3 forwards, E5M2 for gradients


RECIPES: dict[str, Recipe] = {
    "delayed": Recipe((8, 9), None, (1, 0), (12, 1), 16, True, False, "hybrid"),
    "tensorwise": Recipe((8, 9), None, (2, 2), (12, 1), 16, False, True, "hybrid"),
    "blockwise": Recipe((9, 0), None, (2, 3), (12, 9), 128, False, True, "e4m3"),
    "mxfp8": Recipe((10, 0), (12, 0), (2, 1), (12, 8), 32, False, False, "e4m3"),
}
ROLLOUT_FP8_CAPABILITY = (8, 9)  # vLLM's FP8 kernels; older cards would fall back to weight-only ones

# Mean gap of log-probs between engine and actor that FP8 in either may make, in nats; see `docs/gpu_internals.md`.
FP8_LOGPROB_GAP = 0.25


@dataclass(frozen=True, slots=True)
class GpuSupport:
    """What the GPU machine offers; None: it is not known, and nothing is refused for it."""

    num_gpus: int
    capability: Version | None = None  # of the GPU that can do least
    cuda: Version | None = None  # that torch was built with
    packages: dict[str, Version] = field(default_factory=dict)  # name -> version of those that are installed


def parse_version(text: str) -> Version:
    """The leading numbers of a version: `2.11.0+cu130` -> (2, 11, 0); empty if there is none."""
    leading = re.match(r"\d+(?:\.\d+)*", text)
    return tuple(map(int, leading[0].split("."))) if leading else ()


def token_alignment(settings: ActorSettings) -> int:
    """Tokens of a pack are a multiple of this: sequence parallelism cuts a pack over the tensor-parallel ranks, and the
    gradient of a weight is a product over tokens, which FP8 takes in blocks."""
    blocks = 1 if settings.fp8 is None else RECIPES[settings.fp8].multiple
    return blocks * settings.tensor_parallel * sequence_multiple(settings)


def sequence_multiple(settings: ActorSettings) -> int:
    """Every sequence is padded to a multiple of this: context parallelism gives each rank two equal pieces of it."""
    return 2 * settings.context_parallel if settings.context_parallel > 1 else 1


def setting_problems(config: RunConfig) -> Iterator[str]:
    """Keys for GPUs that contradict each other, whatever the machine and the model."""
    a = config.actor
    if a.backend == "te" and config.model.dtype == "float32" and a.context_parallel > 1:
        yield (
            f"actor.context_parallel: {a.context_parallel} in float32 with actor.backend: te, whose attention over "
            "several ranks knows no float32; allowed: actor.backend auto, local, or model.dtype bfloat16"
        )
    if a.fp8 is None:
        if a.fp8_params:
            yield "actor.fp8_params: true needs actor.fp8, found null; allowed there: tensorwise, blockwise"
        if a.fp8_bf16_layers:
            yield f"actor.fp8_bf16_layers: {a.fp8_bf16_layers} needs actor.fp8, found null"
    else:
        recipe = RECIPES[a.fp8]
        if a.backend == "local":
            yield f"actor.backend: local has no FP8; actor.fp8: {a.fp8} needs te or auto"
        if config.model.dtype != "bfloat16":
            yield f"model.dtype: {config.model.dtype} under actor.fp8: {a.fp8}; allowed: bfloat16"
        if a.fp8_params and not recipe.parameters:
            allowed = ", ".join(name for name, other in RECIPES.items() if other.parameters)
            yield f"actor.fp8_params: true under actor.fp8: {a.fp8}; allowed there: {allowed}"
        if a.fp8_bf16_layers and recipe.keeps_state:
            yield (
                f"actor.fp8_bf16_layers: {a.fp8_bf16_layers} under actor.fp8: {a.fp8}, whose scales are updated for "
                "all layers at once; allowed: 0"
            )
    if config.rollout.placement == "colocated":
        engines = config.rollout.num_engines * config.rollout.tensor_parallel
        if engines > a.world_size:
            yield (
                f"rollout.placement: colocated with {engines} engine ranks and {a.world_size} actor ranks; every "
                "engine rank shares the GPU of an actor rank, so at most as many are allowed"
            )
        if config.sync.transport == "nccl":
            yield "sync.transport: nccl needs a GPU for each rank; allowed with rollout.placement colocated: auto, ipc"
    elif config.sync.transport == "ipc":
        yield "sync.transport: ipc reaches engines on the actor's own GPUs; it needs rollout.placement colocated"


def model_problems(config: RunConfig, arch: Architecture) -> Iterator[str]:
    """Sizes of the model that FP8 cannot take under this layout."""
    a = config.actor
    if a.fp8 is None:
        return
    multiple, tp = RECIPES[a.fp8].multiple, a.tensor_parallel
    sizes = {
        "the model's hidden size": arch.hidden_size,
        "a rank's rows of the fused QKV": (arch.num_heads + 2 * arch.num_kv_heads) * arch.head_dim // tp,
        "a rank's attention output": arch.num_heads * arch.head_dim // tp,
    }
    if arch.experts is None:
        sizes["a rank's feed-forward size"] = arch.ffn_size // tp
    else:
        expert_tp = tp if a.expert_tensor_parallel is None else a.expert_tensor_parallel
        sizes["a rank's part of an expert's feed-forward size"] = arch.experts.ffn_size // expert_tp
    for what, size in sizes.items():
        if size % multiple:
            yield f"actor.fp8: {a.fp8} needs sizes in multiples of {multiple}, {what} is {size}"
    try:
        stages = divide_layers(arch.num_layers, a.pipeline_parallel, a.first_stage_layers, a.last_stage_layers)
    except InputError:  # reported by what checks the layout
        return
    most = min(stages[0], stages[-1])
    if a.fp8_bf16_layers > most:
        yield f"actor.fp8_bf16_layers: {a.fp8_bf16_layers}; a pipeline rank has {most} layers, which is the most"


def machine_problems(config: RunConfig, machine: GpuSupport) -> Iterator[str]:
    """What the config asks of GPUs and packages, and this machine lacks."""
    a, r = config.actor, config.rollout
    if not machine.num_gpus:
        wishes = {
            f"actor.fp8: {a.fp8}": a.fp8 is not None,
            "actor.backend: te (Transformer Engine)": a.backend == "te",
            # vLLM 0.32 returns experts from its second model runner alone, whose kernels are Triton's.
            f"actor.router_replay: {a.router_replay}": a.router_replay != "off",
            "actor.gradient_accumulation_fusion: true": a.gradient_accumulation_fusion is True,
            f"rollout.quantization: {r.quantization}": r.quantization is not None,
            f"sync.transport: {config.sync.transport}": config.sync.transport in ("ipc", "nccl"),
        }
        instead = {"actor.backend": "auto, local", "actor.gradient_accumulation_fusion": "auto, false"}
        instead |= {"sync.transport": "auto, shared_memory, gloo", "actor.router_replay": "off"}
        for wish in (wish for wish, asked in wishes.items() if asked):
            yield f"{wish} needs a GPU, found none; allowed: {instead.get(wish.split(':')[0], 'null')}"
        return
    engine = machine.packages.get("transformer-engine")
    if a.backend == "te" and engine is None:
        yield "actor.backend: te needs the package transformer-engine, which is not installed; allowed: auto, local"
    if a.fp8 is not None:
        yield from _recipe_problems(a.fp8, machine, engine)
    if a.gradient_accumulation_fusion is True and (engine is None or a.backend == "local"):
        yield (
            "actor.gradient_accumulation_fusion: true needs the layers of transformer-engine, which "
            f"{'is not installed' if engine is None else 'actor.backend: local does not use'}; allowed: auto, false"
        )
    if machine.capability is not None:
        yield from gpu_problems(config, machine.capability)


def gpu_problems(config: RunConfig, found: Version) -> Iterator[str]:
    """What the config asks of a GPU of this compute capability, and it lacks."""
    a, r = config.actor, config.rollout
    if a.fp8 is not None and not _fits(RECIPES[a.fp8], found):
        recipe = RECIPES[a.fp8]
        below = "" if recipe.below_capability is None else f", below {_dotted(recipe.below_capability)}"
        can = [name for name, other in RECIPES.items() if _fits(other, found)]
        yield (
            f"actor.fp8: {a.fp8} needs compute capability {_dotted(recipe.least_capability)} or more{below}, found "
            f"{_dotted(found)}; allowed on this GPU: {', '.join(can) or 'null'}"
        )
    if r.quantization and found < ROLLOUT_FP8_CAPABILITY:
        yield (
            f"rollout.quantization: {r.quantization} needs compute capability {_dotted(ROLLOUT_FP8_CAPABILITY)} or "
            f"more, found {_dotted(found)}; allowed: null"
        )


def _recipe_problems(name: str, machine: GpuSupport, engine: Version | None) -> Iterator[str]:
    recipe = RECIPES[name]
    if engine is None:
        yield f"actor.fp8: {name} needs the package transformer-engine, which is not installed"
    elif engine < recipe.least_engine:
        least = _dotted(recipe.least_engine)
        yield f"actor.fp8: {name} needs transformer-engine {least} or later, found {_dotted(engine)}"
    if machine.cuda is not None and machine.cuda < recipe.least_cuda:
        yield f"actor.fp8: {name} needs CUDA {_dotted(recipe.least_cuda)} or later, found {_dotted(machine.cuda)}"


def _fits(recipe: Recipe, capability: Version) -> bool:
    below = recipe.below_capability
    return recipe.least_capability <= capability and (below is None or capability < below)


def _dotted(version: Version) -> str:
    return ".".join(map(str, version))
