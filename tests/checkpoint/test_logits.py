"""Logits of two checkpoints: equal ones pass, a wrong weight or setting is found, and nothing hangs or is half done."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from megatron_coreward.checkpoint import logits
from megatron_coreward.checkpoint.convert import to_megatron
from megatron_coreward.checkpoint.logits import LogitComparison, available_memory, check_memory, compare_logits
from megatron_coreward.checkpoint.verify import open_checkpoint
from megatron_coreward.cli import main
from megatron_coreward.demo.model import write_model
from megatron_coreward.demo.tokenizer import byte_level_tokenizer
from megatron_coreward.errors import RunError


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Llama with scaled rotary frequencies, and its Megatron checkpoint."""
    folder = tmp_path_factory.mktemp("model")
    settings: dict[str, Any] = {"family": "llama", "llama3_rope": True, "layers": 2, "hidden": 32, "ffn": 48}
    write_model(folder / "hf", byte_level_tokenizer(), jitter=0.02, pad_vocab_to=1, **settings)
    to_megatron(folder / "hf", folder / "m")
    return folder / "hf", folder / "m"


@pytest.mark.long
def test_transformers_and_the_actor_compute_the_same(
    model: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", "verify", *map(str, model), "--logits"]) == 0
    assert "logits of 64 tokens: largest difference" in capsys.readouterr().out


@pytest.mark.slow
def test_a_weight_that_was_changed_is_found(model: tuple[Path, Path], tmp_path: Path) -> None:
    """Two values of one projection that have changed places: the tensors' sums are as before."""
    shutil.copytree(model[0], tmp_path / "hf")
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    tensors["model.layers.1.self_attn.k_proj.weight"][[0, 1]] = tensors["model.layers.1.self_attn.k_proj.weight"][
        [1, 0]
    ]
    save_file(tensors, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RunError, match="compute different logits of 64 tokens: largest difference"):
        compare_logits(open_checkpoint(model[1]), open_checkpoint(tmp_path / "hf"))


@pytest.mark.long
def test_a_model_that_does_not_run_is_named(model: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(model[0], tmp_path / "hf")
    opened = open_checkpoint(tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | {"model_type": "nothing"}))
    with pytest.raises(RunError, match=f"{tmp_path / 'hf'}: its model does not run: "):
        compare_logits(opened, open_checkpoint(model[1]))


def test_a_model_that_takes_too_long_is_stopped(model: tuple[Path, Path]) -> None:
    one = open_checkpoint(model[0])
    with pytest.raises(RunError, match="no logits within 0 s"):
        compare_logits(one, one, timeout_s=0.1)


def test_a_model_that_does_not_fit_is_refused_before_anything_runs(
    model: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logits, "available_memory", lambda: 10**9)
    assert main(["convert", "verify", *map(str, model), "--logits"]) == 2
    said = capsys.readouterr()
    assert "logits need 1.5 GB of memory in fp32, 1.0 GB are available; leave out --logits" in said.err
    assert said.out == ""


def test_the_memory_of_this_machine_is_known(model: tuple[Path, Path]) -> None:
    assert 10**8 < available_memory() < 10**14
    check_memory(open_checkpoint(model[0]))


@pytest.mark.parametrize(
    ("gap", "scale", "ok"), [(0.9e-4, 0.5, True), (1.1e-4, 0.5, False), (1.9e-3, 20.0, True), (2.1e-3, 20.0, False)]
)
def test_the_tolerance_grows_with_the_logits(gap: float, scale: float, ok: bool) -> None:
    assert LogitComparison(64, gap, scale, 1.0).ok is ok


def test_logits_that_are_not_finite_are_refused(model: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        np.save(command[-1], np.full((64, 259), np.nan, dtype=np.float32))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    opened = open_checkpoint(model[0])
    with pytest.raises(RunError, match="its logits are not finite"):
        compare_logits(opened, opened)
