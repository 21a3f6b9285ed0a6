"""Proof that no label is read: with every ground truth replaced by noise, label-free methods give the same weights, bit
by bit; training on ground truths does not."""

import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_coreward.cluster.rollout_engines import RolloutEngines, open_rollout_engines
from megatron_coreward.config.methods import BUILT_IN, method_title, needs_of
from megatron_coreward.rewards.context import BatchRewardContext
from megatron_coreward.rewards.equivalence import AnswerEquivalence
from megatron_coreward.rewards.methods import METHODS, method_of
from megatron_coreward.telemetry.timing import PhaseTimer
from megatron_coreward.trainer.checkpoints import CheckpointWriter
from megatron_coreward.trainer.experience import Collector
from megatron_coreward.trainer.loop import Trainer
from megatron_coreward.trainer.schedule import RolloutSchedule
from megatron_coreward.types import Problem, Role, RolloutGroup, View
from tests.e2e.conftest import Task

# Without KL and weight decay, weights move by rewards alone.
ONLY_REWARDS = ("loss.kl_coef=0", "actor.weight_decay=0")

pytestmark = [pytest.mark.e2e, pytest.mark.ray, pytest.mark.engine, pytest.mark.timeout(600)]


@dataclasses.dataclass
class Running:
    """Actors with a teacher and a reference, and an engine; every run starts from the same saved state."""

    task: Task
    actors: Any
    engines: RolloutEngines
    initial: Path
    before: str  # what `export` gives of it

    def weights_after_training(self, setting: Any, problems: list[Problem], folder: Path) -> str:
        self.actors.call("load", self.initial)
        config, method = self.task.config(setting, "steps=2", *ONLY_REWARDS), method_of(setting)
        needs = method.needs

        def problems_of(step: int) -> list[Problem]:
            return problems[8 * step : 8 * step + 8]

        with AnswerEquivalence("exact") as equivalence:
            schedule = RolloutSchedule(config, needs, self.engines, problems_of)
            collector = Collector(config, method, self.actors, schedule, equivalence, problems_of)
            trainer = Trainer(
                config=config,
                needs=needs,
                actors=self.actors,
                collect=collector.collect,
                checkpoints=CheckpointWriter(config, self.actors),
            )
            for step in (1, 2):
                trainer.step(step, PhaseTimer())
        return self.export(folder)

    def export(self, folder: Path) -> str:
        self.actors.call("export_hf", "policy", folder)
        return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def running(task: Task, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    from megatron_coreward.cluster.processes import processes

    config = task.config("co_rewarding_i+ii", *ONLY_REWARDS)
    initial = tmp_path_factory.mktemp("initial")
    with processes(config) as started:
        started.actors.call("save", initial)
        engines = open_rollout_engines(config, started, np.arange(3, 40, dtype=np.int32))
        running = Running(task, started.actors, engines, initial, "")
        yield dataclasses.replace(running, before=running.export(tmp_path_factory.mktemp("before") / "hf"))


@pytest.fixture(scope="module")
def problems(task: Task, running: Running) -> list[Problem]:
    """Two batches of problems, from which every method learns although the model is too small to be right, or to answer
    two wordings alike: both views have the original's text; a vote of the other view rewards some rollouts of the first
    batch and not others; and the ground truths of that batch are answers that the model gives in the first step."""
    from transformers import AutoTokenizer

    from megatron_coreward.data.dataset import load_problems
    from megatron_coreward.trainer.sampling import sample_groups

    config, method = task.config("co_rewarding_i+ii_original"), METHODS["co_rewarding_i+ii_original"]
    data = config.data
    tokenizer = AutoTokenizer.from_pretrained(task.folder / "start")
    read = load_problems(data.train_files, data.rephrased_files, tokenizer, system_prompt=None, max_prompt_tokens=64)
    loaded = [dataclasses.replace(p, prompts=dict.fromkeys(p.prompts, p.prompts["original"])) for p in read]
    version = running.engines.sync_weights("policy", 0, PhaseTimer())  # the teacher's are the same in the first step

    def draw(view: View, role: Role) -> list[RolloutGroup]:
        how = {"n": 4, "temperature": 1.0, "max_tokens": 32, "step": 1, "seed": config.seed}
        return sample_groups(running.engines, loaded, (view,), role, version=version, **how)

    policy, teacher = draw("original", "policy"), draw("rephrased", "teacher")
    with AnswerEquivalence("exact") as equivalence:
        context = BatchRewardContext(method.needs, equivalence, policy_groups=policy, teacher_groups=teacher)
        uneven = [len(set(method.score(group, context).rewards)) > 1 for group in policy]
    assert sum(uneven) >= 2
    given = [next((answer for answer in group.answers if answer is not None), None) for group in policy]
    order = sorted(range(len(loaded)), key=lambda i: (not uneven[i], given[i] is None))
    assert sum(given[i] is not None for i in order[:8]) >= 4
    first = [dataclasses.replace(loaded[i], ground_truth=given[i] or loaded[i].ground_truth) for i in order[:8]]
    return [*first, *(loaded[i] for i in order[8:16])]


OWN = "tests.rewards.own_methods"


@pytest.mark.parametrize(
    "method",
    [
        *BUILT_IN,
        f"{OWN}:FirstAnswer",
        f"{OWN}:ReadsLabels",
        {"co_rewarding_i": 1.0, f"{OWN}:LengthPenalty": 0.1},
        {"majority_voting": 1.0, "ground_truth": 0.5},
    ],
    ids=method_title,
)
def test_noise_for_labels_changes_only_methods_that_need_them(
    running: Running, problems: list[Problem], tmp_path: Path, method: Any
) -> None:
    noisy = [dataclasses.replace(problem, ground_truth=f"noise {i}") for i, problem in enumerate(problems)]
    labelled = running.weights_after_training(method, problems, tmp_path / "labelled")
    with_noise = running.weights_after_training(method, noisy, tmp_path / "noisy")
    assert labelled != running.before  # something was learned at all
    assert (labelled == with_noise) == (not needs_of(method).ground_truth)
