"""Configs of public models for tests of the planner."""

from typing import Any

from megatron_coreward.config.load import parse_config
from megatron_coreward.config.schema import RunConfig
from megatron_coreward.planner.hardware import Assumptions, find_gpu
from megatron_coreward.planner.plan import Machine, Placement


def config(model: str, method: str = "co_rewarding_i", **groups: Any) -> RunConfig:
    data = {"train_files": ["a"], "rephrased_files": ["b"], **groups.pop("data", {})}
    tree = {"run_dir": "run", "steps": 1, "method": method, "model": {"hf_path": model}, "data": data}
    return parse_config({**tree, **groups})


def machine(gpu: str = "h100", placement: Placement = "disaggregated", **assumptions: Any) -> Machine:
    return Machine(find_gpu(gpu), placement, Assumptions(**assumptions))
