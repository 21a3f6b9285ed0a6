"""Proof that no label is read: with every gold answer replaced by noise, label-free methods give the same weights, bit
by bit; training on gold answers does not."""

import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest

from megatron_coreward.config.schema import MethodName
from megatron_coreward.rewards.equivalence import AnswerEquivalence
from megatron_coreward.rewards.methods import METHODS
from megatron_coreward.telemetry.timing import PhaseTimer
from megatron_coreward.types import Problem
from tests.e2e.conftest import Task

# Without KL and weight decay, weights move by rewards alone.
ONLY_REWARDS = ("loss.kl_coef=0", "actor.weight_decay=0")

pytestmark = [pytest.mark.e2e, pytest.mark.ray, pytest.mark.engine, pytest.mark.timeout(600)]


@dataclasses.dataclass
class Processes:
    """Actors with a teacher and a reference, and an engine; every run starts from the same saved state."""

    task: Task
    actors: Any
    engines: Any
    sync: Any
    initial: Path

    def weights_after_training(self, method: str, problems: list[Problem], folder: Path) -> str:
        from megatron_coreward.trainer.loop import Trainer

        self.actors.load(self.initial)
        config = self.task.config(method, "steps=2", *ONLY_REWARDS)
        with AnswerEquivalence("exact") as equivalence:
            trainer = Trainer(
                config=config,
                method=METHODS[method],
                actors=self.actors,
                engines=self.engines,
                sync=self.sync,
                equivalence=equivalence,
                problems_of=lambda step: problems[8 * step : 8 * step + 8],
            )
            for step in (1, 2):
                trainer.step(step, PhaseTimer())
        return self.export(folder)

    def export(self, folder: Path) -> str:
        self.actors.export_hf("policy", folder)
        return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def running(task: Task, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    import ray

    from megatron_coreward.cluster.processes import processes
    from megatron_coreward.cluster.weight_sync import open_sync
    from megatron_coreward.config.architecture import read_architecture

    config = task.config("co_rewarding_i+ii", *ONLY_REWARDS)
    initial = tmp_path_factory.mktemp("initial")
    with processes(config) as (actors, engines, transport):
        actors.save(initial)
        arch = read_architecture(config.model.hf_path)
        sync = open_sync(config, arch, transport, actors, engines, ray.get)
        yield Processes(task, actors, engines, sync, initial)


@pytest.fixture(scope="module")
def problems(task: Task, running: Processes) -> list[Problem]:
    """Two batches of problems. The first batch's gold answers are ones that the model gives in the first step: it is
    too small to be right, and labels that no rollout ever meets would look like noise to any method."""
    from transformers import AutoTokenizer

    from megatron_coreward.data.dataset import load_problems
    from megatron_coreward.trainer.sampling import sample_groups

    data = task.config("co_rewarding_i").data
    tokenizer = AutoTokenizer.from_pretrained(task.folder / "start")
    loaded = load_problems(data.train_files, data.rephrased_files, tokenizer, system_prompt=None, max_prompt_tokens=64)
    running.sync.sync_weights("policy", 0)
    groups = sample_groups(
        running.engines,
        loaded[:8],
        ("original",),
        "policy",
        n=4,
        temperature=1.0,
        max_tokens=32,
        version=0,
        step=1,
        seed=1,
    )
    given = [next((answer for answer in group.answers if answer is not None), None) for group in groups]
    assert sum(answer is not None for answer in given) >= 4
    first = [
        dataclasses.replace(p, ground_truth=answer or p.ground_truth)
        for p, answer in zip(loaded[:8], given, strict=True)
    ]
    return [*first, *loaded[8:16]]


@pytest.mark.parametrize("method", get_args(MethodName))
def test_noise_for_labels_changes_only_methods_that_need_them(
    running: Processes, problems: list[Problem], tmp_path: Path, method: str
) -> None:
    noisy = [dataclasses.replace(problem, ground_truth=f"noise {i}") for i, problem in enumerate(problems)]
    running.actors.load(running.initial)
    before = running.export(tmp_path / "before")
    labelled = running.weights_after_training(method, problems, tmp_path / "labelled")
    with_noise = running.weights_after_training(method, noisy, tmp_path / "noisy")
    assert labelled != before  # something was learned at all
    assert (labelled == with_noise) == (not METHODS[method].needs.ground_truth)
