"""What an engine's process gets through its environment, and seeds that never meet."""

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from megatron_coreward.rollout import environment
from megatron_coreward.rollout.engine import _spread

ROOT = Path(__file__).parents[2]


def test_variables_are_set_before_torch_reads_them_and_what_the_engine_relies_on_wins() -> None:
    code = (
        "import sys, os; from megatron_coreward.rollout import engine, environment; "
        "assert not {'torch', 'vllm'} & set(sys.modules); "
        "on_cpu = environment.prepare(3); import torch; "
        "assert on_cpu != torch.cuda.is_available(); "
        "assert torch.get_num_threads() == 3 and os.environ['OMP_NUM_THREADS'] == '3'; "
        "assert os.environ['VLLM_ENABLE_V1_MULTIPROCESSING'] == '0'; "
        "assert os.environ['VLLM_LOGGING_LEVEL'] == 'DEBUG'; "
        "assert ('VLLM_CPU_KVCACHE_SPACE' in os.environ) != on_cpu; "
        "assert 'vllm' not in sys.modules"
    )
    user = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_LOGGING_LEVEL": "DEBUG", "VLLM_CPU_KVCACHE_SPACE": "7"}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | user, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr


def test_no_variable_is_required_and_a_default_at_once() -> None:
    tables = [environment.REQUIRED, environment.DEFAULTS, environment.REQUIRED_ON_CPU]
    names = [name for table in tables for name in table] + list(environment.REMOVED_ON_CPU)
    assert len(set(names)) == len(names)


@given(st.integers(0, 2**63))
def test_a_request_s_seeds_leave_room_for_its_samples(seed: int) -> None:
    assert 0 <= _spread(seed) < 2**62


@given(st.integers(0, 2**40))
def test_the_seeds_of_neighbouring_requests_stay_apart(start: int) -> None:
    spread = sorted(_spread(seed) for seed in range(start, start + 200))
    assert min(b - a for a, b in pairwise(spread)) > 16_384  # samples that vLLM draws for a request at most
