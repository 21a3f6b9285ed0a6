"""A run directory with checkpoints is the run that made them: what was learned must go on under the same rules.

`FIXED` decides what is learned, and from what. All other keys (layout, engines, transport, validation, checkpoints,
telemetry, limits) say how it is carried out, and may change from one attempt to the next. So may `steps`: the
schedules of learning rate and teacher then have the new horizon.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from megatron_coreward.checkpoint import inputs
from megatron_coreward.config.methods import method_title
from megatron_coreward.config.names import with_new_names
from megatron_coreward.config.schema import RunConfig
from megatron_coreward.errors import InputError
from megatron_coreward.telemetry import anchor_draws, label_history, timeline
from megatron_coreward.telemetry.jsonl import FILE_NAME, read_rows

# What a resumed run reads and goes on writing.
_READ_ON: tuple[tuple[str, Callable[[Path], object]], ...] = (
    (FILE_NAME, read_rows),
    (label_history.FILE_NAME, label_history.read_lines),
    (anchor_draws.FILE_NAME, anchor_draws.read_draws),
    (timeline.FILE_NAME, timeline.read_timeline),
)

FIXED = (
    "method",
    "seed",
    "model",
    "data.train_files",
    "data.rephrased_files",
    "data.online_rephrasing",
    "data.batch_size",
    "data.max_prompt_tokens",
    "data.over_length",
    "data.missing_gold",
    "data.unpaired",
    "data.system_prompt",
    "data.thinking",
    "data.control_tokens",
    "data.shuffle",
    "actor.lr",
    "actor.min_lr",
    "actor.lr_schedule",
    "actor.lr_warmup",
    "actor.weight_decay",
    "actor.adam_beta1",
    "actor.adam_beta2",
    "actor.adam_eps",
    "actor.clip_grad",
    "actor.router_replay",
    "rollout.n",
    "rollout.votes",
    "rollout.resample_flat",
    "rollout.max_staleness",
    "rollout.temperature",
    "rollout.max_response_tokens",
    "rollout.stop",
    "rollout.top_p",
    "rollout.top_k",
    "teacher",
    "rewards.answer_formats",
    "rewards.stop_at",
    "rewards.equivalence",
    "rewards.min_margin",
    "loss",
)
_PATHS = ("model.hf_path", "model.megatron_path", "data.train_files", "data.rephrased_files")
_STEP = re.compile(r"step_(\d+)")


def newest_checkpoint(run_dir: Path) -> int | None:
    """The step of the newest checkpoint, by the names alone; None: there is none."""
    saved = run_dir / "checkpoints"
    found = [_STEP.fullmatch(path.name) for path in saved.iterdir()] if saved.is_dir() else []
    return max((int(match[1]) for match in found if match), default=None)


def problems(config: RunConfig) -> Iterator[str]:
    """What differs from the run that the run directory holds."""
    run_dir = config.run_dir
    newest = newest_checkpoint(run_dir)
    if newest is None:
        return
    if config.checkpoint.resume == "never":
        yield f"run_dir: {run_dir} holds checkpoints and checkpoint.resume is never; choose another run_dir"
        return
    yield from inputs.refused_inputs(run_dir / "checkpoints" / f"step_{newest:06d}", config)
    for name, read in _READ_ON:
        try:
            if (run_dir / name).is_file():
                read(run_dir / name)
        except InputError as error:
            yield f"run_dir: {error}"
    file = run_dir / "config.yaml"
    try:
        before = yaml.safe_load(file.read_text())
    except FileNotFoundError:
        return
    except (OSError, ValueError, yaml.YAMLError) as error:
        yield f"run_dir: {file} is damaged ({str(error).splitlines()[0]}); restore it or choose another run_dir"
        return
    if not isinstance(before, Mapping):
        yield f"run_dir: {file} is damaged (no keys and values); restore it or choose another run_dir"
        return
    old, new = (dict(_flat(tree)) for tree in (with_new_names(before), config.model_dump(mode="json")))
    for key in sorted(old.keys() & new.keys()):
        is_fixed = any(key == fixed or key.startswith(f"{fixed}.") for fixed in FIXED)
        if is_fixed and _meant(key, old[key]) != _meant(key, new[key]):
            yield (
                f"{key}: {new[key]!r}, but the run in {run_dir} was made with {old[key]!r}; set it back to resume, or "
                "choose another run_dir"
            )


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if name == "method":  # a mixture is one value, in which the order counts
            yield name, method_title(value)
        elif isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _meant(key: str, value: Any) -> Any:
    """Paths are the same however they are spelled."""
    if key not in _PATHS or value is None:
        return value
    return [os.path.abspath(path) for path in value] if isinstance(value, list) else os.path.abspath(value)
