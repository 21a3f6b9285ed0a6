"""Data and model files that were replaced between two attempts are noticed, by content and by nothing else."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_coreward.checkpoint import inputs
from megatron_coreward.config.load import load_config
from megatron_coreward.config.schema import RunConfig
from tests.preflight.recipe_world import write_world


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_world(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def config(*overrides: str) -> RunConfig:
    return load_config(Path("recipe.yaml"), overrides)


@pytest.fixture
def checkpoint(world: Path) -> Path:
    folder = world / "step_000004"
    folder.mkdir()
    (folder / "inputs.json").write_bytes(inputs.dump_digests(inputs.input_digests(config())))
    return folder


def flip(path: Path, place: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


REPLACED: dict[str, Callable[[Path], object]] = {
    "data.train_files[0]: train.parquet": lambda world: flip(world / "train.parquet", 100),
    "data.rephrased_files[0]: rephrased.parquet": lambda world: shutil.copy(
        world / "val.parquet", world / "rephrased.parquet"
    ),
    "data.val_files[0]: val.parquet": lambda world: flip(world / "val.parquet", 100),
    "model.hf_path/config.json: model/config.json": lambda world: (world / "model/config.json").write_text("{}"),
    "model.hf_path/tokenizer.json: model/tokenizer.json": lambda world: flip(world / "model/tokenizer.json"),
    "model.hf_path/model.safetensors: model/model.safetensors": lambda world: flip(world / "model/model.safetensors"),
    "model.hf_path/chat_template.jinja: model/chat_template.jinja": lambda world: (
        world / "model/chat_template.jinja"
    ).write_text("another"),
    "data.train_files[0]: the file does not exist any more": lambda world: (world / "train.parquet").unlink(),
}


@pytest.mark.parametrize("said", REPLACED)
def test_every_file_that_was_replaced_is_named_with_its_key(world: Path, checkpoint: Path, said: str) -> None:
    REPLACED[said](world)
    assert inputs.replaced_inputs(checkpoint, config()) == [said]
    refused = inputs.refused_inputs(checkpoint, config())
    if said.startswith("data.val_files"):
        assert refused == []
    else:
        assert len(refused) == 1
        assert refused[0].startswith(said)
        assert "checkpoint.changed_inputs=accept" in refused[0]
    assert inputs.refused_inputs(checkpoint, config("checkpoint.changed_inputs=accept")) == []


def test_copies_elsewhere_new_times_and_other_files_change_nothing(world: Path, checkpoint: Path) -> None:
    for path in (*world.glob("*.parquet"), *(world / "model").iterdir()):
        os.utime(path, ns=(1, 1))
    (world / "model" / "README.md").write_text("about")
    (world / "model" / ".gitattributes").write_text("* filter")
    shutil.copytree(world / "model", world / "elsewhere")
    shutil.copy(world / "train.parquet", world / "same.parquet")
    moved = config("model.hf_path=elsewhere", "data.train_files=[same.parquet]")
    assert inputs.replaced_inputs(checkpoint, moved) == []
    (checkpoint / "inputs.json").unlink()  # of an older version
    flip(world / "train.parquet", 100)
    assert inputs.replaced_inputs(checkpoint, config()) == []


def test_of_a_large_weight_file_samples_show_other_weights(world: Path) -> None:
    path = world / "model" / "model.safetensors"
    with path.open("wb") as file:
        file.truncate(64 << 20)  # sparse
    before = inputs.input_digests(config())["model.hf_path/model.safetensors"]
    with path.open("r+b") as file:
        for place in range(0, 64 << 20, 1 << 15):  # other weights differ nearly everywhere
            file.seek(place)
            file.write(b"\x01")
    os.utime(path, ns=(1, 1))
    assert inputs.input_digests(config())["model.hf_path/model.safetensors"] != before
