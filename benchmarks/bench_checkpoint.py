"""What a checkpoint costs each rank, for several data-parallel sizes: seconds that training stalls, bytes that a rank
writes, and host memory that saving and resuming take beside the state itself.

    python benchmarks/bench_checkpoint.py [--data-parallel 1 2 4] [--hidden 512] [--layers 8] [--json]

Real actors on gloo ranks, one process each, with an EMA teacher, in fp32. Memory is the kernel's own peak of a process
(VmHWM), reset before each phase; on CPU it counts the copies that wait on the host, which a GPU run has as well.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from megatron_coreward.demo.model import write_model
from megatron_coreward.demo.tokenizer import byte_level_tokenizer
from tests.actor.memory_on_ranks import save_and_resume
from tests.actor.ranks import free_port, run_ranks

MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-parallel", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=32_768)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    options = parser.parse_args()
    found: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder, size = Path(name), options.hidden
        write_model(
            *(folder / "model", byte_level_tokenizer()),
            hidden=size,
            layers=options.layers,
            ffn=3 * size,
            heads=8,
            pad_vocab_to=options.vocabulary,
        )
        for ranks in options.data_parallel:
            (folder / str(ranks)).mkdir()
            layout = {"data_parallel": ranks}
            found[f"DP {ranks}"] = run_ranks(
                ranks, save_and_resume, folder / "model", layout, free_port(), folder / str(ranks)
            )
    if options.json:
        print(json.dumps(found))
        return
    titles = ("rank", "owned", "written", "stall s", "save s", "save +", "resume s", "resume +")
    print(" " * 6 + "".join(f"{title:>9}" for title in titles))
    for layout_name, of_ranks in found.items():
        for rank, of in enumerate(of_ranks):
            columns = (
                rank,
                of["owned_bytes"] / MIB,
                of["written_bytes"] / MIB,
                of["save_stall_s"],
                of["save_s"],
                of["save_extra_bytes"] / MIB,
                of["resume_s"],
                of["resume_extra_bytes"] / MIB,
            )
            print(
                f"{layout_name:6}"
                + "".join(f"{value:>9.2f}" if isinstance(value, float) else f"{value:>9}" for value in columns)
            )
    print("MiB unless it says s; + is the peak beside what was resident before")


if __name__ == "__main__":
    main()
