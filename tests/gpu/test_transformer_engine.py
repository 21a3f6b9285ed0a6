"""Transformer Engine against the local layers: log-probs and gradients, in BF16 and in every FP8 recipe of the card.

Tolerances, from the formats alone. A number rounded to p bits of mantissa (the leading one counted) is off by at most
u = 2^-p of itself, and by u / sqrt(3) of it in the mean square when errors are spread evenly. BF16 has p = 8, E4M3
p = 4, E5M2 p = 3. A product of two rounded operands, summed over many terms whose errors are independent, is off in the
mean square by sqrt(2) u / sqrt(3) of its own size: errors and terms grow alike with the number of terms. A layer's
residual branch has two such products behind each other, a model of L layers adds 2 L branches of comparable size to its
stream, so the stream is off by about sqrt(2) * 0.82 u relative to itself, whatever L is. Backwards the same happens
again with the gradient's format, and a weight's gradient is one more product of a rounded activation and gradient.

    BF16   u = 2^-8:  stream 0.5%, weight gradients about twice that.
    FP8    forwards u = 2^-4 (E4M3): stream 7%; gradients in E5M2 (u = 2^-3) or E4M3: 15 to 20%.

The log-probs of a random model are log-softmax of logits with a standard deviation of s: their error is that of the
stream times s. The bounds below allow 4 times these figures: the analysis is of means, and both sides round.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.actor.ranks import free_port, run_ranks
from tests.gpu.actors import compute, make_batch

BOUNDS = {"bf16": (4 * 0.005, 4 * 0.01), "fp8": (4 * 0.07, 4 * 0.20)}  # of the stream, of a weight's gradient


def recipes() -> list[str]:
    """What this card can do."""
    from megatron_coreward.config.accelerator import RECIPES

    if not torch.cuda.is_available():
        return list(RECIPES)
    found = torch.cuda.get_device_capability()
    return [
        name
        for name, recipe in RECIPES.items()
        if found >= recipe.least_capability and (recipe.below_capability is None or found < recipe.below_capability)
    ]


def run(path: Path, layout: dict[str, Any], dtype: str = "bfloat16") -> dict[str, Any]:
    batch = make_batch(vocabulary(path))
    (found,) = run_ranks(1, compute, path, layout, dtype, free_port(), batch)
    return dict(found)


def vocabulary(path: Path) -> int:
    from megatron_coreward.config.architecture import read_architecture

    return read_architecture(path).vocab_size


@pytest.fixture(scope="module")
def exact(model: Path) -> dict[str, Any]:
    """The local layers in fp32: what both are compared with."""
    return run(model, {"backend": "local"}, "float32")


def compare(found: dict[str, Any], exact: dict[str, Any], bounds: tuple[float, float]) -> None:
    spread = float(np.std(exact["logprobs"])) or 1.0
    of_stream, of_gradient = bounds
    error = np.sqrt(np.mean((found["logprobs"] - exact["logprobs"]) ** 2))
    assert error < of_stream * max(spread, 0.1), f"log-probs are off by {error:.2e}, spread {spread:.2e}"
    assert found["gradients"].keys() == exact["gradients"].keys()
    for name, want in exact["gradients"].items():
        off = np.linalg.norm(found["gradients"][name] - want) / np.linalg.norm(want)
        assert off < of_gradient, f"gradient of {name} is off by {off:.1%}"


@pytest.mark.parametrize("backend", ["local", "te"])
def test_bf16_agrees_with_fp32(model: Path, exact: dict[str, Any], backend: str) -> None:
    found = run(model, {"backend": backend})
    assert found["described"]["backend"] == backend
    compare(found, exact, BOUNDS["bf16"])


@pytest.mark.parametrize("recipe", recipes())
def test_fp8_agrees_with_fp32_within_its_format(model: Path, exact: dict[str, Any], recipe: str) -> None:
    found = run(model, {"backend": "te", "fp8": recipe})
    assert found["described"]["fp8"] == recipe
    compare(found, exact, BOUNDS["fp8"])
    bf16 = run(model, {"backend": "te"})
    assert any((found["gradients"][n] != bf16["gradients"][n]).any() for n in bf16["gradients"]), "nothing ran in FP8"


@pytest.mark.parametrize("recipe", [name for name in recipes() if name in ("tensorwise", "blockwise")])
def test_fp8_weights_agree_with_fp32_within_their_format(model: Path, exact: dict[str, Any], recipe: str) -> None:
    found = run(model, {"backend": "te", "fp8": recipe, "fp8_params": True})
    assert "FP8 weights" in found["described"]["fp8"]
    compare(found, exact, BOUNDS["fp8"])


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("fp8", [None, "tensorwise"])
def test_recomputation_changes_no_gradient(model: Path, recompute: str, fp8: str | None) -> None:
    plain, again = (run(model, {"backend": "te", "fp8": fp8, "recompute": how}) for how in ("none", recompute))
    for name, want in plain["gradients"].items():
        off = np.linalg.norm(again["gradients"][name] - want) / np.linalg.norm(want)
        assert off < BOUNDS["bf16"][1], f"gradient of {name} is off by {off:.1%}"  # atomics of the attention kernels


def test_packing_changes_nothing_beyond_rounding(model: Path) -> None:
    one, several = (run(model, {"backend": "te", "tokens_per_microbatch": tokens}) for tokens in (4096, 128))
    error = np.sqrt(np.mean((one["logprobs"] - several["logprobs"]) ** 2))
    assert error < BOUNDS["bf16"][0] * max(float(np.std(one["logprobs"])), 0.1)
    assert one["nll"] == pytest.approx(several["nll"], rel=BOUNDS["bf16"][0])


def test_fused_adam_is_used_where_transformer_engine_is(model: Path) -> None:
    assert run(model, {"backend": "te"})["described"]["adam"].split(".")[0] in ("transformer_engine", "apex")
