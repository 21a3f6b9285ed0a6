"""Every command of the pages is one that the command line takes, on keys and files that there are.

What a command does is shown by the test that `RUN_BY` names and by this file (`RUN_HERE`), or not at all on machines
that the project is tested on (`NOT_RUN_HERE`, each with its reason).
"""

import ast
import importlib
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron_coreward import cli
from megatron_coreward.config.describe import all_keys, find_keys
from megatron_coreward.config.load import load_config
from megatron_coreward.planner.plan import gpus_of
from tests.docs.pages import ALL_PAGES, FORMER, PAGES, ROOT, Block, Command, blocks, commands

COMMANDS = [command for page in ALL_PAGES for command in commands(page)]

SCRIPT = re.compile(r"python3? ((?:tools|benchmarks)/\w+\.py)")
RUN_HERE = ("plan", "config")  # with recipes that are shipped
# The file whose tests run it, and the function behind the command that they call; None: they call the command itself.
RUN_BY: dict[str, tuple[str, str | None]] = {
    "demo": ("tests/demo/test_real_study.py", "run_cells"),
    "prepare-data": ("tests/data/test_prepare.py", None),
    "rephrase": ("tests/evaluation/test_rephrase.py", "rephrase_file"),
    "plan": ("tests/planner/test_search.py", None),
    "config": ("tests/commands/test_config.py", None),
    "train": ("tests/e2e/test_train.py", None),
    "forecast": ("tests/demo/test_real_study.py", None),
    "launch local": ("tests/launch/test_local.py", None),
    "launch slurm": ("tests/launch/test_slurm.py", None),
    "evaluate run": ("tests/evaluation/test_evaluate.py", "evaluate_files"),
    "evaluate compare": ("tests/evaluation/test_evaluate.py", "compare_files"),
    "evaluate lm-eval": ("tests/evaluation/test_lm_eval.py", "run_lm_eval"),
    "evaluate paper": ("tests/e2e/test_reproduce.py", None),
    "evaluate table": ("tests/e2e/test_reproduce.py", None),
    "completion": ("tests/commands/test_completion.py", None),
    "report": ("tests/report/test_replay.py", None),
    "compare": ("tests/report/test_replay.py", None),
    "replay": ("tests/report/test_replay.py", None),
    "verify-sync": ("tests/e2e/test_transports.py", None),
    "convert to-megatron": ("tests/checkpoint/test_convert.py", None),
    "convert to-hf": ("tests/checkpoint/test_convert.py", None),
    "convert verify": ("tests/checkpoint/test_verify.py", None),
}
NOT_RUN_HERE = {
    "launch kubernetes": "it needs a cluster with KubeRay; its manifests are tested (tests/launch/test_previews.py)",
    "launch skypilot": "it needs an account of a cloud; the task is tested (tests/launch/test_previews.py)",
}


# Programs beside the command line that blocks of shell commands call.
OTHER_PROGRAMS = {
    "make": "its targets are checked below",
    "python": "its scripts are checked below",
    ".venv/bin/python": "the script is compiled below",
    "docker": "it needs Docker; what images are made of is checked (tests/test_images.py)",
    "pip": "it needs the package index",
    "git": "it needs the network",
    "hf": "it needs the network",
    "kubectl": "it needs a Kubernetes cluster",
    "apt-get": "it changes the machine",
    **dict.fromkeys(("cd", "cp", "eval", "ls", "mkdir", "for", "done"), "the shell's own"),
}


def name_of(words: Sequence[str]) -> str:
    depth = 2 if words[0] in ("launch", "evaluate", "convert") else 1
    return " ".join(words[:depth])


def test_the_pages_have_commands() -> None:
    assert len(COMMANDS) > 60
    assert {name_of(command.words) for command in COMMANDS if command.words[0] != "--help"} <= {*RUN_BY, *NOT_RUN_HERE}


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_the_command_line_takes_it(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    if "--help" in command.words:
        with pytest.raises(SystemExit, match="0"):
            cli.main(command.words)
        return
    monkeypatch.chdir(ROOT)
    options = cli.parse(command.words)
    keys = [word.partition("=")[0] for word in getattr(options, "overrides", []) if "=" in word]
    assert [key for key in keys if key not in all_keys()] == []
    cluster = getattr(options, "cluster", None)
    if cluster is not None and cluster.parent == Path("launch/clusters"):
        assert cluster.is_file()
    recipe = getattr(options, "config", None)
    if recipe is not None and recipe.parts[0] == "configs" and "$" not in str(recipe):
        load_config(recipe, options.overrides)  # values of keys, too
    if options.command == "config" and options.recipe is None:
        find_keys([word for word in options.overrides if word != "WORD" and word != "KEY"])


@pytest.mark.parametrize("command", [c for c in COMMANDS if "--gpus-per-node" in c.words], ids=str)
def test_a_launch_asks_for_as_many_gpus_as_its_recipe_uses(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    options = cli.parse(command.words)
    if options.config.parts[0] == "configs":
        config = load_config(options.config, options.overrides)
        assert options.nodes * options.gpus_per_node == gpus_of(config, config.rollout.placement)


def runs_here(command: Command) -> bool:
    """Whether it only reads, and files that are shipped."""
    named = {"KEY", "WORD", "RECIPE", "CONFIG", "recipe.yaml"}
    return command.words[0] in RUN_HERE and named.isdisjoint(command.words) and "--help" not in command.words


@pytest.mark.parametrize("command", filter(runs_here, COMMANDS), ids=str)
def test_commands_that_only_read_do_what_the_pages_say(
    command: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    status = cli.main(command.words)
    said = capsys.readouterr().err
    assert (status, said) == (0, "") or (status == 2 and "does not fit" in said), said


def calls(path: Path) -> tuple[set[str], set[str]]:
    """The functions that a file calls, and the strings that it passes in place or in a list: words of a command."""
    functions, words = set[str](), set[str]()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            functions |= {getattr(node.func, "attr", ""), getattr(node.func, "id", "")}
        values = node.args if isinstance(node, ast.Call) else getattr(node, "elts", [])
        words |= {value.value for value in values if isinstance(value, ast.Constant) and isinstance(value.value, str)}
    return functions, words


@pytest.mark.parametrize("command", RUN_BY)
def test_what_runs_a_command_is_there(command: str) -> None:
    path, function = RUN_BY[command]
    functions, words = calls(ROOT / path)
    if function is None:
        assert command.split()[-1] in words, f"{path} passes {command} to nothing"
    else:
        assert function in functions, f"{path} never calls {function}"


@pytest.mark.parametrize(
    "block",
    [block for page in PAGES for block in blocks(page) if block.language == "python"],
    ids=lambda block: f"{block.page}:{block.line}",
)
def test_python_in_pages_compiles_and_imports_what_there_is(block: Block) -> None:
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            module = importlib.import_module(node.module)
            assert [name.name for name in node.names if not hasattr(module, name.name)] == []


HERE_DOCUMENT = re.compile(r"<<'PY'\n(.*?)\nPY\n", re.DOTALL)
SHELL = [block for page in ALL_PAGES for block in blocks(page) if block.language == "bash"]


@pytest.mark.parametrize("block", SHELL, ids=lambda block: f"{block.page}:{block.line}")
def test_what_else_a_block_calls_is_known(block: Block) -> None:
    for script in HERE_DOCUMENT.findall(block.text):
        compile(script, block.page, "exec")
    text = re.sub(r"\\\n\s*", " ", HERE_DOCUMENT.sub("\n", block.text))
    pieces = [piece.split() for line in text.splitlines() for piece in line.partition("#")[0].split("&&")]
    called = [words for words in pieces if words and not words[0].endswith("megatron-coreward")]
    assert [words[0] for words in called if words[0] not in OTHER_PROGRAMS] == []
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert [words[1] for words in called if words[0] == "make" and words[1] not in targets] == []


def test_continuous_integration_builds_the_site_strictly_between_lint_and_test() -> None:
    steps = [line for line in (ROOT / ".ci" / "run").read_text().splitlines() if line.startswith("make ")]
    assert steps == ["make lint", "make docs", "make test"]
    makefile = (ROOT / "Makefile").read_text()
    assert {words.split()[1] for words in steps} <= set(re.findall(r"^([a-z-]+):", makefile, flags=re.MULTILINE))
    assert re.search(r"^docs: .*\n\t.*mkdocs build --strict$", makefile, flags=re.MULTILINE)
    named = ", ".join(f"`{step}`" for step in steps[:-1]) + f" and `{steps[-1]}`"
    assert f"`.ci/run` runs {named}" in (ROOT / "CONTRIBUTING.md").read_text()


def test_every_benchmark_has_a_row_on_the_page_of_benchmarks() -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    scripts = [path.name for kind in ("bench_*.py", "simulate_*.py") for path in (ROOT / "benchmarks").glob(kind)]
    assert len(scripts) > 10
    assert [name for name in scripts if f"`python benchmarks/{name}" not in page] == []


def test_scripts_that_pages_call_exist() -> None:
    called = {path for page in ALL_PAGES if page.name not in FORMER for path in SCRIPT.findall(page.read_text())}
    assert len(called) > 8
    assert [path for path in called if not (ROOT / path).is_file()] == []
