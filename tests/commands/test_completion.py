"""Completion: what a shell proposes behind the words that were typed. bash is asked itself."""

import shutil
import subprocess
from pathlib import Path

import pytest

from megatron_coreward import cli
from megatron_coreward.commands.completion import script

# Completes the last of the words that were typed, as bash does when Tab is pressed.
ASK = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}; COMP_TYPE=9
compopt() { :; }  # bash has it only while it completes
name=$(complete -p megatron-coreward | grep -o -- '-F [^ ]*' | cut -d' ' -f2)
$name megatron-coreward "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD-1]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""


def proposed(folder: Path, *typed: str) -> set[str]:
    file = folder / "completion.bash"
    if not file.exists():
        file.write_text(script(cli.make_parser(), "bash"))
    words = ["bash", "--norc", "-c", ASK, "bash", str(file), "megatron-coreward", *typed]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr == ""
    return set(done.stdout.split())


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_proposes_commands_their_actions_options_choices_and_files(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").touch()
    (tmp_path / "recipes").mkdir()
    names = {command.__name__.rpartition(".")[2].replace("_", "-") for command in cli.COMMANDS}
    assert names <= proposed(tmp_path, "")
    assert proposed(tmp_path, "co") == {"completion", "compare", "config", "convert"}
    assert {"to-megatron", "to-hf", "verify"} <= proposed(tmp_path, "convert", "")
    assert proposed(tmp_path, "train", "rec") == {"recipe.yaml", "recipes"}
    assert proposed(tmp_path, "launch", "slurm", "rec") == {"recipe.yaml", "recipes"}
    assert "--gpus-per-node" in proposed(tmp_path, "launch", "slurm", "recipe.yaml", "--gpus")
    assert {"co_rewarding_i", "majority_voting"} <= proposed(tmp_path, "demo", "--method", "")
    assert proposed(tmp_path, "completion", "") >= {"bash", "zsh", "fish"}


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_scripts_for_other_shells_name_every_command(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", shell]) == 0
    printed = capsys.readouterr().out
    for command in cli.COMMANDS:
        assert command.__name__.rpartition(".")[2].replace("_", "-") in printed
    assert {"zsh": "#compdef megatron-coreward", "fish": "complete -c megatron-coreward"}[shell] in printed
    assert "--gpus-per-node" in printed or "-l gpus-per-node" in printed


def test_a_shell_that_is_not_known_is_refused_with_those_that_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["completion", "csh"])
    assert "'bash', 'zsh', 'fish'" in capsys.readouterr().err
