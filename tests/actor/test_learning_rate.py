"""The learning rate over a run, a run that was stopped, and one that was prolonged."""

from types import SimpleNamespace
from typing import Any

import pytest

from megatron_coreward.config.schema import ActorSettings


def scheduler(total: int) -> Any:
    from megatron_coreward.actor.optimizer import build_scheduler

    optimizer: Any = SimpleNamespace(param_groups=[{"lr": 0.0, "weight_decay": 0.0}])
    return build_scheduler(optimizer, ActorSettings(lr=1e-3, lr_warmup=0.1), total)


def rates(of: Any, steps: int) -> list[float]:
    found = []
    for _ in range(steps):
        of.step(1)
        found.append(of.optimizer.param_groups[0]["lr"])
    return found


@pytest.mark.parametrize("total", [100, 200])
def test_a_run_goes_on_at_the_rate_of_its_own_horizon(total: int) -> None:
    """Also one of 100 steps that is prolonged to 200: at the end of the old horizon nothing would move any more."""
    first, whole = scheduler(100), scheduler(total)
    rates(first, 90)
    expected = rates(whole, total)[90:]
    resumed = scheduler(total)
    resumed.load_state_dict(first.state_dict())
    assert rates(resumed, total - 90) == expected
    assert min(expected) > 0
