"""The rollout log of a run: what a step has sampled and concluded, on disk before its update begins.

A step that died in its update, or after the newest checkpoint, is done again from here without asking an engine: the
rollouts, votes and rewards are read, and only the update is computed. The log is the dump of rollouts itself
(rollouts/step_000001.parquet) with a note of what it was drawn under.

Invariants (tests/trainer/test_rollout_log.py):
  1. A step is read only if it was drawn under the same settings, model and data, from weights of the versions that
     may be learnt from, for the same questions, and if all steps between the checkpoint and it are there too.
  2. What is read gives the same update as what was sampled.
"""

import hashlib
import json
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_coreward.checkpoint.inputs import VALIDATION, input_digests
from megatron_coreward.cluster.weight_sync import SyncReport
from megatron_coreward.config.methods import method_title
from megatron_coreward.config.schema import RunConfig
from megatron_coreward.errors import InputError
from megatron_coreward.rewards.methods.base import GroupReward
from megatron_coreward.telemetry.rollout_dump import (
    ScoredGroup,
    discard_rollouts,
    dump_rollouts,
    dumped_steps,
    read_notes,
    read_rollouts,
    rollouts_path,
)
from megatron_coreward.telemetry.timing import PhaseTimer
from megatron_coreward.trainer.experience import Collector, Experience, Rollouts
from megatron_coreward.trainer.staleness import versions_allowed
from megatron_coreward.types import Problem, View

# What has no part in what is sampled from given weights, and none in the weights.
_WITHOUT_EFFECT = ("run_dir", "telemetry", "checkpoint", "faults", "watchdog", "validation", "sync")


@dataclass(frozen=True, slots=True)
class LoggedStep:
    """What was sampled for a step, and how the policy's groups were rewarded."""

    rollouts: Rollouts
    group_rewards: list[GroupReward]


class RolloutLog:
    """The steps of one run."""

    def __init__(self, run_dir: Path, fingerprint: str, first_step: int, keep: bool) -> None:
        """Drops what cannot be gone on from.

        Args:
            fingerprint: of everything that decides what is sampled (`fingerprint_of`).
            first_step: the step that the run does next.
            keep: let steps stay that a checkpoint covers (they are the run's dump of rollouts).
        """
        self._run_dir, self._fingerprint, self._keep = run_dir, fingerprint, keep
        step = first_step
        while self._usable(step):
            step += 1
        discard_rollouts(run_dir, step)
        self.num_recorded = step - first_step  # steps that will be read

    def has(self, step: int) -> bool:
        """Whether a step is recorded."""
        return self._usable(step)

    def read(
        self, step: int, problems: Sequence[Problem], views: Sequence[View], versions: Collection[int]
    ) -> LoggedStep | None:
        """A step as it was recorded; None if it has to be sampled. `versions`: that it may be sampled from."""
        if not self._usable(step):
            return None
        path = rollouts_path(self._run_dir, step)
        try:
            scored = read_rollouts(path)
        except InputError:  # its notes are whole and its rows are not: the step is sampled again
            discard_rollouts(self._run_dir, step)
            return None
        policy = [item for item in scored if item.rewards is not None]
        asked = [(problem.uid, view) for problem in problems for view in views]
        completions = [c for item in policy for c in item.group.completions]
        sampled_from = {version for c in completions for version in c.token_versions.tolist()}
        if [(item.group.uid, item.group.view) for item in policy] != asked or not sampled_from <= set(versions):
            discard_rollouts(self._run_dir, step)
            return None
        group_rewards = [
            GroupReward(item.label, item.rewards, item.advantages) for item in policy if item.rewards is not None
        ]
        syncs = [SyncReport(*report) for report in json.loads(read_notes(path)["syncs"])]
        teacher = [item.group for item in scored if item.rewards is None]
        return LoggedStep(Rollouts([item.group for item in policy], teacher, syncs), group_rewards)

    def note(self, step: int, name: str) -> str | None:
        """What `write` was given as a further note of a recorded step; None: the step or the note is not there."""
        return read_notes(rollouts_path(self._run_dir, step)).get(name) if self._usable(step) else None

    def write(
        self,
        step: int,
        scored: Sequence[ScoredGroup],
        syncs: Sequence[SyncReport],
        more_notes: Mapping[str, str] | None = None,
    ) -> None:
        """Records a step; it is on disk on return."""
        notes = {
            **(more_notes or {}),
            "fingerprint": self._fingerprint,
            "syncs": json.dumps([[report.seconds, report.canary_gap, report.limit] for report in syncs]),
        }
        dump_rollouts(self._run_dir, step, scored, notes)

    def covered(self, step: int) -> None:
        """A checkpoint holds everything up to this step."""
        if not self._keep:
            for number, path in dumped_steps(self._run_dir).items():
                if number <= step:
                    path.unlink()

    def _usable(self, step: int) -> bool:
        path = rollouts_path(self._run_dir, step)
        try:
            return path.is_file() and read_notes(path).get("fingerprint") == self._fingerprint
        except InputError:
            return False


class LoggedCollector:
    """A collector whose steps are logged, and read from the log if it has them."""

    def __init__(
        self, collector: Collector, log: RolloutLog, notes: Callable[[int], Mapping[str, str]] = lambda step: {}
    ) -> None:
        """`notes`: what to keep beside the rollouts of a step."""
        self._collector, self._log, self._notes = collector, log, notes

    def collect(self, step: int, num_updates: int, timer: PhaseTimer) -> Experience:
        """The experience of a step, as `Collector.collect` has it. The recorded rewards count, whatever the method
        would make of the rollouts now."""
        collector, config = self._collector, self._collector.config
        versions = versions_allowed(num_updates, config.loss.updates_per_batch, config.rollout.max_staleness)
        problems = collector.problems_of(step - 1)
        logged = self._log.read(step, problems, collector.method.needs.views, versions)
        sampled = collector.source.sample(step, num_updates, timer)  # of a logged step: what later steps need
        if logged is not None:
            return collector.score(step, num_updates, logged.rollouts, timer, logged.group_rewards)
        experience = collector.score(step, num_updates, sampled, timer)
        self._log.write(step, experience.scored, sampled.syncs, self._notes(step))
        return experience


def fingerprint_of(config: RunConfig) -> str:
    """Changes with every setting, model file or data file that has a part in what a step samples and learns."""
    tree = config.model_dump(mode="json")
    tree["method"] = method_title(config.method)  # of a mixture, the order counts: the first label is taken
    for name in _WITHOUT_EFFECT:
        del tree[name]
    if config.actor.router_replay != "off":  # no dump has the experts that engines chose: a step is sampled again
        tree["attempt"] = uuid.uuid4().hex
    tree["files"] = {key: digest for key, digest in input_digests(config).items() if not key.startswith(VALIDATION)}
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:16]
