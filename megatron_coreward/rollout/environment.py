"""The environment variables of a rollout engine, in one place, with the reason for each.

They are set before torch and vLLM are imported in the engine's process (both read some of them only then), and the
worker processes of a tensor-parallel engine inherit them.
"""

import os

# Whatever the user has set: the engine relies on these.
REQUIRED = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # scheduler in this process: nothing between a request and its result that
    # could reorder requests, and no process that outlives this one
    "VLLM_NO_USAGE_STATS": "1",  # a training run reports to nobody
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",  # models are local directories: no look-ups that hang on clusters without a network
    "TRANSFORMERS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",  # threads before a fork; prompts arrive as tokens anyway
}

# Kept if the user has set them.
DEFAULTS = {
    "VLLM_LOGGING_LEVEL": "ERROR",  # the console is the trainer's, and a CPU engine alone warns a dozen times of what
    # is meant here (eager, no Triton, no chunked prefill; at each update, that rotary tables are not in checkpoints)
    "VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS": "30",  # on a busy host a worker of a tensor-parallel engine takes longer
    # than the default 5 s to exit; terminated half-way, it leaves its segments in /dev/shm
}

# Without a GPU, in addition.
REQUIRED_ON_CPU = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the default binds every engine of a host to the same cores, and refuses
    # tensor parallelism on hosts with fewer NUMA nodes than ranks; the operating system places the few threads well
    "OMP_WAIT_POLICY": "passive",  # threads that spin at barriers take the cores from actors and other engines
    "KMP_BLOCKTIME": "0",  # the same for Intel's OpenMP
    "TORCHDYNAMO_DISABLE": "1",  # models run eagerly here; compiling vLLM's few helpers costs seconds, saves nothing
}

# A user's value would override the size that the configuration gives, and can only be whole GiB.
REMOVED_ON_CPU = ("VLLM_CPU_KVCACHE_SPACE",)


def prepare(cpu_threads: int) -> bool:
    """Sets the variables for an engine in this process; returns whether it runs without a GPU.

    Args:
        cpu_threads: OpenMP threads of each engine rank without a GPU.
    """
    os.environ.update(REQUIRED)
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    os.environ["OMP_NUM_THREADS"] = str(cpu_threads)

    import torch

    torch.set_num_threads(cpu_threads)  # in case torch had been imported before
    on_cpu = not torch.cuda.is_available()
    if on_cpu:
        os.environ.update(REQUIRED_ON_CPU)
        for name in REMOVED_ON_CPU:
            os.environ.pop(name, None)
    return on_cpu
