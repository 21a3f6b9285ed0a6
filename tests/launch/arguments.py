"""`megatron-coreward launch ...` without the other commands, and a recipe to launch."""

import sys
from pathlib import Path
from typing import Any

import yaml

from megatron_coreward.commands import launch
from megatron_coreward.commands.arguments import Parser

ROOT = Path(__file__).parents[2]
CLUSTERS = ROOT / "launch" / "clusters"


def launch_command(*words: str) -> None:
    """Parses and runs; bad input raises InputError."""
    parser = Parser()
    launch.add(parser.add_subparsers(required=True))
    options = parser.parse_args(["launch", *words])
    options.run(options)


def write_recipe(folder: Path, **keys: Any) -> Path:
    """A recipe of the least keys; `run_dir` is in the folder."""
    tree = {
        "run_dir": str(folder / "Run_1"),
        "steps": 3,
        "method": "majority_voting",
        "model": {"hf_path": "models/some"},
        "data": {"train_files": ["train.parquet"]},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree | keys))
    return path


if __name__ == "__main__":
    launch_command(*sys.argv[1:])
