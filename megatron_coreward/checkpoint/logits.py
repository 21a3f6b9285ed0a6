"""Whether two checkpoints compute the same: the logits of one text, each from the code that the format is meant for.

A Hugging Face directory runs in transformers, a Megatron checkpoint in the actor's own model, both in fp32 on the CPU,
one after the other and each in a process of its own (what Megatron needs on a CPU is no good for transformers).
"""

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_coreward.checkpoint.verify import Opened
from megatron_coreward.errors import InputError, RunError
from megatron_coreward.types import FloatArray
from megatron_coreward.weights.mapping import hf_tensors

TOKENS = 64
TOLERANCE = 1e-4  # on logits, relative to the largest one if that is above 1
BYTES_PER_PARAMETER = 4.5  # fp32, and one layer's tensors twice while they are loaded
BYTES_BESIDE = 1.5e9  # libraries, activations and logits
_PROGRAMS = {True: "megatron_coreward.actor.write_logits", False: "megatron_coreward.checkpoint.write_logits"}


@dataclass(frozen=True, slots=True)
class LogitComparison:
    tokens: int
    gap: float  # largest absolute difference
    scale: float  # largest absolute logit
    same_argmax: float  # share of the places

    @property
    def ok(self) -> bool:
        return self.gap <= TOLERANCE * max(1.0, self.scale)

    def __str__(self) -> str:
        return (
            f"logits of {self.tokens} tokens: largest difference {self.gap:.1e}, largest logit {self.scale:.1f}, "
            f"the same most likely token at {self.same_argmax:.1%} of the places"
        )


def check_memory(side: Opened) -> None:
    """Raises InputError if the model does not fit into the memory that is available now."""
    parameters = sum(int(np.prod(shape)) for shape in hf_tensors(side.arch).values())
    needed = parameters * BYTES_PER_PARAMETER + BYTES_BESIDE
    available = available_memory()
    if needed > available:
        raise InputError(
            f"{side.path}: logits need {needed / 1e9:.1f} GB of memory in fp32, {available / 1e9:.1f} GB are "
            "available; leave out --logits"
        )


def available_memory() -> int:
    """Bytes that the system can give without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise RunError("/proc/meminfo has no MemAvailable")


def compare_logits(one: Opened, other: Opened, timeout_s: float = 3600) -> LogitComparison:
    """Runs both models on the same tokens.

    Raises:
        InputError: the model does not fit into memory.
        RunError: the logits differ, or a model does not run.
    """
    for side in (one, other):
        check_memory(side)
    vocabulary = min(one.arch.vocab_size, other.arch.vocab_size)
    tokens = np.random.default_rng(0).integers(0, vocabulary, TOKENS)
    a, b = (_logits(side, tokens, timeout_s) for side in (one, other))
    found = LogitComparison(
        tokens=TOKENS,
        gap=float(np.abs(a - b).max()),
        scale=float(max(np.abs(a).max(), np.abs(b).max())),
        same_argmax=float((a.argmax(-1) == b.argmax(-1)).mean()),
    )
    if not found.ok:
        raise RunError(f"{one.path} and {other.path} compute different {found}")
    return found


def _logits(side: Opened, tokens: NDArray[np.int64], timeout_s: float) -> FloatArray:
    """[T, V] in fp32."""
    with tempfile.TemporaryDirectory() as folder:
        given, result = Path(folder) / "tokens.npy", Path(folder) / "logits.npy"
        np.save(given, tokens)
        command = [sys.executable, "-m", _PROGRAMS[side.is_megatron], str(side.description), str(given), str(result)]
        if side.is_megatron:
            command += [str(side.path), side.kind]
        root = str(Path(__file__).parents[2])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(paths)}
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False
            )
        except subprocess.TimeoutExpired:
            raise RunError(f"{side.path}: no logits within {timeout_s:.0f} s") from None
        if done.returncode != 0 or not result.is_file():
            last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
            raise RunError(f"{side.path}: its model does not run: {last}")
        logits: FloatArray = np.load(result)
    if not np.isfinite(logits).all():
        raise RunError(f"{side.path}: its logits are not finite")
    return logits
