"""Models and engines for the tests of this folder; each engine starts once a session."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_coreward.demo.model import write_model
from megatron_coreward.demo.tokenizer import byte_level_tokenizer
from megatron_coreward.weights.layouts import EngineLayout
from tests.rollout.engine_process import EngineProcess, sync

# Name of an engine -> (how its model is written, how it is started). 259 tokens: vLLM pads the vocabulary to 320 rows.
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "untied": ({"pad_vocab_to": 1}, {}),
    "tied": ({"pad_vocab_to": 1, "tie": True}, {}),
    "tied, TP 2": ({"tie": True}, {"tensor_parallel": 2}),
    "experts": ({"family": "qwen3_moe"}, {}),
    "llama": ({"family": "llama"}, {}),
    "mistral": ({"family": "mistral"}, {}),
    "qwen2, tied, TP 2": ({"family": "qwen2", "tie": True, "head_dim": 16}, {"tensor_parallel": 2}),
    "experts, TP 2": ({"family": "qwen3_moe"}, {"tensor_parallel": 2}),
}


def tensor_parallel(kind: str) -> int:
    """Of the engine of a kind."""
    return int(KINDS[kind][1].get("tensor_parallel", 1))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Path]:
    """The checkpoint of a kind of model with the weights that a seed gives."""

    def write(kind: str, seed: int) -> Path:
        path = tmp_path_factory.getbasetemp() / f"{kind.replace(', ', '-').replace(' ', '')}-{seed}"
        if not path.exists():
            model, _ = KINDS[kind]
            sizes = {"layers": 2, "hidden": 64, "ffn": 96, "head_dim": 32, "jitter": 0.15}
            write_model(path, byte_level_tokenizer(), seed=seed, **(sizes | model))
        return path

    return write


class Engines:
    """The running engine of each kind of model. Its model directory has weights of seed 0, which it never reads."""

    def __init__(self, checkpoint: Callable[[str, int], Path]) -> None:
        self._checkpoint = checkpoint
        self._running: dict[str, EngineProcess] = {}

    def __call__(self, kind: str) -> EngineProcess:
        if kind not in self._running:
            self._running[kind] = self.start(kind)
        return self._running[kind]

    def start(self, kind: str) -> EngineProcess:
        """One that the caller has to end."""
        sizes = {"max_model_len": 512, "max_num_seqs": 64, "kv_cache_gib": 0.125}
        return EngineProcess(self._checkpoint(kind, 0), dtype="float32", **sizes, **KINDS[kind][1])

    def end(self, kind: str) -> None:
        self._running.pop(kind).close()

    def end_all(self) -> None:
        for kind in list(self._running):
            self.end(kind)


@pytest.fixture(scope="session")
def engine_of(checkpoint: Callable[[str, int], Path]) -> Iterator[Engines]:
    engines = Engines(checkpoint)
    yield engines
    engines.end_all()


@pytest.fixture
def start_engine(engine_of: Engines) -> Iterator[Callable[[str], EngineProcess]]:
    """Starts an engine of a kind for one test, which may do to it what it likes."""
    started: list[EngineProcess] = []

    def start(kind: str) -> EngineProcess:
        started.append(engine_of.start(kind))
        return started[-1]

    yield start
    for engine in started:
        engine.kill()


@pytest.fixture
def synced(engine_of: Engines, checkpoint: Callable[[str, int], Path]) -> Callable[[str, int], Any]:
    """The engine of a kind, holding the weights of a seed as version seed."""

    def sync_weights(kind: str, seed: int) -> Any:
        engine = engine_of(kind)
        if engine.version() != seed:
            sync(engine, checkpoint(kind, seed), seed, engines=EngineLayout(1, tensor_parallel(kind)))
        return engine

    return sync_weights
