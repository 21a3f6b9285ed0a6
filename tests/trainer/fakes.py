"""Actors and engines behind the loop's narrow contracts: they write down what is asked of them, in order."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np

from megatron_coreward.config.load import parse_config
from megatron_coreward.config.schema import RunConfig
from megatron_coreward.rewards.answer import extract_answer
from megatron_coreward.rollout.requests import SamplingRequest
from megatron_coreward.types import (
    Completion,
    EngineInterval,
    FloatArray,
    IntArray,
    Problem,
    Prompt,
    Role,
    Sequences,
    TokenStats,
    TrainBatch,
    View,
)
from megatron_coreward.weights.layouts import ActorLayout, EngineLayout
from megatron_coreward.weights.spec import TransferSpec

SPEC = TransferSpec("shared_memory", "test", ActorLayout(), EngineLayout(), "float32", 256, 60.0)

VIEWS: tuple[View, ...] = ("original", "rephrased")


def make_config(method: str = "co_rewarding_i", **changes: Any) -> RunConfig:
    tree: dict[str, Any] = {
        "run_dir": "run",
        "steps": 10,
        "method": method,
        "model": {"hf_path": "model", "dtype": "float32"},
        "data": {"train_files": ["train.parquet"], "rephrased_files": ["rephrased.parquet"], "batch_size": 2},
        "rollout": {"n": 4, "max_response_tokens": 8},
        "teacher": {"n": 3},
    }
    return parse_config(tree, [f"{key}={value}" for key, value in changes.items()])


def make_problem(number: int) -> Problem:
    prompts = {
        view: Prompt(f"{view} {number}", np.asarray([10 + number, place + 1], dtype=np.int32))
        for place, view in enumerate(VIEWS)
    }
    return Problem(f"fake/{number}", prompts, ground_truth=str(number), source="fake")


class FakeWorkers:
    """One worker, which is the whole group: commands are its own methods."""

    def call(self, method: str, *arguments: Any, results_of: tuple[int, ...] | None = None) -> list[Any]:
        return [getattr(self, method)(*arguments)]

    def begin(self, method: str, *arguments: Any) -> Any:
        return SimpleNamespace(calls=[getattr(self, method)(*arguments)])


class FakeActors(FakeWorkers):
    def __init__(self, events: list[str], score: float = -1.0) -> None:
        self.events = events
        self.score = score
        self.batches: list[TrainBatch] = []

    def update_ema_teacher(self, decay: float) -> None:
        self.events.append(f"teacher {decay:.4f}")

    def token_stats(
        self, sequences: Sequences, weights: Any, temperature: float, statistics: bool = True
    ) -> TokenStats:
        self.events.append(f"stats {weights}")
        lengths = [n - int(p) for n, p in zip(sequences.lengths, sequences.prompt_lengths, strict=True)]
        values = [np.full(n, self.score, dtype=np.float32) for n in lengths]
        return TokenStats(values, [-v for v in values], [2 * np.abs(v) for v in values])

    def update(self, batch: TrainBatch) -> dict[str, float]:
        self.events.append("update")
        self.batches.append(batch)
        names = ["tokens", "clipped", "entropy", "self_certainty", "logprob_gap", "loss/policy", "loss/total"]
        return dict.fromkeys([*names, "max:logprob_gap", "lr", "grad_norm"], 1.0)

    def open_sender(self, spec: TransferSpec) -> TransferSpec:
        self.events.append("open")
        return spec.at("here", len(self.events))

    def send_weights(self, role: Role, version: int) -> str:
        self.events.append(f"send {role}")
        return f"sent {version}"


class FakeEngines(FakeWorkers):
    """Answers `\\boxed{k}` with k the number of the sample modulo 2, so that votes and variance exist."""

    numbers = range(2)

    def __init__(self, events: list[str], score: float = -1.0) -> None:
        self.events = events
        self.held = score
        self.requests: list[SamplingRequest] = []
        self.version: int | None = None

    def receive_weights(self, spec: dict[str, Any], version: int) -> Any:
        self.events.append(f"receive {version}")
        self.version = version
        return SimpleNamespace(calls=[f"received {version}"])

    def score(self, token_ids: IntArray) -> FloatArray:
        self.events.append("canary")
        return np.full(len(token_ids) - 1, self.held, dtype=np.float32)

    def restart(self, index: int) -> None:
        self.events.append(f"restart {index}")
        self.version = None

    def take_sampling_metrics(self) -> dict[str, float]:
        return {}

    def take_intervals(self) -> list[EngineInterval]:
        return []

    def sample(self, requests: Sequence[SamplingRequest], expected_version: int) -> list[list[Completion]]:
        assert self.version == expected_version
        self.events.append(f"sample {expected_version}")
        self.requests.extend(requests)
        return [[self._read(self._sample(i, expected_version), r) for i in range(r.n)] for r in requests]

    def begin_sampling(
        self, requests: Sequence[SamplingRequest], expected_version: int
    ) -> Callable[[], list[list[Completion]]]:
        completions = self.sample(requests, expected_version)

        def finish() -> list[list[Completion]]:
            self.events.append(f"took {expected_version}")
            return completions

        return finish

    @staticmethod
    def _read(completion: Completion, request: SamplingRequest) -> Completion:
        return replace(completion, answer=extract_answer(completion.text, request.answer_formats))

    @staticmethod
    def _sample(i: int, version: int) -> Completion:
        ids = np.arange(1, 4 + i % 2, dtype=np.int32)
        logprobs = np.full(len(ids), -1.0, dtype=np.float32)
        return Completion(ids, logprobs, f"so \\boxed{{{i % 3}}}", None, "stop", version)
