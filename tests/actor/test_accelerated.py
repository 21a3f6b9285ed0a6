"""What Megatron is given for FP8, recomputation and fusion; and how FP8's memory of former micro-batches is handled.

Everything here runs without a GPU: the decisions are taken before a kernel is.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_coreward.config.schema import ActorSettings
from megatron_coreward.demo.model import write_model
from megatron_coreward.demo.tokenizer import byte_level_tokenizer
from megatron_coreward.errors import InputError
from tests.actor.accelerated_on_ranks import checkpoint_keys, scoring_under, update_with_cold_scales
from tests.actor.ranks import free_port, run_ranks
from tests.actor.test_parity import make_batch


def given(frozen: bool = False, **settings: Any) -> dict[str, Any]:
    from megatron_coreward.actor.model import fp8_config

    return fp8_config(ActorSettings(**settings), frozen)


def test_every_recipe_has_its_format() -> None:
    assert given() == {}
    assert given(fp8="tensorwise") == {"fp8": "hybrid", "fp8_recipe": "tensorwise"}
    assert given(fp8="blockwise")["fp8"] == given(fp8="mxfp8")["fp8"] == "e4m3"
    assert given(fp8="delayed")["fp8_amax_history_len"] == 1024


@pytest.mark.parametrize(
    ("asked", "dtype", "meant"),
    [
        ("auto", torch.bfloat16, "te"),
        ("auto", torch.float32, "local"),
        ("te", torch.float32, "te"),
        ("local", torch.bfloat16, "local"),
    ],
)
def test_auto_means_transformer_engine_but_for_fp32(
    monkeypatch: pytest.MonkeyPatch, asked: str, dtype: torch.dtype, meant: str
) -> None:
    from megatron.core.extensions import transformer_engine

    from megatron_coreward.actor.model import resolve_backend

    monkeypatch.setattr(transformer_engine, "HAVE_TE", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_backend(asked, dtype) == meant


def test_copies_of_weights_in_fp8_are_forgotten_wherever_they_are() -> None:
    from megatron_coreward.actor.model import forget_quantised_weights

    layer = torch.nn.Linear(2, 2)
    layer._fp8_workspaces = {"weight": torch.zeros(1)}  # type: ignore[assignment]
    forget_quantised_weights([torch.nn.Sequential(layer, torch.nn.ReLU())])
    assert layer._fp8_workspaces == {}


def test_first_and_last_layers_may_stay_in_bf16() -> None:
    ends = given(fp8="tensorwise", fp8_bf16_layers=2)
    assert ends["first_last_layers_bf16"]
    assert (ends["num_layers_at_start_in_bf16"], ends["num_layers_at_end_in_bf16"]) == (2, 2)


def test_frozen_models_keep_bf16_weights_and_never_scale_by_a_past_that_they_do_not_have() -> None:
    assert given(frozen=True, fp8="delayed") == {}
    assert given(frozen=True, fp8="tensorwise", fp8_params=True) == {"fp8": "hybrid", "fp8_recipe": "tensorwise"}
    assert given(fp8="tensorwise", fp8_params=True)["fp8_param"]


def test_recomputation_names_the_feed_forward_part() -> None:
    from megatron_coreward.actor.model import recompute_config

    assert recompute_config(ActorSettings(), experts=False) == {}
    selective = ActorSettings(recompute="selective")
    assert recompute_config(selective, experts=False)["recompute_modules"] == ["mlp"]
    assert recompute_config(selective, experts=True)["recompute_modules"] == ["moe"]
    assert recompute_config(ActorSettings(recompute="full"), experts=True)["recompute_granularity"] == "full"


@pytest.mark.parametrize(("setting", "fused"), [("auto", True), (True, True), (False, False)])
def test_layers_that_can_fuse_gradients_do_unless_the_config_says_otherwise(setting: Any, fused: bool) -> None:
    from megatron_coreward.actor.model import fuse_gradients, fuses_gradients

    class Layer(torch.nn.Module):  # as Transformer Engine's
        fuse_wgrad_accumulation = False

    model = torch.nn.Sequential(torch.nn.Linear(2, 2), Layer())
    fuse_gradients(model, ActorSettings(gradient_accumulation_fusion=setting))
    assert fuses_gradients(model) == fused
    assert not fuses_gradients(torch.nn.Linear(2, 2))


def test_fp8_without_transformer_engine_is_refused_and_never_silently_bf16() -> None:
    from megatron_coreward.actor.model import build_chunks
    from megatron_coreward.planner.models import published_architecture

    arch = published_architecture("Qwen3-1.7B-Base")
    with pytest.raises(InputError, match="actor.fp8: tensorwise needs a GPU and the transformer-engine"):
        build_chunks(arch, ActorSettings(fp8="tensorwise"), torch.bfloat16, 64)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("qwen3")
    return write_model(path, byte_level_tokenizer(), family="qwen3", layers=2, hidden=64, ffn=96, head_dim=24)


@pytest.mark.ranks
def test_unknown_scales_are_found_by_two_passes_that_leave_no_trace(model: Path) -> None:
    cold, warm = (
        run_ranks(1, update_with_cold_scales, model, free_port(), make_batch(259), cold)[0] for cold in (True, False)
    )
    assert (cold["passes"], warm["passes"]) == (4, 2)  # two of them before the first update only
    assert cold["reports"] == warm["reports"]
    assert all(torch.equal(a, b) for a, b in zip(cold["weights"], warm["weights"], strict=True))
    assert not cold["Adam steps together"]  # which would take 4 bytes a parameter more on a GPU


@pytest.mark.parametrize(("recipe", "while_scored"), [("delayed", None), ("tensorwise", "hybrid")])
@pytest.mark.ranks
def test_scoring_the_policy_under_delayed_scaling_is_in_bf16(
    model: Path, recipe: str, while_scored: str | None
) -> None:
    (seen,) = run_ranks(1, scoring_under, model, free_port(), make_batch(259), recipe)
    assert seen["policy"] == while_scored
    assert seen["policy after"] == seen["reference after"] == "hybrid"
    assert seen["really"]


@pytest.mark.ranks
def test_a_checkpoint_holds_nothing_of_transformer_engines_pickles(model: Path, tmp_path: Path) -> None:
    (found,) = run_ranks(1, checkpoint_keys, model, free_port(), tmp_path)
    assert found["has"]  # the model has such a state
    assert [key for key in found["keys"] if "_extra_state" in key] == []
    assert [value for value in found["extra"] if value is not None] == []  # Megatron's own layers get None
