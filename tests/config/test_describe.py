"""Every key explains itself: type, limits, the default as one would write it, and a description."""

from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel

from megatron_coreward.config.describe import all_keys, as_yaml, find_keys, groups
from megatron_coreward.config.load import parse_config
from megatron_coreward.config.names import RENAMED_KEYS, with_new_names
from megatron_coreward.config.schema import RunConfig
from megatron_coreward.errors import InputError


def tree() -> dict[str, Any]:
    return {
        "run_dir": "run",
        "steps": 10,
        "method": "co_rewarding_ii",
        "model": {"hf_path": "model"},
        "data": {"train_files": ["a.parquet"]},
    }


def fields(model: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key and its field, by pydantic's own tables."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from fields(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


FIELDS = dict(fields())
KEYS = all_keys()


def test_all_keys_are_there_those_of_the_guard_too() -> None:
    assert list(KEYS) == sorted(FIELDS, key=list(KEYS).index)
    assert {name.partition(".")[0] for name in KEYS if "." in name} == {
        name
        for name, field in RunConfig.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
    }
    assert sum(name.startswith("guard.") for name in KEYS) >= 20


@pytest.mark.parametrize("name", FIELDS)
def test_every_key_has_a_description_in_whole_sentences(name: str) -> None:
    description = KEYS[name].description
    assert len(description) > 20
    assert description.endswith((".", ")"))
    assert "\n" not in description
    assert description == " ".join((FIELDS[name].description or "").split())


def test_every_group_has_a_description() -> None:
    assert [group.name for group in groups() if not group.description] == []


@pytest.mark.parametrize("name", FIELDS)
def test_every_default_is_shown_as_an_override_that_means_it(name: str) -> None:
    field, key = FIELDS[name], KEYS[name]
    assert (key.default == "required") == field.is_required()
    if field.is_required():
        return
    config = parse_config(tree(), [f"{name}={key.default}"])
    defaults = parse_config(tree())
    for part in name.split("."):
        config, defaults = getattr(config, part), getattr(defaults, part)
    assert config == defaults
    assert key.default == as_yaml(field.get_default(call_default_factory=True))


@pytest.mark.parametrize(
    ("name", "kind", "choices"),
    [
        ("run_dir", "path", ()),
        ("steps", "integer ≥ 1", ()),
        ("seed", "integer ≥ 0, ≤ 4294967295", ()),
        ("actor.lr", "number > 0", ()),
        ("actor.adam_beta1", "number ≥ 0, < 1", ()),
        ("loss.dual_clip", "number > 1 or null", ()),
        ("data.train_files", "list of paths, at least 1", ()),
        ("data.thinking", "true or false or null", ()),
        ("telemetry.wandb_project", "text or null", ()),
        ("actor.gradient_accumulation_fusion", "`auto` or true or false", ("auto",)),
        ("loss.mismatch_correction", "`off` or `tis` or `icepop`", ("off", "tis", "icepop")),
        ("rewards.answer_formats", "list of `boxed` or `hashes` or `plain`, at least 1", ("boxed", "hashes", "plain")),
    ],
)
def test_types_limits_and_choices_are_named(name: str, kind: str, choices: tuple[str, ...]) -> None:
    assert (KEYS[name].kind, KEYS[name].choices) == (kind, choices)


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (None, "null"),
        (False, "false"),
        (0, "0"),
        (3e-6, "3e-06"),
        (0.1 + 0.2, "0.30000000000000004"),
        ("off", "off"),
        ("010", '"010"'),
        ("true", '"true"'),
        ("", '""'),
        ("[x]", '"[x]"'),
        (("a b", "c", "1"), '["a b", c, "1"]'),
    ],
)
def test_values_are_written_as_overrides_have_them(value: Any, written: str) -> None:
    assert as_yaml(value) == written


def names(*words: str) -> list[str]:
    return [key.name for group in find_keys(words) for key in group.keys]


def test_keys_are_found_by_name_group_and_word() -> None:
    assert names() == list(KEYS)
    assert names("loss.kl_coef") == ["loss.kl_coef"]
    assert names("teacher") == names("teacher.") == [name for name in KEYS if name.startswith("teacher.")]
    assert {"loss.kl_coef", "loss.kl_reference", "guard.kl", "guard.action"} <= set(names("KL"))
    assert "data.shuffle" not in names("kl")
    assert "rollout.kv_cache_gib" in names("key-value")  # in its description alone
    assert names("steps", "model.dtype") == ["steps", "model.dtype"]


def test_what_is_not_found_is_reported_with_what_is_near() -> None:
    with pytest.raises(InputError, match="'temprature' .*did you mean 'temperature'"):
        find_keys(["temprature"])
    with pytest.raises(InputError, match="key 'sync.hashes' is called 'sync.checksums' now"):
        find_keys(["sync.hashes"])


def test_renamed_keys_lead_from_names_that_are_gone_to_names_that_are_there() -> None:
    assert set(RENAMED_KEYS) & set(KEYS) == set()
    assert set(RENAMED_KEYS.values()) <= set(KEYS)


def test_what_a_run_was_made_with_is_read_by_new_names() -> None:
    made_with = {"steps": 3, "sync": {"hashes": True, "bucket_mib": 1.0}, "teacher": {"lag": 2}, "rollout": {"lag": 1}}
    assert with_new_names(made_with) == {
        "steps": 3,
        "sync": {"checksums": True, "bucket_mib": 1.0},
        "teacher": {"lookahead": 2},
        "rollout": {"max_staleness": 1},
    }
