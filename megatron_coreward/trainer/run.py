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
from megatron_coreward.config.methods import method_title, needs_of
from megatron_coreward.config.schema import Equivalence, RunConfig
from megatron_coreward.config.validate import warnings
from megatron_coreward.data.dataset import ProblemSet, data_sets, load_problems
from megatron_coreward.data.parquet import Message, read_rows
from megatron_coreward.data.prompts import Tokenizer
from megatron_coreward.errors import HaltedError, InputError, RunError
from megatron_coreward.preflight import preflight, refuse_another_run
from megatron_coreward.rewards.equivalence import AnswerEquivalence
from megatron_coreward.rewards.methods import method_of
from megatron_coreward.telemetry import anchor_draws, label_history, timeline
from megatron_coreward.telemetry.console import RunView, open_view
from megatron_coreward.telemetry.label_history import LabelHistory
from megatron_coreward.telemetry.rollout_dump import ScoredGroup
from megatron_coreward.telemetry.sinks import open_sinks, require_trackers
from megatron_coreward.telemetry.timeline import Timeline
from megatron_coreward.telemetry.timing import PhaseTimer
from megatron_coreward.trainer import finish
from megatron_coreward.trainer.anchors import Anchors, draw_anchors
from megatron_coreward.trainer.checkpoints import CheckpointWriter
from megatron_coreward.trainer.collection import open_collection
from megatron_coreward.trainer.loop import Trainer
from megatron_coreward.trainer.online_rephrasing import Rewriting
from megatron_coreward.trainer.rollback import Collapsing, open_guard, roll_back
from megatron_coreward.trainer.rollout_log import RolloutLog, fingerprint_of
from megatron_coreward.trainer.run_directory import (
    OpenedRun,
    announce,
    interrupt_says_how_to_go_on,
    lock_run_directory,
    log_event,
    open_run_directory,
    resume_hint,
)
from megatron_coreward.trainer.validation import validation_metrics


@dataclass(frozen=True, slots=True)
class _Data:
    """What a run trains on and what it is validated on."""

    train: ProblemSet
    questions: Mapping[str, Sequence[Message]]  # of the training questions by uid, if a model is to rewrite them
    tokenizer: Tokenizer
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
        arch: what `preflight` returned, if it has been run; None: it is run first, unless the run is trained and only
            lacks what is written without devices.

    Returns:
        The run directory.

    Raises:
        InputError: before any process starts, if config, model or data cannot work; before the first step, if there are
            fewer anchor questions than guard.min_anchors.
        Preempted: the run was asked to stop; what it had done is saved.
        HaltedError: the guard has ended the run.
        RunError: the run cannot go on; the message names the cause and from where it would go on.
    """
    with StopSignals(config.faults.stop_signals) as stop, ExitStack() as stack:
        completes = finish.only_completes(config)
        if completes:
            refuse_another_run(config)
        else:
            arch = arch or preflight(config)
        stack.enter_context(lock_run_directory(config.run_dir))
        stack.enter_context(interrupt_says_how_to_go_on(config))
        require_trackers(config.model_dump(include={"telemetry"}))
        if completes:
            finish.complete(config, partial(announce, config))
            return config.run_dir
        assert arch is not None
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
                title=f"{method_title(config.method)} in {config.run_dir}",
                total_steps=config.steps,
                steps_done=opened.steps_done,
            )
        )
        for note in [
            *opened.notes,
            *data.notes(config),
            *warnings(config, arch),
            "starting Ray, actors and rollout engines",
        ]:
            view.note(note)
        attempt = _Attempt(config, data, opened, stop, view, stack)
        watchdog = Watchdog(config.watchdog, attempt.notify, stop, logs=config.run_dir / LOGS)
        running = stack.enter_context(processes(config, watchdog))
        state = opened.trainer_state
        calibrated = state is not None and state.canary_allowed == config.sync.max_logprob_gap
        canary_limit = state.canary_limit if state is not None and calibrated else None
        engines = open_rollout_engines(config, running, canary_tokens(data.train), attempt.notify, canary_limit)
        stack.callback(engines.close)
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
        config, method, state = self.config, method_of(self.config.method), self.opened.trainer_state
        equivalence = self._equivalence(config.rewards.equivalence, running)
        log = RolloutLog(
            config.run_dir,
            fingerprint_of(config),
            first_step=self.opened.steps_done + 1,
            keep=config.telemetry.dump_rollouts,
        )
        if log.num_recorded:
            self.view.note(f"the rollout log has the rollouts of {log.num_recorded} further steps")
        collection = open_collection(
            config,
            self.data.train,
            self._rewriting(engines),
            actors,
            engines,
            equivalence,
            log,
            self.opened.steps_done,
            None if state is None else state.questions,
        )
        labels = self._label_history(equivalence)
        busy = self.stack.enter_context(Timeline(config.run_dir / timeline.FILE_NAME, self._first_row()))

        def begun(phase: str | None) -> None:
            self.view.phase(phase)
            busy.phase(phase)

        def observe(step: int, scored: Sequence[ScoredGroup]) -> dict[str, float]:
            busy.write(step, engines.take_intervals())
            return labels.observe(step, scored) | collection.metrics(scored)

        return Trainer(
            config=config,
            needs=method.needs,
            actors=actors,
            collect=collection.collect,
            checkpoints=CheckpointWriter(
                config, actors, on_complete=log.covered, labels=labels.snapshot, last_step=self.opened.steps_done
            ),
            state=state or TrainerState(0, 0),
            guard=open_guard(config, state),
            stop=self.stop,
            validate=self._validation(engines, running),
            draw_anchors=self._anchors(engines, equivalence),
            observe=observe,
            questions=collection.questions,
            record=self._recorder(),
            new_timer=lambda: PhaseTimer(begun),
            notify=self.notify,
        )

    def _first_row(self) -> int:
        """The step whose row is written next."""
        state = self.opened.trainer_state
        return 0 if state is None else state.step + (state.unfinished_row is None)

    def _rewriting(self, engines: RolloutEngines) -> Rewriting | None:
        who = self.config.data.online_rephrasing
        return None if who == "off" else Rewriting(who, engines, self.data.tokenizer, self.data.questions)

    def _label_history(self, equivalence: AnswerEquivalence) -> LabelHistory:
        first_step = 0 if self.opened.trainer_state is None else self.opened.steps_done + 1
        path = self.config.run_dir / label_history.FILE_NAME
        return self.stack.enter_context(LabelHistory(path, equivalence.equivalent, first_step, equivalence.compare))

    def _anchors(
        self, engines: RolloutEngines, equivalence: AnswerEquivalence
    ) -> Callable[[int, int, PhaseTimer], dict[str, float]]:
        """Draws the anchor questions whenever it is time (`trainer.anchors`)."""
        config = self.config
        if config.guard.action == "off" or not config.guard.anchors:
            return lambda step, num_updates, timer: {}
        first_step, path = self._first_row(), config.run_dir / anchor_draws.FILE_NAME
        reads_labels = method_of(config.method).needs.ground_truth
        chosen = Anchors(path, self.data.train, config.guard, equivalence, first_step, only_right=reads_labels)
        self.stack.callback(chosen.close)
        if first_step > 0 and not chosen.chosen:
            self.notify(
                f"no anchor questions: {path} has none, and they are chosen before the first step (guard.anchors)"
            )

        def observe(step: int, num_updates: int, timer: PhaseTimer) -> dict[str, float]:
            if not chosen.due(step):
                return {}

            def ask() -> dict[str, float]:
                version = engines.sync_weights("policy", num_updates, timer)
                with timer.phase("anchors"):
                    return chosen.observe(step, partial(draw_anchors, config, engines, version))

            return engines.run(ask, timer)

        return observe

    def _recorder(self) -> Callable[[int, dict[str, float]], None]:
        """Writes the row of a step to every sink and shows it."""
        config = self.config
        sinks = self.stack.enter_context(
            open_sinks(
                config.run_dir,
                first_step=self._first_row(),
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
    data, needs, title = config.data, needs_of(config.method), method_title(config.method)
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
        problems = problems.with_ground_truth(data.missing_gold, problems.missing_in_training(title))
    held_out = []
    for file in data.val_files:
        found = load_problems([file], (), tokenizer, **limits)
        held_out.append((file, found.with_ground_truth(data.missing_gold, found.missing_in_validation(file))))
    limit = config.validation.max_problems
    online = data.online_rephrasing != "off"
    return _Data(
        problems.with_two_views() if online else problems,
        {row.uid: row.messages for file in data.train_files if online for row in read_rows(file, "original")},
        tokenizer,
        {name: part.first(limit) for name, part in data_sets(held_out).items()},
    )
