"""YAML means what a person wrote, and what cannot be read is reported with file, line and cause."""

import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from megatron_coreward.config.yaml_file import as_text, parse_scalar, parse_yaml, plain, read_yaml, write_yaml
from megatron_coreward.errors import InputError


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("off", "off"),
        ("on", "on"),
        ("yes", "yes"),
        ("no", "no"),
        ("1:30", "1:30"),
        ("12:00:00", "12:00:00"),
        ("2026-01-01", "2026-01-01"),
        ("1_000", "1_000"),
        ("0b1", "0b1"),
        ("010", 10),
        ("+12", 12),
        ("0o17", 15),
        ("0x1F", 31),
        ("1e-5", 1e-5),
        ("1E5", 1e5),
        (".5", 0.5),
        ("5.", 5.0),
        ("-.inf", -math.inf),
        ("true", True),
        ("False", False),
        ("tRUE", "tRUE"),
        ("null", None),
        ("~", None),
        ("", None),
        ("nUll", "nUll"),
        ("1" * 5000, "1" * 5000),
    ],
)
def test_plain_scalars_follow_the_core_schema_in_files_and_overrides(written: str, meant: Any) -> None:
    for read in (plain(parse_scalar(written)), plain(parse_yaml(f"[{written}, 'x']", "test")[0]) if written else None):
        assert read == meant
        assert type(read) is type(meant)


def test_quoted_scalars_are_text_and_nan_is_a_number() -> None:
    assert parse_yaml("['1', \"true\", 'null']", "test") == ["1", "true", "null"]
    assert math.isnan(parse_scalar(".nan"))


@given(st.from_regex(r"[-+]?[0-9]{1,20}|[-+]?[0-9]+\.[0-9]*([eE][-+]?[0-9]{1,2})?", fullmatch=True))
def test_a_number_remembers_how_it_was_written(written: str) -> None:
    number = parse_scalar(written)
    assert as_text([number]) == [written]
    assert plain({"a": [number]}) == {"a": [float(written) if set(".eE") & set(written) else int(written)]}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**12), 10**12) | st.text(st.characters(codec="ascii"), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abxyz", min_size=1), inner, max_size=3),
    max_leaves=8,
)


@given(json_values)
@example("0E0")
@example({"1E5": "0o7"})
def test_what_is_written_is_read_back_by_either_version_of_yaml(value: Any) -> None:
    written = write_yaml(value)
    assert plain(parse_yaml(written, "test")) == value
    assert yaml.safe_load(written) == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "f.yaml, line 3: key 'a' is there already, in line 1"),
        ("a:\n  b: {x: 1,\n      x: 2}\n", "f.yaml, line 3: key 'x' is there already, in line 2"),
        ("a: 1\n'a': 2\n", "f.yaml, line 2: key 'a' is there already, in line 1"),
        ("a: 1\n\tb: 2\n", "f.yaml: not valid YAML, line 2, column 1: a tab is used for indentation"),
        ("a:\n\t- b\n", "f.yaml: not valid YAML, line 2, column 1: a tab is used for indentation"),
        ("a:\n  b: 1\n c: 2\n", "line 3, column 2: indentation that does not fit the lines above"),
        ("a: b: c\n", "line 1, column 5: a second ': ' in the line"),
        ("a: [1\n", "not valid YAML, line 2, column 1: expected ',' or ']'"),
        ("a: 1\n---\nb: 2\n", "line 2, column 1: expected a single document"),
        ("&x [*x]\n", "line 1: contains itself"),
        ("a: !!python/object:os.system x\n", "line 1: !!python/object:os.system is not supported"),
        ("a: !!int x\n", "line 1: invalid literal for int.*'x'"),
        ("? [a]\n: b\n", "line 1: a key is text; found a list or a mapping"),
        ("<<: 3\n", "line 1: << takes a mapping"),
        ("a: \x01\n", "not valid YAML .*#x0001"),
        ("[" * 3000, "nested too deeply"),
    ],
)
def test_what_cannot_be_read_is_reported_with_line_and_cause(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_yaml(text, "f.yaml")


def test_keys_are_text_and_anchors_merge_below_a_mappings_own_keys() -> None:
    text = "base: &base {x: 1, on: 2}\n1: a\nmore: {x: 3, <<: *base}\nboth: {<<: [{y: 1}, {y: 2, z: 3}]}\n"
    assert parse_yaml(text, "test") == {
        "base": {"x": 1, "on": 2},
        "1": "a",
        "more": {"x": 3, "on": 2},
        "both": {"y": 1, "z": 3},
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: 1\nb: \xff\n", "not UTF-8 text, line 2 .byte 0xff"),
        ("a: 1".encode("utf-16"), "not UTF-8 text, line 1"),
        (b"", "expected keys and values, found nothing"),
        (b"3", "expected keys and values, found int"),
    ],
)
def test_files_that_hold_no_keys_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "f.yaml"
    file.write_bytes(content)
    with pytest.raises(InputError, match=f"f.yaml: {message}"):
        read_yaml(file, "config file")


def test_files_that_cannot_be_opened_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"config file .*none.yaml does not exist"):
        read_yaml(tmp_path / "none.yaml", "config file")
    with pytest.raises(InputError, match=r"config file .* cannot be read .Is a directory"):
        read_yaml(tmp_path, "config file")
    with pytest.raises(InputError, match=r"cannot be read .File name too long"):
        read_yaml(tmp_path / ("x" * 300), "config file")


def test_a_byte_order_mark_and_a_name_that_is_not_utf_8_do_no_harm(tmp_path: Path) -> None:
    file = tmp_path / "odd-\udcff.yaml"
    file.write_bytes(b"\xef\xbb\xbfa: 1\n")
    assert read_yaml(file, "config file") == {"a": 1}
