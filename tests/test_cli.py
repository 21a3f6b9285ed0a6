"""The command line: how it ends, and that asking it for help is cheap."""

import argparse
import shlex
import signal
import subprocess
import sys
from pathlib import Path

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
        (HaltedError("indicators of collapse"), 3, "the run is halted: indicators of collapse"),
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


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["demo", "--method", "co_rewarding_1"], "did you mean 'co_rewarding_i'?"),
        (["replay", "run", "--equivalence", "hendricks"], "did you mean 'hendrycks'?"),
        (["trian", "recipe.yaml"], "did you mean 'train'?"),
        (["demo", "--method", "prayer"], "'random_reward')\n"),  # the last of the choices, and nothing near
    ],
)
def test_a_choice_that_is_none_is_refused_with_the_one_that_is_near(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(arguments)
    assert capsys.readouterr().err.endswith(said if said.endswith("\n") else f"{said}\n")


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


@pytest.mark.parametrize("value", [["hashes"], ["boxed", "--n", "3"], []])
def test_an_option_under_its_former_name_says_the_new_one(value: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["evaluate", "run", "MODEL", "q.parquet", "--out", "out", "--answer-form", *value])
    assert "error: --answer-form: this option is called --answer-format now" in capsys.readouterr().err


def all_parsers(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    found = [parser]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                found += all_parsers(command)
    return found


def test_the_help_of_every_command_ends_with_an_example_that_the_command_takes() -> None:
    """Its own command takes it, and what it names of this repository is there."""
    seen = 0
    for parser in all_parsers(cli.make_parser()):
        if not parser.add_help:
            continue  # a former name, which is not listed
        lines = parser.format_help().rstrip().splitlines()
        assert lines[-2] == "example:", parser.prog
        words = shlex.split(lines[-1])
        if words[0] == "eval":
            words = shlex.split(words[1].removeprefix("$(").removesuffix(")"))
        assert words[: len(parser.prog.split())] == parser.prog.split()
        options = cli.parse(words[1:])
        assert callable(options.run)
        named = [word for word in words if word.startswith(("configs/", "launch/"))]
        assert [word for word in named if not (Path(__file__).parents[1] / word).is_file()] == []
        seen += 1
    assert seen >= len(cli.COMMANDS)


def test_every_option_says_its_default() -> None:
    """Options of all commands that have one; a switch is off, and says nothing."""
    silent, seen = [], 0
    for parser in all_parsers(cli.make_parser()):
        for action in parser._actions:
            if not action.option_strings or action.default in (None, False, [], argparse.SUPPRESS):
                continue
            seen += 1
            said = parser._get_formatter()._get_help_string(action) or ""
            if not action.help or "default" not in said:
                silent.append(f"{parser.prog} {action.option_strings[0]}")
    assert seen > 30
    assert silent == []


def test_every_argument_says_what_it_is() -> None:
    silent = [
        f"{parser.prog} {action.dest}"
        for parser in all_parsers(cli.make_parser())
        for action in parser._actions
        if action.help is None and not isinstance(action, argparse._SubParsersAction)
    ]
    assert silent == ["megatron-coreward evaluate harness anything"]  # a former command, which only says its new name


@pytest.mark.parametrize(
    "words",
    [["launch", "slurm", "a.yaml", "--gpus", "8"], ["plan", "a.yaml", "--gp", "8"], ["report", "run", "--st", "3"]],
)
def test_the_beginning_of_an_options_name_is_no_option(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        cli.main(words)
    assert raised.value.code == 2
    assert f"unrecognized arguments: {words[-2]}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["convert", "to-hf", "a", "b", "--workers", "0"],
        ["evaluate", "run", "model", "file", "--out", "x", "--temperature", "nan"],
        ["evaluate", "run", "model", "file", "--out", "x", "--gpu-memory-utilization", "1.5"],
        ["evaluate", "run", "model", "file", "--out", "x", "--batch-questions", "0"],
        ["evaluate", "run", "model", "file", "--out", "x", "--seed", "12345678901234567890"],
        ["rephrase", "model", "file", "--out", "x", "--kv-cache-gib", "inf"],
        ["rephrase", "model", "file", "--out", "x", "--attempts", "-1"],
        ["demo", "--seed", "-1"],
        ["prepare-data", "math", "--out", "x", "--limit", "0"],
        ["launch", "local", "recipe.yaml", "--nodes", "0"],
    ],
)
def test_numbers_out_of_bounds_are_bad_input_that_names_what_is_allowed(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as raised:
        cli.main(words)
    assert raised.value.code == 2
    assert "allowed: " in capsys.readouterr().err


@pytest.mark.parametrize("size", ["nan", "inf", "0", "-1"])
def test_a_size_of_files_is_a_number_above_0(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["convert", "to-hf", "a", "b", f"--shard-gb={size}"]) == 2
    assert f"--shard-gb: {size}; allowed: above 0" in capsys.readouterr().err
