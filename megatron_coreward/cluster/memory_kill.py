"""Ray's memory monitor, in our words: which process it killed, how full the node was, and which keys take less.

The monitor ends a process when the memory of its node is used beyond a threshold (95%), and says so in two thousand
characters about Ray's own settings. Recorded with Ray 2.60; if its words are others, less is said.
"""

import re

LESS_HOST_MEMORY = (
    "less is taken with rollout.kv_cache_gib, rollout.num_engines, actor.data_parallel, actor.tokens_per_microbatch or "
    "actor.recompute, without actor.offload_optimizer and actor.offload_teacher, and with "
    "checkpoint.asynchronous=false; RAY_memory_usage_threshold says how full a node may be"
)
_NODE = re.compile(r"node \(IP: (?P<address>[^,)]+).*?\) was (?P<used>[\d.]+)\s*GB used / (?P<limit>[\d.]+)\s*GB")
_PROCESS = re.compile(r"actual memory used=(?P<own>[\d.]+)\s*GB")


def memory_kill(text: str) -> str | None:
    """What a person needs of an error by which Ray's memory monitor ended a process; None for any other error."""
    if "low on memory" not in text:
        return None
    said = "was killed by Ray's memory monitor"
    if node := _NODE.search(text):
        said += f": {node['used']} of {node['limit']} GB of node {node['address']} were in use"
        own = [float(found["own"]) for found in _PROCESS.finditer(text)]
        if len(own) == 1:
            said += f", {own[0]:.2f} GB of them by it"
    return f"{said}; {LESS_HOST_MEMORY}"
