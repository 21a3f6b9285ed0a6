"""Keys of a Megatron checkpoint: every element of every HF tensor once, under the names that Megatron gives."""

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given

from megatron_coreward.config.architecture import Architecture
from megatron_coreward.weights.checkpoint_keys import checkpoint_tensors, extra_state_keys, is_other_state, spellings
from megatron_coreward.weights.mapping import hf_tensors, megatron_parameters
from tests.checkpoint.models import TINY, TINY_MOE, architecture, configs

ROOT = Path(__file__).parents[2]


@given(config=configs())
def test_every_element_of_every_hf_tensor_is_in_the_checkpoint_once(config: dict[str, Any]) -> None:
    arch = architecture(config)
    seen = {name: np.zeros(shape[0], dtype=int) for name, shape in hf_tensors(arch).items()}
    for tensor in checkpoint_tensors(arch):
        filled = 0
        for run in tensor.runs:
            assert run.row == filled, "runs tile a slice from top to bottom"
            assert hf_tensors(arch)[run.hf_name][1:] == tensor.shape[1:]
            seen[run.hf_name][run.hf_row : run.hf_row + run.rows] += 1
            filled += run.rows
        assert filled == tensor.shape[0]
    for name, count in seen.items():
        assert (count == 1).all(), name


@given(config=configs())
def test_the_slices_of_a_key_tile_it(config: dict[str, Any]) -> None:
    leads: dict[tuple[str, tuple[int, ...], tuple[int, ...]], list[tuple[int, ...]]] = {}
    for tensor in checkpoint_tensors(architecture(config)):
        leads.setdefault((tensor.key, tensor.lead_shape, tensor.shape), []).append(tensor.lead)
    assert len({key for key, _, _ in leads}) == len(leads), "all slices of a key are of one shape"
    for (_, lead_shape, _), found in leads.items():
        assert sorted(found) == list(itertools.product(*map(range, lead_shape)))


@given(config=configs())
def test_rows_of_an_hf_tensor_come_in_order_within_one_slice(config: dict[str, Any]) -> None:
    """What hashes of tensors are taken from."""
    at: dict[str, tuple[str, int]] = {}
    for tensor in checkpoint_tensors(architecture(config)):
        for run in tensor.runs:
            assert at.get(run.hf_name, (tensor.name, 0)) == (tensor.name, run.hf_row)
            at[run.hf_name] = (tensor.name, run.hf_row + run.rows)


def test_state_of_training_is_no_weight() -> None:
    keys = {tensor.key for config in (TINY, TINY_MOE) for tensor in checkpoint_tensors(architecture(config))}
    assert not any(is_other_state(key) for key in keys)
    for key in keys:
        for prefix in ("optimizer.state.exp_avg.", "chained_0.optimizer.", "teacher.", "main.", "exp_avg_sq."):
            assert is_other_state(prefix + key)
    assert is_other_state("rng_state/shard_0_1")
    assert all(is_other_state(key) for key in extra_state_keys(architecture(TINY_MOE)))
    assert keys <= {spelling for key in keys for spelling in spellings(key)}


def te_config(config: dict[str, Any]) -> dict[str, Any]:
    return config | {"hidden_size": 8, "head_dim": 4, "max_position_embeddings": 64}


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Architecture, dict[str, Any]]]:
    """Models and what Megatron's Transformer Engine spec makes of them."""
    folder = tmp_path_factory.mktemp("te")
    models = [
        TINY | {"model_type": "qwen2"},
        TINY,
        TINY | {"model_type": "llama", "tie_word_embeddings": True},
        TINY_MOE,
    ]
    for i, config in enumerate(models):
        (folder / str(i)).mkdir()
        (folder / str(i) / "config.json").write_text(json.dumps(te_config(config)))
    done = subprocess.run(
        [
            sys.executable,
            "tests/weights/transformer_engine_keys.py",
            *(str(folder / str(i)) for i in range(len(models))),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    return [(architecture(te_config(config)), of_te) for config, of_te in zip(models, found, strict=True)]


@pytest.mark.slow
def test_keys_and_shapes_are_those_of_megatrons_transformer_engine_spec(
    described: list[tuple[Architecture, dict[str, Any]]],
) -> None:
    for arch, of_te in described:
        shapes = {tensor.key: list(tensor.global_shape) for tensor in checkpoint_tensors(arch)}
        for key in shapes.keys() & {"embedding.word_embeddings.weight", "output_layer.weight"}:
            shapes[key][0] = arch.padded_vocab_size(1)
        assert shapes == of_te["tensors"], arch.family


@pytest.mark.slow
def test_every_object_that_megatrons_transformer_engine_spec_asks_for_is_there(
    described: list[tuple[Architecture, dict[str, Any]]],
) -> None:
    for arch, of_te in described:
        assert of_te["objects"]
        assert set(of_te["objects"]) <= set(extra_state_keys(arch)), arch.family


@pytest.mark.slow
def test_parameters_are_named_as_in_megatrons_transformer_engine_spec(
    described: list[tuple[Architecture, dict[str, Any]]],
) -> None:
    for arch, of_te in described:
        assert sorted(of_te["parameters"]) == sorted(megatron_parameters(arch, te=True, grouped_experts=True))
