"""Whether two checkpoints hold the same weights, and whether one holds what its manifest says: tensor by tensor."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from blake3 import blake3

from megatron_coreward.checkpoint.convert import describing_directory, key_prefix, megatron_directory
from megatron_coreward.checkpoint.manifest import TensorHash, read_manifest
from megatron_coreward.checkpoint.pieces import PIECE_BYTES, Scratch, WeightFiles, bytes_of, cuts
from megatron_coreward.checkpoint.safetensors_files import HfWeights
from megatron_coreward.checkpoint.torch_dist import MegatronWeights
from megatron_coreward.config.architecture import Architecture, read_architecture
from megatron_coreward.errors import InputError
from megatron_coreward.weights.mapping import hf_tensors

Progress = Callable[[int, int], None]  # tensors done, tensors in all


@dataclass(frozen=True)
class Opened:
    """A checkpoint of either format; to be closed."""

    path: Path
    arch: Architecture
    description: Path  # directory with config.json and the tokenizer
    weights: WeightFiles
    kind: str  # of its weights: policy or teacher
    manifest: dict[str, TensorHash] | None

    @property
    def is_megatron(self) -> bool:
        return isinstance(self.weights, MegatronWeights)

    def close(self) -> None:
        self.weights.close()


@dataclass
class Verification:
    """What was found; differences name the tensor and its largest absolute difference."""

    tensors: int = 0
    configs: list[str] = field(default_factory=list)  # what config.json says otherwise: "<key>: <one> and <other>"
    different: dict[str, float] = field(default_factory=dict)
    not_as_manifest: list[str] = field(default_factory=list)  # "<path>: <tensor>"
    manifests: int = 0  # how many of the sides have one

    @property
    def ok(self) -> bool:
        return not self.different and not self.not_as_manifest and not self.configs


def open_checkpoint(path: Path, hf_path: Path | None = None, weights: str = "policy") -> Opened:
    """Opens an HF directory or a Megatron checkpoint and checks that it is complete.

    Raises:
        InputError: neither of the two, or damaged.
    """
    inner = megatron_directory(path)
    if (inner / "metadata.json").is_file():
        description = describing_directory(inner, hf_path)
        arch = read_architecture(description)
        manifest = None if weights == "teacher" else read_manifest(inner)
        files: WeightFiles = MegatronWeights(inner, arch, key_prefix(weights))
        return Opened(inner, arch, description, files, weights, manifest)
    if not path.is_dir():
        raise InputError(f"{path} is no directory; expected a Hugging Face model or a Megatron checkpoint")
    arch = read_architecture(path)
    hf = HfWeights(path)
    hf.check(arch)
    return Opened(path, arch, path, hf, "policy", read_manifest(path))


def verify(one: Opened, other: Opened | None, progress: Progress = lambda done, total: None) -> Verification:
    """Compares every tensor and the config of two checkpoints, and each with its manifest if it has one.

    Tensors of different dtypes are the same if every value is. Raises InputError if the shapes of the models differ.
    """
    shapes = hf_tensors(one.arch)
    if other is not None and (others := hf_tensors(other.arch)) != shapes:
        name = next(n for n in [*shapes, *others] if shapes.get(n) != others.get(n))
        raise InputError(
            f"{one.path} and {other.path} are not of one architecture: {name!r} is {shapes.get(name)} in one, "
            f"{others.get(name)} in the other"
        )
    sides = [side for side in (one, other) if side is not None]
    found = Verification(manifests=sum(side.manifest is not None for side in sides))
    if other is not None:
        theirs = asdict(other.arch)
        found.configs = [f"{k}: {v} and {theirs[k]}" for k, v in asdict(one.arch).items() if v != theirs[k]]
    for side in sides:
        unknown = sorted(set(side.manifest or ()) - set(shapes))
        found.not_as_manifest += [f"{side.path}: {name} (no such tensor)" for name in unknown]
    scratches = [Scratch() for _ in sides]
    for name, shape in shapes.items():
        _verify_tensor(sides, name, shape, found, scratches)
        found.tensors += 1
        progress(found.tensors, len(shapes))
    return found


def _verify_tensor(
    sides: list[Opened], name: str, shape: tuple[int, ...], found: Verification, scratches: list[Scratch]
) -> None:
    hashes = [blake3() for _ in sides]
    worst = -1.0
    for first, rows in cuts(shape, 4, PIECE_BYTES):  # the same rows on both sides, whatever their dtypes
        pieces = []
        for side, running, scratch in zip(sides, hashes, scratches, strict=True):
            piece = scratch.take((rows, *shape[1:]), side.weights.dtype(name))
            side.weights.read_rows(name, first, piece)
            running.update(bytes_of(piece))
            pieces.append(piece)
        if len(pieces) == 2 and not _same(*pieces):
            gap = (pieces[0].double() - pieces[1].double()).abs().nan_to_num(nan=math.inf, posinf=math.inf).max()
            worst = max(worst, float(gap))
    if worst >= 0:
        found.different[name] = worst
    for side, running in zip(sides, hashes, strict=True):
        if side.manifest is None:
            continue
        expected = side.manifest.get(name)
        dtype = str(side.weights.dtype(name)).removeprefix("torch.")
        if expected != TensorHash(dtype, shape, running.hexdigest()):
            found.not_as_manifest.append(f"{side.path}: {name}")


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Bit for bit in one dtype, so that NaNs and signed zeros count; by value in two."""
    if one.dtype == other.dtype:
        return bytes_of(one) == bytes_of(other)
    return torch.equal(one.double(), other.double())
