"""Actors and engines behind the loop's narrow contracts: they write down what is asked of them, in order."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from megatron_coreward.cluster.weight_sync import WeightSync
from megatron_coreward.config.load import parse_config
from megatron_coreward.config.schema import RunConfig
from megatron_coreward.rollout.engine import Sample, SamplingRequest
from megatron_coreward.types import FloatArray, IntArray, Problem, Prompt, Role, Sequences, TokenStats, TrainBatch, View
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


def make_sync(
    actors: "FakeActors", engines: Any, *, canary: int = 4, given_up: list[str] | None = None, **options: Any
) -> WeightSync:
    """A weight sync whose calls are done when they are made."""
    told = given_up if given_up is not None else []
    tokens = np.arange(canary, dtype=np.int32)
    settings = {"spec": SPEC, "canary": tokens, "max_gap": 1e-3} | options
    return WeightSync(actors, engines, list, lambda spec, reason: told.append(f"{spec.name}: {reason}"), **settings)


class FakeActors:
    def __init__(self, events: list[str], score: float = -1.0) -> None:
        self.events = events
        self.score = score
        self.batches: list[TrainBatch] = []

    def update_ema_teacher(self, decay: float) -> None:
        self.events.append(f"teacher {decay:.4f}")

    def token_stats(self, sequences: Sequences, weights: Any, temperature: float) -> TokenStats:
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

    def send_weights(self, role: Role, version: int) -> list[Any]:
        self.events.append(f"send {role}")
        return [f"sent {version}"]


class FakeEngines:
    """Answers `\\boxed{k}` with k the number of the sample modulo 2, so that votes and variance exist."""

    def __init__(self, events: list[str], score: float = -1.0) -> None:
        self.events = events
        self.held = score
        self.requests: list[SamplingRequest] = []
        self.version: int | None = None

    def receive_weights(self, spec: dict[str, Any], version: int) -> list[Any]:
        self.events.append(f"receive {version}")
        self.version = version
        return [f"received {version}"]

    def score(self, token_ids: IntArray) -> list[FloatArray]:
        self.events.append("canary")
        return [np.full(len(token_ids) - 1, self.held, dtype=np.float32)]

    def sample(self, requests: Sequence[SamplingRequest], expected_version: int) -> list[list[Sample]]:
        assert self.version == expected_version
        self.events.append(f"sample {expected_version}")
        self.requests.extend(requests)
        return [[self._sample(i, expected_version) for i in range(r.n)] for r in requests]

    def begin(self, requests: Sequence[SamplingRequest], expected_version: int) -> Callable[[], list[list[Sample]]]:
        samples = self.sample(requests, expected_version)

        def finish() -> list[list[Sample]]:
            self.events.append(f"took {expected_version}")
            return samples

        return finish

    @staticmethod
    def _sample(i: int, version: int) -> Sample:
        ids = np.arange(1, 4 + i % 2, dtype=np.int32)
        logprobs = np.full(len(ids), -1.0, dtype=np.float32)
        return Sample(ids, logprobs, f"so \\boxed{{{i % 3}}}", "stop", version)
