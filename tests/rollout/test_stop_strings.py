"""Stop strings reach vLLM, and a response that one ended has the string in its tokens and its text, not its answer."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_coreward.rollout.engine import RolloutEngine
from megatron_coreward.rollout.requests import GroupName, SamplingRequest
from megatron_coreward.rollout.step_loop import Sample

pytest.importorskip("vllm")

WORDS = [r"so \boxed{7}.", "\n", "Question", ":", " what is", r" \boxed{8}"]


class Tokenizer:
    def batch_decode(self, ids: list[list[int]], skip_special_tokens: bool) -> list[str]:
        return ["".join(WORDS[i] for i in one) for one in ids]


class EndingLLM:
    """`vllm.LLM` that writes all words up to the first stop string, as vLLM does: its own text lacks the string."""

    def __init__(self) -> None:
        self.params: list[Any] = []

    def generate(self, prompts: list[Any], params: list[Any], use_tqdm: bool) -> list[Any]:
        from vllm.v1.engine.detokenizer import check_stop_strings

        self.params += params
        outputs = []
        for one in params:
            text, ids, reason = "", [], "length"
            for i, word in enumerate(WORDS):
                text, ids = text + word, [*ids, i]
                found = check_stop_strings(text, len(word), one.stop, one.include_stop_str_in_output)
                if found is not None:
                    text, reason = text[: found[1]], "stop"
                    break
            flat = SimpleNamespace(logprobs=[-0.5] * len(ids), start_indices=list(range(len(ids))))
            answer = SimpleNamespace(token_ids=ids, text=text, logprobs=flat, finish_reason=reason)
            outputs.append(SimpleNamespace(outputs=[answer] * one.n))
        return outputs


@pytest.fixture
def engine() -> RolloutEngine:
    engine = RolloutEngine.__new__(RolloutEngine)
    held = {"_llm": EndingLLM(), "_tokenizer": Tokenizer(), "_versions_known": False, "_max_model_len": 64}
    for name, value in (held | {"_tensor_parallel": 1, "_broken": None, "_version": 3, "_routing": None}).items():
        setattr(engine, name, value)
    return engine


def request(*stop: str, stop_at: tuple[str, ...] = ()) -> SamplingRequest:
    return SamplingRequest(np.asarray([1, 2]), 1, 0, 1.0, 1.0, 8, ("boxed",), stop_at, stop)


def test_vllm_gets_the_stop_strings_and_decodes_as_it_goes_only_if_there_are_any(engine: RolloutEngine) -> None:
    from vllm import SamplingParams

    engine.sample([request("Question:", "\n\n"), request()], 3)
    with_stop, without = engine._llm.params
    assert isinstance(with_stop, SamplingParams)
    assert with_stop.stop == ["Question:", "\n\n"]
    assert with_stop.detokenize
    assert without.stop == []
    assert not without.detokenize


def test_the_string_that_ended_a_response_is_the_last_of_its_tokens_and_of_its_text(engine: RolloutEngine) -> None:
    (ended,), (whole,) = engine.sample([request("Question:"), request()], 3)
    assert ended.finish_reason == "stop"
    assert ended.text == "so \\boxed{7}.\nQuestion:"
    assert ended.token_ids.tolist() == [0, 1, 2, 3]
    assert len(ended.logprobs) == 4
    assert ended.answer == "7"
    assert (whole.finish_reason, whole.answer) == ("length", "8")


def test_without_a_stop_in_the_engine_the_follow_up_is_sampled_and_not_read(engine: RolloutEngine) -> None:
    ((sample,),) = engine.sample([request(stop_at=("Question:",))], 3)
    assert sample.text.endswith(r"\boxed{8}")
    assert sample.answer == "7"


@pytest.mark.parametrize(
    ("ids", "border", "kept"),
    [([0, 1, 2, 3, 4], 3, 4), ([0, 2, 4, 3, 2], 2, 5), ([2, 3], 1, 2)],
    ids=["across", "apart", "at the end"],
)
def test_a_string_that_an_interruption_has_cut_ends_the_sample(
    engine: RolloutEngine, ids: list[int], border: int, kept: int
) -> None:
    """`Question` was drawn before, `:` after: vLLM has seen neither as the string. What it has seen whole it ends."""
    name, drawn = GroupName(1, "policy", 0), [-0.5] * len(ids)
    sample = Sample(name, 0, request("Question:"), 0, list(ids), drawn, [(0, 2), (border, 4)], [border], "length")
    engine._tokenizer.decode = lambda ids, skip_special_tokens: "".join(WORDS[i] for i in ids)
    engine._end_at_stop(sample)
    assert sample.token_ids == ids[:kept]
    assert len(sample.logprobs) == kept
    cut = ids[border - 1 : border + 1] == [2, 3]
    assert sample.finish_reason == ("stop" if cut else "length")
