"""The converter against a plain file copy of the same bytes: seconds, GB/s, peak memory.

    python benchmarks/bench_convert.py [--gigabytes 2] [--folder /dev/shm] [--repeat 3] [--workers 2] [--json]

Writes a random bf16 model of Qwen3's shape (hidden 2048, a vocabulary of 151,936, as many layers as fill the size), takes
it to Megatron and back, and copies it with `cp`; all of it ends on the disk (fsync). Each conversion is a process of its
own, whose peak memory is its VmHWM. The order alternates from one repetition to the next, so that none of the three
always finds the page cache as another one has left it; the source itself is in the cache throughout, for all of them.

Two times are given for a conversion: that of the work, which is held against the copy, and that of the whole command, with
the start of Python and the import of torch. Figures are medians. Everything that was written is removed in the end.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from megatron_coreward.checkpoint.pieces import PIECE_BYTES, cuts
from megatron_coreward.checkpoint.safetensors_files import HfWriter
from megatron_coreward.config.architecture import parse_architecture
from megatron_coreward.weights.mapping import hf_tensors

CONFIG = {
    "model_type": "qwen3",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": False,
}
GIB = 2**30

# What a child runs: the command line, then its own peak memory and the seconds that the work took.
CHILD = """
import json, sys, time
import megatron_coreward.checkpoint.convert
from megatron_coreward.cli import main
begin = time.perf_counter()
status = main(sys.argv[2:])
seconds = time.perf_counter() - begin
peak = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
json.dump({"seconds": seconds, "peak_bytes": peak}, open(sys.argv[1], "w"))
sys.exit(status)
"""


def write_random_model(folder: Path, gigabytes: float) -> tuple[int, int]:
    """Writes the model piece by piece, in files of about 1 GB. Returns its bytes and those of its largest tensor."""

    def sizes(layers: int) -> list[int]:
        shapes = hf_tensors(parse_architecture(CONFIG | {"num_hidden_layers": layers}, "benchmark"))
        return [2 * torch.Size(shape).numel() for shape in shapes.values()]

    one, two = sum(sizes(1)), sum(sizes(2))
    layers = max(1, 1 + round((gigabytes * 1e9 - one) / (two - one)))
    config = CONFIG | {"num_hidden_layers": layers}
    shapes = hf_tensors(parse_architecture(config, "benchmark"))
    (folder / "config.json").write_text(json.dumps(config))
    noise = torch.randn(PIECE_BYTES // 2, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    with closing(HfWriter(folder, shapes, dict.fromkeys(shapes, torch.bfloat16), 10**9)) as writer:
        for name, shape in shapes.items():
            for first, rows in cuts(shape, 2, PIECE_BYTES):
                piece = noise[: rows * torch.Size(shape[1:]).numel()]
                writer.write_rows(name, first, piece)
    return sum(sizes(layers)), max(sizes(layers))


def sync(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        file = os.open(path, os.O_RDONLY)
        os.fsync(file)
        os.close(file)


def copy(source: Path, target: Path) -> dict[str, float]:
    begin = time.perf_counter()
    subprocess.run(["cp", "-r", "--reflink=never", source, target], check=True, timeout=3600)
    sync(target)
    return {"seconds": time.perf_counter() - begin}


def convert(action: str, source: Path, target: Path, options: list[str], report: Path) -> dict[str, float]:
    root = str(Path(__file__).parents[1])
    command = [sys.executable, "-c", CHILD, report, "convert", action, source, target, *options]
    begin = time.perf_counter()
    subprocess.run(
        list(map(str, command)),
        check=True,
        timeout=3600,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
    )
    return {**json.loads(report.read_text()), "command_s": time.perf_counter() - begin}


def measure(folder: Path, gigabytes: float, repeat: int, options: list[str]) -> dict[str, Any]:
    model = folder / "model"
    model.mkdir()
    total, largest = write_random_model(model, gigabytes)
    sync(model)
    megatron = folder / "megatron"  # what `to-hf` reads
    convert("to-megatron", model, megatron, options, folder / "report.json")
    target = folder / "target"
    cases = {
        "copy": lambda: copy(model, target),
        "to-megatron": lambda: convert("to-megatron", model, target, options, folder / "report.json"),
        "to-hf": lambda: convert("to-hf", megatron, target, options, folder / "report.json"),
    }
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in cases}
    for turn in range(repeat):
        names = list(cases)[turn % 3 :] + list(cases)[: turn % 3]
        for name in names:
            runs[name].append(cases[name]())
            shutil.rmtree(target)
            os.sync()
    medians = {
        name: {key: statistics.median(run[key] for run in found) for key in found[0]} for name, found in runs.items()
    }
    medians["to-megatron"]["peak_bytes"] = max(run["peak_bytes"] for run in runs["to-megatron"])
    medians["to-hf"]["peak_bytes"] = max(run["peak_bytes"] for run in runs["to-hf"])
    return {
        "bytes": total,
        "largest_tensor_bytes": largest,
        "bound_bytes": GIB + 2 * largest,
        "copy_gb_per_s": total / 1e9 / medians["copy"]["seconds"],
        "runs": medians,
        "all_seconds": {name: [run["seconds"] for run in found] for name, found in runs.items()},
    }


def show(found: dict[str, Any]) -> None:
    gigabytes, runs = found["bytes"] / 1e9, found["runs"]
    print(f"{gigabytes:.2f} GB, largest tensor {found['largest_tensor_bytes'] / GIB:.2f} GiB")
    print(f"{'':<14}{'s':>8}{'GB/s':>8}{'of copy':>9}{'command s':>11}{'peak GiB':>10}{'bound GiB':>11}")
    for name, run in runs.items():
        line = f"{name:<14}{run['seconds']:8.2f}{gigabytes / run['seconds']:8.2f}"
        if "peak_bytes" in run:
            ratio, bound = runs["copy"]["seconds"] / run["seconds"], found["bound_bytes"] / GIB
            line += f"{ratio:9.2f}{run['command_s']:11.2f}{run['peak_bytes'] / GIB:10.2f}{bound:11.2f}"
        print(line)
    for name, seconds in found["all_seconds"].items():
        print(f"  {name}: {', '.join(f'{s:.2f}' for s in seconds)} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the model, 10^9 bytes")
    parser.add_argument("--folder", type=Path, help="where to write; default: the system's temporary directory")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--dtype", help="cast on the way")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    options = parser.parse_args()
    further = ["--workers", str(options.workers)] + (["--dtype", options.dtype] if options.dtype else [])
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="bench_convert_") as folder:
        found = measure(Path(folder), options.gigabytes, options.repeat, further)
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        show(found)


if __name__ == "__main__":
    main()
