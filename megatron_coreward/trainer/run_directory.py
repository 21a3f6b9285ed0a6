"""Taking a run directory: who trains in it, from which checkpoint an attempt goes on, and how to go on after it."""

import datetime
import fcntl
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_coreward.checkpoint.inputs import refused_inputs, replaced_inputs
from megatron_coreward.checkpoint.store import (
    DamagedCheckpoint,
    TrainerState,
    check_checkpoint,
    checkpoint_path,
    discard_unfinished,
    saved_steps,
    set_aside,
)
from megatron_coreward.config.load import dump_config
from megatron_coreward.config.schema import RunConfig
from megatron_coreward.errors import InputError
from megatron_coreward.telemetry import label_history
from megatron_coreward.telemetry.files import replaced_whole, writing
from megatron_coreward.telemetry.rollout_dump import discard_rollouts
from megatron_coreward.telemetry.untrusted_text import printable, say
from megatron_coreward.trainer.finish import final_model_is_whole

LOCK = "lock"  # in the run directory: of the process that trains in it


@contextmanager
def lock_run_directory(run_dir: Path, patience_s: float = 10.0) -> Iterator[None]:
    """Keeps other processes from training in the directory meanwhile.

    Raises:
        InputError: another process does, and still does after a moment in which one that was killed would be gone.
    """
    with writing(run_dir / LOCK):
        run_dir.mkdir(parents=True, exist_ok=True)
        file = os.open(run_dir / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    deadline = time.monotonic() + patience_s
    try:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    who = os.pread(file, 200, 0).decode(errors="replace") or "another process"
                    raise InputError(f"run_dir: {who} trains in {run_dir}; choose another run_dir") from None
                time.sleep(0.2)
            except OSError:  # a file system without locks
                break
        with suppress(OSError):  # a full disk: then others do not learn who it is
            os.ftruncate(file, 0)
            os.pwrite(file, f"process {os.getpid()} on {os.uname().nodename}".encode(), 0)
        yield
    finally:
        os.close(file)


def remove_leftovers(run_dir: Path) -> None:
    """Removes what writers that were killed have left half-written: nobody else writes here (`lock_run_directory`)."""
    for folder in (run_dir, run_dir / "rollouts"):
        for path in folder.glob(".*.tmp"):
            path.unlink(missing_ok=True)
    for name in (".hf.partial", ".hf.removed"):
        shutil.rmtree(run_dir / name, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class OpenedRun:
    """From where an attempt goes on."""

    trainer_state: TrainerState | None  # None: from the beginning
    notes: list[str]

    @property
    def steps_done(self) -> int:
        return 0 if self.trainer_state is None else self.trainer_state.step


def open_run_directory(config: RunConfig, news: Sequence[str] = ()) -> OpenedRun:
    """Finds the newest checkpoint that is whole, sets damaged ones aside, and writes the resolved config.

    Args:
        news: what ended the attempt before this one.

    Raises:
        InputError: the directory holds a run that must not be overwritten, or only damaged checkpoints.
    """
    run_dir, settings = config.run_dir, config.checkpoint
    saved = saved_steps(run_dir)
    for note in news:
        log_event(config, note)
    if saved and settings.resume == "never" and not news:  # this run's own, of an attempt before
        raise InputError(f"run_dir: {run_dir} holds checkpoints and checkpoint.resume is never; choose another run_dir")
    if saved and saved[-1] >= config.steps and final_model_is_whole(run_dir):
        raise InputError(
            f"run_dir: the run in {run_dir} has done its {saved[-1]} steps; raise steps or choose another run_dir"
        )
    notes: list[str] = []
    trainer_state = _newest_whole_checkpoint(config, saved, notes)
    discard_unfinished(run_dir)
    remove_leftovers(run_dir)
    if trainer_state is not None:
        notes += _changes_since(trainer_state.step, config)
    done = trainer_state.step if trainer_state is not None else 0
    if (run_dir / "hf").exists() and done < config.steps:  # of a run that was shorter
        aside = run_dir / f"hf_step_{done:06d}"
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(run_dir / "hf", aside)
        notes.append(f"the model of the shorter run is now {aside.name}")
    run_dir.mkdir(parents=True, exist_ok=True)
    with writing(run_dir / "config.yaml"), replaced_whole(run_dir / "config.yaml") as temporary:
        temporary.write_text(dump_config(config))
    if trainer_state is None:
        shutil.rmtree(run_dir / "tensorboard", ignore_errors=True)
        if settings.resume == "never":
            discard_rollouts(run_dir, 0)
    elif not (run_dir / label_history.FILE_NAME).exists():
        _restore_labels(config, trainer_state)
    for note in notes:
        log_event(config, note)
    return OpenedRun(trainer_state, [*news, *notes])


def _newest_whole_checkpoint(config: RunConfig, saved: Sequence[int], notes: list[str]) -> TrainerState | None:
    """The state of the newest checkpoint that is whole; newer ones are set aside, each with a note."""
    run_dir, damaged = config.run_dir, dict[int, DamagedCheckpoint]()
    trainer_state = None
    for step in reversed(saved):
        try:
            contents = config.checkpoint.verify == "full"
            trainer_state = check_checkpoint(checkpoint_path(run_dir, step), contents=contents)
            break
        except DamagedCheckpoint as error:
            damaged[step] = error
    if saved and trainer_state is None:
        raise InputError(
            "\n".join([f"run_dir: {run_dir} has no checkpoint that is whole", *map(str, damaged.values())])
        )
    for step, reason in damaged.items():
        aside = set_aside(checkpoint_path(run_dir, step))
        notes.append(f"damaged checkpoint, set aside as {aside.name}: {reason}")
    return trainer_state


def _changes_since(step: int, config: RunConfig) -> Iterator[str]:
    """What differs from what the checkpoint of a step was made with; InputError for what may not differ."""
    checkpoint = checkpoint_path(config.run_dir, step)
    if changed := changed_keys(checkpoint / "config.yaml", config):
        yield f"the checkpoint of step {step} was made with other settings: {', '.join(changed)}"
    if refused := refused_inputs(checkpoint, config):
        raise InputError("\n".join(refused))
    if replaced := replaced_inputs(checkpoint, config):
        yield f"files were replaced since the checkpoint of step {step}: {', '.join(replaced)}"


def changed_keys(saved: Path, config: RunConfig) -> list[str]:
    """`actor.lr (0.1, now 0.2)` for every setting of a saved configuration that is another one now."""

    def flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
        for key, value in tree.items():
            if isinstance(value, dict):
                yield from flat(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}", value

    before = dict(flat(yaml.safe_load(saved.read_text()))) if saved.is_file() else {}
    now = dict(flat(config.model_dump(mode="json")))
    return [f"{key} ({before[key]}, now {now[key]})" for key in now if key in before and before[key] != now[key]]


def _restore_labels(config: RunConfig, trainer_state: TrainerState) -> None:
    kept = checkpoint_path(config.run_dir, trainer_state.step) / label_history.FILE_NAME
    if kept.is_file():
        shutil.copyfile(kept, config.run_dir / label_history.FILE_NAME)


def log_event(config: RunConfig, text: str) -> None:
    """What happened to the run stays in its directory too, whatever the console shows, as far as the disk takes it."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    with suppress(OSError), (config.run_dir / "events.log").open("a", errors="backslashreplace") as file:
        file.write(f"{now} {printable(text)}\n")


def announce(config: RunConfig, text: str) -> None:
    """A line for people outside of an attempt, which has a view for that; it goes to `events.log` too."""
    if config.telemetry.console != "off":
        with suppress(OSError):
            say(text)
    log_event(config, text)


def resume_hint(config: RunConfig) -> str:
    """How to go on, in words."""
    saved = saved_steps(config.run_dir)
    where = f"goes on after step {saved[-1]}" if saved else "starts from the beginning (no checkpoint yet)"
    if config.checkpoint.resume == "never":
        return f"with checkpoint.resume=auto the same command {where}"
    return f"the same command {where}, in {config.run_dir}"


@contextmanager
def interrupt_says_how_to_go_on(config: RunConfig) -> Iterator[None]:
    """Ctrl-C ends a run at once; the message says from where the same command goes on."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        interrupt.add_note(resume_hint(config))
        raise
