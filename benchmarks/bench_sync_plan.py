"""Planning of the weight sync for layouts that need hundreds of GPUs: time to plan, bytes by rank and link, seconds.

    python benchmarks/bench_sync_plan.py [--gigabytes-per-s 50] [--json]

Nothing is moved: the plan is made from the numbers of the published configs, on one core. Seconds are predicted for
links of the given speed at every rank and worker, with nothing else that costs time.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from megatron_coreward.config.architecture import Architecture, parse_architecture
from megatron_coreward.weights.layouts import ActorLayout, EngineLayout
from megatron_coreward.weights.plan import ModelTensors, plan_transfers
from megatron_coreward.weights.schedule import Schedule

LLAMA_70B = {
    "model_type": "llama",
    "num_hidden_layers": 80,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
}
QWEN3_235B = {
    "model_type": "qwen3_moe",
    "num_hidden_layers": 94,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_attention_heads": 64,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
}
QWEN3_8B = {
    "model_type": "qwen3",
    "num_hidden_layers": 36,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
}

QWEN3_30B_A3B = {
    "model_type": "qwen3_moe",
    "num_hidden_layers": 48,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
}

CASES: tuple[tuple[str, dict[str, Any], ActorLayout, EngineLayout], ...] = (
    (
        "Qwen3-8B, 8 GPUs colocated: TP2 x DP4 -> 8 engines of TP1",
        QWEN3_8B,
        ActorLayout(tensor_parallel=2, data_parallel=4),
        EngineLayout(num_engines=8),
    ),
    (
        "Qwen3-30B-A3B, 8 + 8 GPUs: EP8 -> 4 engines of TP2",
        QWEN3_30B_A3B,
        ActorLayout(expert_parallel=8, data_parallel=8),
        EngineLayout(num_engines=4, tensor_parallel=2),
    ),
    (
        "Llama-3.1-70B, 40 + 24 GPUs: TP8 x PP5 -> 6 engines of TP4",
        LLAMA_70B,
        ActorLayout(tensor_parallel=8, pipeline_parallel=5),
        EngineLayout(num_engines=6, tensor_parallel=4),
    ),
    (
        "Qwen3-235B-A22B, 64 + 64 GPUs: TP4 x PP8 x DP2 (EP2) -> 8 engines of TP8",
        QWEN3_235B,
        ActorLayout(
            tensor_parallel=4,
            pipeline_parallel=8,
            expert_parallel=2,
            expert_tensor_parallel=1,
            data_parallel=2,
            first_stage_layers=11,
            last_stage_layers=11,
        ),
        EngineLayout(num_engines=8, tensor_parallel=8),
    ),
    (
        "Llama-3.1-70B, TP8 x PP8 x DP4 -> 64 engines of TP4",
        LLAMA_70B,
        ActorLayout(tensor_parallel=8, pipeline_parallel=8, data_parallel=4),
        EngineLayout(num_engines=64, tensor_parallel=4),
    ),
    (
        # 94 layers: Megatron gives the stages of the embedding and of the head one layer less than the others.
        "Qwen3-235B-A22B, TP4 x PP8 x EP8 -> 32 engines of TP8",
        QWEN3_235B,
        ActorLayout(
            tensor_parallel=4,
            pipeline_parallel=8,
            expert_parallel=8,
            data_parallel=8,
            first_stage_layers=11,
            last_stage_layers=11,
        ),
        EngineLayout(num_engines=32, tensor_parallel=8),
    ),
    ("Qwen3-8B, one rank -> 8 engines of TP1, which pass on", QWEN3_8B, ActorLayout(), EngineLayout(num_engines=8)),
)


def spread(sizes: np.ndarray) -> dict[str, float]:
    """Least, mean and most, in GB."""
    return {"min": float(sizes.min()) / 1e9, "mean": float(sizes.mean()) / 1e9, "max": float(sizes.max()) / 1e9}


def measure(arch: Architecture, actor: ActorLayout, engines: EngineLayout, bytes_per_s: float) -> dict[str, Any]:
    """Plans once, with all sums, and lists one worker's transfers."""
    begin = time.perf_counter()
    plan = plan_transfers(actor, engines, ModelTensors(arch, "bfloat16"))
    imbalance, seconds = plan.sender_imbalance, plan.seconds(bytes_per_s)
    planned = time.perf_counter()
    transfers = sum(1 for _ in plan.incoming(0, 0))
    listed = time.perf_counter()
    links = plan.bytes_by_link[plan.bytes_by_link > 0]
    return {
        "plan_s": planned - begin,
        "ranks": actor.world_size,
        "workers": engines.num_engines * engines.num_workers,
        "total_gb": plan.total_bytes / 1e9,
        "sent_by_rank_gb": spread(plan.bytes_sent),
        "received_by_worker_gb": spread(plan.bytes_received),
        "links": int(links.size),
        "by_link_gb": spread(links),
        "sender_imbalance": imbalance,  # within the ranks that hold the same shards
        "rank_imbalance": float(plan.bytes_sent.max() / plan.bytes_sent.mean()),  # over all ranks: stages differ
        "predicted_s": seconds,
        "busiest_gb": plan.busiest_bytes / 1e9,
        "busiest_over_minimum": plan.busiest_bytes / plan.least_busiest_bytes,
        "hops": plan.num_hops,
        "first_worker": {"transfers": transfers, "list_s": listed - planned},
    }


def bucket_by_bucket(
    arch: Architecture, actor: ActorLayout, engines: EngineLayout, bucket_bytes: int
) -> dict[str, Any]:
    """What the busiest link of every bucket carries, added up, and the messages of a worker."""
    schedule = Schedule(actor, engines, ModelTensors(arch, "bfloat16"), bucket_bytes)
    busiest = [0] * len(schedule.buckets)
    for listed in (
        *(schedule.outgoing(rank) for rank in range(actor.world_size)),
        *(schedule.incoming(0, worker) for worker in range(engines.num_workers)),
    ):
        busiest = [max(most, sum(m.nbytes for m in of_one)) for most, of_one in zip(busiest, listed, strict=True)]
    messages = sum(len(bucket) for bucket in listed)
    return {"buckets": len(busiest), "by_bucket_gb": sum(busiest) / 1e9, "messages_of_a_worker": messages}


def show(title: str, found: dict[str, Any], gigabytes_per_s: float) -> None:
    def line(what: str, sizes: dict[str, float]) -> str:
        return f"  {what:<22}{sizes['min']:10.3f}{sizes['mean']:10.3f}{sizes['max']:10.3f}   GB: min, mean, max"

    print(title)
    print(f"  planned in {found['plan_s']:.3f} s; {found['ranks']} ranks, {found['workers']} workers")
    print(f"  total bytes           {found['total_gb']:10.1f}   GB, exactly what the workers need")
    print(line("sent by a rank", found["sent_by_rank_gb"]))
    print(line("received by a worker", found["received_by_worker_gb"]))
    print(line("over a link", found["by_link_gb"]) + f"; {found['links']} links")
    print(f"  sender imbalance      {found['sender_imbalance']:10.4f}   among copies of a shard (aim: at most 1.2)")
    print(f"  busiest rank to mean  {found['rank_imbalance']:10.4f}   over all ranks (embedding and head lie on few)")
    print(f"  busiest link          {found['busiest_gb']:10.3f}   GB, {found['busiest_over_minimum']:.3f} x the least")
    print(f"  from a rank to the last engine: {found['hops']} links")
    print(f"  predicted             {found['predicted_s']:10.3f}   s at {gigabytes_per_s:g} GB/s a link")
    if "by_bucket_gb" in found:
        print(f"  bucket by bucket      {found['by_bucket_gb']:10.3f}   GB, the busiest link of each of them")
    first = found["first_worker"]
    print(f"  the first worker's {first['transfers']} transfers listed in {first['list_s']:.3f} s\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes-per-s", type=float, default=50.0, help="speed of a link")
    parser.add_argument(
        "--by-bucket", type=float, metavar="MIB", help="also list all messages; minutes for large models"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    options = parser.parse_args()
    results = {}
    for title, config, actor, engines in CASES:
        arch = parse_architecture(config, title)
        results[title] = measure(arch, actor, engines, options.gigabytes_per_s * 1e9)
        if options.by_bucket is not None:
            results[title] |= bucket_by_bucket(arch, actor, engines, int(options.by_bucket * 2**20))
        if not options.json:
            show(title, results[title], options.gigabytes_per_s)
    if options.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
