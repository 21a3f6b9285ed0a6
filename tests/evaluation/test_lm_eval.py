"""The command line of lm-evaluation-harness, and what is refused before it starts."""

import json
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from megatron_coreward.errors import InputError, RunError
from megatron_coreward.evaluation.lm_eval import BENCHMARKS, lm_eval_command, read_lm_eval_results, run_lm_eval


def test_one_command_measures_all_benchmarks(tmp_path: Path) -> None:
    command = lm_eval_command(
        tmp_path, ["ifeval", "mmlu_pro", "crux"], Path("out"), tensor_parallel=2, limit=5, allow_code=True
    )
    options = dict(pairwise(command))
    assert command[:4] == ["lm_eval", "run", "--model", "vllm"]
    assert options["--tasks"] == "ifeval,mmlu_pro,cruxeval_input_cot,cruxeval_output_cot"
    assert options["--model_args"].split(",")[:3] == [
        f"pretrained={tmp_path}",
        "dtype=bfloat16",
        "tensor_parallel_size=2",
    ]
    assert options["--limit"] == "5"
    assert "--confirm_run_unsafe_code" in command
    assert "--apply_chat_template" in command
    assert "--confirm_run_unsafe_code" not in lm_eval_command(tmp_path, ["ifeval"], Path("out"), allow_code=True)


@pytest.mark.parametrize(
    ("benchmarks", "message"),
    [
        ([], "no benchmark given; allowed: ifeval, mmlu_pro, crux, livecodebench"),
        (["gpqa"], "benchmark 'gpqa': unknown; allowed: ifeval"),
        (["crux"], "--allow-code"),
        (["livecodebench"], "has no task for it; allowed: --include-path"),
    ],
)
def test_what_cannot_run_is_refused(benchmarks: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        lm_eval_command(Path("model"), benchmarks, Path("out"))


def test_a_task_of_one_s_own_serves_livecodebench(tmp_path: Path) -> None:
    command = lm_eval_command(Path("model"), ["livecodebench"], Path("out"), include_path=tmp_path, allow_code=True)
    assert command[command.index("--tasks") + 1] == "livecodebench"
    assert command[command.index("--include_path") + 1] == str(tmp_path)


def test_a_path_that_the_harness_cannot_read_is_refused() -> None:
    with pytest.raises(InputError, match="comma"):
        lm_eval_command(Path("a,b"), ["ifeval"], Path("out"))


def test_a_missing_harness_is_named_with_its_installation(tmp_path: Path) -> None:
    with pytest.raises(InputError, match='no-such-harness is not installed.*pip install "lm_eval'):
        run_lm_eval(tmp_path, ["ifeval"], tmp_path / "out", program=["no-such-harness"])


def test_results_are_read_from_what_the_harness_leaves(tmp_path: Path) -> None:
    fake = tmp_path / "fake.py"
    fake.write_text(
        "import json, pathlib, sys\n"
        "folder = pathlib.Path(sys.argv[sys.argv.index('--output_path') + 1]) / 'model'\n"
        "folder.mkdir(parents=True)\n"
        "rows = {'ifeval': {'alias': 'ifeval', 'acc,none': 0.5, 'acc_stderr,none': 0.1}}\n"
        "(folder / 'results_2026-01-01.json').write_text(json.dumps({'results': rows}))\n"
    )
    results = run_lm_eval(tmp_path, ["ifeval"], tmp_path / "out", program=[sys.executable, str(fake)])
    assert results == {"ifeval": {"acc,none": 0.5}}
    fake.write_text("raise SystemExit(3)")
    with pytest.raises(RunError, match="exit status 3"):
        run_lm_eval(tmp_path, ["ifeval"], tmp_path / "out", program=[sys.executable, str(fake)])
    fake.write_text("")
    with pytest.raises(RunError, match=r"no results_\*.json"):
        run_lm_eval(tmp_path, ["ifeval"], tmp_path / "out", program=[sys.executable, str(fake)])


def test_standard_errors_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "results_x.json"
    path.write_text(json.dumps({"results": {"t": {"m,f": 1, "m_stderr,f": "N/A", "alias": "t"}}}))
    assert read_lm_eval_results(path) == {"t": {"m,f": 1.0}}


def test_every_benchmark_of_the_paper_has_an_entry() -> None:
    assert set(BENCHMARKS) == {"ifeval", "mmlu_pro", "crux", "livecodebench"}
