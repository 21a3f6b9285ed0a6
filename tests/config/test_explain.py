"""What a recipe gets wrong is reported with the key's description, what is allowed, and what may have been meant."""

from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from megatron_coreward.config.describe import all_keys
from megatron_coreward.config.explain import explain
from megatron_coreward.config.load import parse_config
from megatron_coreward.config.names import RENAMED_KEYS, did_you_mean
from megatron_coreward.errors import InputError
from megatron_coreward.launch import settings


def tree() -> dict[str, Any]:
    return {
        "run_dir": "run",
        "steps": 10,
        "method": "co_rewarding_ii",
        "model": {"hf_path": "model"},
        "data": {"train_files": ["a.parquet"]},
    }


def message(*overrides: str, keys: dict[str, Any] | None = None) -> str:
    with pytest.raises(InputError) as error:
        parse_config(tree() | (keys or {}), overrides)
    return str(error.value)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("actor.lrr=1", "unknown key 'actor.lrr'; did you mean 'actor.lr'?"),
        ("actr.lr=1", "unknown key 'actr'; did you mean 'actor'?"),
        ("rollout.N=8", "unknown key 'rollout.N'; did you mean 'rollout.n'?"),
        ("guard.warnafter=3", "unknown key 'guard.warnafter'; did you mean 'guard.warn_after'?"),
        ("kl_coef=0.1", "unknown key 'kl_coef'; did you mean 'loss.kl_coef'?"),
        ("actor.kl_coef=0.1", "unknown key 'actor.kl_coef'; did you mean 'loss.kl_coef'?"),
        (
            "teacher.qqq=1",
            "unknown key 'teacher.qqq'; allowed: lookahead, engines, n, early_stop, decay_",
        ),
        ("method=co_rewarding_3", "found 'co_rewarding_3'; did you mean 'co_rewarding_i'?"),
        (
            "method={empo: 1, entrpy: 0.1}",
            "not 'entrpy' (did you mean 'entropy'?), found {'empo': 1, 'entrpy': 0.1}",
        ),
        ("method={qqq: 1}", "to weights; not 'qqq', found"),
        ("actor.fp8=TensorWise", "found 'TensorWise'; did you mean 'tensorwise'?"),
        ("guard.action=roll_back", "found 'roll_back'; did you mean 'rollback'?"),
        ("rewards.answer_formats=[boxed, hash]", "rewards.answer_formats.1: .*found 'hash'; did you mean 'hashes'?"),
        ("faults.stop_signals=[sigterm]", "found 'sigterm'; did you mean 'SIGTERM'?"),
        (
            "actor.gradient_accumulation_fusion=aut",
            "expected `auto` or true or false, found 'aut'; did you mean 'auto'?",
        ),
    ],
)
def test_the_nearest_name_or_value_is_offered(override: str, expected: str) -> None:
    said = message(override)
    assert all(part in said for part in expected.split(".*")), said


@pytest.mark.parametrize(("old", "new"), RENAMED_KEYS.items())
def test_renamed_keys_are_refused_with_the_new_name(old: str, new: str) -> None:
    assert message(f"{old}=1").startswith(f"config: key {old!r} is called {new!r} now")


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("steps=0", "steps"),
        ("seed=12345678901234567890", "seed"),
        ("actor.lr=fast", "actor.lr"),
        ("data.train_files=[]", "data.train_files"),
        ("model.hf_path=null", "model.hf_path"),
        ("guard.kl_factor=1", "guard.kl_factor"),
        ("actor.gradient_accumulation_fusion=3", "actor.gradient_accumulation_fusion"),
    ],
)
def test_a_wrong_value_is_reported_once_with_what_the_key_is_for(override: str, key: str) -> None:
    said = message(override)
    assert said.count(f"config: {key}: ") == 1
    assert said.splitlines()[-1].startswith(f"    {key}")
    assert said.endswith(all_keys()[key].description)
    if not all_keys()[key].choices:  # which the problem itself names
        assert f"({all_keys()[key].kind})" in said


def test_a_missing_key_is_reported_with_what_it_is_for() -> None:
    incomplete = tree()
    del incomplete["model"]["hf_path"]
    with pytest.raises(
        InputError, match=r"config: key 'model.hf_path' is missing\n    model.hf_path \(path\): Directory"
    ):
        parse_config(incomplete)


def test_all_problems_are_reported_each_once() -> None:
    said = message("steps=0", "actor.lrr=1", "rollout.n=1", "actor.backend=x")
    assert said.count("config: ") == 4


def test_groups_and_their_rules_are_named() -> None:
    assert message("actor=3").startswith("config: actor: expected a group of keys, found 3")
    assert "config: guard: warn_after (12) must not be above act_after (10)" in message("guard.warn_after=12")


def test_long_values_are_cut() -> None:
    assert len(message(f"steps={'x' * 10_000}")) < 500


def wrong(model: type[BaseModel], **values: Any) -> str:
    with pytest.raises(ValidationError) as failed:
        model.model_validate(values)
    return explain("cluster.yaml", model, failed.value)


def test_the_files_of_clusters_can_be_explained_as_well() -> None:
    said = wrong(
        settings.SlurmCluster,
        kind="slurm",
        acount="x",
        stop_before_s=0,
        env={"low": "x"},
        ssh={"host": "h", "usr": "u"},
        mounts=["here"],
    )
    for problem in (
        "cluster.yaml: unknown key 'acount'; did you mean 'account'?",
        "cluster.yaml: stop_before_s: input should be greater than or equal to 1, found 0",
        "cluster.yaml: env.low.[key]: an environment variable is named in capitals",
        "cluster.yaml: key 'ssh.user' is missing",
        "cluster.yaml: unknown key 'ssh.usr'; did you mean 'ssh.user'?",
        "cluster.yaml: mounts.0: expected /on/the/host:/in/the/container, found 'here'",
    ):
        assert problem in said
    assert "tolerations" in wrong(settings.KubernetesCluster, kind="kubernetes", tolerations=3)


def test_nothing_is_offered_that_is_not_near() -> None:
    assert did_you_mean("zzz", ["actor", "loss"]) is None
    assert did_you_mean("LOSS", ["actor", "loss"]) == "loss"
