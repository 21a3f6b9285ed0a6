"""What cannot work is answered by `train` at once: status 2, one message that names the place, and nothing started."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from megatron_coreward.cli import main
from megatron_coreward.preflight import machine
from tests.preflight.broken_recipes import CASES, data, resumed
from tests.preflight.recipe_world import write_world

SECONDS: dict[str, float] = {}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_world(folder)
    return folder


@pytest.fixture
def world(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory is a copy of the world, on a machine that is large and has no GPU; nothing can start."""
    folder = tmp_path / "world"
    shutil.copytree(template, folder)
    monkeypatch.chdir(folder)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(machine, "visible_gpus", lambda: 0)
    monkeypatch.setattr(machine, "available_memory", lambda: 1 << 40)
    monkeypatch.setattr(machine, "free_bytes", lambda folder: 1 << 40)
    started = ModuleType("megatron_coreward.trainer.run")
    started.train = lambda config, arch: config.run_dir  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "megatron_coreward.trainer.run", started)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_what_cannot_work_is_answered_with_status_2_and_one_message(
    name: str, world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case = CASES[name]
    if case.do is not None:
        case.do(world, monkeypatch)
    before = sorted(path for path in world.rglob("*"))
    begin = time.perf_counter()
    status = main(["train", "recipe.yaml", *case.changes])
    SECONDS[name] = time.perf_counter() - begin
    printed = capsys.readouterr()
    assert status == 2
    assert printed.out == ""
    assert "Traceback" not in printed.err
    assert printed.err.startswith("error: ")
    assert re.search(case.message, printed.err), printed.err
    assert sorted(path for path in world.rglob("*")) == before  # nothing was made or removed


def test_there_are_at_least_sixty_cases() -> None:
    assert len(CASES) >= 60
    if len(SECONDS) == len(CASES):
        slowest = max(SECONDS, key=lambda name: SECONDS[name])
        print(f"{len(CASES)} answers, the slowest ({slowest}) in {SECONDS[slowest]:.2f} s")


def test_what_works_is_started(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "recipe.yaml"]) == 0, capsys.readouterr().err
    assert (
        main(["train", "recipe.yaml", "model.hf_path=experts", "actor.data_parallel=2", "method=co_rewarding_ii"]) == 0
    )


def test_a_resumed_run_may_change_how_it_is_carried_out(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    resumed()(world, monkeypatch)
    changes = [
        "actor.tensor_parallel=2",
        "rollout.num_engines=2",
        "sync.transport=gloo",
        "steps=20",
        "data.val_files=[]",
    ]
    absolute = [f"model.hf_path={world / 'model'}", f"data.train_files=[{world / 'train.parquet'}]"]
    assert main(["train", "recipe.yaml", *changes, *absolute]) == 0, capsys.readouterr().err


def test_a_cluster_is_not_measured_by_this_machine(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setattr(machine, "available_memory", lambda: 1)
    assert main(["train", "recipe.yaml", "actor.tensor_parallel=2"]) == 0


def test_all_problems_are_reported_at_once(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (world / "model/tokenizer.json").write_text("{")
    data("rephrased", ["a"])(world, pytest.MonkeyPatch())
    changes = [
        "actor.tensor_parallel=3",
        "loss.kl_reference=teacher",
        "rollout.kv_cache_gib=4096",
        "run_dir=recipe.yaml",
    ]
    assert main(["train", "recipe.yaml", *changes]) == 2
    printed = capsys.readouterr().err
    for part in ("actor.tensor_par", "loss.kl_ref", "memory:", "run_dir:", "tokenizer.json: not a", "no rephrasing"):
        assert part in printed
    lines = printed.splitlines()
    assert len(lines) == len(set(lines))


def test_the_answer_comes_before_anything_heavy_is_imported(world: Path) -> None:
    program = (
        "import sys\n"
        "from megatron_coreward.cli import main\n"
        "status = main(['train', 'recipe.yaml', 'actor.tensor_parallel=3', 'data.max_prompt_tokens=8'])\n"
        "heavy = {'torch', 'ray', 'vllm', 'megatron', 'transformers'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else status)\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(root)},
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "actor.tensor_parallel: 3 does not divide" in done.stderr
    assert "data.max_prompt_tokens: found 8" in done.stderr
