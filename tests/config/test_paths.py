"""`~` and variables in paths are replaced once, in every key that is a path, and what cannot be is refused."""

from pathlib import Path, PurePosixPath
from typing import Any

import pytest

from megatron_coreward.config.component import Component
from megatron_coreward.config.load import dump_config, load_config, parse_config
from megatron_coreward.config.paths import expand_path
from megatron_coreward.errors import InputError


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.setenv("DATA", "/data/sets")
    monkeypatch.setenv("AGAIN", "$DATA/x")
    monkeypatch.delenv("NOT_SET", raising=False)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("~/run", "/home/ada/run"),
        ("$DATA/math", "/data/sets/math"),
        ("${DATA}_2", "/data/sets_2"),
        ("a/~/b", "a/~/b"),
        ("price$", "price$"),
        ("$5", "$5"),
    ],
)
def test_paths_are_expanded(written: str, meant: str) -> None:
    assert expand_path(written) == Path(meant)
    assert expand_path(expand_path(written)) == Path(meant)


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("$NOT_SET/x", "the environment variable NOT_SET is not set"),
        ("~nobody-of-that-name/x", "no home directory for ~nobody-of-that-name"),
        ("$AGAIN", "has something to expand again"),
        ("a\udcff", "not UTF-8 text from character 2 on"),
        ("a\0b", "no null character"),
        ("", "the path is empty"),
    ],
)
def test_what_cannot_be_expanded_is_refused(written: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        expand_path(written)


def tree() -> dict[str, Any]:
    return {
        "run_dir": "~/run",
        "steps": 10,
        "method": "co_rewarding_i",
        "model": {"hf_path": "$DATA/model", "megatron_path": "${DATA}/megatron"},
        "data": {"train_files": ["$DATA/a.parquet"], "rephrased_files": ["~/b.parquet"]},
    }


def test_every_path_of_a_recipe_is_expanded_and_a_resolved_one_means_the_same_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = parse_config(tree(), ["data.val_files=[$DATA/v.parquet]"])
    assert (config.run_dir, config.model.hf_path) == (Path("/home/ada/run"), Path("/data/sets/model"))
    assert config.model.megatron_path == Path("/data/sets/megatron")
    assert config.data.train_files == (Path("/data/sets/a.parquet"),)
    assert config.data.rephrased_files == (Path("/home/ada/b.parquet"),)
    assert config.data.val_files == (Path("/data/sets/v.parquet"),)
    (tmp_path / "config.yaml").write_text(dump_config(config))
    monkeypatch.delenv("DATA")
    monkeypatch.setenv("HOME", "/elsewhere")
    assert load_config(tmp_path / "config.yaml") == config


def test_a_base_may_be_named_by_a_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "base.yaml").write_text("{run_dir: run, steps: 3, method: entropy}")
    (tmp_path / "recipe.yaml").write_text("base: $BASES/base.yaml\nmodel: {hf_path: m}\ndata: {train_files: [a]}\n")
    monkeypatch.setenv("BASES", str(tmp_path))
    assert load_config(tmp_path / "recipe.yaml").steps == 3
    monkeypatch.delenv("BASES")
    with pytest.raises(InputError, match=r"base: \$BASES/base.yaml: the environment variable BASES is not set"):
        load_config(tmp_path / "recipe.yaml")


def test_a_path_that_cannot_be_expanded_is_reported_with_its_key() -> None:
    with pytest.raises(InputError, match="config: data.val_files: the environment variable NOT_SET is not set"):
        parse_config(tree(), ["data.val_files=[$NOT_SET/v.parquet]"])


@pytest.mark.parametrize(
    "override", ["run_dir=run\udcff", "data.val_files=[run\udcff]", "telemetry.wandb_project=\udcff"]
)
def test_text_that_is_not_utf_8_is_reported_as_such(override: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=f"not UTF-8 text from character {override.index(chr(0xDCFF)) + 1} on"):
        parse_config(tree(), [override])
    monkeypatch.setenv("DATA", "/data/\udcff")
    with pytest.raises(InputError, match="model.hf_path: not UTF-8 text"):
        parse_config(tree())


class Remote(Component):
    here: Path | None = None
    there: PurePosixPath | None = None


def test_paths_of_another_machine_are_left_to_it() -> None:
    remote = Remote.model_validate({"here": "~/a", "there": "~/a"})
    assert (remote.here, remote.there) == (Path("/home/ada/a"), PurePosixPath("~/a"))
