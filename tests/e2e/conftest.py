"""A small model that answers, made by the demo's warm start; and Ray, stopped in any case."""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from megatron_coreward.config.load import parse_config
from megatron_coreward.config.schema import RunConfig
from tools.soak import make_task


@dataclass(frozen=True)
class Task:
    folder: Path

    def config(self, method: str | dict[str, float], *overrides: str) -> RunConfig:
        tree: dict[str, Any] = {
            "run_dir": str(self.folder / (method if isinstance(method, str) else "mixture")),
            "steps": 3,
            "method": method,
            "model": {"hf_path": str(self.folder / "start"), "dtype": "float32"},
            "data": {
                "train_files": [str(self.folder / "train.parquet")],
                "rephrased_files": [str(self.folder / "train_rephrased.parquet")],
                "val_files": [str(self.folder / "heldout.parquet")],
                "batch_size": 8,
                "max_prompt_tokens": 64,
                "system_prompt": None,
            },
            "actor": {"tensor_parallel": 2, "tokens_per_microbatch": 2048, "lr": 1e-3, "lr_schedule": "constant"},
            "rollout": {"n": 4, "max_response_tokens": 32, "kv_cache_gib": 0.25},
            "teacher": {"n": 4, "decay_start": 0.5},
            "validation": {"every": 0, "max_problems": 8},
            "telemetry": {"console": "off"},
        }
        return parse_config(tree, overrides)


@pytest.fixture(scope="session")
def task(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Task]:
    """A folder of this process's own; the model in it is made once for all processes that run tests."""
    from megatron_coreward.cluster.ray_start import stop_ray

    own = tmp_path_factory.getbasetemp()
    shared = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "task"
    with FileLock(f"{shared}.lock"):
        if not (shared / "complete").exists():
            shutil.rmtree(shared, ignore_errors=True)
            make_task(shared)
            (shared / "complete").touch()
    yield Task(Path(shutil.copytree(shared, tmp_path_factory.mktemp("e2e") / "task")))
    stop_ray()
