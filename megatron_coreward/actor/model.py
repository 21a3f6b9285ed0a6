"""The actor's model: Megatron's `GPTModel` under the layout, from the architecture of a Hugging Face config."""

import math
import warnings
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.fp8_utils import is_float8tensor
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

from megatron_coreward.actor import parallel
from megatron_coreward.actor.attention import PackedAttention
from megatron_coreward.actor.router_replay import LayerReplay, attach_replay
from megatron_coreward.config.accelerator import RECIPES
from megatron_coreward.config.architecture import Architecture, RopeScaling
from megatron_coreward.config.schema import ActorSettings
from megatron_coreward.errors import InputError
from megatron_coreward.weights.mapping import is_expert, is_replicated

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def resolve_backend(backend: str, dtype: torch.dtype) -> str:
    """`te` or `local`: what `actor.backend: auto|te|local` means on this machine. `auto` is `local` in fp32, for which
    Transformer Engine has no fused attention, and whose products it rounds (TF32).

    Raises:
        InputError: `te` was asked for and is not installed or there is no GPU.
    """
    if backend == "local" or (backend == "auto" and dtype == torch.float32):
        return "local"
    from megatron.core.transformer.transformer_layer import TransformerLayer  # noqa: F401  (fails loudly if broken)

    try:
        from megatron.core.extensions.transformer_engine import HAVE_TE
    except ImportError:
        HAVE_TE = False
    if HAVE_TE and torch.cuda.is_available():
        return "te"
    if backend == "te":
        raise InputError("actor.backend: te needs a GPU and the transformer-engine package; use auto or local")
    return "local"


class TorchRMSNorm(torch.nn.RMSNorm):
    """RMSNorm for the local spec. Megatron's wrapper refuses sequence parallelism; all it takes is the mark that lets
    Megatron sum the weight's gradient over tensor-parallel ranks."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def fp8_config(settings: ActorSettings, frozen: bool) -> dict[str, Any]:
    """What Megatron is given of FP8; empty for BF16.

    Only the inputs of the layers' linear products are FP8; attention, norms, embedding and output layer are not. A
    frozen model is never trained, so delayed scaling would leave it with the scales that it starts with: it computes in
    BF16 then. Its weights are kept in BF16 in any case.
    """
    if settings.fp8 is None:
        return {}
    recipe, ends = RECIPES[settings.fp8], settings.fp8_bf16_layers
    if frozen and recipe.keeps_state:
        return {}
    given: dict[str, Any] = {"fp8": recipe.format, "fp8_recipe": settings.fp8}
    if recipe.keeps_state:  # Transformer Engine's defaults; Megatron's would look one micro-batch back
        given |= {"fp8_amax_history_len": 1024, "fp8_amax_compute_algo": "max"}
    if settings.fp8_params and not frozen:
        given["fp8_param"] = True
    if ends:
        given |= {
            "first_last_layers_bf16": True,
            "num_layers_at_start_in_bf16": ends,
            "num_layers_at_end_in_bf16": ends,
        }
    return given


def recompute_config(settings: ActorSettings, experts: bool) -> dict[str, Any]:
    """What Megatron computes again in the backward pass. Fused attention keeps little: `selective` leaves it alone."""
    if settings.recompute == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    if settings.recompute == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": ["moe" if experts else "mlp"]}
    return {}


def fuse_gradients(model: torch.nn.Module, settings: ActorSettings) -> None:
    """Lets Transformer Engine's layers add weight gradients to the fp32 buffers within the product.

    Megatron's config has one switch for these layers and for its own output layer, which it refuses to build without
    apex's kernel. So the switch stays off, and the layers get what it would give them. The output layer needs no
    kernel: `token_stats` adds to the buffer itself.
    """
    if settings.gradient_accumulation_fusion is not False:
        for module in model.modules():
            if hasattr(module, "fuse_wgrad_accumulation"):
                module.fuse_wgrad_accumulation = True  # type: ignore[assignment]


def fuses_gradients(model: torch.nn.Module) -> bool:
    """Whether any layer does."""
    return any(getattr(module, "fuse_wgrad_accumulation", False) for module in model.modules())


# Longer than 60 lines: it is one call of Megatron's constructor, one setting a line.
def transformer_config(
    arch: Architecture, settings: ActorSettings, dtype: torch.dtype, backend: str, frozen: bool = False
) -> TransformerConfig:
    """Megatron's config for one model under one layout.

    `calculate_per_token_loss` makes Megatron sum losses over micro-batches and gradients over data-parallel ranks
    without averaging: the normalisation is in the batch's token weights already.
    """
    virtual = settings.virtual_pipeline if settings.virtual_pipeline > 1 else None
    on_gpu = torch.cuda.is_available()
    fused = backend == "te"
    moe: dict[str, Any] = {}
    if arch.experts is not None:
        moe = {
            "num_moe_experts": arch.experts.num,
            "moe_ffn_hidden_size": arch.experts.ffn_size,
            "moe_router_topk": arch.experts.top_k,
            "moe_router_pre_softmax": not arch.experts.normalise_top_k,
            "moe_router_load_balancing_type": "none",
            # alltoall takes its split sizes to numpy only for CUDA tensors
            "moe_token_dispatcher_type": "alltoall" if on_gpu else "allgather",
            "moe_router_dtype": "fp32",  # the product that chooses experts, under BF16 too
            "moe_grouped_gemm": fused,
            "moe_permute_fusion": fused and can_fuse_permutation(),
        }
    return TransformerConfig(
        num_layers=arch.num_layers,
        hidden_size=arch.hidden_size,
        ffn_hidden_size=arch.ffn_size,
        num_attention_heads=arch.num_heads,
        num_query_groups=arch.num_kv_heads,
        kv_channels=arch.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=arch.norm_eps,
        qk_layernorm=arch.qk_norm,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=arch.qkv_bias,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        attention_softmax_in_fp32=True,
        tensor_model_parallel_size=settings.tensor_parallel,
        pipeline_model_parallel_size=settings.pipeline_parallel,
        virtual_pipeline_model_parallel_size=virtual,
        context_parallel_size=settings.context_parallel,
        num_layers_in_first_pipeline_stage=settings.first_stage_layers,
        num_layers_in_last_pipeline_stage=settings.last_stage_layers,
        expert_model_parallel_size=settings.expert_parallel,
        expert_tensor_parallel_size=settings.expert_tensor_parallel,
        sequence_parallel=settings.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        calculate_per_token_loss=True,
        use_cpu_initialization=not on_gpu,
        perform_initialization=False,
        bias_activation_fusion=fused,
        bias_dropout_fusion=fused,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,  # see `fuse_gradients`
        apply_rope_fusion=fused,
        # Interleaved schedules between two ranks mix up the two directions when P2P is batched.
        overlap_p2p_comm=virtual is not None,
        batch_p2p_comm=virtual is None,
        batch_p2p_sync=False,  # a synchronisation of the whole device after each exchange, for former versions of torch
        **moe,
        **({} if frozen else recompute_config(settings, arch.experts is not None)),
        **fp8_config(settings, frozen),
    )


def can_fuse_permutation() -> bool:
    """Whether Transformer Engine has kernels that sort tokens by expert, from 2.1 on."""
    from megatron.core.extensions import transformer_engine

    return getattr(transformer_engine, "fused_permute", None) is not None


def layer_spec(arch: Architecture, backend: str) -> tuple[ModuleSpec, Any]:
    """The spec of one layer and the class of the final norm."""
    num_experts = arch.experts.num if arch.experts is not None else None
    if backend == "te":
        from megatron.core.extensions.transformer_engine import TENorm
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

        spec = get_gpt_layer_with_transformer_engine_spec(
            num_experts=num_experts, moe_grouped_gemm=num_experts is not None, qk_layernorm=arch.qk_norm
        )
        return spec, TENorm
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # apex is optional; its absence is not worth a line
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

        spec = get_gpt_layer_local_spec(
            num_experts=num_experts, moe_grouped_gemm=False, qk_layernorm=arch.qk_norm, normalization="RMSNorm"
        )
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = TorchRMSNorm
    if num_experts is not None:  # as Transformer Engine's spec, whose experts have nothing to fuse this norm into
        keys = spec.submodules.sharded_state_dict_keys_map
        spec.submodules.sharded_state_dict_keys_map = {
            name: key for name, key in keys.items() if not name.startswith("pre_mlp_layernorm.")
        }
    attention = spec.submodules.self_attention.submodules
    attention.core_attention = PackedAttention
    if arch.qk_norm:
        attention.q_layernorm = attention.k_layernorm = TorchRMSNorm
    return spec, TorchRMSNorm


class HiddenStatesModel(GPTModel):
    """Megatron's model, but that the last stage ends with the hidden states [T, 1, H] (T / tensor-parallel size of them
    under sequence parallelism). Its output layer holds the weight; `token_stats` applies it to the rows that count."""

    replays: tuple[LayerReplay, ...] = ()  # of its routers, if their experts come from elsewhere

    def _postprocess(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return hidden_states

    @property
    def output_weight(self) -> torch.Tensor:
        """[V / tensor-parallel size, H] of the last stage: a parameter of its own, or the embedding's."""
        tied = self.share_embeddings_and_output_weights
        weight: torch.Tensor = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        return weight


def build_chunks(
    arch: Architecture, settings: ActorSettings, dtype: torch.dtype, max_sequence_length: int, frozen: bool = False
) -> list[GPTModel]:
    """This rank's model chunks, one for each virtual pipeline stage, with undefined weights: load them before use.

    Args:
        frozen: never trained.

    Raises:
        InputError: the settings ask for what this machine does not have.
    """
    backend = resolve_backend(settings.backend, dtype)
    if settings.fp8 is not None and backend != "te":
        raise InputError(f"actor.fp8: {settings.fp8} needs a GPU and the transformer-engine package; allowed: null")
    config = transformer_config(arch, settings, dtype, backend, frozen)
    spec, norm = layer_spec(arch, backend)
    chunks = []
    for chunk in range(settings.virtual_pipeline):
        stage = chunk if settings.virtual_pipeline > 1 else None
        model = HiddenStatesModel(
            config,
            TransformerBlockSubmodules(
                layer_specs=[spec] * get_num_layers_to_build(config, vp_stage=stage), layer_norm=norm
            ),
            vocab_size=arch.padded_vocab_size(settings.tensor_parallel),
            max_sequence_length=max_sequence_length,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
            share_embeddings_and_output_weights=arch.tied,
            position_embedding_type="rope",
            rotary_base=arch.rope_theta,
            vp_stage=stage,
        )
        if arch.rope_scaling is not None:
            model.rotary_pos_emb.inv_freq = scale_rope(model.rotary_pos_emb.inv_freq, arch.rope_scaling)
        _mark_tensor_parallel(model)
        _mark_experts(model)
        if not frozen:
            fuse_gradients(model, settings)
            if settings.router_replay != "off":
                model.replays = attach_replay(model, settings)
        _place(model, dtype)
        chunks.append(model)
    return chunks


def _place(model: GPTModel, dtype: torch.dtype) -> None:
    """Brings everything to the device and the dtype, except weights that were made in FP8, which are there."""
    device = parallel.device()
    for module in model.modules():
        for tensor in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
            if not is_float8tensor(tensor):
                tensor.data = tensor.data.to(device, dtype if tensor.is_floating_point() else None)


def forget_quantised_weights(chunks: Iterable[torch.nn.Module]) -> None:
    """Drops the copies in FP8 that Transformer Engine keeps of weights; it makes them again when they are needed."""
    for chunk in chunks:
        for module in chunk.modules():
            getattr(module, "_fp8_workspaces", {}).clear()


def _mark_tensor_parallel(model: GPTModel) -> None:
    """Marks parameters that are cut over tensor-parallel ranks. Megatron does so only if it initialises weights; an
    unmarked one counts as a copy, and the global gradient norm leaves out every rank's part but the first's."""
    for name, param in model.named_parameters():
        if not is_replicated(name) and not getattr(param, "tensor_model_parallel", False):
            dim = 1 if name.endswith(("linear_proj.weight", "linear_fc2.weight")) or ".linear_fc2.weight" in name else 0
            set_tensor_model_parallel_attributes(param, True, dim, 1)


def _mark_experts(model: GPTModel) -> None:
    """Marks experts whose replicas are other ranks than those of the other parameters, so that their gradients are
    reduced over their own replicas. Megatron 0.16.1 marks them under expert parallelism alone, and would leave out the
    tensor-parallel ranks that hold the same whole experts."""
    config = model.config
    if config.expert_tensor_parallel_size != config.tensor_model_parallel_size:
        for name, param in model.named_parameters():
            if is_expert(name):
                param.allreduce = False


def scale_rope(inv_freq: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Llama 3's rope scaling: long wavelengths are stretched by `factor`, short ones kept, those between blended.

    Megatron's own takes only the factor and blends the middle twice, so it differs from the released models.
    """
    wavelength = 2 * math.pi / inv_freq
    blend = (scaling.original_max_position / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    blend = blend.clamp(0.0, 1.0)
    return inv_freq * (blend + (1 - blend) / scaling.factor)
