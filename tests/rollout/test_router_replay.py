"""Engines return the experts that each token went to, if the policy is to train them: vLLM faked, as no CPU has it."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from megatron_coreward.config.architecture import Experts
from megatron_coreward.errors import RunError
from megatron_coreward.planner.models import published_architecture
from megatron_coreward.rollout.engine import RolloutEngine, _engine_arguments
from megatron_coreward.rollout.requests import SamplingRequest
from megatron_coreward.rollout.setup import EngineSetup
from megatron_coreward.types import Completion
from tests.rollout.test_vllm_versions import NewLLM, engine_of

pytest.importorskip("vllm")

REQUEST = SamplingRequest([1, 2, 3], 2, 0, 1.0, 1.0, 2)
EXPERTS = np.arange(4 * 3 * 2, dtype=np.uint8).reshape(4, 3, 2)  # of 3 + 2 - 1 tokens
MODEL = replace(published_architecture("Qwen3-30B-A3B"), num_layers=3, experts=Experts(24, 2, 768, True))


class Routing(NewLLM):
    """Returns experts with every sample, as vLLM 0.32 does if it was built so."""

    def __init__(self, experts: Any) -> None:
        super().__init__()
        self.experts = experts

    def generate(self, prompts: list[Any], params: list[Any], use_tqdm: bool) -> list[Any]:
        outputs = super().generate(prompts, params, use_tqdm)
        for answer in (answer for output in outputs for answer in output.outputs):
            answer.routed_experts = self.experts
        return outputs


def sampled(experts: Any, request: SamplingRequest, asked: bool = True) -> Completion:
    engine: RolloutEngine = engine_of(Routing(experts))
    engine._routing = MODEL if asked else None
    engine.receive_weights({}, 0, 4)
    return engine.sample([request], 4)[0][1]


def test_a_sample_that_is_trained_on_has_the_experts_of_all_tokens_but_the_last() -> None:
    np.testing.assert_array_equal(sampled(EXPERTS, REQUEST).routed_experts, EXPERTS)


def test_nothing_is_kept_that_nobody_reads() -> None:
    assert sampled(EXPERTS, replace(REQUEST, logprobs=False)).routed_experts is None
    assert sampled(EXPERTS, REQUEST, asked=False).routed_experts is None


@pytest.mark.parametrize(
    ("experts", "found"),
    [
        pytest.param(None, "none", id="none"),
        pytest.param(EXPERTS[1:], r"\[3, 3, 2\]", id="of too few tokens"),
        pytest.param(EXPERTS[:, 1:], r"\[4, 2, 2\]", id="of too few layers"),
        pytest.param(EXPERTS[:, :, :1], r"\[4, 3, 1\]", id="too few a token"),
        pytest.param(EXPERTS.reshape(4, 6), r"\[4, 6\]", id="layers in one row"),
    ],
)
def test_experts_that_are_missing_end_the_run(experts: Any, found: str) -> None:
    message = rf"actor.router_replay: experts that vLLM returned for a sample: found {found}, expected .* = \[4, 3, 2\]"
    with pytest.raises(RunError, match=message):
        sampled(experts, REQUEST)


@pytest.mark.parametrize(("dtype", "number"), [(np.uint8, 24), (np.uint16, 300), (np.int16, -1)])
def test_experts_that_the_model_does_not_have_end_the_run(dtype: Any, number: int) -> None:
    """And not an assertion of a kernel, once the actor looks them up."""
    experts = EXPERTS.astype(dtype)
    experts[2, 1, 0] = number
    with pytest.raises(RunError, match=rf"vLLM returned expert {number}, and the model has 24; allowed: 0 to 23"):
        sampled(experts, REQUEST)


def test_engines_are_asked_for_experts_only_if_they_are_replayed(tmp_path: Any) -> None:
    setup = EngineSetup(tmp_path, "bfloat16", 128)
    assert "enable_return_routed_experts" not in _engine_arguments(setup, on_cpu=False)
    replayed = _engine_arguments(replace(setup, return_experts=True), on_cpu=False)
    assert replayed["enable_return_routed_experts"] is True
