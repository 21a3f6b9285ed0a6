"""What a rank imports before it can start: seconds of each of them, at every start."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

PROGRAM = """
import sys, torch
compiler = torch.compile
import megatron_coreward.actor.actor
print(sorted({"torch._inductor.compile_fx", "vllm", "wandb"} & set(sys.modules)), torch.compile is compiler)
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the fused kernels are compiled")
def test_without_a_gpu_a_rank_imports_neither_compilers_nor_trackers_and_torch_stays_as_it_was() -> None:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.splitlines()[-1:] == ["[] True"], done.stderr
