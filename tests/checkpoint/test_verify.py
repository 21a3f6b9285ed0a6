"""Verification finds every difference between two checkpoints, and between one and its manifest."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_coreward.checkpoint.convert import to_hf, to_megatron
from megatron_coreward.checkpoint.manifest import MANIFEST, read_manifest
from megatron_coreward.checkpoint.verify import open_checkpoint, verify
from megatron_coreward.cli import main
from megatron_coreward.errors import InputError
from tests.checkpoint.models import TINY, TINY_MOE, random_tensors, write_hf

NORM = "model.norm.weight"


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A model, and the Megatron checkpoint that was made from it."""
    source = write_hf(tmp_path / "hf", TINY_MOE, random_tensors(TINY_MOE, torch.bfloat16))
    to_megatron(source, tmp_path / "m")
    return source, tmp_path / "m"


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("converted")
    write_hf(folder / "hf", TINY, random_tensors(TINY, torch.float32))
    to_megatron(folder / "hf", folder / "m", workers=1)
    to_hf(folder / "m", folder / "back")
    return folder / "m" / "__0_0.distcp", folder / "back" / "model.safetensors"


def run(*arguments: object) -> int:
    return main(["convert", "verify", *map(str, arguments)])


def test_equal_checkpoints_of_both_kinds_pass(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hf, megatron = pair
    to_hf(megatron, tmp_path / "back")
    for one, other, manifests in ((hf, megatron, 1), (megatron, tmp_path / "back", 2), (hf, hf, 0)):
        assert run(one, other) == 0
        assert f"39 tensors are equal; manifests checked: {manifests}" in capsys.readouterr().out
    assert run(megatron) == 0
    assert "39 tensors are as the manifest says; manifests checked: 1" in capsys.readouterr().out


@given(data=st.data())
def test_any_flipped_bit_of_any_weight_is_found_by_the_manifest(
    converted: tuple[Path, Path], data: st.DataObject
) -> None:
    file = data.draw(st.sampled_from(converted))
    path = file.parent
    opened = open_checkpoint(path)
    name = data.draw(st.sampled_from(sorted(opened.manifest or ())))
    tensor = random_tensors(TINY, torch.float32)[name]
    content = file.read_bytes()
    # A row of random bits is found where it lies, in whatever file and format.
    row = tensor[data.draw(st.integers(0, len(tensor) - 1))].reshape(-1).view(torch.uint8).numpy().tobytes()
    assert content.count(row) == 1
    place = content.index(row) + data.draw(st.integers(0, len(row) - 1))
    damaged = bytearray(content)
    damaged[place] ^= 1 << data.draw(st.integers(0, 7))
    try:
        file.write_bytes(damaged)
        found = verify(opened, None)
    finally:
        file.write_bytes(content)
        opened.close()
    assert found.not_as_manifest == [f"{path}: {name}"]


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.update({"more": tensors[NORM]}),
        lambda tensors: tensors.pop(NORM),
        lambda tensors: tensors[NORM].update(blake3="0" * 64),
        lambda tensors: tensors[NORM].update(dtype="float32"),
        lambda tensors: tensors[NORM].update(shape=[3, 2]),
    ],
    ids=["a tensor more", "a tensor less", "hash", "dtype", "shape"],
)
def test_a_manifest_that_was_changed_is_found(
    pair: tuple[Path, Path], change: Callable[[dict[str, Any]], object], capsys: pytest.CaptureFixture[str]
) -> None:
    hf, megatron = pair
    content = json.loads((megatron / MANIFEST).read_text())
    change(content["tensors"])
    (megatron / MANIFEST).write_text(json.dumps(content))
    for others in ([], [hf]):
        assert run(megatron, *others) == 1
        said = capsys.readouterr()
        assert f"not as its manifest says: {megatron}: " in said.out
        assert said.err.endswith("0 of 39 tensors differ, 1 are not as their manifest says, 0 settings differ\n")


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 2, "tensors": {}}', '{"format": 1, "tensors": {"a": {}}}'])
def test_a_damaged_manifest_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(InputError, match="manifest.json: damaged"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("value", "gap"), [(1.0, 1.0), (-0.0, 0.0), (math.nan, math.inf), (math.inf, math.inf)], ids=str
)
def test_a_tensor_that_differs_is_named_with_how_much(
    tmp_path: Path, value: float, gap: float, capsys: pytest.CaptureFixture[str]
) -> None:
    """A zero with another sign too: it is another bit pattern."""
    tensors = {name: torch.zeros(t.shape) for name, t in random_tensors(TINY, torch.float32).items()}
    one = write_hf(tmp_path / "one", TINY, tensors)
    tensors[NORM][4] = value
    other = write_hf(tmp_path / "other", TINY, tensors, num_files=2)
    assert run(one, other) == 1
    assert f"different: {NORM} (largest absolute difference {gap:.3e})" in capsys.readouterr().out


def test_other_dtypes_are_compared_by_value(tmp_path: Path) -> None:
    tensors = {name: torch.ones(t.shape) for name, t in random_tensors(TINY, torch.float32).items()}
    one = write_hf(tmp_path / "one", TINY, tensors)
    other = write_hf(tmp_path / "other", TINY, {name: t.bfloat16() for name, t in tensors.items()})
    assert verify(open_checkpoint(one), open_checkpoint(other)).ok
    tensors[NORM][0] = 1.001
    third = write_hf(tmp_path / "third", TINY, tensors)
    assert list(verify(open_checkpoint(third), open_checkpoint(other)).different) == [NORM]


def test_configs_that_compute_otherwise_are_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same tensors under another rotary base are another model."""
    tensors = random_tensors(TINY, torch.float32)
    one = write_hf(tmp_path / "one", TINY, tensors)
    other = write_hf(tmp_path / "other", TINY | {"rope_theta": 500000.0}, tensors)
    assert run(one, other) == 1
    assert "the configs differ: rope_theta: 10000.0 and 500000.0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 8}, r"not of one architecture: 'model.embed_tokens.weight' is \(7, 6\) in one, \(8, 6\)"),
        ({"num_hidden_layers": 3}, "'model.layers.2.input_layernorm.weight' is None in one"),
        ({"num_hidden_layers": 1}, "'model.layers.1.input_layernorm.weight' is .* in one, None in the other"),
    ],
)
def test_models_of_other_shapes_are_not_compared(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    one = write_hf(tmp_path / "one", TINY, random_tensors(TINY, torch.float32))
    other = write_hf(tmp_path / "other", TINY | changes, random_tensors(TINY | changes, torch.float32))
    with pytest.raises(InputError, match=message):
        verify(open_checkpoint(one), open_checkpoint(other))


def test_bad_input_is_one_clear_error(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hf, megatron = pair
    cases: list[tuple[list[object], str]] = [
        ([tmp_path / "nowhere", hf], "is no directory; expected a Hugging Face model or a Megatron checkpoint"),
        ([hf], "has no manifest.json to compare it with; name a second checkpoint"),
        ([megatron, "--logits"], "--logits compares two checkpoints; name a second one"),
        ([megatron, "--weights", "teacher"], "tensor 'teacher.embedding.word_embeddings.weight' is missing"),
    ]
    for arguments, message in cases:
        assert run(*arguments) == 2
        assert message in capsys.readouterr().err
