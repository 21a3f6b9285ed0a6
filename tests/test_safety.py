"""The promises of SECURITY.md that are about the code and the files of a run as a whole."""

import ast
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from pydantic import BaseModel

from megatron_coreward.config.load import dump_config, parse_config
from megatron_coreward.config.schema import RunConfig
from megatron_coreward.rewards.symbolic import SymbolicPool
from megatron_coreward.telemetry.rollout_dump import ScoredGroup, dump_rollouts, rollouts_path
from megatron_coreward.telemetry.sinks import open_sinks
from megatron_coreward.types import Completion, Prompt, RolloutGroup

ROOT = Path(__file__).parents[1]
FOLDERS = ("megatron_coreward", "tools", "launch")
SECRETS = ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "RAY_AUTH_TOKEN")


def sources() -> Iterator[tuple[Path, ast.Module]]:
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield path, ast.parse(path.read_text(), str(path))


def calls(tree: ast.Module) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def test_code_of_a_model_directory_is_never_asked_for() -> None:
    found = [path for path, _ in sources() if "trust_remote_code" in path.read_text()]
    assert found == []


def test_nothing_is_unpickled_but_by_an_allowlist() -> None:
    unsafe = []
    for path, tree in sources():
        for name, call in calls(tree):
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            if (
                name
                in ("pickle.load", "pickle.loads", "pickle.Unpickler", "cloudpickle.loads", "yaml.load", "joblib.load")
                or (name == "torch.load" and options.get("weights_only") != "True")
                or (name in ("np.load", "numpy.load") and options.get("allow_pickle") == "True")
                or name in ("eval", "exec", "os.system")
            ):
                unsafe.append(f"{path.relative_to(ROOT)}:{call.lineno} {name}")
    assert unsafe == []


def test_megatrons_reader_which_unpickles_is_called_nowhere() -> None:
    assert [path.relative_to(ROOT).as_posix() for path, tree in sources() if _uses_reader(tree)] == []


def _uses_reader(tree: ast.Module) -> bool:
    return any(re.match(r"(dist_checkpointing|dcp)\.load", name) for name, _ in calls(tree))


def test_no_command_line_is_given_to_a_shell() -> None:
    through_a_shell = [
        f"{path.relative_to(ROOT)}:{call.lineno}"
        for path, tree in sources()
        for name, call in calls(tree)
        if name.startswith("subprocess.") and any(k.arg == "shell" for k in call.keywords)
    ]
    assert through_a_shell == []


def keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from keys(kind, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def test_the_config_has_no_place_for_a_secret() -> None:
    """It is written into the run directory and shown by W&B; keys and tokens come from the environment."""
    like_a_secret = re.compile(r"(api_?key|secret|passw|credential|(^|_)token($|_))")
    assert [key for key in keys(RunConfig) if like_a_secret.search(key.rsplit(".", 1)[-1])] == []


def config(run_dir: Path) -> RunConfig:
    return parse_config(
        {
            "run_dir": str(run_dir),
            "steps": 1,
            "method": "majority_voting",
            "model": {"hf_path": "model"},
            "data": {"train_files": ["a.parquet"]},
        }
    )


def group(uid: str) -> ScoredGroup:
    completion = Completion(np.array([1], np.int32), np.array([-0.5], np.float32), "text", "1", "stop", 2)
    prompt = Prompt("q", np.array([1], np.int32))
    numbers = np.zeros(1, np.float32)
    return ScoredGroup(RolloutGroup(uid, "original", "policy", prompt, (completion,)), "1", numbers, numbers)


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_secrets_of_the_environment_are_in_no_file_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    canary = "canary-5f1e7c"
    for name in SECRETS:
        monkeypatch.setenv(name, f"{canary}-{name}")
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(dump_config(config(run)))
    with open_sinks(run, first_step=1, config=config(run).model_dump(mode="json")) as sinks:
        sinks.write(1, {"reward": 0.5, "step_time_s": 1.0})
    dump_rollouts(run, 1, [group("set/1")])
    written = [path for path in run.rglob("*") if path.is_file()]
    assert len(written) >= 4
    assert [path for path in written if canary.encode() in path.read_bytes()] == []


@pytest.mark.parametrize("uid", ["../../outside/1", "/etc/passwd", "a\0b", "..", "x" * 5000, "~/1", "$(touch x)"])
def test_names_from_the_data_never_become_paths(tmp_path: Path, uid: str) -> None:
    run = tmp_path / "deep" / "run"
    run.mkdir(parents=True)
    assert dump_rollouts(run, 1, [group(uid)]) == rollouts_path(run, 1)
    assert files(tmp_path) == ["deep/run/rollouts/step_000001.parquet"]


def test_the_process_that_compares_answers_has_no_secret_and_can_write_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SECRETS:
        monkeypatch.setenv(name, "canary")
    pool = SymbolicPool(5.0)
    try:
        assert pool.equivalent("x+x", "2x") is True
        (worker,) = [
            entry
            for entry in Path("/proc").iterdir()
            if entry.name.isdigit() and _is_our_worker(entry, "symbolic_worker.py")
        ]
        inherited = (worker / "environ").read_bytes()
        assert b"canary" not in inherited
        limits = (worker / "limits").read_text()
        assert re.search(r"Max file size +0 +0", limits)
        assert re.search(r"Max core file size +0 +0", limits)
        assert re.search(rf"Max address space +{2 << 30}", limits)
    finally:
        pool.close()


def _is_our_worker(process: Path, program: str) -> bool:
    try:
        status = (process / "status").read_text()
        return program in (process / "cmdline").read_text() and f"PPid:\t{os.getpid()}\n" in status
    except OSError:  # it has ended
        return False
