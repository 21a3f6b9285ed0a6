"""Writes the recipes of the paper from config/paper.py: configs/paper/ whole, and the parts that say how long a run is.

python tools/write_paper_recipes.py          # writes the files
python tools/write_paper_recipes.py --check  # status 1, and their names, if some are not up to date
"""

import sys
from collections.abc import Container, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from megatron_coreward.config.methods import REPHRASED_METHODS, TWO_VIEW_METHODS, MethodName  # noqa: E402
from megatron_coreward.config.paper import (  # noqa: E402
    MODELS,
    RELEASED_METHODS,
    STEPS,
    DataName,
    PaperRun,
    paper_runs,
    part_name,
)

CONFIGS = ROOT / "configs"
FOLDERS = {"math": "math", "dapo": "dapo", "open_rs": "open-rs"}
TITLES = {"math": "MATH", "dapo": "DAPO-14k", "open_rs": "Open-RS"}
METHODS = {
    "co_rewarding_i": "Co-rewarding-I",
    "co_rewarding_ii": "Co-rewarding-II",
    "ground_truth": "Ground truth (GT-GRPO)",
    "self_certainty": "Self-certainty",
    "entropy": "Entropy minimisation",
    "majority_voting": "Majority voting",
}


def recipes() -> Iterator[tuple[Path, str]]:
    """Every file with its text."""
    for data in MODELS:
        for method in RELEASED_METHODS:
            yield CONFIGS / "parts" / "methods" / f"{method}_{data}.yaml", _part(data, method)
    for run in paper_runs():
        yield CONFIGS / "paper" / f"{run.recipe}.yaml", _recipe(run)


def _part(data: DataName, method: MethodName) -> str:
    lines = [
        "# Made by tools/write_paper_recipes.py from megatron_coreward/config/paper.py, where the length is explained.",
        f"base: [../released.yaml, ../guard.yaml, ../data/{data}.yaml]",
        f"method: {method}",
        f"steps: {STEPS[data, method]}",
    ]
    if method in REPHRASED_METHODS:
        lines += ["data:", f"  rephrased_files: [data/{FOLDERS[data]}/train_rewrite_Qwen3-32B.parquet]"]
    if method in TWO_VIEW_METHODS:
        lines += ["loss:", "  views: sum"]
    if method == "ground_truth":
        lines += ["rewards:", "  equivalence: hendrycks"]
    return "\n".join(lines) + "\n"


def _recipe(run: PaperRun) -> str:
    model = part_name(run.model)
    setup = "co_rewarding_ii" if run.method == "co_rewarding_ii" else "co_rewarding_i"  # baselines have no teacher
    (layout,) = (CONFIGS / "parts" / "layouts").glob(f"{model}_{setup}_*x80.yaml")
    gpus = layout.stem.rpartition("_")[2].partition("x")[0]
    return (
        f"# {METHODS[run.method]} on {TITLES[run.data]}: {run.model}, {gpus} GPUs of 80 GB.\n"
        f"base: [../parts/models/{model}.yaml, ../parts/methods/{run.method}_{run.data}.yaml, "
        f"../parts/layouts/{layout.name}]\n"
        f"run_dir: runs/{run.recipe}\n"
    )


def stale() -> list[Path]:
    """Files that are missing or differ, and recipes that are nobody's."""
    wanted = dict(recipes())
    differ = [path for path, text in wanted.items() if not path.is_file() or path.read_text() != text]
    return differ + leftovers(wanted)


def leftovers(wanted: Container[Path]) -> list[Path]:
    """Recipes of runs that are in the table no longer."""
    return [path for path in sorted((CONFIGS / "paper").glob("*.yaml")) if path not in wanted]


if __name__ == "__main__":
    if "--check" in sys.argv:
        if out_of_date := stale():
            sys.exit("\n".join(["not up to date; run python tools/write_paper_recipes.py", *map(str, out_of_date)]))
    else:
        wanted = dict(recipes())
        for path, text in wanted.items():
            path.write_text(text)
        for path in leftovers(wanted):
            path.unlink()
