"""The checkpoints of a run directory: each appears whole or not at all, damage is found, old ones go.

checkpoints/step_000010/megatron/        distributed checkpoint of the actors
checkpoints/step_000010/trainer.json     the run's step, its score, and the states of other parts
checkpoints/step_000010/config.yaml      the resolved configuration it was made with
checkpoints/step_000010/labels.jsonl     the label history up to there
checkpoints/step_000010/files.json       size and blake3 of every file above
checkpoints/damaged_step_000012/         one that failed its check: set aside, never read again

Invariants (tests/checkpoint/test_store.py):
  1. A directory with a step's name was written in full and is durable.
  2. A checkpoint with a missing, shortened or changed file is not read, and metadata that would run code is refused.
  3. The newest `keep` checkpoints stay, and the one with the best score.
"""

import json
import os
import re
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from blake3 import blake3

from megatron_coreward.checkpoint.safe_load import COMMON_FILE, COMMON_STATE
from megatron_coreward.checkpoint.torch_dist import read_metadata
from megatron_coreward.errors import InputError
from megatron_coreward.telemetry.files import fsync_directory

_NAME = re.compile(r"step_(\d+)")
MANIFEST = "files.json"
TRAINER = "trainer.json"
ACTORS = "megatron"

Hashes = Mapping[str, tuple[int, str]]  # file -> bytes, blake3


@dataclass(frozen=True, slots=True)
class TrainerState:
    """The state of a run after a step. What is drawn, batches and rollouts, is a function of seed and step."""

    step: int  # steps done; also the batches taken from the data
    num_updates: int  # optimizer steps done
    teacher_updates: int = 0  # the last step whose EMA the teacher has taken; the step after `step` may be begun
    skipped_steps: int = 0  # in a row, without an update
    score: float | None = None  # of the metric by which the best checkpoint is kept
    score_metric: str | None = None  # its name; null in earlier checkpoints: as the settings are
    first_accuracy: float | None = None  # avg@n of the run's first validation (pass@1 without random samples)
    first_metric: str | None = None  # which score that was; null in earlier checkpoints: as the settings are
    guard: dict[str, Any] | None = None  # the guard's state
    canary_limit: float | None = None  # nats; what a weight sync may show since the run's first one
    canary_allowed: float | None = None  # sync.max_logprob_gap at that time: another one lets the next sync set it
    questions: dict[str, Any] | None = None  # what was drawn, if that is no function of the step (`resample_flat`)
    unfinished_row: dict[str, float | None] | None = None  # of a step whose validation was interrupted; null: NaN


class DamagedCheckpoint(InputError):
    """A checkpoint that must not be read; the message names the file and what is wrong with it."""


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """The directory of a step's checkpoint."""
    return run_dir / "checkpoints" / f"step_{step:06d}"


def saved_steps(run_dir: Path) -> list[int]:
    """Steps with a checkpoint, oldest first."""
    folder = run_dir / "checkpoints"
    if not folder.is_dir():
        return []
    found = [_NAME.fullmatch(path.name) for path in folder.iterdir()]
    return sorted(int(match[1]) for match in found if match)


def new_checkpoint(run_dir: Path, trainer_state: TrainerState, files: Mapping[str, bytes]) -> Path:
    """Begins a checkpoint beside its final place; `finalize_checkpoint` ends it.

    Args:
        files: what else to keep in it, by name.

    Returns:
        The directory for the actors' part (absolute, empty).
    """
    partial = _partial(run_dir, trainer_state.step)
    shutil.rmtree(partial, ignore_errors=True)
    (partial / ACTORS).mkdir(parents=True)
    (partial / TRAINER).write_text(json.dumps(asdict(trainer_state), indent=1, allow_nan=False) + "\n")
    for name, content in files.items():
        (partial / name).write_bytes(content)
    return (partial / ACTORS).resolve()


def finalize_checkpoint(
    run_dir: Path,
    step: int,
    hashes: Hashes,
    *,
    keep: int,
    best: Literal["highest", "lowest"] = "highest",
    best_metric: str | None = None,
) -> Path:
    """Gives a checkpoint that is written in full its name, and removes those that are not to be kept.

    Args:
        hashes: size and blake3 of files of the actors' part that are known already; the others are read here.
        best_metric: by which the best one is found; scores of another are not compared with it.
    """
    partial, final = _partial(run_dir, step), checkpoint_path(run_dir, step)
    known = {f"{ACTORS}/{name}": tuple(entry) for name, entry in hashes.items()}
    entries = {}
    for path in sorted(path for path in partial.rglob("*") if path.is_file()):
        name = path.relative_to(partial).as_posix()
        if name not in known:
            _sync_file(path)
            known[name] = (path.stat().st_size, _hash(path))
        entries[name] = {"bytes": known[name][0], "blake3": known[name][1]}
    if missing := known.keys() - entries.keys():
        raise OSError(f"{partial / min(missing)} was written by a rank and is not there")
    manifest = partial / MANIFEST
    manifest.write_text(json.dumps({"format": 1, "files": entries}, indent=1) + "\n")
    _sync_file(manifest)
    for folder in (partial / ACTORS, partial):
        fsync_directory(folder)
    _remove(final)
    os.replace(partial, final)
    fsync_directory(final.parent)
    for old in set(saved_steps(run_dir)) - _to_keep(run_dir, keep, best, best_metric):
        _remove(checkpoint_path(run_dir, old))
    for left in final.parent.glob(".step_*.removed"):
        shutil.rmtree(left, ignore_errors=True)
    return final


def discard_unfinished(run_dir: Path) -> None:
    """Removes what a process that died has left half-written or half-removed."""
    for path in (run_dir / "checkpoints").glob(".step_*"):
        shutil.rmtree(path, ignore_errors=True)


def read_trainer_state(path: Path) -> TrainerState:
    """The saved state of the run. Raises DamagedCheckpoint if the description is missing or damaged."""
    try:
        tree = json.loads((path / TRAINER).read_text())
        tree |= tree.pop("extra", {})  # the former form had some under "extra", and another name for the teacher's
        if "teacher_moves" in tree:
            tree["teacher_updates"] = tree.pop("teacher_moves")
        return TrainerState(**tree)
    except (OSError, ValueError, TypeError, AttributeError) as e:
        raise DamagedCheckpoint(f"{path / TRAINER}: damaged ({e})") from None


def check_checkpoint(path: Path, contents: bool = True) -> TrainerState:
    """Makes sure that a checkpoint is what was written, before anything is loaded from it.

    Args:
        contents: compare checksums too, not only names and sizes.

    Raises:
        DamagedCheckpoint: naming the first file that is missing, of another size, changed, or not to be trusted.
    """
    try:
        wanted = {
            name: (int(entry["bytes"]), str(entry["blake3"]))
            for name, entry in json.loads((path / MANIFEST).read_text())["files"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise DamagedCheckpoint(f"{path / MANIFEST}: damaged ({type(e).__name__}: {e})") from None
    for name, (size, _) in wanted.items():
        file = path / name
        if ".." in Path(name).parts or not file.is_file():
            raise DamagedCheckpoint(f"{file}: missing")
        if file.stat().st_size != size:
            raise DamagedCheckpoint(f"{file}: {file.stat().st_size} bytes, {size} were written")
    for required in (TRAINER, f"{ACTORS}/.metadata"):
        if required not in wanted:
            raise DamagedCheckpoint(f"{path / MANIFEST}: names no {required}")
    if contents:
        with ThreadPoolExecutor(max_workers=8) as pool:
            for name, found in zip(wanted, pool.map(lambda name: _hash(path / name), wanted), strict=True):
                if found != wanted[name][1]:
                    raise DamagedCheckpoint(f"{path / name}: its content is not what was written (blake3)")
    try:
        objects = read_metadata(path / ACTORS).state_dict_metadata
    except InputError as e:
        raise DamagedCheckpoint(str(e)) from None
    if f"{ACTORS}/{COMMON_FILE}" not in wanted and COMMON_STATE not in objects:
        raise DamagedCheckpoint(f"{path / MANIFEST}: names no {ACTORS}/{COMMON_FILE}, and .metadata no {COMMON_STATE}")
    return read_trainer_state(path)


def set_aside(path: Path) -> Path:
    """Takes a damaged checkpoint out of the row, for people to look at."""
    aside = path.with_name(f"damaged_{path.name}")
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(path, aside)
    return aside


def _to_keep(run_dir: Path, keep: int, best: Literal["highest", "lowest"], metric: str | None) -> set[int]:
    steps = saved_steps(run_dir)
    kept = set(steps[-keep:])
    scores: dict[int, float] = {}
    for step in steps:
        try:
            saved = read_trainer_state(checkpoint_path(run_dir, step))
        except DamagedCheckpoint:
            continue  # only reading it for a resume is an error; here it is one without a score
        if saved.score is not None and saved.score_metric in (None, metric):
            scores[step] = saved.score
    if scores:
        wanted = max(scores.values()) if best == "highest" else min(scores.values())
        kept.add(max(step for step, score in scores.items() if score == wanted))
    return kept


def _partial(run_dir: Path, step: int) -> Path:
    final = checkpoint_path(run_dir, step)
    return final.with_name(f".{final.name}.partial")


def _remove(path: Path) -> None:
    """Takes the name away first, so that a process that dies half-way leaves no checkpoint with holes."""
    if path.exists():
        doomed = path.with_name(f".{path.name}.removed")
        shutil.rmtree(doomed, ignore_errors=True)
        os.replace(path, doomed)
        shutil.rmtree(doomed, ignore_errors=True)  # a file may be open somewhere, which keeps its directory on NFS


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _hash(path: Path) -> str:
    return str(blake3().update_mmap(path).hexdigest())
