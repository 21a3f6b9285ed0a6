"""What a run reads, by content: a checkpoint remembers the data and model files that it was made from.

checkpoints/step_000010/inputs.json has a digest of every file, by the key that names it. Between two attempts files may
be replaced under the same names: the run would go on with other questions, another tokenizer or another frozen
reference, and nothing would say so. Resuming compares, and refuses (`refused_inputs`) or, with
`checkpoint.changed_inputs=accept`, notes it. Validation files decide nothing that is learned: those are only noted.

Data, configs and tokenizers are read whole. Of a weight file, which may have gigabytes, the size and evenly spread
samples are: other weights differ nearly everywhere. Where a file lies, and when it was written, counts for nothing.
"""

import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from blake3 import blake3

from megatron_coreward.config.schema import RunConfig

FILE_NAME = "inputs.json"
VALIDATION = "data.val_files"

_MODEL_FILES = (".json", ".safetensors", ".model", ".txt", ".jinja")
_SAMPLED = (".safetensors", ".distcp")
_SAMPLES, _SAMPLE_BYTES = 64, 64 * 1024


def input_digests(config: RunConfig) -> dict[str, str]:
    """`data.train_files[0]` or `model.hf_path/config.json` to the digest of the file, for all files that are there."""
    return {key: _digest(path) for key, path in _files(config) if path.is_file()}


def replaced_inputs(checkpoint: Path, config: RunConfig) -> list[str]:
    """`data.train_files[0]: train.parquet` for every file that is not what it was when the checkpoint was made.

    Empty if nothing was replaced, or the checkpoint does not say what it was made from.
    """
    try:
        saved = dict(json.loads((checkpoint / FILE_NAME).read_text()))
    except (OSError, ValueError, TypeError):  # of an older version, or damaged, which its own check says
        return []
    paths, now = dict(_files(config)), input_digests(config)
    return [
        f"{key}: {paths[key]}" if key in paths and key in now else f"{key}: the file does not exist any more"
        for key in sorted(saved.keys() | now.keys())
        if saved.get(key) != now.get(key) and (key in saved or _would_be_read(key, saved))
    ]


def refused_inputs(checkpoint: Path, config: RunConfig) -> list[str]:
    """What is wrong with going on from a checkpoint, a problem for each file that was replaced."""
    if config.checkpoint.changed_inputs == "accept":
        return []
    return [
        f"{replaced}, not the file that {checkpoint} was made from; restore that file, choose another run_dir, or "
        "go on from there with this one under checkpoint.changed_inputs=accept"
        for replaced in replaced_inputs(checkpoint, config)
        if not replaced.startswith(VALIDATION)
    ]


def dump_digests(digests: dict[str, str]) -> bytes:
    """The content of a checkpoint's `inputs.json`."""
    return (json.dumps(digests, indent=1, sort_keys=True) + "\n").encode()


def _would_be_read(key: str, saved: dict[str, str]) -> bool:
    """Whether a file that the checkpoint does not know is one more of a group that it knows: not of new validation."""
    return not key.startswith(VALIDATION) or any(known.startswith(VALIDATION) for known in saved)


def _files(config: RunConfig) -> Iterator[tuple[str, Path]]:
    data, model = config.data, config.model
    for key, files in (
        ("data.train_files", data.train_files),
        ("data.rephrased_files", data.rephrased_files),
        (VALIDATION, data.val_files),
    ):
        yield from ((f"{key}[{place}]", path) for place, path in enumerate(files))
    if model.hf_path.is_dir():
        for path in sorted(model.hf_path.iterdir()):
            if path.suffix in _MODEL_FILES and not path.name.startswith("."):
                yield f"model.hf_path/{path.name}", path
    if model.megatron_path is not None and model.megatron_path.is_dir():
        for path in sorted(model.megatron_path.rglob("*")):
            yield f"model.megatron_path/{path.relative_to(model.megatron_path)}", path


def _digest(path: Path) -> str:
    state = path.stat()
    return _digest_of(path.absolute(), state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=4096)  # it is asked for several times before a run starts
def _digest_of(path: Path, size: int, changed: int) -> str:
    if path.suffix not in _SAMPLED or size <= _SAMPLES * _SAMPLE_BYTES:
        return str(blake3().update_mmap(path).hexdigest())
    hashed = blake3(f"{size}:".encode())
    with path.open("rb") as file:
        for place in range(_SAMPLES):
            file.seek((size - _SAMPLE_BYTES) * place // (_SAMPLES - 1))
            hashed.update(file.read(_SAMPLE_BYTES))
    return str(hashed.hexdigest())
