"""The house rules: imports downward only, light at the bottom, Ray at the edges; functions short enough to be read."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "megatron_coreward"
ROOT = Path(__file__).parents[1] / PACKAGE

# Modules of `weights` that send or receive.
MOVES_WEIGHTS = ("message", "meeting", "groups", "mailbox", "cuda_ipc", "senders", "receivers")

# From the bottom up. A room is a module or a package right under ours, or one module of `weights`: what moves weights
# is on a higher layer than what plans their moves. The empty name is our package itself, which every import runs.
LAYERS: tuple[frozenset[str], ...] = (
    frozenset({"", "errors", "types", "config", "weights"}),
    frozenset({"rewards", "algorithms"}),
    frozenset({"telemetry", "data", "weights.*"}),
    frozenset({"planner", "guard", "report"}),
    frozenset({"checkpoint", *(f"weights.{name}" for name in MOVES_WEIGHTS)}),
    frozenset({"actor", "rollout"}),
    frozenset({"preflight"}),
    frozenset({"cluster"}),
    frozenset({"trainer"}),
    frozenset({"evaluation"}),
    frozenset({"demo", "launch"}),
    frozenset({"commands"}),
    frozenset({"cli"}),
    frozenset({"attempt", "__main__"}),
)
LIGHT = 4  # layers that import without Megatron, vLLM and Ray


def modules(root: Path) -> dict[str, Path]:
    """Every module of the package by its dotted name below the package; the package itself is the empty name."""
    names = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


def room(module: str) -> str:
    first, *rest = module.split(".")
    return ".".join([first, *rest[:1]]) if first == "weights" else first


def imports(path: Path, module: str) -> Iterator[str]:
    """Absolute names of everything that a file imports, in functions and for types as well."""
    is_package = path.name == "__init__.py"
    here = [PACKAGE, *(part for part in module.split(".") if part)]
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                up = here[: len(here) - node.level + is_package]
                base = ".".join([*up, base] if base else up)
            yield from (f"{base}.{alias.name}" for alias in node.names)


def own_imports(root: Path) -> Iterator[tuple[str, str]]:
    """(importing module, imported module) of our own, both below the package."""
    known = modules(root)
    for module, path in known.items():
        for name in imports(path, module):
            if name == PACKAGE or not name.startswith(f"{PACKAGE}."):
                continue
            target = name.removeprefix(f"{PACKAGE}.")
            while target and target not in known:  # `from module import name`
                target = target.rpartition(".")[0]
            if target:
                yield module, target


def layer(module: str) -> int | None:
    name = room(module)
    if name.startswith("weights.") and not any(name in rooms for rooms in LAYERS):
        name = "weights.*"
    return next((height for height, rooms in enumerate(LAYERS) if name in rooms), None)


def is_low(module: str) -> bool:
    height = layer(module)
    return height is not None and height < LIGHT


def upward_imports(root: Path) -> list[str]:
    wrong = []
    for module, target in own_imports(root):
        height, reached = layer(module), layer(target)
        if height is not None and reached is not None and reached > height:
            wrong.append(f"{module} imports {target}")
    return wrong


def third_party(root: Path, *packages: str) -> dict[str, set[str]]:
    """Module -> those of the named packages that it imports."""
    found = {module: {name.split(".")[0] for name in imports(path, module)} for module, path in modules(root).items()}
    return {module: names & set(packages) for module, names in found.items() if names & set(packages)}


def mutual_rooms(root: Path) -> list[str]:
    edges = {(room(module), room(target)) for module, target in own_imports(root) if room(module) != room(target)}
    return sorted(f"{a} and {b} import each other" for a, b in edges if a < b and (b, a) in edges)


def cycles(root: Path) -> list[list[str]]:
    """Groups of modules that import each other, directly or over others; imports in functions and for types count."""
    graph: dict[str, set[str]] = {module: set() for module in modules(root)}
    for module, target in own_imports(root):
        if module != target:
            graph[module].add(target)
    reached = {module: _reachable(graph, module) for module in graph}
    groups = {frozenset({module, *(m for m in reached[module] if module in reached[m])}) for module in graph}
    return sorted(sorted(group) for group in groups if len(group) > 1)


def _reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    found: set[str] = set()
    to_do = [start]
    while to_do:
        new = graph[to_do.pop()] - found
        found |= new
        to_do += new
    return found


MAX_LINES, MAX_LONG = 60, 4
# Functions that are longer than MAX_LINES, at most MAX_LONG of them, and why none of them becomes two.
LONG_FUNCTIONS = {
    "actor.model.transformer_config": "one call of Megatron's constructor, one setting a line",
    "demo.model.write_model": "a signature of twenty sizes and their description; ten lines do the work",
    "launch.scripts.node_script": "the text of one shell script, which is read from top to bottom",
}


def long_functions(root: Path) -> dict[str, int]:
    """Lines of every function over MAX_LINES, by module and name."""
    return {
        f"{module}.{node.name}": lines
        for module, path in modules(root).items()
        for node in ast.walk(ast.parse(path.read_text(), str(path)))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (lines := (node.end_lineno or node.lineno) - node.lineno + 1) > MAX_LINES
    }


def test_few_functions_are_long_and_each_has_a_reason() -> None:
    assert len(LONG_FUNCTIONS) <= MAX_LONG
    assert set(long_functions(ROOT)) == set(LONG_FUNCTIONS)


def test_every_module_has_a_layer() -> None:
    assert [module for module in modules(ROOT) if layer(module) is None] == []


def test_imports_point_downward_only() -> None:
    assert upward_imports(ROOT) == []


def test_no_modules_import_in_a_circle() -> None:
    assert cycles(ROOT) == []


def test_no_two_rooms_import_each_other() -> None:
    assert mutual_rooms(ROOT) == []


def test_actor_and_rollout_never_import_each_other() -> None:
    crossing = [pair for pair in own_imports(ROOT) if {room(name) for name in pair} == {"actor", "rollout"}]
    assert crossing == []


def test_ray_appears_only_in_worker_shells_and_in_the_cluster() -> None:
    users = third_party(ROOT, "ray")
    assert [name for name in users if room(name) != "cluster" and not name.endswith(".worker")] == []


def test_the_light_layers_never_name_megatron_vllm_or_ray_and_torch_only_in_algorithms() -> None:
    heavy = third_party(ROOT, "megatron", "vllm", "ray")
    assert [name for name in heavy if is_low(name)] == []
    torch_users = third_party(ROOT, "torch")
    assert [name for name in torch_users if is_low(name) and room(name) != "algorithms"] == []


@pytest.mark.long
def test_the_light_layers_import_where_megatron_vllm_and_ray_are_missing() -> None:
    low = [f"{PACKAGE}.{name}".removesuffix(".") for name in modules(ROOT) if is_low(name)]
    program = (
        "import importlib, sys\n"
        "for name in ('megatron', 'vllm', 'ray'): sys.modules[name] = None\n"
        "for name in sys.argv[1:]: importlib.import_module(name)\n"
        "print(len(sys.argv) - 1)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *low], capture_output=True, text=True, timeout=120, cwd=ROOT.parent, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(low) > 10
    assert done.stdout.split()[-1] == str(len(low))


class TestTheRulesThemselves:
    """The checks above find what they look for, in a small package that breaks each rule."""

    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        files = {
            "__init__.py": "",
            "types.py": "from megatron_coreward.rewards.voting import vote\n",
            "rewards/voting.py": "import ray.util\nfrom ..types import Problem\n",
            "actor/worker.py": "import ray\ndef f():\n    from megatron_coreward.rollout import engine\n",
            "rollout/__init__.py": "from . import engine\n",
            "rollout/engine.py": "import numpy\nimport megatron_coreward.actor.worker\n",
            "weights/plan.py": "from megatron_coreward.weights.senders import base\n",
            "weights/senders/base.py": "from megatron_coreward import types\n",
        }
        for name, text in files.items():
            path = tmp_path / PACKAGE / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path / PACKAGE

    def test_upward_imports_are_found_and_downward_ones_pass(self, root: Path) -> None:
        assert upward_imports(root) == ["types imports rewards.voting", "weights.plan imports weights.senders.base"]

    def test_mutual_imports_are_found_inside_functions_and_through_relative_names(self, root: Path) -> None:
        assert mutual_rooms(root) == ["actor and rollout import each other", "rewards and types import each other"]

    def test_circles_are_found_over_several_modules_and_inside_functions(self, root: Path) -> None:
        for name, text in {
            "cli.py": "from megatron_coreward.commands import launch\n",
            "commands/launch.py": "from megatron_coreward.launch.attempt import attempt\n",
            "launch/attempt.py": "def attempt():\n    from megatron_coreward import cli\n",
            "report/page.py": "from megatron_coreward import cli\n",
        }.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        assert cycles(root) == [
            ["actor.worker", "rollout.engine"],
            ["cli", "commands.launch", "launch.attempt"],
            ["rewards.voting", "types"],
        ]

    def test_long_functions_are_found_in_classes_and_functions(self, root: Path) -> None:
        body = "\n".join(["        pass"] * MAX_LINES)
        text = f"class A:\n    async def long(self):\n{body}\n    def short(self):\n        pass\n"
        (root / "types.py").write_text(text)
        assert long_functions(root) == {"types.long": MAX_LINES + 1}

    def test_third_parties_are_found_by_module(self, root: Path) -> None:
        assert third_party(root, "ray") == {"rewards.voting": {"ray"}, "actor.worker": {"ray"}}
