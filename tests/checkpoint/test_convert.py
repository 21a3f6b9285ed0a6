"""Conversion: bit-exact there and back, a target whole or not at all, one clear error for everything that is wrong."""

import errno
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_coreward.checkpoint import convert, new_directory, pieces
from megatron_coreward.checkpoint.convert import to_hf, to_megatron
from megatron_coreward.checkpoint.manifest import MANIFEST, read_manifest
from megatron_coreward.checkpoint.verify import open_checkpoint, verify
from megatron_coreward.cli import main
from megatron_coreward.errors import InputError, RunError
from tests.checkpoint.models import (
    TINY,
    TINY_MOE,
    assert_bit_equal,
    configs,
    random_tensors,
    read_hf,
    write_hf,
)

ROOT = Path(__file__).parents[2]


@pytest.mark.long
@settings(max_examples=40)
@given(
    config=configs(),
    dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.float16]),
    num_files=st.integers(1, 4),
    piece_bytes=st.integers(1, 400),  # pieces end within fused tensors, heads and experts
    shard_bytes=st.integers(1, 4000),
    workers=st.integers(1, 3),
)
def test_the_round_trip_is_bit_exact(
    config: dict[str, Any], dtype: torch.dtype, num_files: int, piece_bytes: int, shard_bytes: int, workers: int
) -> None:
    tensors = random_tensors(config, dtype)
    with tempfile.TemporaryDirectory() as name, mock.patch.object(convert, "PIECE_BYTES", piece_bytes):
        folder = Path(name)
        source = write_hf(folder / "hf", config, tensors, num_files)
        to_megatron(source, folder / "megatron", workers=workers)
        to_hf(folder / "megatron", folder / "back", shard_bytes=shard_bytes, workers=workers)
        assert_bit_equal(read_hf(folder / "back"), tensors)
        assert read_manifest(folder / "back") == read_manifest(folder / "megatron") is not None
        assert verify(open_checkpoint(folder / "megatron"), open_checkpoint(folder / "back")).ok
        for file in ("tokenizer.json", "generation_config.json"):
            assert (folder / "back" / file).read_bytes() == (source / file).read_bytes()
        found = json.loads((folder / "back" / "config.json").read_text())
        name = str(dtype).removeprefix("torch.")
        assert found == config | {"dtype": name, "torch_dtype": name}


def read_with_torch(folder: Path, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors through PyTorch's own reader."""
    import torch.distributed.checkpoint as dcp

    state = {key: torch.zeros(shape, dtype=dtype) for key, shape in shapes.items()}
    dcp.load(state, checkpoint_id=str(folder), no_dist=True)
    return state


def test_a_dense_model_lies_as_megatron_has_it(tmp_path: Path) -> None:
    """The layout, written out once more by hand, and read by PyTorch: QKV by groups, gate above up, layers stacked."""
    config = TINY | {"model_type": "qwen2"}
    t = random_tensors(config, torch.float32)
    to_megatron(write_hf(tmp_path / "hf", config, t), tmp_path / "m")

    def qkv(layer: int, kind: str) -> torch.Tensor:
        q, k, v = (t[f"model.layers.{layer}.self_attn.{p}_proj.{kind}"] for p in "qkv")
        return torch.cat([q[:4], k[:2], v[:2], q[4:], k[2:], v[2:]])  # 2 groups of 2 query heads, heads of 2

    def each(name: str) -> torch.Tensor:
        return torch.stack([t[f"model.layers.{layer}.{name}.weight"] for layer in range(2)])

    expected = {
        "embedding.word_embeddings.weight": t["model.embed_tokens.weight"],
        "output_layer.weight": t["lm_head.weight"],
        "decoder.final_layernorm.weight": t["model.norm.weight"],
        "decoder.layers.self_attention.linear_qkv.layer_norm_weight": each("input_layernorm"),
        "decoder.layers.self_attention.linear_qkv.weight": torch.stack([qkv(0, "weight"), qkv(1, "weight")]),
        "decoder.layers.self_attention.linear_qkv.bias": torch.stack([qkv(0, "bias"), qkv(1, "bias")]),
        "decoder.layers.self_attention.linear_proj.weight": each("self_attn.o_proj"),
        "decoder.layers.mlp.linear_fc1.layer_norm_weight": each("post_attention_layernorm"),
        "decoder.layers.mlp.linear_fc1.weight": torch.cat([each("mlp.gate_proj"), each("mlp.up_proj")], dim=1),
        "decoder.layers.mlp.linear_fc2.weight": each("mlp.down_proj"),
    }
    found = read_with_torch(tmp_path / "m", {k: tuple(v.shape) for k, v in expected.items()}, torch.float32)
    assert_bit_equal(found, expected)


def test_experts_lie_as_megatron_has_them(tmp_path: Path) -> None:
    t = random_tensors(TINY_MOE, torch.float32)
    to_megatron(write_hf(tmp_path / "hf", TINY_MOE, t), tmp_path / "m")

    def experts(*projections: str) -> torch.Tensor:
        return torch.stack(
            [
                torch.stack(
                    [
                        torch.cat([t[f"model.layers.{i}.mlp.experts.{e}.{p}.weight"] for p in projections])
                        for e in range(3)
                    ]
                )
                for i in range(2)
            ]
        )

    def each(name: str) -> torch.Tensor:
        return torch.stack([t[f"model.layers.{layer}.{name}.weight"] for layer in range(2)])

    expected = {
        "decoder.layers.mlp.experts.experts.linear_fc1.weight": experts("gate_proj", "up_proj"),
        "decoder.layers.mlp.experts.experts.linear_fc2.weight": experts("down_proj"),
        "decoder.layers.mlp.router.weight": each("mlp.gate"),
        "decoder.layers.pre_mlp_layernorm.weight": each("post_attention_layernorm"),
        "decoder.layers.self_attention.q_layernorm.weight": each("self_attn.q_norm"),
        "decoder.layers.self_attention.k_layernorm.weight": each("self_attn.k_norm"),
    }
    found = read_with_torch(tmp_path / "m", {k: tuple(v.shape) for k, v in expected.items()}, torch.float32)
    assert_bit_equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("direction", ["to-megatron", "to-hf"])
def test_a_cast_gives_what_torch_gives(tmp_path: Path, dtype: torch.dtype, direction: str) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(t.shape, generator=generator) for name, t in random_tensors(TINY, torch.float32).items()
    }
    first, second = (dtype, None) if direction == "to-megatron" else (None, dtype)
    to_megatron(write_hf(tmp_path / "hf", TINY, tensors), tmp_path / "m", dtype=first)
    to_hf(tmp_path / "m", tmp_path / "back", dtype=second)
    assert_bit_equal(read_hf(tmp_path / "back"), {name: t.to(dtype) for name, t in tensors.items()})
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("direction", ["to-megatron", "to-hf"])
def test_a_cast_keeps_infinities_but_makes_none(tmp_path: Path, direction: str) -> None:
    tensors = {name: torch.zeros(t.shape) for name, t in random_tensors(TINY, torch.float32).items()}
    tensors["model.norm.weight"][:3] = torch.tensor([torch.inf, -torch.inf, torch.nan])
    first, second = (torch.float16, None) if direction == "to-megatron" else (None, torch.float16)
    to_megatron(write_hf(tmp_path / "hf", TINY, tensors), tmp_path / "m", dtype=first)
    to_hf(tmp_path / "m", tmp_path / "back", dtype=second)
    found = read_hf(tmp_path / "back")["model.norm.weight"]
    assert found[:2].tolist() == [torch.inf, -torch.inf]
    assert found[2].isnan()


def test_dtypes_that_differ_from_tensor_to_tensor_are_kept(tmp_path: Path) -> None:
    """The router in fp32 beside bf16 weights; config.json then says nothing new."""
    tensors = random_tensors(TINY_MOE, torch.bfloat16)
    for layer in range(2):
        name = f"model.layers.{layer}.mlp.gate.weight"
        tensors[name] = torch.randn(tensors[name].shape)
    to_megatron(write_hf(tmp_path / "hf", TINY_MOE, tensors), tmp_path / "m")
    to_hf(tmp_path / "m", tmp_path / "back", shard_bytes=300)
    assert_bit_equal(read_hf(tmp_path / "back"), tensors)
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == TINY_MOE


def test_no_piece_is_larger_than_the_buffers_allow(tmp_path: Path) -> None:
    source = write_hf(tmp_path / "hf", TINY, random_tensors(TINY, torch.float32))
    seen: list[int] = []
    read = pieces.OpenFiles.read

    def spy(self: pieces.OpenFiles, path: Path, start: int, out: torch.Tensor) -> None:
        seen.append(out.nbytes)
        read(self, path, start, out)

    with mock.patch.object(pieces.OpenFiles, "read", spy), mock.patch.object(convert, "BUFFER_BYTES", 2 * 3 * 70):
        to_megatron(source, tmp_path / "m", workers=2)
        to_hf(tmp_path / "m", tmp_path / "back", workers=2)
    assert 48 <= max(seen) <= 70


def drop(path: Path, name: str) -> None:
    rewrite_all(path, lambda tensors: tensors.pop(name))


def rewrite_all(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


def set_config(path: Path, **changes: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))


HUGE, NORM, FC = torch.tensor([7e4] * 6), "model.norm.weight", "model.layers.0.mlp.up_proj.weight"

BAD_HF: dict[str, tuple[Callable[[Path], object], str]] = {
    "no directory": (lambda p: p.rename(p.with_name("elsewhere")), "no config.json in"),
    "no config": (lambda p: (p / "config.json").unlink(), "no config.json in"),
    "config is no JSON": (lambda p: (p / "config.json").write_text("{"), "config.json: not valid JSON"),
    "another family": (lambda p: set_config(p, model_type="gpt2"), "model_type is 'gpt2'; supported"),
    "another size": (lambda p: set_config(p, intermediate_size=6), "gate_proj.weight' has shape"),
    "another depth": (lambda p: set_config(p, num_hidden_layers=3), "'model.layers.2.input_layernorm.weight'"),
    "a bias": (
        lambda p: set_config(p, model_type="qwen2"),
        "tensors are missing, first 'model.layers.0.self_attn.q_proj.bias'",
    ),
    "no weights": (lambda p: (p / "model.safetensors").unlink(), "no *.safetensors files in"),
    "truncated": (lambda p: os.truncate(p / "model.safetensors", 3000), "model.safetensors: truncated"),
    "missing tensor": (lambda p: drop(p, FC), f"1 tensors are missing, first '{FC}'"),
    "extra tensor": (
        lambda p: rewrite_all(p, lambda t: t.update(more=HUGE)),
        "no place in a qwen3 model, first 'more'",
    ),
    "integers": (
        lambda p: rewrite_all(p, lambda t: t.update({NORM: HUGE.int()})),
        f"'{NORM}' has dtype I32; supported",
    ),
    "tied with a head": (lambda p: set_config(p, tie_word_embeddings=True), "'lm_head.weight' is not the embedding"),
    "fused tensors of two dtypes": (
        lambda p: rewrite_all(p, lambda t: t.update({FC: t[FC].half()})),
        "become one tensor, but have different dtypes: choose one with --dtype",
    ),
    "layers of two dtypes": (
        lambda p: rewrite_all(p, lambda t: t.update({n: t[n].half() for n in t if "layers.1.mlp" in n})),
        "of other layers is torch.float32: choose one with --dtype",
    ),
}


def errors_of(capsys: pytest.CaptureFixture[str]) -> str:
    """What the command said: one line."""
    text = capsys.readouterr().err
    assert text.count("\n") == 1, text
    return text


def run(*arguments: object) -> int:
    return main(["convert", *map(str, arguments)])


class TestBadInput:
    @pytest.fixture
    def source(self, tmp_path: Path) -> Path:
        return write_hf(
            tmp_path / "hf", TINY, {k: torch.randn(v.shape) for k, v in random_tensors(TINY, torch.float32).items()}
        )

    def names(self, folder: Path) -> set[str]:
        return {path.name for path in folder.iterdir()}

    @pytest.mark.parametrize("name", BAD_HF)
    def test_a_bad_model_is_one_clear_error_and_no_target(
        self, tmp_path: Path, source: Path, name: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        damage, message = BAD_HF[name]
        damage(source)
        before = self.names(tmp_path)
        assert run("to-megatron", source, tmp_path / "m") == 2
        assert self.names(tmp_path) == before
        assert message in errors_of(capsys)

    @pytest.mark.parametrize("direction", ["to-megatron", "to-hf"])
    def test_values_beyond_float16(
        self, tmp_path: Path, source: Path, direction: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        rewrite_all(source, lambda tensors: tensors.update({NORM: HUGE}))
        to_megatron(source, tmp_path / "m")
        before = self.names(tmp_path)
        given = source if direction == "to-megatron" else tmp_path / "m"
        assert run(direction, given, tmp_path / "new", "--dtype", "float16") == 2
        assert f"tensor '{NORM}' has values beyond the range of torch.float16; choose another --dtype" in errors_of(
            capsys
        )
        assert self.names(tmp_path) == before
        assert run(direction, given, tmp_path / "new", "--dtype", "bfloat16") == 0

    @pytest.mark.parametrize("direction", ["to-megatron", "to-hf"])
    def test_a_target_that_exists_is_left_alone(
        self, tmp_path: Path, source: Path, direction: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        to_megatron(source, tmp_path / "m")
        given = source if direction == "to-megatron" else tmp_path / "m"
        (tmp_path / "file").write_text("mine")
        (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
        (tmp_path / "empty").mkdir()
        for name in ("file", "dangling", "empty"):
            assert run(direction, given, tmp_path / name) == 2
            assert f"{tmp_path / name} exists; choose another target" in errors_of(capsys)
        assert (tmp_path / "file").read_text() == "mine"
        assert run(direction, given, tmp_path / "no" / "where") == 2
        assert f"{tmp_path / 'no'} is no directory" in errors_of(capsys)

    def test_a_target_that_appears_in_the_meantime_is_left_alone(self, tmp_path: Path, source: Path) -> None:
        target = tmp_path / "m"
        with pytest.raises(InputError, match="has appeared in the meantime"):
            to_megatron(source, target, progress=lambda done, total: target.mkdir(exist_ok=True))
        assert self.names(tmp_path) == {"hf", "m"}
        assert list(target.iterdir()) == []

    def test_a_checkpoint_that_brings_no_config_needs_one(
        self, tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        to_megatron(source, tmp_path / "m")
        (tmp_path / "m" / "hf" / "config.json").unlink()
        assert run("to-hf", tmp_path / "m", tmp_path / "back") == 2
        assert "name the model's Hugging Face directory with --hf-path" in errors_of(capsys)
        assert run("to-hf", tmp_path / "m", tmp_path / "back", "--hf-path", source) == 0

    def test_a_config_of_another_model_is_refused(
        self, tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        to_megatron(source, tmp_path / "m")
        set_config(source, num_hidden_layers=3)
        assert run("to-hf", tmp_path / "m", tmp_path / "back", "--hf-path", source) == 2
        assert "has shape (2, " in errors_of(capsys)

    def test_a_checkpoint_without_a_teacher_has_none_to_convert(
        self, tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        to_megatron(source, tmp_path / "m")
        assert run("to-hf", tmp_path / "m", tmp_path / "back", "--weights", "teacher") == 2
        assert "tensor 'teacher.embedding.word_embeddings.weight' is missing" in errors_of(capsys)

    def test_a_damaged_chunk_is_named_and_leaves_no_target(
        self, tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        to_megatron(source, tmp_path / "m", workers=1)
        (tmp_path / "m" / "__0_0.distcp").write_bytes(b"\0" * 100)
        assert run("to-hf", tmp_path / "m", tmp_path / "back") == 2
        assert "__0_0.distcp: the chunk of" in errors_of(capsys)
        assert self.names(tmp_path) == {"hf", "m"}

    @pytest.mark.parametrize("arguments", [["--workers", "0"], ["--dtype", "int8"]])
    def test_options_are_checked(self, tmp_path: Path, source: Path, arguments: list[str]) -> None:
        with pytest.raises(SystemExit) as caught:
            run("to-megatron", source, tmp_path / "m", *arguments)
        assert caught.value.code == 2

    def test_shards_of_no_size(self, tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
        to_megatron(source, tmp_path / "m")
        assert run("to-hf", tmp_path / "m", tmp_path / "back", "--shard-gb", "0") == 2
        assert "--shard-gb: 0; allowed: above 0" in errors_of(capsys)


class TestFailures:
    """A full disk, a worker that fails, an interruption: status 1, one line, and nothing left behind."""

    @pytest.fixture(params=["to-megatron", "to-hf"])
    def conversion(self, request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
        source = write_hf(tmp_path / "hf", TINY, random_tensors(TINY, torch.float32))
        to_megatron(source, tmp_path / "m")
        return request.param, source if request.param == "to-megatron" else tmp_path / "m"

    @staticmethod
    def left(folder: Path) -> set[str]:
        return {path.name for path in folder.iterdir()} - {"hf", "m"}

    def test_too_little_free_space_is_seen_before_anything_is_written(
        self, tmp_path: Path, conversion: tuple[str, Path], capsys: pytest.CaptureFixture[str]
    ) -> None:
        direction, source = conversion
        (tmp_path / ".new.partial-0123abcd").mkdir()
        with mock.patch.object(new_directory.shutil, "disk_usage", return_value=mock.Mock(free=10**6)):
            assert run(direction, source, tmp_path / "new") == 1
        error = errors_of(capsys)
        assert "0.00 GB are free" in error
        assert ".new.partial-0123abcd may be left of a conversion that was killed" in error
        assert self.left(tmp_path) == {".new.partial-0123abcd"}

    @pytest.mark.parametrize("after", [0, 1, 20])
    def test_the_disk_runs_full(
        self, tmp_path: Path, conversion: tuple[str, Path], after: int, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """As a kernel does it: the last write that finds room stops short, without an error."""
        direction, source = conversion
        write, calls = os.pwrite, iter(range(10**6))

        def full(file: int, data: Any, start: int) -> int:
            call = next(calls)
            if call < after:
                return write(file, data, start)
            if call == after:
                return write(file, bytes(data)[: len(data) // 2], start)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with mock.patch.object(os, "pwrite", full):
            assert run(direction, source, tmp_path / "new", "--workers", 1) == 1
        assert f"{tmp_path / 'new'} could not be written: No space left on device" in errors_of(capsys)
        assert self.left(tmp_path) == set()

    def test_a_worker_fails(self, tmp_path: Path, conversion: tuple[str, Path]) -> None:
        direction, source = conversion

        def fail(*arguments: Any) -> None:
            raise MemoryError("no more")

        with mock.patch.object(convert._Hashes, "update", fail), pytest.raises(MemoryError, match="no more"):
            (to_megatron if direction == "to-megatron" else to_hf)(source, tmp_path / "new", workers=2)
        assert self.left(tmp_path) == set()

    def test_bytes_that_pass_twice_or_never_are_an_error(self) -> None:
        shapes, dtypes = {"a": (2, 3)}, {"a": torch.float32}
        hashes = convert._Hashes(shapes, dtypes)
        hashes.update("a", torch.zeros(1, 3))
        with pytest.raises(RunError, match="'a' was not converted as a whole"):
            hashes.finish()
        hashes.update("a", torch.zeros(1, 3))
        assert hashes.finish().keys() == {"a"}
        with pytest.raises(RunError, match="'a': more bytes were converted than it has"):
            hashes.update("a", torch.zeros(1, 3))

    @pytest.mark.long
    @pytest.mark.parametrize(
        ("conversion", "number"), [("to-megatron", signal.SIGTERM), ("to-hf", signal.SIGINT)], indirect=["conversion"]
    )
    def test_a_signal_in_the_middle(self, tmp_path: Path, conversion: tuple[str, Path], number: signal.Signals) -> None:
        direction, source = conversion
        program = f"""
import sys, time
from megatron_coreward.checkpoint import convert
from megatron_coreward.cli import main
count = convert._Pile.count
def slow(self, nbytes):
    count(self, nbytes)
    sys.stdout.write("going\\n")
    sys.stdout.flush()
    time.sleep(0.2)
convert._Pile.count = slow
sys.exit(main(["convert", {direction!r}, {str(source)!r}, {str(tmp_path / "new")!r}, "--workers", "2"]))
"""
        child = subprocess.Popen(
            [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == "going\n"
            assert any(name.startswith(".new.partial-") for name in self.left(tmp_path))
            child.send_signal(number)
            child.send_signal(number)  # a second one does not disturb the clearing up
            _, error = child.communicate(timeout=60)
        finally:
            child.kill()
            child.wait()
        assert (child.returncode, error) == (1, "interrupted\n")
        assert self.left(tmp_path) == set()

    @pytest.mark.long
    @pytest.mark.parametrize("conversion", ["to-megatron"], indirect=True)
    def test_a_limit_of_the_kernel(self, tmp_path: Path, conversion: tuple[str, Path]) -> None:
        """No simulation: files may have 1 KiB."""
        direction, source = conversion
        command = [sys.executable, "-m", "megatron_coreward", "convert", direction, str(source), str(tmp_path / "new")]
        done = subprocess.run(
            ["bash", "-c", 'ulimit -f 1; exec "$@"', "bash", *command],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 1, done.stderr
        assert done.stderr.endswith("could not be written: File too large (" + str(tmp_path) + ")\n")
        assert self.left(tmp_path) == set()

    def test_two_conversions_to_one_target_do_not_mix(self, tmp_path: Path, conversion: tuple[str, Path]) -> None:
        direction, source = conversion
        work = to_megatron if direction == "to-megatron" else to_hf
        target, once = tmp_path / "new", []

        def second(done: int, total: int) -> None:
            if not once:
                once.append(done)
                work(source, target, workers=1)

        with pytest.raises(InputError, match="has appeared in the meantime"):
            work(source, target, workers=1, progress=second)
        assert verify(open_checkpoint(target), open_checkpoint(source)).ok
        assert self.left(tmp_path) == {"new"}


def test_a_manifest_of_the_source_is_not_taken_over(tmp_path: Path) -> None:
    source = write_hf(tmp_path / "hf", TINY, random_tensors(TINY, torch.float32))
    (source / MANIFEST).write_text("{}")
    to_megatron(source, tmp_path / "m")
    assert not (tmp_path / "m" / "hf" / MANIFEST).exists()
    manifest = read_manifest(tmp_path / "m")
    assert manifest is not None
    assert len(manifest) == len(random_tensors(TINY, torch.float32))


# ---- what lies beside weights ----------------------------------------------------------------------------------------


def with_more_files(source: Path) -> dict[str, str]:
    """Adds what published models have beside weights, and weights of other formats; returns the former."""
    more = {
        "LICENSE": "free",
        "chat_template.jinja": "{{ messages }}",
        "additional_chat_templates/tool_use.jinja": "{{ tools }}",
        "original/params.json": "{}",
    }
    weights = ("pytorch_model.bin", "original/consolidated.00.pth", "onnx/model.onnx_data", ".cache/huggingface/x.lock")
    for name, text in {**more, **dict.fromkeys(weights, "weights")}.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(text)
    return more


def test_every_file_that_is_not_weights_goes_along(tmp_path: Path) -> None:
    source = write_hf(tmp_path / "hf", TINY | {"torch_dtype": "float16"}, random_tensors(TINY, torch.bfloat16))
    more = with_more_files(source)
    to_megatron(source, tmp_path / "m")
    to_hf(tmp_path / "m", tmp_path / "back")
    own = {"config.json", "tokenizer.json", "generation_config.json", "model.safetensors", MANIFEST}
    files = {
        path.relative_to(tmp_path / "back").as_posix() for path in (tmp_path / "back").rglob("*") if path.is_file()
    }
    assert files == own | set(more)
    assert {name: (tmp_path / "back" / name).read_text() for name in more} == more
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (written["dtype"], written["torch_dtype"]) == ("bfloat16", "bfloat16")


def test_a_target_within_the_source_does_not_go_along(tmp_path: Path) -> None:
    source = write_hf(tmp_path / "hf", TINY, random_tensors(TINY, torch.bfloat16))
    (source / "runs").mkdir()
    (source / "runs" / "notes.txt").touch()
    to_megatron(source, source / "runs" / "m")
    assert not (source / "runs" / "m" / "hf" / "runs").exists()


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_files_of_a_read_only_store_are_taken_without_their_modes(tmp_path: Path, umask: int) -> None:
    """Contents are copied: all that is written has the mode of any new file, and the same command works again."""
    source = write_hf(tmp_path / "hf", TINY, random_tensors(TINY, torch.bfloat16), num_files=2)
    with_more_files(source)
    for path in sorted(source.rglob("*"), reverse=True):
        path.chmod(0o555 if path.is_dir() else 0o444)
    source.chmod(0o555)
    former = os.umask(umask)
    try:
        for number in (1, 2):
            to_megatron(source, tmp_path / f"m{number}")
            to_hf(tmp_path / f"m{number}", tmp_path / f"back{number}", shard_bytes=500)
    finally:
        os.umask(former)
        source.chmod(0o755)
    for target in ("m1", "m2", "back1", "back2"):
        for path in (tmp_path / target, *(tmp_path / target).rglob("*")):
            expected = 0o777 & ~umask if path.is_dir() else 0o666 & ~umask
            assert path.stat().st_mode & 0o777 == expected, path
