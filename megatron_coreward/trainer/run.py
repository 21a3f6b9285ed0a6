"""A training run from config to final model: what is built, in which order, and what is left in the run directory."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from megatron_coreward.checkpoint.store import ACTORS, TrainerState, checkpoint_path
from megatron_coreward.cluster.comparison import comparer_for
from megatron_coreward.cluster.preemption import Preempted, StopRequest, StopSignals
from megatron_coreward.cluster.processes import LOGS, Processes, processes
from megatron_coreward.cluster.ray_start import start_ray
from megatron_coreward.cluster.rollout_engines import RolloutEngines, open_rollout_engines
from megatron_coreward.cluster.watchdog import Watchdog, WorkerDied
from megatron_coreward.cluster.weight_sync import canary_tokens
from megatron_coreward.config.architecture import Architecture
from megatron_coreward.config.schema import Equivalence, RunConfig
from megatron_coreward.data.dataset import ProblemSet, data_sets, load_problems
from megatron_coreward.data.sampler import BatchSampler
from megatron_coreward.errors import HaltedError, InputError, RunError
from megatron_coreward.preflight import preflight
from megatron_coreward.rewards.equivalence import AnswerEquivalence
from megatron_coreward.rewards.methods import METHODS
from megatron_coreward.telemetry import label_history
from megatron_coreward.telemetry.console import RunView, open_view
from megatron_coreward.telemetry.label_history import LabelHistory
from megatron_coreward.telemetry.rollout_dump import ScoredGroup
from megatron_coreward.telemetry.sinks import open_sinks, require_trackers
from megatron_coreward.telemetry.timing import PhaseTimer
from megatron_coreward.trainer import finish
from megatron_coreward.trainer.checkpoints import CheckpointWriter
from megatron_coreward.trainer.experience import Collector
from megatron_coreward.trainer.loop import Trainer
from megatron_coreward.trainer.rollback import Collapsing, open_guard, roll_back
from megatron_coreward.trainer.rollout_log import LoggedCollector, RolloutLog, fingerprint_of
from megatron_coreward.trainer.run_directory import (
    OpenedRun,
    announce,
    interrupt_says_how_to_go_on,
    lock_run_directory,
    log_event,
    open_run_directory,
    resume_hint,
)
from megatron_coreward.trainer.schedule import RolloutSchedule
from megatron_coreward.trainer.validation import validation_metrics


@dataclass(frozen=True, slots=True)
class _Data:
    """What a run trains on and what it is validated on."""

    train: ProblemSet
    held_out: Mapping[str, ProblemSet]  # data sets by their names

    def notes(self, config: RunConfig) -> Iterator[str]:
        """Questions that are left out."""
        held_out = ((f"validation ({name})", problems) for name, problems in self.held_out.items())
        for what, problems in (("training", self.train), *held_out):
            for count, why in (
                (problems.num_dropped, f"are longer than data.max_prompt_tokens ({config.data.max_prompt_tokens})"),
                (problems.num_unpaired, "have no rephrasing, or are rephrasings without a question"),
                (problems.num_unanswered, "have no ground truth"),
            ):
                if count:
                    yield f"{count} {what} questions {why} and are left out; {len(problems)} are used"


def train(config: RunConfig, arch: Architecture | None = None) -> Path:
    """Runs `config.steps` steps (those that an earlier attempt did not do) and writes the final model.

    Args:
        arch: what `preflight` returned, if it has been run; None: it is run first.

    Returns:
        The run directory.

    Raises:
        InputError: before any process starts, if config, model or data cannot work.
        Preempted: the run was asked to stop; what it had done is saved.
        HaltedError: the guard has ended the run.
        RunError: the run cannot go on; the message names the cause and from where it would go on.
    """
    with StopSignals(config.faults.stop_signals) as stop, ExitStack() as stack:
        arch = arch or preflight(config)
        stack.enter_context(lock_run_directory(config.run_dir))
        stack.enter_context(interrupt_says_how_to_go_on(config))
        require_trackers(config.model_dump(include={"telemetry"}))
        if finish.is_trained(config) and finish.missing(config):
            finish.complete(config, partial(announce, config))
            return config.run_dir
        tokenizer = AutoTokenizer.from_pretrained(config.model.hf_path)
        _run_to_the_end(config, arch, _load_data(config, tokenizer), stop)
        if finish.missing(config):  # an error behind the model, which fails no run
            finish.complete(config, partial(announce, config))
        return config.run_dir


def _run_to_the_end(config: RunConfig, arch: Architecture, data: _Data, stop: StopSignals) -> None:
    """As many attempts as `faults.max_restarts` and the guard's rollbacks allow."""
    restarts = config.faults.max_restarts
    notes: list[str] = []
    before: Exception | None = None  # what ended the attempt before
    while True:
        try:
            opened = open_run_directory(config, notes)
            start_ray(config.watchdog.start_limit_s)
            stop.take()
            with finish.nothing_after_it_counts(config, partial(announce, config)):
                _run(config, arch, data, opened, stop)
            return
        except Preempted as request:
            raise Preempted(f"{request}; {resume_hint(config)}") from None
        except WorkerDied as death:
            if restarts == 0:
                raise RunError(f"{death}; {resume_hint(config)}") from death
            restarts -= 1
            before = death
            notes = [f"{death}; all processes are started again (faults.max_restarts: {restarts} left)"]
        except Collapsing as collapse:
            if collapse.decision.action != "rollback":
                raise HaltedError(str(collapse)) from None
            step = roll_back(config.run_dir, collapse.decision)
            before = collapse
            notes = [f"{collapse} Going on from step {step}."]
        except RunError as error:
            raise RunError(f"{error}; {resume_hint(config)}") from error
        except InputError as error:
            if before is None:
                raise
            # The input was good once: it is the cluster that has changed, which has lost a node, say.
            raise RunError(f"{before}; started again: {error}; {resume_hint(config)}") from error
        except Exception as error:
            error.add_note(resume_hint(config))
            raise


def _run(config: RunConfig, arch: Architecture, data: _Data, opened: OpenedRun, stop: StopRequest) -> None:
    """One attempt, from the start of the processes to the final model."""
    with ExitStack() as stack:
        view = stack.enter_context(
            open_view(
                config.telemetry.console,
                title=f"{config.method} in {config.run_dir}",
                total_steps=config.steps,
                steps_done=opened.steps_done,
            )
        )
        for note in [*opened.notes, *data.notes(config), "starting Ray, actors and rollout engines"]:
            view.note(note)
        attempt = _Attempt(config, data, opened, stop, view, stack)
        watchdog = Watchdog(config.watchdog, attempt.notify, stop, logs=config.run_dir / LOGS)
        running = stack.enter_context(processes(config, watchdog))
        engines = open_rollout_engines(config, running, canary_tokens(data.train), attempt.notify)
        computes = running.actors.call("describe", results_of=(0,))[0]
        attempt.notify("actors compute with " + ", ".join(f"{what}: {how}" for what, how in computes.items()))
        if opened.trainer_state is not None:
            running.actors.call("load", (checkpoint_path(config.run_dir, opened.steps_done) / ACTORS).resolve())
            view.note(f"resumed after step {opened.steps_done}")
        attempt.trainer(running, engines).train()
        view.note("writing the final model")
        (config.run_dir / finish.REPORT).unlink(missing_ok=True)  # one of a run that had fewer steps, or that ran
        running.actors.call("export_hf", "policy", (config.run_dir / "hf").resolve())
        finish.try_report(config, attempt.notify)


@dataclass(frozen=True, slots=True)
class _Attempt:
    """What an attempt is given, before its processes are there."""

    config: RunConfig
    data: _Data
    opened: OpenedRun
    stop: StopRequest
    view: RunView
    stack: ExitStack  # closes what the attempt opens

    def notify(self, text: str) -> None:
        """Shows a line to people, and keeps it in the run directory."""
        self.view.note(text)
        log_event(self.config, text)

    def trainer(self, running: Processes, engines: RolloutEngines) -> Trainer:
        """The trainer, with all that it writes to."""
        actors = running.actors
        config, method, state = self.config, METHODS[self.config.method], self.opened.trainer_state
        equivalence = self._equivalence(config.rewards.equivalence, running)
        problems_of = BatchSampler(self.data.train, config.data.batch_size, config.seed, config.data.shuffle).batch
        log = RolloutLog(
            config.run_dir,
            fingerprint_of(config),
            first_step=self.opened.steps_done + 1,
            keep=config.telemetry.dump_rollouts,
        )
        if log.num_recorded:
            self.view.note(f"the rollout log has the rollouts of {log.num_recorded} further steps")
        schedule = RolloutSchedule(config, method.needs, engines, problems_of, log.has)
        collector = Collector(config, method, actors, schedule, equivalence, problems_of)
        labels = self._label_history(equivalence)

        def observe(step: int, scored: Sequence[ScoredGroup]) -> dict[str, float]:
            sampling = {} if config.rollout.max_staleness else engines.take_sampling_metrics()
            return labels.observe(step, scored) | sampling

        return Trainer(
            config=config,
            needs=method.needs,
            actors=actors,
            collect=LoggedCollector(collector, log).collect,
            checkpoints=CheckpointWriter(
                config, actors, on_complete=log.covered, labels=labels.snapshot, last_step=self.opened.steps_done
            ),
            state=state or TrainerState(0, 0),
            guard=open_guard(config, state),
            stop=self.stop,
            validate=self._validation(engines, running),
            observe=observe,
            record=self._recorder(),
            new_timer=lambda: PhaseTimer(self.view.phase),
            notify=self.notify,
        )

    def _label_history(self, equivalence: AnswerEquivalence) -> LabelHistory:
        first_step = 0 if self.opened.trainer_state is None else self.opened.steps_done + 1
        path = self.config.run_dir / label_history.FILE_NAME
        return self.stack.enter_context(LabelHistory(path, equivalence.equivalent, first_step, equivalence.compare))

    def _recorder(self) -> Callable[[int, dict[str, float]], None]:
        """Writes the row of a step to every sink and shows it."""
        config, state = self.config, self.opened.trainer_state
        sinks = self.stack.enter_context(
            open_sinks(
                config.run_dir,
                first_step=0 if state is None else state.step + (state.unfinished_row is None),
                config=config.model_dump(mode="json"),
                warn=self.notify,
            )
        )

        def record(step: int, row: dict[str, float]) -> None:
            sinks.write(step, row)
            self.view.write(step, row)

        return record

    def _equivalence(self, relation: Equivalence, running: Processes) -> AnswerEquivalence:
        """A relation whose processes are on every machine of the run."""
        limits = self.config.rewards.comparison_timeout_s, self.config.rewards.comparison_workers
        comparer = comparer_for(running.nodes, *limits) if running.nodes else None
        return self.stack.enter_context(AnswerEquivalence(relation, *limits, comparer=comparer))

    def _validation(
        self, engines: RolloutEngines, running: Processes
    ) -> Callable[[int, PhaseTimer], dict[str, float]] | None:
        if not self.data.held_out:
            return None
        config = self.config
        equivalence = self._equivalence(config.validation.equivalence or config.rewards.equivalence, running)
        return partial(validation_metrics, config, self.data.held_out, engines, equivalence)


def _load_data(config: RunConfig, tokenizer: Any) -> _Data:
    """The questions to train on, and those to validate on (`data_sets`)."""
    data, needs = config.data, METHODS[config.method].needs
    limits: dict[str, Any] = {
        "system_prompt": data.system_prompt,
        "max_prompt_tokens": data.max_prompt_tokens,
        "over_length": data.over_length,
        "unpaired": data.unpaired,
        "thinking": data.thinking,
        "control_tokens": data.control_tokens,
    }
    rephrased = data.rephrased_files if "rephrased" in needs.all_views else ()
    problems = load_problems(data.train_files, rephrased, tokenizer, **limits)
    if needs.ground_truth:
        problems = problems.with_ground_truth(data.missing_gold, problems.missing_in_training(config.method))
    held_out = []
    for file in data.val_files:
        found = load_problems([file], (), tokenizer, **limits)
        held_out.append((file, found.with_ground_truth(data.missing_gold, found.missing_in_validation(file))))
    limit = config.validation.max_problems
    return _Data(problems, {name: part.first(limit) for name, part in data_sets(held_out).items()})
