"""A training run from config to final model: what is built, in which order, and what is left in the run directory."""

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from megatron_coreward.checkpoint.store import (
    ACTORS,
    checkpoint_path,
)
from megatron_coreward.cluster.colocation import no_handoff, open_colocation
from megatron_coreward.cluster.engine_recovery import EngineRecovery
from megatron_coreward.cluster.groups import start_ray
from megatron_coreward.cluster.preemption import Preempted, StopRequest, StopSignals
from megatron_coreward.cluster.processes import LOGS, processes
from megatron_coreward.cluster.watchdog import Watchdog, WorkerDied
from megatron_coreward.cluster.weight_sync import CANARY_TOKENS, canary_tokens, open_sync
from megatron_coreward.config.architecture import Architecture
from megatron_coreward.config.schema import RunConfig
from megatron_coreward.data.dataset import ProblemSet, load_problems
from megatron_coreward.data.sampler import BatchSampler
from megatron_coreward.errors import HaltedError, InputError, RunError
from megatron_coreward.guard import Guard
from megatron_coreward.preflight import preflight
from megatron_coreward.report.report import write_report
from megatron_coreward.rewards.equivalence import AnswerEquivalence
from megatron_coreward.rewards.methods import METHODS
from megatron_coreward.telemetry import label_history
from megatron_coreward.telemetry.console import open_view
from megatron_coreward.telemetry.sinks import open_sinks, require_wandb
from megatron_coreward.telemetry.timing import PhaseTimer
from megatron_coreward.trainer.checkpoints import CheckpointWriter
from megatron_coreward.trainer.loop import Trainer
from megatron_coreward.trainer.rollback import Collapsing, count_rollbacks, roll_back
from megatron_coreward.trainer.rollout_log import RolloutLog, fingerprint_of
from megatron_coreward.trainer.run_directory import (
    OpenedRun,
    lock_run_directory,
    log_event,
    open_run_directory,
    resume_hint,
)
from megatron_coreward.trainer.session import UNFINISHED, Session
from megatron_coreward.trainer.validation import evaluate
from megatron_coreward.types import WeightVersion


def train(config: RunConfig) -> Path:
    """Runs `config.steps` steps (those that an earlier attempt did not do) and writes the final model.

    Returns:
        The run directory.

    Raises:
        InputError: before any process starts, if config, model or data cannot work.
        Preempted: the run was asked to stop; what it had done is saved.
        HaltedError: the guard has ended the run.
        RunError: the run cannot go on; the message names the cause and from where it would go on.
    """
    with StopSignals(config.faults.stop_signals) as stop, ExitStack() as stack:
        arch = preflight(config)
        stack.enter_context(lock_run_directory(config.run_dir))
        if config.telemetry.wandb_project is not None:
            require_wandb(config.telemetry.wandb_project)
        tokenizer = AutoTokenizer.from_pretrained(config.model.hf_path)
        problems, held_out = _load_data(config, tokenizer)
        restarts = config.faults.max_restarts
        notes: list[str] = []
        before: Exception | None = None  # what ended the attempt before
        while True:
            start = open_run_directory(config, notes)
            start_ray(config.watchdog.start_limit_s)
            stop.take()
            try:
                _run(config, arch, problems, held_out, start, stop)
                return config.run_dir
            except Preempted as request:
                raise Preempted(f"{request}; {resume_hint(config)}") from None
            except WorkerDied as death:
                if restarts == 0:
                    raise RunError(f"{death}; {resume_hint(config)}") from death
                restarts -= 1
                before = death
                notes = [f"{death}; all processes are started anew (faults.max_restarts: {restarts} left)"]
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
                raise RunError(f"{before}; started anew: {error}; {resume_hint(config)}") from error
            except Exception as error:
                error.add_note(resume_hint(config))
                raise


def _run(
    config: RunConfig,
    arch: Architecture,
    problems: ProblemSet,
    held_out: Mapping[str, ProblemSet],
    start: OpenedRun,
    stop: StopRequest,
) -> None:
    """One attempt, from the start of the processes to the final model."""
    sampler = BatchSampler(problems, config.data.batch_size, config.seed, config.data.shuffle)
    trainer_state, steps_done = start.trainer_state, start.trainer_state.step if start.trainer_state else 0
    with ExitStack() as stack:
        view = stack.enter_context(
            open_view(
                config.telemetry.console,
                title=f"{config.method} in {config.run_dir}",
                total_steps=config.steps,
                steps_done=steps_done,
            )
        )
        for note in start.notes:
            view.note(note)
        for what, some in (("training", problems), *((f"validation ({n})", part) for n, part in held_out.items())):
            for count, why in (
                (some.num_dropped, f"are longer than data.max_prompt_tokens ({config.data.max_prompt_tokens})"),
                (some.num_unpaired, "have no rephrasing, or are rephrasings without a question"),
                (some.num_unanswered, "have no ground truth"),
            ):
                if count:
                    view.note(f"{count} {what} questions {why} and are left out; {len(some)} are used")
        view.note("starting Ray, actors and rollout engines")

        def notify(text: str) -> None:
            view.note(text)
            log_event(config, text)

        watchdog = Watchdog(config.watchdog, notify, stop, logs=config.run_dir / LOGS)
        actors, engines, transport = stack.enter_context(processes(config, watchdog))
        equivalence = stack.enter_context(
            AnswerEquivalence(config.rewards.equivalence, config.rewards.comparison_timeout_s)
        )
        validation_equivalence = stack.enter_context(
            AnswerEquivalence(
                config.validation.equivalence or config.rewards.equivalence, config.rewards.comparison_timeout_s
            )
        )
        colocation = open_colocation(config.rollout.placement, actors, engines, engines.slept)
        receiving = engines if colocation is None else colocation.engines
        canary = canary_tokens([problem.prompts["original"].token_ids for problem in problems[:CANARY_TOKENS]])
        sync = open_sync(config, transport, actors, receiving, partial(watchdog.get, awaited="weights"), canary)
        if colocation is not None:
            colocation.published = sync
            sync.open()  # buckets take memory on the GPU, which the first turn has to know of
        notify("actors compute with " + ", ".join(f"{what}: {how}" for what, how in actors.describe().items()))
        rollout_log = RolloutLog(
            config.run_dir, fingerprint_of(config), first_step=steps_done + 1, keep=config.telemetry.dump_rollouts
        )
        run = Trainer(
            config=config,
            method=METHODS[config.method],
            actors=actors,
            engines=engines,
            sync=sync,
            equivalence=equivalence,
            problems_of=sampler.batch,
            guard=Guard(config.guard, rollbacks=count_rollbacks(config.run_dir)),
            rollout_log=rollout_log,
            gpu_handoff=colocation or no_handoff,
            with_recovery=EngineRecovery(engines, sync, config.faults.engine_restarts, notify),
        )
        sinks = stack.enter_context(
            open_sinks(
                config.run_dir,
                first_step=0 if trainer_state is None else steps_done + (UNFINISHED not in trainer_state.extra),
                wandb_project=config.telemetry.wandb_project,
                config=config.model_dump(mode="json"),
            )
        )
        labels = stack.enter_context(
            label_history.LabelHistory(
                config.run_dir / label_history.FILE_NAME,
                equivalence.equivalent,
                first_step=0 if trainer_state is None else steps_done + 1,
            )
        )

        def record(step: int, metrics: dict[str, float]) -> None:
            sinks.write(step, metrics)
            view.write(step, metrics)

        session = Session(
            config=config,
            run=run,
            checkpoints=CheckpointWriter(config, actors, rollout_log.covered, labels.snapshot),
            stop=stop,
            validate=(lambda timer: _validate(run, held_out, validation_equivalence, timer)) if held_out else None,
            observe=lambda step, scored: (
                labels.observe(step, scored) | ({} if config.rollout.max_staleness else engines.take_sampling_metrics())
            ),
            record=record,
            new_timer=lambda: PhaseTimer(view.phase),
            notify=notify,
        )
        if trainer_state is None:
            session.validate_at_start()
        else:
            actors.load((checkpoint_path(config.run_dir, trainer_state.step) / ACTORS).resolve())
            session.resume(trainer_state)
            view.note(f"resumed after step {trainer_state.step}")
        if rollout_log.num_recorded:
            view.note(f"the journal has the rollouts of {rollout_log.num_recorded} further steps")
        session.train()
        view.note("writing the final model")
        actors.export_hf("policy", (config.run_dir / "hf").resolve())
        _write_report(config, notify)


def _write_report(config: RunConfig, notify: Callable[[str], None]) -> None:
    """The run's page. All that it shows is kept beside it: an error here is told, and takes no finished run away."""
    try:
        write_report(config.run_dir)
    except Exception as error:
        again = f"`megatron-coreward report {config.run_dir}` tries again"
        notify(f"report.html was not written: {type(error).__name__}: {error}; {again}")


def _validate(
    run: Trainer, held_out: Mapping[str, ProblemSet], equivalence: AnswerEquivalence, timer: PhaseTimer
) -> dict[str, float]:
    with run.gpu_handoff(timer):
        run.schedule.sync_weights("policy", run.num_updates, timer)
        with timer.phase("validation"):
            return evaluate(
                run.engines,
                held_out,
                run.config.validation,
                equivalence,
                max_tokens=run.config.rollout.max_response_tokens,
                version=WeightVersion("policy", run.num_updates).number,
                seed=run.config.seed,
                answer_formats=run.config.rewards.answer_formats,
            )


def _load_data(config: RunConfig, tokenizer: Any) -> tuple[ProblemSet, dict[str, ProblemSet]]:
    """The questions to train on, and those to validate on: a set for each source, by its name, which two files of one
    source have with their own name behind it."""
    data, needs = config.data, METHODS[config.method].needs
    limits: dict[str, Any] = {
        "system_prompt": data.system_prompt,
        "max_prompt_tokens": data.max_prompt_tokens,
        "over_length": data.over_length,
        "unpaired": data.unpaired,
        "thinking": data.thinking,
    }
    rephrased = data.rephrased_files if "rephrased" in needs.all_views else ()
    problems = load_problems(data.train_files, rephrased, tokenizer, **limits)
    if needs.ground_truth:
        problems = problems.with_ground_truth(data.missing_gold, f"data.train_files: method {config.method}")
    held_out = []
    for file in data.val_files:
        found = load_problems([file], (), tokenizer, **limits)
        found = found.with_ground_truth(data.missing_gold, f"data.val_files: {file}: validation")
        held_out += [(source, file, part) for source, part in found.by_source().items()]
    sources = Counter(source for source, _, _ in held_out)
    limit = config.validation.max_problems
    return problems, {
        source if sources[source] == 1 else f"{source}/{file.stem}": part.first(limit)
        for source, file, part in held_out
    }
