"""The shortest way through docs/reproduce.md: data, recipes of the paper, a checkpoint's evaluation, the table."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_coreward.cli import main
from megatron_coreward.demo.model import write_model
from megatron_coreward.demo.tokenizer import byte_level_tokenizer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.e2e,
    pytest.mark.ray,
    pytest.mark.engine,
    pytest.mark.timeout(2400),
]

CONFIGS = Path(__file__).parents[2] / "configs" / "paper"
METHODS = {"co_rewarding_i": "Co-rewarding-I", "co_rewarding_ii": "Co-rewarding-II", "ground_truth": "GT-Reward"}
# As the page has them, for one machine without a GPU.
SMALL = (
    *(
        "model.hf_path=models/tiny",
        "model.dtype=float32",
        "steps=2",
        "data.batch_size=4",
        "data.max_prompt_tokens=1024",
    ),
    *("rollout.n=2", "rollout.max_response_tokens=16", "rollout.kv_cache_gib=0.25", "rollout.max_num_seqs=32"),
    *("rollout.num_engines=1", "rollout.tensor_parallel=1", "actor.tensor_parallel=1", "actor.pipeline_parallel=1"),
    *("actor.virtual_pipeline=1", "actor.sequence_parallel=false", "validation.every=0", "checkpoint.every=1"),
)


def write_sources(folder: Path) -> None:
    """Files of the sources' columns, as `prepare-data --input` takes them."""
    folder.mkdir()
    questions = [(f"What is ${n} + {n}$?", 2 * n) for n in range(4)]
    solved = [{"problem": q, "solution": rf"It is $\boxed{{{a}}}$.", "level": "1", "type": "x"} for q, a in questions]
    answered = [{"problem": q, "answer": str(a)} for q, a in questions]
    for name, rows in (("math", solved), ("math500", answered), ("amc", answered)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rephrased = [row | {"problem": f"Add it up: {row['problem']}"} for row in solved]
    (folder / "rephrased.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rephrased))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working directory with a model and the data; the data's commands."""
    from megatron_coreward.cluster.ray_start import stop_ray

    folder = tmp_path_factory.mktemp("reproduce")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_model(
            Path("models/tiny"), byte_level_tokenizer(), layers=1, hidden=64, heads=4, kv_heads=2, head_dim=32, ffn=64
        )
        write_sources(Path("sources"))
        math = "data/math/train_rewrite_Qwen3-32B.parquet"
        for words in (
            ("math", "--input", "sources/math.jsonl"),
            ("math", "--input", "sources/math.jsonl", "--split", "test"),
            ("math", "--input", "sources/rephrased.jsonl", "--out", math),
            ("math500", "--input", "sources/math500.jsonl", "--split", "test"),
            ("amc", "--input", "sources/amc.jsonl"),
        ):
            assert main(["prepare-data", *words]) == 0
        yield folder
        stop_ray()


def test_from_data_to_the_table(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for method in METHODS:
        run = f"runs/tiny_{method}"
        recipe = CONFIGS / f"qwen3_1_7b_base_math_{method}.yaml"
        assert main(["train", str(recipe), f"run_dir={run}", *SMALL, "telemetry.console=off"]) == 0
        small = ["--dtype", "float32", "--max-tokens", "16", "--kv-cache-gib", "0.125", "--limit", "3"]
        checkpoint = f"{run}/checkpoints/step_000001"
        out = ["--hf-path", "models/tiny", "--out", f"evals/{method}", "--benchmarks", "math500", "amc", "ifeval"]
        assert main(["evaluate", "paper", checkpoint, *out, *small]) == 0
        assert "not measured: ifeval: no **/*.jsonl in data/ifeval; get it: hf download" in capsys.readouterr().out
    folders = [f"evals/{method}" for method in METHODS]
    assert main(["evaluate", "table", *folders, "--out", "evals/table"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "| model | trained on | method | MATH500 | AMC |"
    assert {line.split(" | ")[2] for line in printed[2:5]} == set(METHODS.values())
    rows = list(csv.DictReader((place / "evals/table/table.csv").open()))
    assert {(row["method"], row["benchmark"], row["metric"], row["num_questions"]) for row in rows} == {
        (method, name, metric, "3") for method in METHODS for name, metric in (("math500", "avg@1"), ("amc", "avg@8"))
    }
    assert {(row["model"], row["data"]) for row in rows} == {("tiny", "math")}
    assert (place / "evals/table/table.tex").read_text().startswith(r"\begin{tabular}")
