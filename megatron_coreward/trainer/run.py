"""A training run from config to final model: what is built, in which order, and what is left in the run directory."""

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import ray
from transformers import AutoTokenizer

from megatron_coreward.actor.setup import ActorSetup
from megatron_coreward.checkpoint.convert import megatron_directory
from megatron_coreward.checkpoint.store import Position, load_checkpoint, save_checkpoint, saved_steps
from megatron_coreward.config.load import dump_config
from megatron_coreward.config.schema import RunConfig
from megatron_coreward.config.validate import validate
from megatron_coreward.data.dataset import ProblemSet, load_problems
from megatron_coreward.data.sampler import BatchSampler
from megatron_coreward.errors import InputError
from megatron_coreward.rewards.equivalence import Judge
from megatron_coreward.rewards.methods import METHODS
from megatron_coreward.telemetry import label_history
from megatron_coreward.telemetry.console import open_view
from megatron_coreward.telemetry.rollout_dump import discard_rollouts, dump_rollouts
from megatron_coreward.telemetry.sinks import open_sinks, require_wandb
from megatron_coreward.telemetry.timing import PhaseTimer
from megatron_coreward.trainer.cluster import ActorGroup, EngineGroup, resolve_transport, start_ray
from megatron_coreward.trainer.evaluate import Accuracy, evaluate
from megatron_coreward.trainer.loop import Trainer
from megatron_coreward.trainer.sync import open_sync, weight_version
from megatron_coreward.weights.route import Transport


def train(config: RunConfig) -> Path:
    """Runs `config.steps` steps (those that an earlier attempt did not do) and writes the final model.

    Returns:
        The run directory.

    Raises:
        InputError: before any process starts, if config, model or data cannot work.
    """
    arch = validate(config)
    if config.telemetry.wandb_project is not None:
        require_wandb(config.telemetry.wandb_project)
    tokenizer = AutoTokenizer.from_pretrained(config.model.hf_path)
    problems, held_out = _load_data(config, tokenizer)
    sampler = BatchSampler(problems, config.data.batch_size, config.seed, config.data.shuffle)
    done = _claim_run_dir(config)

    with ExitStack() as stack:
        view = stack.enter_context(
            open_view(
                config.telemetry.console,
                title=f"{config.method} in {config.run_dir}",
                total_steps=config.steps,
                steps_done=done or 0,
            )
        )
        view.note("starting Ray, actors and rollout engines")
        actors, engines, transport = stack.enter_context(processes(config))
        judge = stack.enter_context(Judge(config.rewards.equivalence, config.rewards.judge_timeout_s))
        run = Trainer(
            config=config,
            method=METHODS[config.method],
            actors=actors,
            engines=engines,
            sync=open_sync(config, arch, transport, actors, engines, ray.get),
            judge=judge,
            problems_of=sampler.batch,
        )
        first = 1
        if done is not None:
            position = load_checkpoint(config.run_dir, done, actors.load)
            run.num_updates, first = position.num_updates, position.step + 1
            discard_rollouts(config.run_dir, first)
            view.note(f"resumed after step {position.step}")
        sinks = stack.enter_context(
            open_sinks(
                config.run_dir,
                first_step=0 if done is None else first,
                wandb_project=config.telemetry.wandb_project,
                config=config.model_dump(mode="json"),
            )
        )

        labels = stack.enter_context(
            label_history.LabelHistory(
                config.run_dir / label_history.FILE_NAME, judge.equivalent, first_step=0 if done is None else first
            )
        )

        def record(step: int, metrics: dict[str, float]) -> None:
            sinks.write(step, metrics)
            view.write(step, metrics)

        if held_out is not None and done is None and config.validation.at_start:
            timer = PhaseTimer(view.phase)
            accuracy = _validate(run, held_out, timer)
            record(0, accuracy.metrics() | timer.metrics())
        for step in range(first, config.steps + 1):
            timer = PhaseTimer(view.phase)
            result = run.step(step, timer)
            result.metrics.update(labels.observe(step, result.judged))
            if config.telemetry.dump_rollouts:
                dump_rollouts(config.run_dir, step, result.judged)
            if held_out is not None and _due(step, config.validation.every, config.steps):
                result.metrics.update(_validate(run, held_out, timer).metrics())
            if _due(step, config.checkpoint.every, config.steps):
                with timer.phase("checkpoint"):
                    position = Position(step, run.num_updates)
                    save_checkpoint(config.run_dir, position, actors.save, config.checkpoint.keep)
            record(step, result.metrics | timer.metrics())
        view.note("writing the final model")
        actors.export_hf("policy", (config.run_dir / "hf").resolve())
    return config.run_dir


def _due(step: int, every: int, last: int) -> bool:
    return step == last or (every > 0 and step % every == 0)


def _validate(run: Trainer, held_out: ProblemSet, timer: PhaseTimer) -> Accuracy:
    run.publish("policy", timer)
    with timer.phase("validation"):
        return evaluate(
            run.engines,
            held_out,
            run.config.validation,
            run.judge,
            max_tokens=run.config.rollout.max_response_tokens,
            version=weight_version("policy", run.num_updates),
            seed=run.config.seed,
        )


@contextmanager
def processes(config: RunConfig) -> Iterator[tuple[ActorGroup, EngineGroup, Transport]]:
    """The actors and engines of a run, and how weights travel between them; started side by side, ended in any case."""
    start_ray()
    transport = resolve_transport(config.sync.transport)
    max_sequence = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    with ExitStack() as stack:
        actors = ActorGroup(actor_setup(config, max_sequence))
        stack.callback(actors.shutdown)
        engines = EngineGroup(
            config.model.hf_path.resolve(),
            config.rollout,
            config.model.dtype,
            max_sequence + 1,
            config.seed,
            transport=transport,
        )
        stack.callback(engines.shutdown)
        actors.wait()
        engines.wait()
        yield actors, engines, transport


def actor_setup(config: RunConfig, max_sequence: int) -> ActorSetup:
    """What the ranks of a run are built from."""
    kl_coef = config.loss.kl_coef or 0.0
    return ActorSetup(
        settings=config.actor,
        loss=config.loss,
        kl_coef=kl_coef,
        hf_path=config.model.hf_path.resolve(),
        megatron_path=config.model.megatron_path and megatron_directory(config.model.megatron_path).resolve(),
        dtype=config.model.dtype,
        temperature=config.rollout.temperature,
        max_sequence_length=max_sequence,
        total_updates=config.steps * config.loss.updates_per_batch,
        seed=config.seed,
        teacher=METHODS[config.method].needs.teacher,
        frozen_reference=kl_coef > 0 and config.loss.kl_reference == "frozen",
    )


def _load_data(config: RunConfig, tokenizer: Any) -> tuple[ProblemSet, ProblemSet | None]:
    data, needs = config.data, METHODS[config.method].needs
    limits: dict[str, Any] = {
        "system_prompt": data.system_prompt,
        "max_prompt_tokens": data.max_prompt_tokens,
        "over_length": data.over_length,
    }
    rephrased = data.rephrased_files if "rephrased" in needs.views else ()
    problems = load_problems(data.train_files, rephrased, tokenizer, **limits)
    if needs.gold and problems.num_without_gold:
        raise InputError(
            f"data.train_files: method {config.method} needs reward_model.ground_truth, and "
            f"{problems.num_without_gold} of {len(problems)} questions have none"
        )
    if not data.val_files:
        return problems, None
    held_out = load_problems(data.val_files, (), tokenizer, **limits)
    if held_out.num_without_gold:
        raise InputError(f"data.val_files: {held_out.num_without_gold} questions have no reward_model.ground_truth")
    limit = config.validation.max_problems
    if limit is not None and limit < len(held_out):
        held_out = ProblemSet(held_out[:limit], held_out.num_dropped, 0, held_out.longest_prompt)
    return problems, held_out


def _claim_run_dir(config: RunConfig) -> int | None:
    """Writes the resolved config; returns the newest checkpoint's step if the run goes on from one.

    Raises:
        InputError: the directory holds a run that must not be overwritten, or one of another config.
    """
    run_dir = config.run_dir
    saved = saved_steps(run_dir)
    if saved and config.checkpoint.resume == "never":
        raise InputError(f"run_dir: {run_dir} holds checkpoints and checkpoint.resume is never; choose another run_dir")
    if saved and saved[-1] >= config.steps:
        raise InputError(
            f"run_dir: the run in {run_dir} has done its {saved[-1]} steps; raise steps or choose another run_dir"
        )
    run_dir.mkdir(parents=True, exist_ok=True)
    partial = run_dir / ".config.yaml.partial"
    partial.write_text(dump_config(config))
    os.replace(partial, run_dir / "config.yaml")
    if not saved:
        shutil.rmtree(run_dir / "tensorboard", ignore_errors=True)
        discard_rollouts(run_dir, 0)
        return None
    return saved[-1]
