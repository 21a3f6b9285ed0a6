"""vLLM, one step after another: what `rollout.step_loop` asks of an engine.

Samples are requests of their own, and not n samples of one request, so that each is heard of when it ends. They share
the keys and values of their prompt all the same, through vLLM's prefix cache.

To withdraw a sample without asking for its tokens at every step, what vLLM has collected of it is read from the states
of its output processor, which are not part of vLLM's interface (0.26 to 0.33 have them).
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from megatron_coreward.errors import RunError
from megatron_coreward.rollout.requests import SamplingRequest
from megatron_coreward.rollout.step_loop import Drawn
from megatron_coreward.types import FloatArray


class VllmSteps:
    """The engine in `vllm.LLM`, which nobody else steps meanwhile."""

    def __init__(self, llm: Any) -> None:
        self._engine = llm.llm_engine
        self._ids: dict[int, str] = {}  # vLLM's own names of the samples that it has

    def add(self, number: int, prompt: list[int], request: SamplingRequest, seed: int, max_tokens: int) -> None:
        params = sampling_params(request, 1, seed, max_tokens)
        name = self._engine.add_request(_name(number), {"type": "token", "prompt_token_ids": prompt}, params)
        self._ids[number] = name or _name(number)

    def step(self) -> Mapping[int, Drawn]:
        ended = {}
        for output in self._engine.step():
            if output.finished:
                (completion,) = output.outputs
                if completion.finish_reason not in ("stop", "length"):
                    raise RunError(f"vLLM ended a request with finish reason {completion.finish_reason!r}")
                number = _number(output.request_id)
                del self._ids[number]
                ended[number] = Drawn(completion.token_ids, flat(completion.logprobs), completion.finish_reason)
        return ended

    def withdraw(self, numbers: Iterable[int]) -> Mapping[int, Drawn]:
        names = {number: self._ids.pop(number) for number in numbers}
        states = self._engine.output_processor.request_states
        found = {}
        for number, name in names.items():
            state = states[name]
            logprobs = flat(state.logprobs_processor.logprobs)
            found[number] = Drawn(list(state.detokenizer.output_token_ids), logprobs, None)
        self._engine.abort_request([_name(number) for number in names])
        if not self._ids:
            self._finish_batches()
        return found

    def _finish_batches(self) -> None:
        """vLLM schedules ahead on GPUs: a batch may be on its way, and its blocks are not free before it is back."""
        while getattr(self._engine.engine_core.engine_core, "batch_queue", None):
            self._engine.step()


def sampling_params(request: SamplingRequest, n: int, seed: int, max_tokens: int) -> Any:
    """How vLLM draws `n` samples; sample i with the seed + i."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        n=n,
        seed=seed,
        temperature=request.temperature,
        top_p=request.top_p,
        max_tokens=max_tokens,
        logprobs=0 if request.logprobs else None,  # of the sampled token only
        flat_logprobs=True,
        stop=list(request.stop),
        # Token by token, twice, would take a fifth of the time; without stop strings, once at the end is enough.
        detokenize=bool(request.stop),
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def flat(logprobs: Any) -> FloatArray:
    """[L] of the sampled tokens, from vLLM's flat log-probs; [0] without any."""
    if logprobs is None:
        return np.empty(0, dtype=np.float32)
    of_tokens: FloatArray = np.asarray(logprobs.logprobs, dtype=np.float32)[logprobs.start_indices]
    return of_tokens


def _name(number: int) -> str:
    return f"sample-{number}"


def _number(name: str) -> int:
    return int(name.removeprefix("sample-"))
