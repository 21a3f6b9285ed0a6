"""What holds for every test: one OpenMP thread a process, property tests that do not fail on a slow machine, quick
tests that start nothing heavy, and an order in which two workers finish together."""

import os
from collections.abc import Iterator

# Before torch is imported anywhere: threads that spin make processes that share cores many times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
from hypothesis import settings

from tests.heavy_processes import HeavyProcesses

settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")

NOT_QUICK = ("gpu", "slow", "e2e", "engine", "ray", "ranks", "long")  # marks; the longest of those without a GPU first
LONG_S = 10.0  # a test that takes longer is named when it is done


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--quick",
        action="store_true",
        help="only short tests that start no Ray, engine or ranks; one that starts them fails",
    )


@pytest.hookimpl(trylast=True)  # behind whoever adds marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    def weight(item: pytest.Item) -> int:
        return next((i for i, name in enumerate(NOT_QUICK) if item.get_closest_marker(name)), len(NOT_QUICK))

    for item in items:
        if "run_ranks" in _names_of(item) and weight(item) == len(NOT_QUICK):
            raise pytest.UsageError(f"{item.nodeid} starts ranks: mark it as one that does (pytest.mark.ranks)")
    if config.getoption("quick"):
        config.hook.pytest_deselected(items=[item for item in items if weight(item) < len(NOT_QUICK)])
        items[:] = [item for item in items if weight(item) == len(NOT_QUICK)]
    if "PYTEST_XDIST_WORKER" in os.environ:
        # A file stays in one worker, with what it shares; so do the engines that a whole folder shares. Long ones come
        # first, so that no worker begins one when the other has nothing left to do.
        for item in items:
            shares_engines = item.path.parent.name == "rollout" and item.get_closest_marker("engine")
            item.add_marker(pytest.mark.xdist_group("rollout engines" if shares_engines else str(item.path)))
        lightest = {path: min(weight(i) for i in items if i.path == path) for path in {item.path for item in items}}
        items.sort(key=lambda item: lightest[item.path])


def _names_of(item: pytest.Item) -> tuple[str, ...]:
    """The names that the body of a test uses."""
    return item.function.__code__.co_names if isinstance(item, pytest.Function) else ()


@pytest.fixture(scope="session")
def _heavy_processes(pytestconfig: pytest.Config) -> Iterator[HeavyProcesses | None]:
    if not pytestconfig.getoption("quick"):
        yield None
        return
    with HeavyProcesses() as watch:
        yield watch


@pytest.fixture(autouse=True)
def _quick_tests_start_nothing_heavy(_heavy_processes: HeavyProcesses | None) -> Iterator[None]:
    yield
    if _heavy_processes is not None and (seen := _heavy_processes.take()):
        pytest.fail(f"this test started {', '.join(sorted(seen))}: mark it as one that does ({', '.join(NOT_QUICK)})")


class LongTests:
    """Names what took long, so that whoever waits sees what a run is busy with."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        terminal = self._config.pluginmanager.get_plugin("terminalreporter")
        if terminal is not None and report.duration > LONG_S:
            what = {"setup": "was set up", "teardown": "was torn down"}.get(str(report.when), report.outcome)
            terminal.ensure_newline()
            terminal.write_line(f"{report.nodeid} {what} in {report.duration:.0f} s")


def pytest_configure(config: pytest.Config) -> None:
    if "PYTEST_XDIST_WORKER" not in os.environ:
        config.pluginmanager.register(LongTests(config))
