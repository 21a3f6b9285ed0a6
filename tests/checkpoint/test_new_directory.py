"""A directory that could not be written whole leaves nothing behind, and says which file and why."""

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_coreward.checkpoint.new_directory import removed_on_error


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), ValueError("odd"), KeyboardInterrupt()])
def test_what_was_half_written_goes_whatever_the_error(tmp_path: Path, error: BaseException) -> None:
    partial = tmp_path / ".hf.partial"
    partial.mkdir()
    (partial / "part-1").write_bytes(b"weights")
    with pytest.raises(type(error)) as caught, removed_on_error(partial):
        raise error
    assert caught.value is error
    assert list(tmp_path.iterdir()) == []


def test_what_is_complete_stays(tmp_path: Path) -> None:
    with removed_on_error(tmp_path / ".hf.partial"):
        (tmp_path / "hf").mkdir()
    assert (tmp_path / "hf").is_dir()


def test_an_error_of_the_machine_that_safetensors_met_is_one_with_its_number(tmp_path: Path) -> None:
    partial = tmp_path / ".hf.partial"
    with pytest.raises(OSError, match=os.strerror(errno.ENOENT)) as caught, removed_on_error(partial):
        save_file({"weight": torch.zeros(4)}, partial / "part-1")  # the folder is missing
    assert (caught.value.errno, caught.value.filename) == (errno.ENOENT, str(partial))
