"""The command line: how it ends, and that asking it for help is cheap."""

import argparse
import signal
import subprocess
import sys

import pytest

from megatron_coreward import cli
from megatron_coreward.commands import launch, train
from megatron_coreward.errors import HaltedError, InputError, RunError


def noted(error: BaseException, note: str) -> BaseException:
    error.add_note(note)
    return error


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (None, 0, ""),
        (RunError("no space"), 1, "the run failed: no space"),
        (OSError("odd"), 1, "the run failed: OSError: odd"),
        (
            noted(OSError("odd"), "the same command goes on"),
            1,
            "the run failed: OSError: odd; the same command goes on",
        ),
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


@pytest.mark.parametrize(
    "arguments",
    [
        ["recipe.yaml", "steps=3", "--nodes", "2", "seed=4", "--dry-run", "method=entropy"],
        ["--nodes", "2", "recipe.yaml", "steps=3", "seed=4", "method=entropy", "--dry-run"],
        ["--nodes", "2", "--dry-run", "recipe.yaml", "steps=3", "seed=4", "method=entropy"],
        ["recipe.yaml", "--nodes", "2", "--dry-run", "steps=3", "seed=4", "method=entropy"],
        ["recipe.yaml", "--dry-run", "steps=3", "--nodes", "2", "seed=4", "method=entropy"],
    ],
    ids=" ".join,
)
def test_keys_may_stand_before_between_and_behind_options(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = []
    monkeypatch.setattr(launch, "_launch", taken.append)
    cli.main(["launch", "slurm", *arguments])
    (options,) = taken
    assert (str(options.config), options.nodes, options.dry_run) == ("recipe.yaml", 2, True)
    assert options.overrides == ["steps=3", "seed=4", "method=entropy"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["launch", "slurm", "recipe.yaml", "--nods", "2"],
        ["launch", "slurm", "recipe.yaml", "--node", "2"],
        ["rephrase", "m", "f", "--out", "o", "seed=4"],
    ],
)
def test_what_no_command_takes_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(arguments)
    assert f"unrecognized arguments: {' '.join(arguments[-2:] if arguments[0] == 'launch' else arguments[-1:])}" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_after_the_work_is_done_does_not_change_the_exit_status(sent: signal.Signals) -> None:
    program = (
        "import atexit, os, sys\n"
        "from megatron_coreward import cli\n"
        f"atexit.register(os.kill, os.getpid(), {int(sent)})\n"
        "sys.argv = ['megatron-coreward', 'plan', 'nowhere.yaml']\n"
        "cli.console()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2, done.stderr


@pytest.mark.parametrize("arguments", [["MODEL", "ifeval", "--out", "out"], ["--limit", "3", "MODEL", "ifeval"]])
def test_a_command_under_its_former_name_says_the_new_one(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["evaluate", "harness", *arguments]) == 2
    assert "error: evaluate harness: this command is called `evaluate lm-eval` now" in capsys.readouterr().err
