"""The command line: how it ends, and that asking it for help is cheap."""

import argparse
import subprocess
import sys

import pytest

from megatron_coreward import cli
from megatron_coreward.commands import train
from megatron_coreward.errors import HaltedError, InputError, RunError


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (None, 0, ""),
        (RunError("no space"), 1, "the run failed: no space"),
        (OSError("odd"), 1, "the run failed: OSError: odd"),
        (KeyboardInterrupt(), 1, "interrupted"),
        (InputError("steps: -1"), 2, "error: steps: -1"),
        (HaltedError("signs of collapse"), 3, "the run is halted: signs of collapse"),
    ],
)
def test_the_exit_status_says_how_it_ended(
    error: BaseException | None,
    status: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def end(options: argparse.Namespace) -> None:
        if error is not None:
            raise error

    monkeypatch.setattr(train, "_train", end)
    assert cli.main(["train", "recipe.yaml"]) == status
    assert capsys.readouterr().err.strip().endswith(said)


def test_help_names_every_command_and_imports_nothing_heavy() -> None:
    heavy = {"kubernetes", "megatron", "nemo_run", "numpy", "pyarrow", "ray", "torch", "transformers", "vllm"}
    code = f"""
import sys
from megatron_coreward import cli
try:
    cli.main(["--help"])
finally:
    print("imported:", sorted({heavy!r} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert "imported: []" in done.stdout
    for command in cli.COMMANDS:
        assert command.__name__.rpartition(".")[2].replace("_", "-") in done.stdout
