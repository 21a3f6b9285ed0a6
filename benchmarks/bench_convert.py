"""The converter against a plain file copy of the same bytes: seconds, GB/s, peak memory.

    python benchmarks/bench_convert.py [--gigabytes 2] [--folder /dev/shm] [--repeat 5] [--workers 2] [--json]

Writes a random bf16 model of Qwen3's shape (hidden 2048, a vocabulary of 151,936, as many layers as fill the size),
takes it to Megatron and back, and copies it with `cp`; all of it ends on the disk (fsync). Each of the three is a
process of its own, which measures its work once everything is imported, and its peak memory (VmHWM); "command s" has
the start of Python and the import of torch with it. (The copy starts the same way: a virtual machine may take freed
memory back within seconds, and then the first to touch it again pays several seconds a gigabyte.)

The order changes from round to round; the source is in the page cache throughout. Figures are medians of the
rounds that were asked for, after one that does not count. Everything that was written is removed in the end.
"""

import argparse
import json
import os
import shutil
import signal
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

# What a child runs: the command line or a copy; then its own peak memory and the seconds that the work took.
CHILD = """
import json, subprocess, sys, time
from pathlib import Path
import megatron_coreward.checkpoint.convert
from megatron_coreward.checkpoint.new_directory import sync_directory
from megatron_coreward.cli import main
begin = time.perf_counter()
if sys.argv[2] == "copy":
    subprocess.run(["cp", "-r", "--reflink=never", *sys.argv[3:]], check=True)
    sync_directory(Path(sys.argv[4]))
elif main(sys.argv[2:]) != 0:
    sys.exit(1)
seconds = time.perf_counter() - begin
peak = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
json.dump({"seconds": seconds, "peak_bytes": peak}, open(sys.argv[1], "w"))
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


def child(report: Path, *arguments: object) -> dict[str, float]:
    """Runs a conversion or a copy in a process of its own."""
    begin = time.perf_counter()
    subprocess.run(
        [sys.executable, "-c", CHILD, str(report), *map(str, arguments)],
        check=True,
        timeout=3600,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"},
    )
    return {**json.loads(report.read_text()), "command_s": time.perf_counter() - begin}


def measure(folder: Path, gigabytes: float, repeat: int, options: list[str]) -> dict[str, Any]:
    model = folder / "model"
    model.mkdir()
    total, largest = write_random_model(model, gigabytes)
    megatron, target, report = folder / "megatron", folder / "target", folder / "report.json"
    child(report, "convert", "to-megatron", model, megatron, *options)  # what `to-hf` reads
    cases: dict[str, list[object]] = {
        "copy": ["copy", model, target],
        "to-megatron": ["convert", "to-megatron", model, target, *options],
        "to-hf": ["convert", "to-hf", megatron, target, *options],
    }
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in cases}
    for number in range(-1, repeat):  # the first round does not count: it touches memory that nobody has used before
        names = list(cases)[number % 3 :] + list(cases)[: number % 3]
        for name in names:
            run = child(report, *cases[name])
            if number >= 0:
                runs[name].append(run)
            shutil.rmtree(target)
            os.sync()
    medians = {
        name: {key: statistics.median(run[key] for run in found) for key in found[0]} for name, found in runs.items()
    }
    for name, found in runs.items():
        medians[name]["peak_bytes"] = max(run["peak_bytes"] for run in found)
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
        if name != "copy":
            ratio, bound = runs["copy"]["seconds"] / run["seconds"], found["bound_bytes"] / GIB
            line += f"{ratio:9.2f}{run['command_s']:11.2f}{run['peak_bytes'] / GIB:10.2f}{bound:11.2f}"
        print(line)
    best = {name: min(seconds) for name, seconds in found["all_seconds"].items()}
    for name, seconds in found["all_seconds"].items():
        of_copy = "" if name == "copy" else f"; best against the copy's best: {best['copy'] / best[name]:.2f}"
        print(f"  {name}: {', '.join(f'{s:.2f}' for s in seconds)} s{of_copy}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the model, 10^9 bytes")
    parser.add_argument("--folder", type=Path, help="where to write; default: the system's temporary directory")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--dtype", help="cast on the way")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what was written is removed
    further = ["--workers", str(options.workers)] + (["--dtype", options.dtype] if options.dtype else [])
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="bench_convert_") as folder:
        found = measure(Path(folder), options.gigabytes, options.repeat, further)
    if options.json:
        print(json.dumps(found))
    else:
        show(found)


if __name__ == "__main__":
    main()
