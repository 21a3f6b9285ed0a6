"""CRUXEval and LiveCodeBench: which answers are right, as the benchmarks define it; code only in the sandbox."""

import base64
import json
import pickle
import zlib
from pathlib import Path
from typing import Any

import pytest

from megatron_coreward.errors import InputError
from megatron_coreward.evaluation.tasks import crux, livecodebench

pytestmark = pytest.mark.timeout(120)

ROW = {"code": "def f(a, b):\n    print('noise')\n    return [a + b, a]", "input": "1, b=2", "output": "[3, 1]"}


@pytest.mark.parametrize(
    ("response", "right"),
    [
        ("It is. [ANSWER]assert f(1, b=2) == [3, 1][/ANSWER]", 1),
        ("[ANSWER]\nassert f(1, b=2) == [3,1]\n", 1),  # generation stops at the closing tag
        ("[ANSWER][3, 1][/ANSWER]", 1),
        ("[ANSWER]assert [3, 1] == f(1, b=2)[/ANSWER]", 1),
        ("[ANSWER]assert f(1, b=2) == [3, 2][/ANSWER]", 0),
        ("[ANSWER]assert f(1, b=2) == f(1, b=2)[/ANSWER]", 0),  # not a value
        ("[ANSWER]assert f(1, b=2) == __import__('os')._exit(0)[/ANSWER]", 0),
        ("[ANSWER]assert f(1, b=2) == [3, 1[/ANSWER]", 0),
        ("first [ANSWER][3, 1][/ANSWER], no: [ANSWER][4, 1][/ANSWER]", 0),
        ("[3, 1]", 0),
        ("[ANSWER][/ANSWER]", 0),
    ],
)
def test_an_output_is_right_if_its_value_is(response: str, right: int) -> None:
    assert crux.score_output(ROW, [response]) == {"acc": right}


@pytest.mark.parametrize(
    ("response", "right"),
    [
        ("[ANSWER]assert f(1, b=2) == [3, 1][/ANSWER]", 1),
        ("[ANSWER]assert f(1, 2.0) == [3, 1][/ANSWER]", 1),  # another input with the same output
        ("[ANSWER]f(1, 2)[/ANSWER]", 1),
        ("[ANSWER]1, 2[/ANSWER]", 1),
        ("[ANSWER]1, b=2[/ANSWER]", 1),
        ("[ANSWER]assert f(2, 1) == [3, 1][/ANSWER]", 0),
        ("[ANSWER]assert f((1, 2) == [3, 1][/ANSWER]", 0),
        ("[ANSWER]assert f(exit(), 2) == [3, 1][/ANSWER]", 0),
        ("nothing", 0),
    ],
)
def test_an_input_is_right_if_it_leads_to_the_output(response: str, right: int) -> None:
    assert crux.score_input(ROW, [response]) == {"acc": right}


def test_questions_show_what_is_known_and_hide_the_rest() -> None:
    assert "assert f(1, b=2) == ??" in crux.output_prompt(ROW)
    assert "[3, 1]" not in crux.output_prompt(ROW)
    assert "assert f(??) == [3, 1]" in crux.input_prompt(ROW)
    assert "b=2" not in crux.input_prompt(ROW)


def problem(
    public: list[tuple[str, str]], private: list[tuple[str, str]], name: str | None = None, packed: bool = True
) -> dict[str, Any]:
    """A row of the data set."""
    texts = [json.dumps([{"input": i, "output": o, "testtype": "x"} for i, o in cases]) for cases in (public, private)]
    if packed:
        texts[1] = base64.b64encode(zlib.compress(pickle.dumps(texts[1]))).decode()
    return {
        "question_id": "q1",
        "question_content": "Add.",
        "starter_code": ""
        if name is None
        else f"class Solution:\n    def {name}(self, a: List[int]) -> int:\n        ",
        "public_test_cases": texts[0],
        "private_test_cases": texts[1],
        "metadata": "{}" if name is None else json.dumps({"func_name": name}),
    }


def fenced(code: str) -> str:
    return f"So:\n```python\n{code}\n```\nDone."


SUM = problem([("1 2\n", "3\n")], [("4 5\n", "9"), ("1.5 2\n", "3.50\n")])


@pytest.mark.parametrize(
    ("response", "right"),
    [
        (fenced("print(sum(map(float, input().split())))"), 1),  # 3.0 is 3
        (
            fenced(
                "if __name__ == '__main__':\n    a, b = map(float, stdin.readline().split())\n    print(a + b, ' ')"
            ),
            1,
        ),
        (fenced("print(3)"), 0),  # the public test only
        (fenced("print(sum(map(float, input().split())), 'x')"), 0),
        (fenced("print(sum(map(float, input().split())), '\\n1')"), 0),
        ("```python\nprint(3)", 0),  # cut off
        ("print(sum(map(float, input().split())))", 0),
        (fenced("import os\nos._exit(0)"), 0),
        (fenced("print(3)") + fenced("print(sum(map(float, input().split())))"), 1),  # the last block
    ],
)
def test_a_program_passes_if_all_tests_do(response: str, right: int) -> None:
    assert livecodebench.score(SUM, [response]) == {"acc": right}


@pytest.mark.parametrize(
    ("body", "right"),
    [
        ("return len(a) + k", 1),
        ("print('noise'); return len(a) + k", 1),
        ("return 3", 0),
        ("raise ValueError", 0),
        ("return {1, 2}", 0),  # no JSON
    ],
)
def test_a_function_is_called_with_each_line(body: str, right: int) -> None:
    row = problem([("[1, 2]\n1", "3")], [("[]\n7", "7")], name="g", packed=False)
    code = f"class Solution:\n    def g(self, a: List[int], k: int) -> int:\n        {body}"
    assert livecodebench.score(row, [fenced(code)]) == {"acc": right}


def test_a_list_is_what_a_tuple_of_equal_items_is() -> None:
    row = problem([("3", "[3, 3]")], [], name="g")
    assert livecodebench.score(row, [fenced("class Solution:\n    def g(self, n):\n        return n, n")]) == {"acc": 1}


def test_packed_tests_that_would_run_code_are_refused(tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "attacked",))

    row = SUM | {"private_test_cases": base64.b64encode(zlib.compress(pickle.dumps(Attack()))).decode()}
    with pytest.raises(InputError, match="problem q1: its tests cannot be read .it names pathlib"):
        livecodebench.test_cases(row)
    assert not (tmp_path / "attacked").exists()
    with pytest.raises(InputError, match="problem q1: it has no tests"):
        livecodebench.test_cases(problem([], []))


def test_the_prompt_has_the_starter_code() -> None:
    assert "def g(self" in livecodebench.prompt(problem([], [], name="g"))
    assert "standard input" in livecodebench.prompt(SUM)
