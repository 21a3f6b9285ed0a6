"""What runs on one NVIDIA GPU: `make gpu-test`. Elsewhere every test says why it is skipped."""

import importlib.metadata
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def missing() -> str | None:
    """What this machine lacks, None where the tests can run."""
    if not torch.cuda.is_available():
        return "needs an NVIDIA GPU and a CUDA build of torch"
    for name in ("transformer-engine", "megatron-core", "vllm"):
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return f"needs the package {name}"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = missing()
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            item.add_marker(pytest.mark.timeout(580))
            if reason is not None:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3 of two layers, of sizes that every FP8 recipe takes."""
    from megatron_coreward.demo.model import write_model
    from megatron_coreward.demo.tokenizer import word_level_tokenizer

    path = tmp_path_factory.mktemp("model")
    sizes = {"layers": 2, "hidden": 512, "heads": 8, "kv_heads": 4, "head_dim": 64, "ffn": 1536}
    return write_model(path, word_level_tokenizer(), **sizes, init_std=0.02, dtype=torch.bfloat16)  # type: ignore[arg-type]
