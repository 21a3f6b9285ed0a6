"""The teacher's step keeps movements that fp32 alone would round away."""

import pytest
import torch

from megatron_coreward.algorithms.ema_schedule import teacher_decay


def drift(rate: float, steps: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Movement after `steps` of 1 - d = rate towards a policy that moves a little: exact, compensated, plain fp32."""
    from megatron_coreward.actor.teacher import ema_step_

    generator = torch.Generator().manual_seed(0)
    start = torch.randn(20_000, generator=generator)
    policy = start.clone()
    exact, plain = start.double(), start.clone()
    value, compensation = start.clone(), torch.zeros_like(start)
    for _ in range(steps):
        policy += 1e-4 * torch.randn(start.shape, generator=generator)
        exact += rate * (policy.double() - exact)
        plain += rate * (policy - plain)
        ema_step_([value], [compensation], [policy], 1 - rate)
    origin = start.double()
    return exact - origin, value.double() + compensation.double() - origin, plain.double() - origin


def relative(error: torch.Tensor, movement: torch.Tensor) -> float:
    return float(error.norm() / movement.norm())


@pytest.mark.parametrize("rate", [1e-4, 1e-5])
def test_compensation_keeps_the_movement(rate: float) -> None:
    exact, compensated, plain = drift(rate, 200)
    assert relative(compensated - exact, exact) < 0.02
    assert relative(plain - exact, exact) > 0.05  # what the compensation is for


def test_without_compensation_to_do_it_is_the_plain_average() -> None:
    from megatron_coreward.actor.teacher import ema_step_

    value, compensation = torch.zeros(3), torch.zeros(3)
    ema_step_([value], [compensation], [torch.tensor([1.0, 2.0, 4.0])], teacher_decay(0, 10, 0.75, 1.0))
    torch.testing.assert_close(value, torch.tensor([0.25, 0.5, 1.0]))


def test_tensors_are_stepped_in_groups_that_tile_them_and_hold_so_many_elements(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from megatron_coreward.actor import teacher

    monkeypatch.setattr(teacher, "GROUP_ELEMENTS", 10)
    tensors = [torch.zeros(n) for n in (4, 5, 3, 30, 1, 2)]
    groups = list(teacher._groups(tensors))
    assert groups == [(0, 2), (2, 3), (3, 4), (4, 6)]
    assert list(teacher._groups([])) == []
