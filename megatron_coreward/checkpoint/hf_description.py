"""What a Hugging Face model directory holds beside weights: configs, tokenizer, chat templates, licence."""

import json
import os
import shutil
from pathlib import Path

import torch

_WEIGHTS = {
    ".bin",
    ".ckpt",
    ".distcp",
    ".gguf",
    ".h5",
    ".msgpack",
    ".npz",
    ".onnx",
    ".onnx_data",
    ".ot",
    ".pt",
    ".pth",
    ".safetensors",
    ".tflite",
}


def copy_description(source: Path, target: Path, dtype: torch.dtype | None = None) -> None:
    """Copies every file of a model directory that holds no weights, those in folders too, and writes the weights' dtype
    into config.json, under its name of today and under the one that older readers know.

    Contents are copied and not modes: what a shared store keeps read-only is written to here. Names that begin with a
    dot, and the folder in which the target lies, are left out.
    """
    inside = target.resolve()
    for folder, folders, files in os.walk(source, onerror=_raise):
        here = Path(folder)
        folders[:] = sorted(
            name for name in folders if not name.startswith(".") and not inside.is_relative_to((here / name).resolve())
        )
        for name in sorted(files):
            if _is_description(here / name):
                copy = target / here.relative_to(source) / name
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(here / name, copy)
    if dtype is not None:
        config_path = target / "config.json"
        config = json.loads(config_path.read_text(encoding="utf-8"))
        config["dtype"] = config["torch_dtype"] = str(dtype).removeprefix("torch.")
        config_path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _raise(error: OSError) -> None:
    raise error


def _is_description(path: Path) -> bool:
    hidden, index = path.name.startswith("."), path.name.endswith(".index.json")
    return path.is_file() and not hidden and path.suffix not in _WEIGHTS and not index
