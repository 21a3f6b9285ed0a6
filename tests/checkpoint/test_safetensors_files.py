"""Safetensors files: what the library writes is read bit by bit and the other way round; what is damaged is refused."""

import json
import struct
import tempfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from megatron_coreward.checkpoint.safetensors_files import INDEX, HfWeights, HfWriter, read_header
from megatron_coreward.errors import InputError
from tests.checkpoint.models import TINY, architecture, assert_bit_equal, random_tensors, read_hf, write_hf

shapes = st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple)
dtypes = st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16])
models = st.dictionaries(st.text(min_size=1, max_size=8), st.tuples(shapes, dtypes), min_size=1, max_size=6)


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    nbytes = torch.Size(shape).numel() * dtype.itemsize
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8).view(dtype).view(shape)


@pytest.mark.long
@given(model=models, first=st.integers(0, 5))
def test_any_rows_of_what_the_library_wrote_are_read(model: dict[str, Any], first: int) -> None:
    tensors = {name: random_tensor(*kind) for name, kind in model.items() if name != "__metadata__"}
    with tempfile.TemporaryDirectory() as folder:
        save_file(tensors, Path(folder) / "model.safetensors")
        with closing(HfWeights(Path(folder))) as weights:
            found = {}
            for name, tensor in tensors.items():
                start = min(first, len(tensor) - 1)
                found[name] = torch.empty_like(tensor[start:])
                weights.read_rows(name, start, found[name])
                tensors[name] = tensor[start:]
            assert_bit_equal(found, tensors)


@given(model=models, shard_bytes=st.integers(1, 400))
def test_what_is_written_the_library_reads(model: dict[str, Any], shard_bytes: int) -> None:
    """Mixed dtypes of odd sizes too: the library refuses tensors that lie at no multiple of their element size."""
    tensors = {name: random_tensor(*kind) for name, kind in model.items() if name != "__metadata__"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        by_name = {name: tuple(t.shape) for name, t in tensors.items()}, {name: t.dtype for name, t in tensors.items()}
        with closing(HfWriter(folder, *by_name, shard_bytes)) as writer:
            for name, tensor in tensors.items():
                for row in reversed(range(len(tensor))):
                    writer.write_rows(name, row, tensor[row : row + 1].contiguous())
        assert_bit_equal(read_hf(folder), tensors)
        for file in folder.glob("*.safetensors"):
            found = read_header(file)
            assert all(t.start % t.dtype.itemsize == 0 for t in found.values())
            assert len(found) == 1 or sum(t.nbytes for t in found.values()) <= shard_bytes
        with closing(HfWeights(folder)) as weights:  # the index agrees with the files
            assert weights.tensors.keys() == tensors.keys()


def rewrite(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes the header of a file and leaves its data as they are."""
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


NORM = "model.norm.weight"

DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda f: f.write_bytes(b""), "not a readable safetensors file"),
    "a few bytes": (lambda f: f.write_bytes(b"abc"), "not a readable safetensors file"),
    "no header": (lambda f: f.write_bytes(b"\xff" * 64), "not a safetensors file, or truncated"),
    "header is no JSON": (
        lambda f: f.write_bytes(struct.pack("<Q", 8) + b"{[}     "),
        "not a readable safetensors file",
    ),
    "header is a list": (
        lambda f: f.write_bytes(struct.pack("<Q", 8) + b"[]      "),
        "not a readable safetensors file",
    ),
    "truncated": (lambda f: f.write_bytes(f.read_bytes()[:-1]), "truncated"),
    "bytes left over": (lambda f: f.write_bytes(f.read_bytes() + b"x"), "bytes are left over"),
    "hole": (lambda f: rewrite(f, lambda h: shift(h, 2)), "starts at byte"),
    "overlap": (lambda f: rewrite(f, lambda h: shift(h, -2)), "starts at byte"),
    "offsets beside shape": (lambda f: rewrite(f, lambda h: h[NORM].update(shape=[5])), f"{NORM}.*shape and dtype"),
    "negative shape": (lambda f: rewrite(f, lambda h: h[NORM].update(shape=[-6, -1])), f"{NORM}.*shape"),
    "shape of fractions": (lambda f: rewrite(f, lambda h: h[NORM].update(shape=[6.5])), "not a readable"),
    "integers": (lambda f: rewrite(f, lambda h: h[NORM].update(dtype="I32")), f"{NORM}.*dtype I32; supported"),
    "no dtype": (lambda f: rewrite(f, lambda h: h[NORM].pop("dtype")), "not a readable"),
}


def shift(header: dict[str, Any], by: int) -> None:
    last = max((h for name, h in header.items() if name != "__metadata__"), key=lambda h: int(h["data_offsets"][0]))
    last["data_offsets"] = [offset + by for offset in last["data_offsets"]]


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_file_is_named_with_what_is_wrong(tmp_path: Path, name: str) -> None:
    path = write_hf(tmp_path / "m", TINY, random_tensors(TINY, torch.float32))
    damage, message = DAMAGES[name]
    damage(path / "model.safetensors")
    with pytest.raises(InputError, match=message) as caught:
        HfWeights(path)
    assert "model.safetensors" in str(caught.value)


@given(cut=st.integers(0, 2000))
def test_no_prefix_of_a_file_is_accepted(cut: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = write_hf(Path(folder) / "m", TINY, random_tensors(TINY, torch.bfloat16))
        file = path / "model.safetensors"
        content = file.read_bytes()
        file.write_bytes(content[: min(cut, len(content) - 1)])
        with pytest.raises(InputError, match="model.safetensors"):
            HfWeights(path)


def test_a_tensor_twice_in_one_header_is_refused(tmp_path: Path) -> None:
    path = write_hf(tmp_path / "m", TINY, random_tensors(TINY, torch.float32))
    text = (
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    )
    (path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 4)
    with pytest.raises(InputError, match="'a' appears twice"):
        HfWeights(path)


class TestSeveralFiles:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        return write_hf(tmp_path / "m", TINY, random_tensors(TINY, torch.float32), num_files=3)

    @staticmethod
    def change_index(path: Path, change: Callable[[dict[str, str]], object]) -> None:
        index = json.loads((path / INDEX).read_text())
        change(index["weight_map"])
        (path / INDEX).write_text(json.dumps(index))

    def refused(self, path: Path, message: str) -> None:
        with pytest.raises(InputError, match=message):
            HfWeights(path)

    def test_a_file_that_the_index_names_is_missing(self, path: Path) -> None:
        (path / "model-00002-of-00003.safetensors").unlink()
        self.refused(path, "names model-00002-of-00003.safetensors, which does not exist")

    def test_one_of_several_numbered_files_is_missing_and_there_is_no_index(self, path: Path) -> None:
        (path / INDEX).unlink()
        HfWeights(path).close()
        (path / "model-00003-of-00003.safetensors").unlink()
        self.refused(path, "model-00003-of-00003.safetensors is missing")

    def test_the_index_lacks_a_tensor(self, path: Path) -> None:
        self.change_index(path, lambda names: names.pop(NORM))
        self.refused(path, f"disagrees with .* on tensor '{NORM}': the file holds it")

    def test_the_index_names_a_tensor_that_is_in_no_file(self, path: Path) -> None:
        self.change_index(path, lambda names: names.update(more="model-00001-of-00003.safetensors"))
        self.refused(path, "on tensor 'more': the file does not hold it")

    def test_the_index_puts_a_tensor_into_another_file(self, path: Path) -> None:
        first, second = (f"model-0000{i}-of-00003.safetensors" for i in (1, 2))
        moved = next(iter(read_header(path / second)))
        self.change_index(path, lambda names: names.update({moved: first}))
        self.refused(path, "disagrees with")

    def test_the_index_leaves_the_directory(self, path: Path) -> None:
        self.change_index(path, lambda names: names.update({NORM: "../other.safetensors"}))
        self.refused(path, "outside of the model's directory")

    @pytest.mark.parametrize("text", ["", "[]", '{"weight_map": 3}', '{"weight_map": {"a": "x", "a": "y"}}'])
    def test_an_index_that_is_none(self, path: Path, text: str) -> None:
        (path / INDEX).write_text(text)
        self.refused(path, "not an index of safetensors files")

    def test_a_second_set_of_weights_beside_the_index(self, path: Path) -> None:
        save_file({"a": torch.zeros(1)}, path / "model.safetensors")
        self.refused(path, "model.safetensors lies beside the files that")

    def test_a_tensor_in_two_files(self, path: Path) -> None:
        (path / INDEX).unlink()
        save_file({NORM: torch.zeros(6)}, path / "extra.safetensors")
        self.refused(path, f"tensor '{NORM}' is in .* and in ")


class TestCheck:
    def check(self, tmp_path: Path, tensors: dict[str, torch.Tensor], **config: Any) -> list[str]:
        path = write_hf(tmp_path / "m", TINY | config, tensors)
        with closing(HfWeights(path)) as weights:
            return weights.check(architecture(TINY | config))

    def test_the_tensors_of_the_architecture_pass(self, tmp_path: Path) -> None:
        assert self.check(tmp_path, random_tensors(TINY, torch.float32)) == []

    def test_a_missing_tensor_is_named(self, tmp_path: Path) -> None:
        tensors = random_tensors(TINY, torch.float32)
        del tensors["model.layers.1.mlp.up_proj.weight"]
        with pytest.raises(InputError, match="1 tensors are missing, first 'model.layers.1.mlp.up_proj.weight'"):
            self.check(tmp_path, tensors)

    def test_a_tensor_too_many_is_named(self, tmp_path: Path) -> None:
        tensors = random_tensors(TINY, torch.float32) | {"model.layers.2.mlp.up_proj.weight": torch.zeros(1)}
        with pytest.raises(InputError, match="no place in a qwen3 model, first 'model.layers.2.mlp.up_proj.weight'"):
            self.check(tmp_path, tensors)

    def test_another_shape_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(
            InputError, match=r"'model.embed_tokens.weight' has shape \(7, 6\), config.json asks for \(8"
        ):
            self.check(tmp_path, random_tensors(TINY, torch.float32), vocab_size=8)

    def test_buffers_that_follow_from_the_config_are_passed_over(self, tmp_path: Path) -> None:
        name = "model.layers.0.self_attn.rotary_emb.inv_freq"
        assert self.check(tmp_path, random_tensors(TINY, torch.float32) | {name: torch.zeros(1)}) == [name]

    def test_a_tied_model_may_repeat_its_embedding_as_its_head_but_have_no_other(self, tmp_path: Path) -> None:
        tensors = random_tensors(TINY, torch.bfloat16)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        assert self.check(tmp_path, tensors, tie_word_embeddings=True) == ["lm_head.weight"]
        tensors["lm_head.weight"].view(torch.uint8)[-1, -1] ^= 1
        (tmp_path / "other").mkdir()
        with pytest.raises(InputError, match="tie_word_embeddings true, but 'lm_head.weight' is not the embedding"):
            self.check(tmp_path / "other", tensors, tie_word_embeddings=True)
