"""YAML recipe + `key=value` overrides -> `RunConfig`; bad input is one message before anything is spent.

A recipe may begin with `base: FILE` or `base: [FILE, ...]`, paths from the recipe's own folder: it then has the keys of
those files, a later file's over an earlier one's, and its own over all of theirs. Groups of keys are merged, anything
else (a list too) is replaced. Paths that the keys name start where the command is run; `~` and `$VARIABLES` in them are
replaced once, here (`config.paths`).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from megatron_coreward.config.accelerator import FP8_LOGPROB_GAP
from megatron_coreward.config.explain import explain
from megatron_coreward.config.methods import needs_of
from megatron_coreward.config.names import RENAMED_KEYS
from megatron_coreward.config.paths import check_text, expand_path
from megatron_coreward.config.schema import RunConfig
from megatron_coreward.config.yaml_file import parse_scalar, parse_yaml, read_yaml, write_yaml
from megatron_coreward.errors import InputError

# The paper's KL coefficients (arXiv 2508.00410, appendix); the baselines run at that of Co-rewarding-I.
KL_COEF_WITH_TEACHER = 0.001
KL_COEF = 0.005

ONE_VALUE = ("method",)  # keys whose mapping is a value, and no group of keys


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a recipe and applies overrides of the form `actor.lr=1e-5`; values are read as in a recipe.

    Raises:
        InputError: naming the file and the key, what was found and what is allowed.
    """
    return parse_config(_read(path, ()), overrides, where=str(path))


def _read(path: Path, readers: tuple[Path, ...]) -> dict[str, Any]:
    """A recipe's keys with those of the files that it is based on; `readers` are the files that led here."""
    if path.resolve() in [reader.resolve() for reader in readers]:
        raise InputError(f"{path}: is its own base ({' -> '.join(map(str, (*readers, path)))})")
    tree = read_yaml(path, f"{readers[-1]}: base file" if readers else "config file")
    bases = tree.pop("base", [])
    if isinstance(bases, str):
        bases = [bases]
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise InputError(f"{path}: base: expected a file or a list of files, found {bases!r}")
    merged: dict[str, Any] = {}
    for base in bases:
        try:
            file = path.parent / expand_path(base)
        except ValueError as e:
            raise InputError(f"{path}: base: {base}: {e}") from None
        merged = _merge(merged, _read(file, (*readers, path)))
    return _merge(merged, tree)


def _merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(under)
    for key, value in over.items():
        below = merged.get(key)
        if isinstance(below, dict) and isinstance(value, dict) and key not in ONE_VALUE:
            merged[key] = _merge(below, value)
        else:
            merged[key] = value
    return merged


def parse_config(tree: dict[str, Any], overrides: Sequence[str] = (), where: str = "config") -> RunConfig:
    """See `load_config`; `where` names the source in messages."""
    for override in overrides:
        _apply(tree, override)
    try:
        return resolve(RunConfig.model_validate(tree))
    except ValidationError as e:
        raise InputError(explain(where, RunConfig, e, RENAMED_KEYS)) from None


def resolve(config: RunConfig) -> RunConfig:
    """Replaces `auto` and null by what they mean for this run, so that the saved config says what was run.

    Raises:
        InputError: a method of the user's own cannot be loaded (`config.plugins`).
    """
    teacher = needs_of(config.method).teacher
    kl_coef = config.loss.kl_coef
    if kl_coef is None:
        kl_coef = KL_COEF_WITH_TEACHER if teacher else KL_COEF
    reference = config.loss.kl_reference
    if reference == "auto":
        reference = "teacher" if teacher else "frozen"
    gap = config.sync.max_logprob_gap
    if gap is None:
        gap = 1e-3 if config.model.dtype == "float32" else 0.1
        if config.actor.fp8 is not None or config.rollout.quantization is not None:
            gap = FP8_LOGPROB_GAP
    return config.model_copy(
        update={
            "loss": config.loss.model_copy(update={"kl_coef": kl_coef, "kl_reference": reference}),
            "sync": config.sync.model_copy(update={"max_logprob_gap": gap}),
        }
    )


def dump_config(config: BaseModel) -> str:
    """YAML of the whole config, defaults included; `load_config` reads it back to an equal one."""
    return write_yaml(config.model_dump(mode="json"))


def _override_value(override: str, text: str) -> Any:
    """A list, a mapping or a quoted text in YAML, and anything else as one plain scalar: `run_dir=a #2` is `a #2`."""
    if not text.lstrip().startswith(("[", "{", "'", '"')):
        return parse_scalar(text)
    return parse_yaml(text, f"override {override!r}")


def _apply(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise InputError(f"override {override!r}: expected key=value, such as actor.lr=1e-5")
    try:
        check_text(override)
    except ValueError as e:
        raise InputError(f"override {override!r}: {e}") from None
    value = _override_value(override, text)
    node = tree
    *parents, last = key.split(".")
    for depth, parent in enumerate(parents):
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise InputError(f"override {override!r}: {'.'.join(parents[: depth + 1])} is a value, not a group of keys")
        node = child
    node[last] = value
