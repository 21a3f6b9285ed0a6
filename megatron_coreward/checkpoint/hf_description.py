"""What a Hugging Face model directory holds beside weights: config, generation config, tokenizer, licence."""

import json
import shutil
from pathlib import Path

import torch

_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".distcp"}


def copy_description(source: Path, target: Path, dtype: torch.dtype | None = None) -> None:
    """Copies every file of a model directory that holds no weights, and writes the weights' dtype into config.json."""
    for path in sorted(source.iterdir()):
        index = path.name.endswith(".index.json")
        if path.is_file() and not path.name.startswith(".") and path.suffix not in _WEIGHTS and not index:
            shutil.copy2(path, target / path.name)
    if dtype is not None:
        config_path = target / "config.json"
        config = json.loads(config_path.read_text())
        config.pop("torch_dtype", None)
        config["dtype"] = str(dtype).removeprefix("torch.")
        config_path.write_text(json.dumps(config, indent=2) + "\n")
