"""Megatron checkpoints: any tiling of chunks is read, nothing hostile is run, nothing damaged is accepted."""

import itertools
import json
import os
import pickle
import tempfile
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from megatron_coreward.checkpoint.convert import to_megatron
from megatron_coreward.checkpoint.torch_dist import DESCRIPTION, ChunkFile, MegatronWeights, read_metadata
from megatron_coreward.errors import InputError
from megatron_coreward.weights.checkpoint_keys import checkpoint_tensors
from megatron_coreward.weights.mapping import hf_tensors
from tests.checkpoint.models import TINY, TINY_MOE, architecture, assert_bit_equal, configs, random_tensors, write_hf

Cuts = Callable[[str, int, int], list[int]]  # (key, dimension, size) -> places to cut at


def global_tensors(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The stacked tensors of a Megatron checkpoint, by its table of keys."""
    found: dict[str, torch.Tensor] = {}
    for t in checkpoint_tensors(architecture(config)):
        rows = torch.cat([tensors[run.hf_name][run.hf_row : run.hf_row + run.rows] for run in t.runs])
        found.setdefault(t.key, torch.empty(t.global_shape, dtype=rows.dtype))[t.lead] = rows
    return found


def write_checkpoint(folder: Path, tensors: dict[str, torch.Tensor], cuts: Cuts = lambda key, dim, size: []) -> None:
    """As PyTorch writes one: every tensor as a grid of chunks, several of them in a file."""
    entries, results = {}, []
    for number, (key, tensor) in enumerate(tensors.items()):
        edges = [[0, *sorted(cuts(key, dim, size)), size] for dim, size in enumerate(tensor.shape)]
        chunks = []
        for box in itertools.product(*(list(itertools.pairwise(sorted(set(e)))) for e in edges)):
            offsets, sizes = torch.Size(a for a, _ in box), torch.Size(b - a for a, b in box)
            with (folder / f"__{number % 2}_0.distcp").open("ab") as file:
                start = file.tell()
                torch.save(tensor[tuple(slice(a, b) for a, b in box)].clone(), file)
                where = _StorageInfo(f"__{number % 2}_0.distcp", start, file.tell() - start)
            chunks.append(ChunkStorageMetadata(offsets, sizes))
            results.append(WriteResult(MetadataIndex(key, offsets), where.length, where))
        entries[key] = TensorStorageMetadata(TensorProperties(dtype=tensor.dtype), tensor.shape, chunks)
    FileSystemWriter(folder).finish(Metadata(entries), [results])
    (folder / "metadata.json").write_text(json.dumps(DESCRIPTION))


def read_all(folder: Path, config: dict[str, Any], prefix: str = "") -> dict[str, torch.Tensor]:
    arch = architecture(config)
    with closing(MegatronWeights(folder, arch, prefix)) as weights:
        found = {}
        for name, shape in hf_tensors(arch).items():
            found[name] = torch.empty(shape, dtype=weights.dtype(name))
            weights.read_rows(name, 0, found[name])
        return found


@pytest.mark.long
@given(config=configs(), data=st.data())
def test_weights_are_read_however_they_are_cut_into_chunks(config: dict[str, Any], data: st.DataObject) -> None:
    """Over layers, experts, rows and columns; this covers every tensor, pipeline and expert parallel layout."""

    def cuts(key: str, dim: int, size: int) -> list[int]:
        return data.draw(st.lists(st.integers(1, size - 1), max_size=2, unique=True)) if size > 1 else []

    tensors = random_tensors(config, torch.float16)
    with tempfile.TemporaryDirectory() as name:
        write_checkpoint(Path(name), global_tensors(config, tensors), cuts)
        assert_bit_equal(read_all(Path(name), config), tensors)


def test_a_padded_vocabulary_and_state_beside_the_weights_are_passed_over(tmp_path: Path) -> None:
    tensors = random_tensors(TINY, torch.float32)
    stored = global_tensors(TINY, tensors)
    for key in ("embedding.word_embeddings.weight", "output_layer.weight"):
        stored[key] = torch.cat([stored[key], torch.zeros(121, 6)])
    stored["optimizer.state.exp_avg.decoder.final_layernorm.weight"] = torch.zeros(6)
    stored["exp_avg.decoder.final_layernorm.weight"] = torch.zeros(6)
    stored["decoder.layers.mlp.linear_fc1._extra_state"] = torch.zeros(6)
    write_checkpoint(tmp_path, stored)
    assert_bit_equal(read_all(tmp_path, TINY), tensors)


def test_the_teacher_is_read_under_its_prefix(tmp_path: Path) -> None:
    policy, teacher = (random_tensors(TINY_MOE, torch.float32, seed) for seed in (1, 2))
    of_teacher = {f"teacher.{key}": tensor for key, tensor in global_tensors(TINY_MOE, teacher).items()}
    write_checkpoint(tmp_path, global_tensors(TINY_MOE, policy) | of_teacher)
    assert_bit_equal(read_all(tmp_path, TINY_MOE), policy)
    assert_bit_equal(read_all(tmp_path, TINY_MOE, "teacher."), teacher)


def test_the_norm_of_expert_layers_is_found_under_both_specs_keys(tmp_path: Path) -> None:
    tensors = random_tensors(TINY_MOE, torch.float32)
    stored = global_tensors(TINY_MOE, tensors)
    stored["decoder.layers.mlp.linear_fc1.layer_norm_weight"] = stored.pop("decoder.layers.pre_mlp_layernorm.weight")
    write_checkpoint(tmp_path, stored)
    assert_bit_equal(read_all(tmp_path, TINY_MOE), tensors)


class TestRefusals:
    @pytest.fixture
    def stored(self) -> dict[str, torch.Tensor]:
        return global_tensors(TINY, random_tensors(TINY, torch.float32))

    def refused(self, folder: Path, message: str) -> None:
        with pytest.raises(InputError, match=message):
            read_all(folder, TINY)

    def test_missing_tensor(self, tmp_path: Path, stored: dict[str, torch.Tensor]) -> None:
        del stored["decoder.layers.mlp.linear_fc2.weight"]
        write_checkpoint(tmp_path, stored)
        self.refused(tmp_path, "tensor 'decoder.layers.mlp.linear_fc2.weight' is missing")

    def test_tensor_too_many(self, tmp_path: Path, stored: dict[str, torch.Tensor]) -> None:
        write_checkpoint(tmp_path, stored | {"decoder.layers.mlp.linear_fc1.bias": torch.zeros(2, 10)})
        self.refused(tmp_path, "no place in a qwen3 model, first 'decoder.layers.mlp.linear_fc1.bias'")

    def test_another_shape(self, tmp_path: Path, stored: dict[str, torch.Tensor]) -> None:
        stored["decoder.layers.self_attention.linear_proj.weight"] = torch.zeros(3, 6, 8)
        write_checkpoint(tmp_path, stored)
        self.refused(tmp_path, r"linear_proj.weight' has shape \(3, 6, 8\), the qwen3 config asks for \(2, 6, 8\)")

    def test_a_vocabulary_that_is_too_small(self, tmp_path: Path, stored: dict[str, torch.Tensor]) -> None:
        stored["embedding.word_embeddings.weight"] = torch.zeros(6, 6)
        write_checkpoint(tmp_path, stored)
        self.refused(tmp_path, r"word_embeddings.weight' has shape \(6, 6\)")

    def test_integers(self, tmp_path: Path, stored: dict[str, torch.Tensor]) -> None:
        stored["decoder.final_layernorm.weight"] = torch.zeros(6, dtype=torch.int64)
        write_checkpoint(tmp_path, stored)
        self.refused(tmp_path, "final_layernorm.weight' has dtype torch.int64; supported: floats")

    @staticmethod
    def change(folder: Path, edit: Callable[[Metadata], object]) -> None:
        metadata = pickle.loads((folder / ".metadata").read_bytes())
        edit(metadata)
        (folder / ".metadata").write_bytes(pickle.dumps(metadata))

    @pytest.mark.parametrize(
        ("edit", "message"),
        [
            (lambda chunks: chunks.pop(), "blocks cover"),
            (
                lambda chunks: chunks.__setitem__(0, ChunkStorageMetadata(torch.Size((0, 0)), torch.Size((4, 6)))),
                "overlap",
            ),
            (lambda chunks: chunks.append(chunks[0]), "lie in one place"),
            (
                lambda chunks: chunks.__setitem__(0, ChunkStorageMetadata(torch.Size((0, 0)), torch.Size((7, 60)))),
                "not inside of it",
            ),
            (
                lambda chunks: chunks.__setitem__(0, ChunkStorageMetadata(torch.Size((0, -1)), torch.Size((7, 6)))),
                "not inside of it",
            ),
        ],
        ids=["a hole", "an overlap", "twice", "beyond the end", "before the start"],
    )
    def test_chunks_that_do_not_tile(
        self, tmp_path: Path, stored: dict[str, torch.Tensor], edit: Callable[[list[Any]], object], message: str
    ) -> None:
        key = "embedding.word_embeddings.weight"
        write_checkpoint(tmp_path, stored, lambda k, dim, size: [3] if k == key and dim == 0 else [])
        self.change(tmp_path, lambda metadata: edit(metadata.state_dict_metadata[key].chunks))
        self.refused(tmp_path, message)

    def test_a_chunk_that_is_stored_nowhere(self, tmp_path: Path, stored: dict[str, torch.Tensor]) -> None:
        write_checkpoint(tmp_path, stored)
        self.change(tmp_path, lambda m: m.storage_data.pop(MetadataIndex("output_layer.weight", torch.Size((0, 0)))))
        self.refused(tmp_path, "the chunk of 'output_layer.weight' at .* is not stored anywhere")

    def test_a_chunk_of_another_shape_than_the_metadata_says(
        self, tmp_path: Path, stored: dict[str, torch.Tensor]
    ) -> None:
        write_checkpoint(tmp_path, stored)

        def edit(metadata: Metadata) -> None:
            where = metadata.storage_data
            norm, head = self.indices(metadata)
            where[head], where[norm] = where[norm], where[head]

        self.change(tmp_path, edit)
        self.refused(tmp_path, "the chunk of .* at byte .* is not what .metadata says")

    def test_two_chunks_in_one_place(self, tmp_path: Path, stored: dict[str, torch.Tensor]) -> None:
        write_checkpoint(tmp_path, stored)

        def edit(metadata: Metadata) -> None:
            norm, head = self.indices(metadata)
            metadata.storage_data[head] = metadata.storage_data[norm]

        self.change(tmp_path, edit)
        self.refused(tmp_path, "chunks of .* and .* lie in one place")

    @staticmethod
    def indices(metadata: Metadata) -> list[MetadataIndex]:
        keys = ("decoder.final_layernorm.weight", "output_layer.weight")
        return [next(index for index in metadata.storage_data if index.fqn == key) for key in keys]

    def test_a_chunk_outside_of_the_checkpoint(self, tmp_path: Path, stored: dict[str, torch.Tensor]) -> None:
        write_checkpoint(tmp_path, stored)

        def edit(metadata: Metadata) -> None:
            index = next(iter(metadata.storage_data))
            old = metadata.storage_data[index]
            metadata.storage_data[index] = _StorageInfo("../other.distcp", old.offset, old.length)

        self.change(tmp_path, edit)
        self.refused(tmp_path, "outside of the checkpoint")

    def test_a_missing_file(self, tmp_path: Path, stored: dict[str, torch.Tensor]) -> None:
        write_checkpoint(tmp_path, stored)
        (tmp_path / "__1_0.distcp").unlink()
        self.refused(tmp_path, "__1_0.distcp is missing; it holds a chunk of")

    @pytest.mark.parametrize("keep", [0.0, 0.5, 0.98])
    def test_a_truncated_file(self, tmp_path: Path, stored: dict[str, torch.Tensor], keep: float) -> None:
        write_checkpoint(tmp_path, stored)
        file = tmp_path / "__0_0.distcp"
        os.truncate(file, int(file.stat().st_size * keep))
        self.refused(tmp_path, "__0_0.distcp: the chunk of .* is damaged")

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("metadata.json", None, "no metadata.json"),
            ("metadata.json", b"{", "metadata.json: damaged"),
            ("metadata.json", b'{"sharded_backend": "zarr"}', "format 'zarr'; supported: torch_dist"),
            (".metadata", None, ".metadata: not readable"),
            (".metadata", b"", ".metadata: not readable"),
            (".metadata", pickle.dumps(Metadata({}, storage_data=None)), ".metadata: not the metadata"),
            (".metadata", pickle.dumps({"a": 1}), ".metadata: not the metadata"),
            (".metadata", pickle.dumps(Metadata({"a": 1, 2: 3}, storage_data={})), ".metadata: not the metadata"),
        ],
    )
    def test_what_describes_the_checkpoint_is_damaged(
        self, tmp_path: Path, stored: dict[str, torch.Tensor], name: str, content: bytes | None, message: str
    ) -> None:
        write_checkpoint(tmp_path, stored)
        (tmp_path / name).unlink()
        if content is not None:
            (tmp_path / name).write_bytes(content)
        self.refused(tmp_path, message)


class _Hostile:
    """Unpickled without care it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


class _HostileEval(_Hostile):
    def __reduce__(self) -> tuple[Any, ...]:
        return eval, (f"open({str(self.path)!r}, 'w').close()",)


@pytest.mark.parametrize("kind", [_Hostile, _HostileEval])
def test_metadata_that_would_run_code_is_refused_and_does_not_run(tmp_path: Path, kind: type[_Hostile]) -> None:
    write_checkpoint(tmp_path, global_tensors(TINY, random_tensors(TINY, torch.float32)))
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Metadata({"a": kind(tmp_path / "ran")}, storage_data={})))
    with pytest.raises(InputError, match="does not belong into a checkpoint's metadata"):
        read_metadata(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", [_Hostile, _HostileEval])
def test_a_chunk_that_would_run_code_is_refused_and_does_not_run(tmp_path: Path, kind: type[_Hostile]) -> None:
    stored = global_tensors(TINY, random_tensors(TINY, torch.float32))
    write_checkpoint(tmp_path, stored)
    where = read_metadata(tmp_path).storage_data
    first = next(w for w in where.values() if w.relative_path == "__0_0.distcp" and w.offset == 0)
    file = tmp_path / first.relative_path
    with tempfile.TemporaryFile() as hostile:
        torch.save(kind(tmp_path / "ran"), hostile)
        hostile.seek(0)
        archive = hostile.read()
    file.write_bytes(archive + file.read_bytes()[first.length :].rjust(file.stat().st_size - len(archive), b"\0"))
    with pytest.raises(InputError, match="is damaged"):
        read_all(tmp_path, TINY)
    assert not (tmp_path / "ran").exists()


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted")
    source = write_hf(folder / "hf", TINY, random_tensors(TINY, torch.float32))
    to_megatron(source, folder / "megatron")
    return folder / "megatron"


@given(
    place=st.floats(0, 1, exclude_max=True), value=st.integers(1, 255), name=st.sampled_from([".metadata", "chunks"])
)
def test_a_flipped_byte_is_harmless_or_an_input_error(converted: Path, place: float, value: int, name: str) -> None:
    """Bits of the weights themselves can change unseen here: the manifest is there for that (test_verify)."""
    file = (
        converted / ".metadata"
        if name == ".metadata"
        else max(converted.glob("*.distcp"), key=lambda f: f.stat().st_size)
    )
    content = file.read_bytes()
    damaged = bytearray(content)
    damaged[int(place * len(damaged))] ^= value
    file.write_bytes(damaged)
    try:
        with suppress(InputError):  # anything else is a failure
            read_all(converted, TINY)
    finally:
        file.write_bytes(content)


def test_a_write_that_stops_short_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.save does not look at the count that a write returns."""
    whole = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, start: whole(file, bytes(data)[:100], start))
    tensor = torch.arange(1000)
    with closing(ChunkFile(tmp_path / "a")) as file:
        torch.save(tensor, file)  # type: ignore[arg-type]
    assert torch.equal(torch.load(tmp_path / "a", weights_only=True), tensor)
