"""What is asked of vLLM to step it: of the parts of it that are not its interface, and of batches under way."""

from types import SimpleNamespace
from typing import Any

import pytest

from megatron_coreward.errors import RunError
from megatron_coreward.rollout.requests import SamplingRequest
from megatron_coreward.rollout.step_loop import Drawn
from megatron_coreward.rollout.vllm_steps import VllmSteps

pytest.importorskip("vllm")

REQUEST = SamplingRequest([1, 2], n=8, seed=3, temperature=0.5, top_p=0.9, max_tokens=4, stop=("\n",), logprobs=False)


class Engine:
    """`vllm.LLMEngine` that has drawn tokens 5 and 6 of whatever it was given."""

    def __init__(self, ahead: int) -> None:
        self.added: list[tuple[str, Any, Any]] = []
        self.aborted: list[str] = []
        self.outputs: list[Any] = []
        self.engine_core = SimpleNamespace(engine_core=SimpleNamespace(batch_queue=[object()] * ahead))
        self.output_processor = SimpleNamespace(request_states={})

    def add_request(self, name: str, prompt: Any, params: Any) -> str:
        self.added.append((name, prompt, params))
        flat = SimpleNamespace(logprobs=[-0.5, -9.0, -1.0], start_indices=[0, 2])
        state = SimpleNamespace(
            detokenizer=SimpleNamespace(output_token_ids=[5, 6]),
            logprobs_processor=SimpleNamespace(logprobs=None if params.logprobs is None else flat),
        )
        self.output_processor.request_states[f"{name}-own"] = state
        return f"{name}-own"

    def abort_request(self, names: list[str]) -> None:
        self.aborted += names

    def step(self) -> list[Any]:
        del self.engine_core.engine_core.batch_queue[:1]
        return self.outputs


def make(ahead: int = 0) -> tuple[VllmSteps, Engine]:
    engine = Engine(ahead)
    return VllmSteps(SimpleNamespace(llm_engine=engine)), engine


def test_a_sample_is_a_request_of_its_own_with_its_seed() -> None:
    steps, engine = make()
    steps.add(7, [1, 2, 9], REQUEST, 30, 3)
    ((_, prompt, params),) = engine.added
    assert prompt == {"type": "token", "prompt_token_ids": [1, 2, 9]}
    assert (params.n, params.seed, params.max_tokens, params.temperature, params.top_p) == (1, 30, 3, 0.5, 0.9)
    assert (params.stop, params.detokenize, params.logprobs) == (["\n"], True, None)


def test_what_was_drawn_of_a_sample_comes_out_with_it() -> None:
    steps, engine = make()
    steps.add(1, [1], SamplingRequest([1], 1, 0, 1.0, 1.0, 4), 0, 4)
    steps.add(2, [1], REQUEST, 0, 4)
    drawn = steps.withdraw([1, 2])
    assert [(list(d.token_ids), list(d.logprobs), d.finish_reason) for d in drawn.values()] == [
        ([5, 6], [-0.5, -1.0], None),
        ([5, 6], [], None),
    ]
    assert engine.aborted == [name for name, _, _ in engine.added]


def test_an_engine_that_is_emptied_has_no_batch_under_way_and_one_that_is_not_is_not_stepped() -> None:
    steps, engine = make(ahead=2)
    steps.add(1, [1], REQUEST, 0, 4)
    steps.add(2, [1], REQUEST, 0, 4)
    steps.withdraw([1])
    assert len(engine.engine_core.engine_core.batch_queue) == 2
    steps.withdraw([2])
    assert engine.engine_core.engine_core.batch_queue == []


@pytest.mark.parametrize("reason", ["stop", "length", "abort"])
def test_samples_that_have_ended_come_out_of_a_step(reason: str) -> None:
    steps, engine = make()
    steps.add(4, [1], REQUEST, 0, 4)
    completion = SimpleNamespace(token_ids=[5], logprobs=None, finish_reason=reason)
    unfinished = SimpleNamespace(finished=False)
    ended = SimpleNamespace(finished=True, request_id=engine.added[0][0], outputs=[completion])
    engine.outputs = [unfinished, ended]
    if reason == "abort":
        with pytest.raises(RunError, match="finish reason 'abort'"):
            steps.step()
        return
    (drawn,) = steps.step().values()
    assert isinstance(drawn, Drawn)
    assert (list(drawn.token_ids), drawn.finish_reason) == ([5], reason)
