"""A training run from config to final model: what is built, in which order, and what is left in the run directory."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from megatron_coreward.actor.setup import ActorSetup
from megatron_coreward.checkpoint.convert import megatron_directory
from megatron_coreward.checkpoint.store import (
    ACTORS,
    checkpoint_path,
)
from megatron_coreward.config.architecture import Architecture
from megatron_coreward.config.schema import RunConfig
from megatron_coreward.data.dataset import ProblemSet, load_problems
from megatron_coreward.data.sampler import BatchSampler
from megatron_coreward.errors import HaltedError, InputError, RunError
from megatron_coreward.guard import Guard
from megatron_coreward.report.report import write_report
from megatron_coreward.rewards.equivalence import Judge
from megatron_coreward.rewards.methods import METHODS
from megatron_coreward.rollout import leftovers
from megatron_coreward.telemetry import label_history
from megatron_coreward.telemetry.console import open_view
from megatron_coreward.telemetry.sinks import open_sinks, require_wandb
from megatron_coreward.telemetry.timing import PhaseTimer
from megatron_coreward.trainer.checkpoints import CheckpointWriter
from megatron_coreward.trainer.claim import Start, claim_run_dir, log_event, resume_hint, sole_use
from megatron_coreward.trainer.cluster import ActorGroup, EngineGroup, start_ray
from megatron_coreward.trainer.evaluate import evaluate
from megatron_coreward.trainer.journal import RolloutJournal, fingerprint_of
from megatron_coreward.trainer.loop import Trainer
from megatron_coreward.trainer.placement import Demand, Reservation
from megatron_coreward.trainer.preemption import Preempted, StopRequest, StopSignals
from megatron_coreward.trainer.preflight import preflight
from megatron_coreward.trainer.recovery import EngineRecovery
from megatron_coreward.trainer.rollback import Collapsing, count_rollbacks, roll_back
from megatron_coreward.trainer.session import UNFINISHED, Session
from megatron_coreward.trainer.sync import PROBE_TOKENS, open_sync, weight_version
from megatron_coreward.trainer.turns import no_turns, open_turns
from megatron_coreward.trainer.watchdog import Watchdog, WorkerDied
from megatron_coreward.weights import segment
from megatron_coreward.weights.route import Transport, choose_transport

LOGS = "logs"  # in the run directory: what the processes print


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
        stack.enter_context(sole_use(config.run_dir))
        if config.telemetry.wandb_project is not None:
            require_wandb(config.telemetry.wandb_project)
        tokenizer = AutoTokenizer.from_pretrained(config.model.hf_path)
        problems, held_out = _load_data(config, tokenizer)
        restarts = config.faults.max_restarts
        notes: list[str] = []
        before: Exception | None = None  # what ended the attempt before
        while True:
            start = claim_run_dir(config, notes)
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
    start: Start,
    stop: StopRequest,
) -> None:
    """One attempt, from the start of the processes to the final model."""
    sampler = BatchSampler(problems, config.data.batch_size, config.seed, config.data.shuffle)
    position, steps_done = start.position, start.position.step if start.position else 0
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

        def tell(text: str) -> None:
            view.note(text)
            log_event(config, text)

        watchdog = Watchdog(config.watchdog, tell, stop, logs=config.run_dir / LOGS)
        actors, engines, transport = stack.enter_context(processes(config, watchdog))
        judge = stack.enter_context(Judge(config.rewards.equivalence, config.rewards.judge_timeout_s))
        right = stack.enter_context(
            Judge(config.validation.equivalence or config.rewards.equivalence, config.rewards.judge_timeout_s)
        )
        turns = open_turns(config.rollout.placement, actors, engines, engines.slept)
        receiving = engines if turns is None else turns.engines
        sync = open_sync(
            config, arch, transport, actors, receiving, partial(watchdog.get, awaited="a bucket of weights")
        )
        if turns is not None:
            turns.published = sync
            sync.open("policy")  # buckets take memory on the GPU, which the first turn has to know of
        tell("actors compute with " + ", ".join(f"{what}: {how}" for what, how in actors.describe().items()))
        journal = RolloutJournal(
            config.run_dir, fingerprint_of(config), first_step=steps_done + 1, keep=config.telemetry.dump_rollouts
        )
        run = Trainer(
            config=config,
            method=METHODS[config.method],
            actors=actors,
            engines=engines,
            sync=sync,
            judge=judge,
            problems_of=sampler.batch,
            guard=Guard(config.guard, rollbacks=count_rollbacks(config.run_dir)),
            journal=journal,
            engines_turn=turns or no_turns,
            surviving=EngineRecovery(engines, sync, config.faults.engine_restarts, tell),
        )
        sinks = stack.enter_context(
            open_sinks(
                config.run_dir,
                first_step=0 if position is None else steps_done + (UNFINISHED not in position.extra),
                wandb_project=config.telemetry.wandb_project,
                config=config.model_dump(mode="json"),
            )
        )
        labels = stack.enter_context(
            label_history.LabelHistory(
                config.run_dir / label_history.FILE_NAME,
                judge.equivalent,
                first_step=0 if position is None else steps_done + 1,
            )
        )

        def record(step: int, metrics: dict[str, float]) -> None:
            sinks.write(step, metrics)
            view.write(step, metrics)

        session = Session(
            config=config,
            run=run,
            checkpoints=CheckpointWriter(config, actors, journal.covered, labels.snapshot),
            stop=stop,
            validate=(lambda timer: _validate(run, held_out, right, timer)) if held_out else None,
            observe=lambda step, judged: (
                labels.observe(step, judged) | ({} if config.rollout.lag else engines.take_sampling_metrics())
            ),
            record=record,
            new_timer=lambda: PhaseTimer(view.phase),
            tell=tell,
        )
        if position is None:
            session.validate_at_start()
        else:
            actors.load((checkpoint_path(config.run_dir, position.step) / ACTORS).resolve())
            session.resume(position)
            view.note(f"resumed after step {position.step}")
        if journal.num_recorded:
            view.note(f"the journal has the rollouts of {journal.num_recorded} further steps")
        session.train()
        view.note("writing the final model")
        actors.export_hf("policy", (config.run_dir / "hf").resolve())
        _write_report(config, tell)


def _write_report(config: RunConfig, tell: Callable[[str], None]) -> None:
    """The run's page. All that it shows is kept beside it: an error here is told, and takes no finished run away."""
    try:
        write_report(config.run_dir)
    except Exception as error:
        again = f"`megatron-coreward report {config.run_dir}` tries again"
        tell(f"report.html was not written: {type(error).__name__}: {error}; {again}")


def _validate(run: Trainer, held_out: Mapping[str, ProblemSet], judge: Judge, timer: PhaseTimer) -> dict[str, float]:
    with run.engines_turn(timer):
        run.schedule.publish("policy", run.num_updates, timer)
        with timer.phase("validation"):
            return evaluate(
                run.engines,
                held_out,
                run.config.validation,
                judge,
                max_tokens=run.config.rollout.max_response_tokens,
                version=weight_version("policy", run.num_updates),
                seed=run.config.seed,
                answer_forms=run.config.rewards.answer_forms,
            )


@contextmanager
def processes(
    config: RunConfig, watchdog: Watchdog | None = None
) -> Iterator[tuple[ActorGroup, EngineGroup, Transport]]:
    """The actors and engines of a run, and how weights travel between them; started side by side, ended in any case.

    After an error nobody waits for them: they may hang in a collective whose partner is gone, or in rollouts.
    """
    start_ray(config.watchdog.start_limit_s)
    watchdog = watchdog or Watchdog(config.watchdog, logs=config.run_dir / LOGS)
    colocated = config.rollout.placement == "colocated"
    demand = Demand(
        ranks=config.actor.world_size,
        rank_group=config.actor.tensor_parallel,
        engines=config.rollout.num_engines,
        engine_size=config.rollout.tensor_parallel,
        colocated=colocated,
    )
    max_sequence = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    with ExitStack() as stack:
        reservation = stack.enter_context(Reservation(demand, config.watchdog.start_limit_s))
        transport = choose_transport(
            config.sync.transport,
            gpus=reservation.on_gpus,
            colocated=colocated,
            num_hosts=reservation.num_hosts,
        )

        def start_actors() -> ActorGroup:
            actors = ActorGroup(actor_setup(config, max_sequence), reservation, watchdog)
            stack.push(partial(_leave, actors))
            return actors

        actors = None if colocated else start_actors()
        engines = EngineGroup(
            config.model.hf_path.resolve(),
            config.rollout,
            reservation,
            config.model.dtype,
            max(max_sequence, PROBE_TOKENS + 1),
            config.seed,
            transport=transport,
            watchdog=watchdog,
        )
        stack.push(partial(_leave, engines))
        if actors is None:  # an engine plans its memory by what is free when it starts; actors come when it is asleep
            engines.wait()
            engines.sleep()
            actors = start_actors()
        actors.wait()
        engines.wait()
        yield actors, engines, transport


def _leave(group: ActorGroup | EngineGroup, kind: object, error: object, trace: object) -> None:
    if kind is None:
        group.shutdown()
    else:
        group.shutdown(patience_s=0.5)
        for _ in range(5):  # those who were killed need a moment to be gone, and hold their segments until then
            segment.remove_leftovers()
            leftovers.remove_leftovers()
            time.sleep(0.2)


def actor_setup(config: RunConfig, max_sequence: int) -> ActorSetup:
    """What the ranks of a run are built from."""
    return ActorSetup(
        settings=config.actor,
        loss=config.loss,
        hf_path=config.model.hf_path.resolve(),
        megatron_path=config.model.megatron_path and megatron_directory(config.model.megatron_path).resolve(),
        dtype=config.model.dtype,
        temperature=config.rollout.temperature,
        max_sequence_length=max_sequence,
        total_updates=config.steps * config.loss.updates_per_batch,
        seed=config.seed,
        teacher=METHODS[config.method].needs.teacher,
        frozen_reference=bool(config.loss.kl_coef) and config.loss.kl_reference == "frozen",
        skip_bad_gradients=config.faults.bad_gradient == "skip",
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
    if needs.gold:
        problems = problems.with_gold(data.missing_gold, f"data.train_files: method {config.method}")
    held_out = []
    for file in data.val_files:
        found = load_problems([file], (), tokenizer, **limits)
        found = found.with_gold(data.missing_gold, f"data.val_files: {file}: validation")
        held_out += [(source, file, part) for source, part in found.by_source().items()]
    sources = Counter(source for source, _, _ in held_out)
    limit = config.validation.max_problems
    return problems, {
        source if sources[source] == 1 else f"{source}/{file.stem}": part.first(limit)
        for source, file, part in held_out
    }
