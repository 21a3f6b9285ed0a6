"""Life and death of shared segments: they appear whole, survive readers, and leave nothing behind."""

import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_coreward.errors import RunError
from megatron_coreward.weights.buckets import HEADER_BYTES, SegmentLayout, TensorMeta
from megatron_coreward.weights.segment import OwnedSegment, open_segment, remove_orphans, segment_path

ROOT = Path(__file__).parents[2]


@pytest.fixture
def layout() -> Iterator[SegmentLayout]:
    layout = SegmentLayout(f"test-{uuid.uuid4().hex}", (TensorMeta("a", (16,), "float32"),), 64)
    yield layout
    segment_path(layout.segment).unlink(missing_ok=True)


def in_another_process(code: str, layout: SegmentLayout) -> "subprocess.Popen[str]":
    """Runs code that may use `layout`; its standard output is a pipe."""
    lines = [
        "import os, sys, json",
        "from megatron_coreward.weights.buckets import SegmentLayout",
        "from megatron_coreward.weights.segment import OwnedSegment, open_segment",
        f"layout = SegmentLayout.from_json({layout.to_json()!r})",
        code,
    ]
    return subprocess.Popen([sys.executable, "-c", "\n".join(lines)], cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_what_one_end_writes_the_other_reads(layout: SegmentLayout) -> None:
    owned = OwnedSegment(layout)
    reader = open_segment(layout, writable=False)
    owned.memory[HEADER_BYTES : HEADER_BYTES + 4] = b"data"
    assert reader[HEADER_BYTES : HEADER_BYTES + 4] == b"data"
    with pytest.raises(TypeError):
        reader[HEADER_BYTES] = 0
    owned.close()
    owned.close()
    assert not segment_path(layout.segment).exists()


def test_a_process_that_attached_leaves_the_segment_to_its_owner(layout: SegmentLayout) -> None:
    owned = OwnedSegment(layout)
    process = in_another_process("open_segment(layout, writable=True)[65536:65540] = b'left'", layout)
    assert process.wait(timeout=60) == 0
    assert segment_path(layout.segment).exists()
    assert owned.memory[HEADER_BYTES : HEADER_BYTES + 4] == b"left"
    owned.close()


def test_the_segment_of_a_killed_process_is_replaced_and_one_of_a_living_process_is_not(layout: SegmentLayout) -> None:
    process = in_another_process("owned = OwnedSegment(layout); print('ready', flush=True); sys.stdin.read()", layout)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        with pytest.raises(RunError, match="still running"):
            OwnedSegment(layout)
        remove_orphans()
        assert segment_path(layout.segment).exists()
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=60)
    former = os.stat(segment_path(layout.segment)).st_ino
    owned = OwnedSegment(layout)
    assert os.stat(segment_path(layout.segment)).st_ino != former
    owned.close()


def test_leftovers_of_other_names_go_when_a_segment_is_created(layout: SegmentLayout) -> None:
    other = SegmentLayout(layout.segment + "-other", layout.metas, 64)
    process = in_another_process("owned = OwnedSegment(layout); os.kill(os.getpid(), 9)", other)
    assert process.wait(timeout=60) == -signal.SIGKILL
    assert segment_path(other.segment).exists()
    OwnedSegment(layout).close()
    assert not segment_path(other.segment).exists()


def test_a_full_shared_memory_is_one_clear_error(layout: SegmentLayout) -> None:
    huge = SegmentLayout(layout.segment, (TensorMeta("a", (2**44,), "float32"),), 64)
    with pytest.raises(RunError, match=r"needs .* bytes in /dev/shm"):
        OwnedSegment(huge)
    assert not segment_path(layout.segment).exists()


def test_a_segment_for_other_tensors_is_refused(layout: SegmentLayout) -> None:
    owned = OwnedSegment(layout)
    with pytest.raises(RunError, match="other tensors"):
        open_segment(SegmentLayout(layout.segment, (TensorMeta("b", (16,), "float32"),), 64), writable=True)
    with pytest.raises(RunError, match="bytes, expected"):
        open_segment(SegmentLayout(layout.segment, (TensorMeta("a", (160,), "float32"),), 64), writable=True)
    owned.close()
    with pytest.raises(RunError, match="does not exist"):
        open_segment(layout, writable=True)


@pytest.mark.parametrize("name", ["", "a/b", ".hidden"])
def test_a_name_must_be_a_plain_file_name(name: str) -> None:
    with pytest.raises(ValueError, match="segment name"):
        segment_path(name)
