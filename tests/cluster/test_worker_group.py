"""A command reaches every worker, the wanted results come back, and every command that is given is a method."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_coreward.cluster import worker_group
from megatron_coreward.cluster.worker_group import WorkerGroup

ROOT = Path(__file__).parents[2] / "megatron_coreward"


class Remote:
    """A worker whose calls come back at once: with its name, the method and the arguments."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.run = self

    def remote(self, method: str, *arguments: Any) -> tuple[Any, ...]:
        return (self.name, method, *arguments)


class Waiting:
    """A watchdog for which all calls have come."""

    def __init__(self) -> None:
        self.awaited: list[tuple[int, str]] = []
        self.names: dict[str, tuple[str, int]] = {}

    def get(self, calls: list[Any], awaited: str, **ignored: Any) -> list[Any]:
        self.awaited.append((len(calls), awaited))
        return calls

    def name(self, worker: Remote, kind: str, index: int) -> None:
        self.names[worker.name] = (kind, index)


@pytest.fixture
def group() -> WorkerGroup:
    made = WorkerGroup("engine", Waiting())  # type: ignore[arg-type]
    for index, name in enumerate("abcd"):
        made.add(Remote(name), index)
    made.part_of = [0, 1, 0, 1]
    return made


def test_a_command_goes_to_every_worker_and_all_are_awaited_though_few_results_are_wanted(group: WorkerGroup) -> None:
    assert group.call("sleep") == [("a", "sleep"), ("b", "sleep"), ("c", "sleep"), ("d", "sleep")]
    assert group.call("describe", 1, results_of=(2, 0)) == [("c", "describe", 1), ("a", "describe", 1)]
    assert group.watchdog.awaited == [(4, "sleep"), (4, "describe")]  # type: ignore[attr-defined]


def test_each_part_is_serialised_once_and_reaches_the_workers_of_the_part(
    group: WorkerGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    put: list[Any] = []
    monkeypatch.setattr(worker_group.ray, "put", lambda value: put.append(value) or f"reference to {value}")
    results = group.call_parts("update", [("batch 0", "plan 0"), ("batch 1", "plan 1")], results_of=(1, 2))
    assert results == [
        ("b", "update", "reference to batch 1", "reference to plan 1"),
        ("c", "update", "reference to batch 0", "reference to plan 0"),
    ]
    assert put == ["batch 0", "plan 0", "batch 1", "plan 1"]


def test_a_worker_that_was_started_again_takes_the_place_of_the_dead_one(group: WorkerGroup) -> None:
    group.add(Remote("new"), 1)
    assert [worker.name for worker in group.workers] == ["a", "new", "c", "d"]
    assert group.watchdog.names["new"] == ("engine", 1)  # type: ignore[attr-defined]


def commands() -> Iterator[tuple[str, str]]:
    """Every command that the package gives by its name, and where."""
    for path in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            is_remote = node.func.attr == "remote" and ast.unparse(node.func.value).endswith(".run")
            if not is_remote and node.func.attr not in ("call", "begin", "call_parts"):
                continue
            if node.args and isinstance(node.args[0], ast.Constant):
                yield str(node.args[0].value), f"{path.name}:{node.lineno}"


def methods(path: str, name: str) -> set[str]:
    for node in ast.parse((ROOT / path).read_text()).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return {item.name for item in node.body if isinstance(item, ast.FunctionDef)}
    raise AssertionError(f"{path} has no {name}")


def test_every_command_is_a_method_of_a_rank_or_of_an_engine() -> None:
    known = methods("actor/actor.py", "MegatronActor") | methods("rollout/engine.py", "RolloutEngine")
    given = list(commands())
    assert len(given) > 15
    assert [(method, where) for method, where in given if method not in known] == []
