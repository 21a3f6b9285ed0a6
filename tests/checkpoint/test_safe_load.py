"""What Megatron's reader would unpickle is refused before it runs; what a run writes is accepted."""

import io
import json
import os
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_coreward.checkpoint.safe_load import COMMON_STATE, check_no_code, read_common_state
from megatron_coreward.errors import InputError

EXTRA = "decoder.layers.mlp.linear_fc1._extra_state/shard_0_1"
COMMON = {"scheduler": {"max_lr": 1e-3, "num_steps": 3}, "optimizer_steps": 3}


class Hostile:
    """Unpickled without care it makes a directory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.path),))


def saved(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def write(folder: Path, changes: Mapping[str, bytes] = {}, *, extra: bytes | None = None, key: str = EXTRA) -> Path:
    """A checkpoint of one tensor and one object, with other contents of some files."""
    folder.mkdir(exist_ok=True)
    tensor, thing = saved(torch.ones(2, 3)), saved([None]) if extra is None else extra
    entry = TensorStorageMetadata(
        TensorProperties(dtype=torch.float32),
        torch.Size((2, 3)),
        [ChunkStorageMetadata(torch.Size((0, 0)), torch.Size((2, 3)))],
    )
    metadata = Metadata(
        {"weight": entry, key: BytesStorageMetadata()},
        storage_data={
            MetadataIndex("weight", torch.Size((0, 0))): _StorageInfo("__0_0.distcp", 0, len(tensor)),
            MetadataIndex(key): _StorageInfo("__0_0.distcp", len(tensor), len(thing)),
        },
    )
    files = {
        "metadata.json": json.dumps({"sharded_backend": "torch_dist", "common_backend": "torch"}).encode(),
        ".metadata": pickle.dumps(metadata),
        "common.pt": saved(COMMON),
        "__0_0.distcp": tensor + thing,
    }
    for name, content in {**files, **changes}.items():
        (folder / name).write_bytes(content)
    return folder


def write_of_0_19(folder: Path, common: bytes) -> Path:
    """The checkpoint with the common state where megatron-core 0.19 has it: an object beside the shards."""
    write(folder, extra=common, key=COMMON_STATE)
    (folder / "common.pt").unlink()
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    return folder


def edited(folder: Path, edit: Callable[[Metadata], Any]) -> Path:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    edit(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    return folder


def test_what_a_run_writes_is_accepted(tmp_path: Path) -> None:
    check_no_code(write(tmp_path / "a"))
    states: list[object] = [torch.empty(0, dtype=torch.uint8), [], None]
    for number, empty in enumerate(states):
        check_no_code(write(tmp_path / str(number), extra=saved(empty)))


def test_the_common_state_is_read_in_the_forms_of_both_versions(tmp_path: Path) -> None:
    for folder in (write(tmp_path / "of_0_16"), write_of_0_19(tmp_path / "of_0_19", saved([COMMON]))):
        check_no_code(folder)
        assert read_common_state(folder) == COMMON


@pytest.mark.parametrize("form", ["archive", "plain pickle"])
def test_a_common_state_among_the_shards_that_would_run_code_is_refused(tmp_path: Path, form: str) -> None:
    state = [{"scheduler": Hostile(tmp_path / "ran"), "optimizer_steps": 3}]
    folder = write_of_0_19(tmp_path / "c", saved(state) if form == "archive" else pickle.dumps(state))
    for reader in (check_no_code, read_common_state):
        with pytest.raises(InputError, match="__0_0.distcp: holds more than data, and would run code"):
            reader(folder)
    assert not (tmp_path / "ran").exists()


def test_a_common_state_is_there_once_and_has_the_form_of_one(tmp_path: Path) -> None:
    twice = write(tmp_path / "twice", extra=saved([COMMON]), key=COMMON_STATE)
    with pytest.raises(InputError, match=r"common.pt: .*names 'common_state/shard_0_1' too"):
        check_no_code(twice)
    for number, wrong in enumerate(([], [COMMON, COMMON], COMMON, [3])):
        with pytest.raises(InputError, match="__0_0.distcp: damaged .*not a dictionary"):
            read_common_state(write_of_0_19(tmp_path / str(number), saved(wrong)))
    outside = write_of_0_19(tmp_path / "outside", saved([COMMON]))

    def edit(metadata: Metadata) -> None:
        metadata.storage_data[MetadataIndex(COMMON_STATE)] = _StorageInfo("../common", 0, 1)

    with pytest.raises(InputError, match="outside of the checkpoint"):
        read_common_state(edited(outside, edit))
    unnamed = write_of_0_19(tmp_path / "unnamed", saved([COMMON]))
    with pytest.raises(InputError, match="common_state/shard_0_1' is kept as an object"):
        check_no_code(write(unnamed, key="other_" + COMMON_STATE))


@pytest.mark.parametrize("name", [".metadata", "common.pt", "common.pt of torch", "__0_0.distcp", "plain pickle"])
def test_what_would_run_code_is_refused_before_it_runs(tmp_path: Path, name: str) -> None:
    ran = tmp_path / "ran"
    bomb, archive = pickle.dumps(Hostile(ran)), saved({"scheduler": Hostile(ran)})
    match name:
        case ".metadata":
            folder = write(tmp_path / "c", {".metadata": bomb})
        case "common.pt":
            folder = write(tmp_path / "c", {"common.pt": bomb})
        case "common.pt of torch":
            folder = write(tmp_path / "c", {"common.pt": archive})
        case "__0_0.distcp":
            folder = write(tmp_path / "c", extra=saved([Hostile(ran)]))
        case _:
            folder = write(tmp_path / "c", extra=bomb)
    file = name.split(" of ")[0] if "plain" not in name else "__0_0.distcp"
    with pytest.raises(InputError, match=f"{file}"):
        check_no_code(folder)
    assert not ran.exists()
    pickle.loads(bomb)  # it would have run
    assert ran.exists()


def test_a_pickle_within_a_tensor_is_refused(tmp_path: Path) -> None:
    """Transformer Engine unpickles the bytes of an extra state that is a tensor."""
    state = torch.frombuffer(bytearray(pickle.dumps(Hostile(tmp_path / "ran"))), dtype=torch.uint8)
    with pytest.raises(InputError, match="_extra_state.*is not empty"):
        check_no_code(write(tmp_path / "c", extra=saved([state])))


def test_a_tensor_that_is_called_bytes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r".metadata: 'decoder.weight' is kept as an object"):
        check_no_code(write(tmp_path / "c", key="decoder.weight"))


@pytest.mark.parametrize("place", ["../outside.distcp", "/etc/hostname", "sub/x.distcp", "..", ""])
def test_a_chunk_outside_of_the_directory_is_refused(tmp_path: Path, place: str) -> None:
    def edit(metadata: Metadata) -> None:
        where = metadata.storage_data[MetadataIndex("weight", torch.Size((0, 0)))]
        metadata.storage_data[MetadataIndex("weight", torch.Size((0, 0)))] = _StorageInfo(place, 0, where.length)

    (tmp_path / "outside.distcp").write_bytes(b"x" * 4096)
    with pytest.raises(InputError, match="outside of the checkpoint"):
        check_no_code(edited(write(tmp_path / "c"), edit))


def test_links_holes_and_strange_readers_are_refused(tmp_path: Path) -> None:
    linked = write(tmp_path / "linked")
    os.rename(linked / "__0_0.distcp", tmp_path / "elsewhere")
    (linked / "__0_0.distcp").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="__0_0.distcp: a link"):
        check_no_code(linked)
    short = write(tmp_path / "short")
    (short / "__0_0.distcp").write_bytes((short / "__0_0.distcp").read_bytes()[:-1])
    with pytest.raises(InputError, match="beyond its end"):
        check_no_code(short)
    for change in ({"sharded_backend": "zarr"}, {"sharded_backend": "torch_dist", "common_backend": "msgpack"}):
        with pytest.raises(InputError, match="supported: torch"):
            check_no_code(write(tmp_path / "c", {"metadata.json": json.dumps(change).encode()}))
    stray = write(tmp_path / "stray")
    (stray / "object.pt").write_bytes(b"")
    with pytest.raises(InputError, match=r"object.pt: no file of a checkpoint"):
        check_no_code(stray)
    bare = write(tmp_path / "bare")
    (bare / "common.pt").unlink()
    with pytest.raises(InputError, match=r"common.pt is missing"):
        check_no_code(bare)


def test_the_switch_that_turns_torchs_own_guard_off_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(InputError, match="TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD lets checkpoints run code"):
        check_no_code(write(tmp_path / "c"))
