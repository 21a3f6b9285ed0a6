"""Installed packages against the ranges that this project names, by their metadata: nothing is imported."""

import importlib.metadata
import tomllib
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement

from megatron_coreward.config.schema import RunConfig
from megatron_coreward.errors import InputError

NAME = "megatron-coreward"
OPTIONAL = {"transformer-engine"}  # of the extra `gpu`: only if actor.backend asks for it


def installed(name: str) -> str | None:
    """The version of a package, None if it is not there."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def requirements() -> list[Requirement]:
    """What this project asks for, extras included: by its metadata or, in a plain checkout, by pyproject.toml."""
    try:
        lines = importlib.metadata.requires(NAME) or []
    except importlib.metadata.PackageNotFoundError:
        file = Path(__file__).parents[3] / "pyproject.toml"
        if not file.is_file():
            return []
        project = tomllib.loads(file.read_text())["project"]
        lines = list(project["dependencies"])
        for extra, names in project["optional-dependencies"].items():
            lines += [f"{line} ; extra == '{extra}'" for line in names]
    try:
        return [Requirement(line) for line in lines]
    except InvalidRequirement as error:
        raise InputError(f"the metadata of the installed {NAME} is damaged ({error}); install it again") from None


def problems(config: RunConfig) -> Iterator[str]:
    """Packages that are missing or of another version than this project was tested with."""
    extra = "gpu" if installed("vllm") is not None else "cpu"
    hint = f"pip install '{NAME}[{extra}]', or make env in a checkout"
    for wanted in requirements():
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": extra}):
            continue
        if wanted.name in OPTIONAL and config.actor.backend != "te":
            continue
        found = installed(wanted.name)
        if found is None:
            yield f"package {wanted.name}: not installed; allowed: {wanted.specifier} ({hint})"
        elif not wanted.specifier.contains(found, prereleases=True):
            yield f"package {wanted.name}: found {found}; allowed: {wanted.specifier} ({hint})"
    if config.telemetry.wandb_project is not None or config.telemetry.mlflow_experiment is not None:
        from megatron_coreward.telemetry.sinks import require_trackers  # with TensorBoard, which is slow to import

        try:
            require_trackers(config.model_dump(include={"telemetry"}))
        except InputError as error:
            yield str(error)
