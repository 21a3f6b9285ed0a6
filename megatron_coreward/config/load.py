"""YAML recipe + `key=value` overrides -> `RunConfig`; bad input is one message before anything is spent.

A recipe may begin with `base: FILE` or `base: [FILE, ...]`, paths from the recipe's own folder: it then has the keys of
those files, a later file's over an earlier one's, and its own over all of theirs. Groups of keys are merged, anything
else (a list too) is replaced. Paths that the keys name are not touched: they start where the command is run.
"""

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from megatron_coreward.config.accelerator import FP8_LOGPROB_GAP
from megatron_coreward.config.schema import TEACHER_METHODS, RunConfig
from megatron_coreward.errors import InputError

# The paper's KL coefficients (arXiv 2508.00410, appendix); the baselines run at that of Co-rewarding-I.
PAPER_KL_COEF = dict.fromkeys(TEACHER_METHODS, 0.001)
DEFAULT_KL_COEF = 0.005


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a recipe and applies overrides of the form `actor.lr=1e-5`; values are read as YAML.

    Raises:
        InputError: naming the file and the key, what was found and what is allowed.
    """
    return parse_config(_read(path, ()), overrides, where=str(path))


def _read(path: Path, readers: tuple[Path, ...]) -> dict[str, Any]:
    """A recipe's keys with those of the files that it is based on; `readers` are the files that led here."""
    if not path.is_file():
        raise InputError(f"config file {path} does not exist{f', the base of {readers[-1]}' if readers else ''}")
    if path.resolve() in [reader.resolve() for reader in readers]:
        raise InputError(f"{path}: is its own base ({' -> '.join(map(str, (*readers, path)))})")
    try:
        tree = yaml.safe_load(path.read_text())
    except OSError as e:
        raise InputError(f"config file {path} cannot be read ({e.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise InputError(f"{path}: not valid YAML ({str(e).splitlines()[0]})") from None
    if not isinstance(tree, dict):
        raise InputError(f"{path}: expected keys and values, found {type(tree).__name__}")
    bases = tree.pop("base", [])
    if isinstance(bases, str):
        bases = [bases]
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise InputError(f"{path}: base: expected a file or a list of files, found {bases!r}")
    merged: dict[str, Any] = {}
    for base in bases:
        merged = _merge(merged, _read(path.parent / base, (*readers, path)))
    return _merge(merged, tree)


def _merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(under)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = _merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def parse_config(tree: dict[str, Any], overrides: Sequence[str] = (), where: str = "config") -> RunConfig:
    """See `load_config`; `where` names the source in messages."""
    for override in overrides:
        _apply(tree, override)
    try:
        return resolve(RunConfig.model_validate(_numbers(tree)))
    except ValidationError as e:
        raise InputError("\n".join(_explain(where, error) for error in e.errors())) from None


def resolve(config: RunConfig) -> RunConfig:
    """Replaces `auto` and null by what they mean for this run, so that the saved config says what was run."""
    kl_coef = config.loss.kl_coef
    if kl_coef is None:
        kl_coef = PAPER_KL_COEF.get(config.method, DEFAULT_KL_COEF)
    reference = config.loss.kl_reference
    if reference == "auto":
        reference = "teacher" if config.method in TEACHER_METHODS else "frozen"
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
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _apply(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise InputError(f"override {override!r}: expected key=value, such as actor.lr=1e-5")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise InputError(f"override {override!r}: the value is not valid YAML") from None
    node = tree
    *parents, last = key.split(".")
    for depth, parent in enumerate(parents):
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise InputError(f"override {override!r}: {'.'.join(parents[: depth + 1])} is a value, not a group of keys")
        node = child
    node[last] = value


def _numbers(value: Any) -> Any:
    """YAML 1.1 reads `1e-5` as a string; people mean the number."""
    if isinstance(value, dict):
        return {key: _numbers(child) for key, child in value.items()}
    if isinstance(value, list):
        return [_numbers(child) for child in value]
    if isinstance(value, str) and "e" in value.lower():
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _explain(where: str, error: Any) -> str:
    location = [str(part) for part in error["loc"]]
    key = ".".join(location)
    if error["type"] == "extra_forbidden":
        known = _keys_beside(location)
        close = difflib.get_close_matches(location[-1], known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"allowed: {', '.join(known)}"
        return f"{where}: unknown key {key!r}; {hint}"
    if error["type"] == "missing":
        return f"{where}: key {key!r} is missing"
    return f"{where}: {key}: {error['msg'][:1].lower()}{error['msg'][1:]}, found {error['input']!r}"


def _keys_beside(location: Iterable[str]) -> list[str]:
    model: Any = RunConfig
    for part in list(location)[:-1]:
        field = model.model_fields.get(part)
        if field is None or not isinstance(field.annotation, type) or not issubclass(field.annotation, BaseModel):
            break
        model = field.annotation
    return list(model.model_fields)
