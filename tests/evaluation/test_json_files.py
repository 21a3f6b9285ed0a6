"""Files of results come back as they were written, and anything else is one message that names the file."""

from pathlib import Path
from typing import Any

import pytest

from megatron_coreward.errors import InputError
from megatron_coreward.evaluation.json_files import read_json, write_json


def numbers(content: dict[str, Any]) -> list[int]:
    return [int(text) for text in content["numbers"]]


def test_a_result_is_read_from_its_file_and_from_its_folder(tmp_path: Path) -> None:
    write_json(tmp_path / "sums.json", {"format": 3, "numbers": ["1", "2"]})
    assert read_json(tmp_path, "sums.json", "sum", 3, numbers) == [1, 2]
    assert read_json(tmp_path / "sums.json", "other.json", "sum", 3, numbers) == [1, 2]
    assert [path.name for path in tmp_path.iterdir()] == ["sums.json"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"format": 2, "numbers": []}', "found format 2; allowed: 3"),
        ('{"format": 3}', r"not a sum \(KeyError\('numbers'\)\)"),
        ('{"format": 3, "numbers": ["x"]}', "not a sum .*ValueError"),
        ('{"format": 3, "numbers": 1}', "not a sum .*TypeError"),
        ("[]", "not a sum .*TypeError"),
        ("{", "not a sum .*JSONDecodeError"),
    ],
)
def test_a_file_of_another_form_is_refused_by_its_name(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "sums.json").write_text(text)
    with pytest.raises(InputError, match=f"sums.json: {message}"):
        read_json(tmp_path, "sums.json", "sum", 3, numbers)


def test_a_missing_file_is_refused_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="sums.json: no sum there"):
        read_json(tmp_path / "sums.json", "sums.json", "sum", 3, numbers)
