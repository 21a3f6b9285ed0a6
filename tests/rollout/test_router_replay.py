"""Engines return the experts that each token went to, if the policy is to train them: vLLM faked, as no CPU has it."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from megatron_coreward.errors import RunError
from megatron_coreward.rollout.engine import RolloutEngine, _engine_arguments
from megatron_coreward.rollout.requests import SamplingRequest
from megatron_coreward.rollout.setup import EngineSetup
from megatron_coreward.types import Completion
from tests.rollout.test_vllm_versions import NewLLM, engine_of

pytest.importorskip("vllm")

REQUEST = SamplingRequest([1, 2, 3], 2, 0, 1.0, 1.0, 2)
EXPERTS = np.arange(4 * 3 * 2, dtype=np.uint8).reshape(4, 3, 2)  # of 3 + 2 - 1 tokens


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
    engine._return_experts = asked
    engine.receive_weights({}, 0, 4)
    return engine.sample([request], 4)[0][1]


def test_a_sample_that_is_trained_on_has_the_experts_of_all_tokens_but_the_last() -> None:
    np.testing.assert_array_equal(sampled(EXPERTS, REQUEST).routed_experts, EXPERTS)


def test_nothing_is_kept_that_nobody_reads() -> None:
    assert sampled(EXPERTS, replace(REQUEST, logprobs=False)).routed_experts is None
    assert sampled(EXPERTS, REQUEST, asked=False).routed_experts is None


@pytest.mark.parametrize(("experts", "found"), [(None, "none"), (EXPERTS[1:], "those of 3")])
def test_experts_that_are_missing_end_the_run(experts: Any, found: str) -> None:
    with pytest.raises(RunError, match=f"actor.router_replay: vLLM returned the experts of 4 tokens as {found}"):
        sampled(experts, REQUEST)


def test_engines_are_asked_for_experts_only_if_they_are_replayed(tmp_path: Any) -> None:
    setup = EngineSetup(tmp_path, "bfloat16", 128)
    assert "enable_return_routed_experts" not in _engine_arguments(setup, on_cpu=False)
    replayed = _engine_arguments(replace(setup, return_experts=True), on_cpu=False)
    assert replayed["enable_return_routed_experts"] is True
