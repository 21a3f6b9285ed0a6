"""The rollout engines as a model of lm-evaluation-harness: prompts in, texts out.

Only tasks that generate text can be asked (`generate_until`), as all of the paper's benchmarks are. Requests are
sampled in batches, and each batch is in a log before the next one starts, so a killed evaluation resumes with the next.

Invariants (tests/evaluation/test_lm_eval.py): the same request asked n times gets n samples of its own; a text ends
before the first of its stop texts; what is drawn for a request depends on the seed and the request alone; an engine
starts only if something is left to ask, and is as long as the longest request needs.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from megatron_coreward.data.prompts import TEMPLATE_VARIABLES
from megatron_coreward.errors import InputError
from megatron_coreward.evaluation.evaluate import VERSION
from megatron_coreward.rollout.requests import SamplingRequest
from megatron_coreward.telemetry.job_log import JobLog
from megatron_coreward.trainer.sampling import SamplingEngines

DEFAULT_MAX_TOKENS = 256  # the harness's own, of tasks that name none
_GENERATION_KEYS = {"until", "max_gen_toks", "do_sample", "temperature", "top_p"}

StartEngines = Callable[[int], AbstractContextManager[SamplingEngines]]  # (tokens of a prompt and its answer)


@dataclass(frozen=True, slots=True)
class Generation:
    """How texts are drawn."""

    temperature: float | None = 0.8  # None: as each task has it
    top_p: float | None = None  # None: as each task has it
    max_tokens: int | None = None  # of an answer; None: as each task has it
    seed: int = 0


@dataclass(frozen=True, slots=True)
class _Asked:
    """A request as the engine gets it, with what the harness cuts its text at."""

    key: str
    request: SamplingRequest
    stop: tuple[str, ...]
    copies: int  # of each text: one greedy text serves every request that asks for it


class EngineLM(LM):
    """`LM` over rollout engines, which `start` starts when they are needed."""

    def __init__(
        self,
        tokenizer: Any,
        start: StartEngines,
        job_log: JobLog,
        generation: Generation,
        *,
        max_length: int,
        chat: bool,
        thinking: bool | None = None,
        batch_requests: int = 64,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """
        Args:
            max_length: tokens of a prompt and its answer that the model can take; longer answers are asked shorter.
            chat: prompts are written by the tokenizer's chat template, which has all special tokens.
            thinking: see `data.prompts.build_prompts`.
        """
        super().__init__()
        self._tokenizer, self._start, self._job_log = tokenizer, start, job_log
        self._generation, self._max_length, self._chat, self._thinking = generation, max_length, chat, thinking
        self._batch, self._on_progress = batch_requests, on_progress

    @property
    def tokenizer_name(self) -> str:
        return str(self._tokenizer.name_or_path).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return str(self._tokenizer.chat_template) if chat_template and self._chat else ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        variables: dict[str, str | bool] = {**TEMPLATE_VARIABLES}
        if self._thinking is not None:
            variables["enable_thinking"] = self._thinking
        return str(
            self._tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
                **variables,
            )
        )

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise _refusal(requests)

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        raise _refusal(requests)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """A text for each request; the same one asked again gets the next sample."""
        counts = Counter(_key(*instance.args) for instance in requests)
        by_key = {_key(*instance.args): instance for instance in requests}
        todo = [self._asked(key, instance, counts[key]) for key, instance in by_key.items() if key not in self._job_log]
        if todo:
            self._sample(todo, len(by_key))
        left = {key: iter(self._job_log[key]["texts"]) for key in counts}
        try:
            return [next(left[_key(*instance.args)]) for instance in requests]
        except StopIteration:
            raise InputError("the log has fewer samples of a request than are asked for; use another folder") from None

    def _asked(self, key: str, instance: Instance, n: int) -> _Asked:
        context, settings = instance.args
        if unknown := set(settings) - _GENERATION_KEYS:
            raise InputError(
                f"task {instance.task_name}: generation_kwargs has {', '.join(sorted(unknown))}; "
                f"allowed: {', '.join(sorted(_GENERATION_KEYS))}"
            )
        chosen = self._generation
        prompt = self._tokenizer(context, add_special_tokens=not self._chat)["input_ids"]
        room = self._max_length - len(prompt)
        if room < 1 or not prompt:
            raise InputError(
                f"task {instance.task_name}: a prompt of {len(prompt)} tokens; allowed: 1 to {self._max_length - 1}"
            )
        until = settings.get("until") or ()
        stop = tuple(text for text in ((until,) if isinstance(until, str) else until) if text)
        temperature = _temperature(settings) if chosen.temperature is None else chosen.temperature
        top_p = settings.get("top_p", 1.0) if chosen.top_p is None else chosen.top_p
        request = SamplingRequest(
            prompt=prompt,
            n=n if temperature else 1,
            seed=_seed(chosen.seed, key),
            temperature=temperature,
            top_p=float(top_p) if temperature else 1.0,
            max_tokens=min(chosen.max_tokens or settings.get("max_gen_toks", DEFAULT_MAX_TOKENS), room),
            stop=stop,
        )
        return _Asked(key, request, stop, n // request.n)

    def _sample(self, todo: Sequence[_Asked], total: int) -> None:
        longest = max(len(asked.request.prompt) + asked.request.max_tokens for asked in todo)
        done = total - len(todo)
        with self._start(longest) as engines:
            for start in range(0, len(todo), self._batch):
                self._on_progress(done + start, total)
                batch = todo[start : start + self._batch]
                drawn = engines.sample([asked.request for asked in batch], VERSION)
                self._job_log.append(
                    {
                        asked.key: {"texts": [_cut(sample.text, asked.stop) for sample in samples] * asked.copies}
                        for asked, samples in zip(batch, drawn, strict=True)
                    }
                )
        self._on_progress(total, total)


def _refusal(requests: Sequence[Instance]) -> InputError:
    names = ", ".join(sorted({str(instance.task_name) for instance in requests}))
    return InputError(
        f"task {names}: it asks for log-likelihoods of given texts; allowed: tasks with output_type generate_until"
    )


def _key(context: str, settings: Mapping[str, Any]) -> str:
    text = json.dumps([context, settings], sort_keys=True)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _seed(seed: int, key: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}/{key}".encode(), digest_size=7).digest(), "little")


def _temperature(settings: Mapping[str, Any]) -> float:
    """As the harness reads it: a task that says nothing of sampling is greedy."""
    return float(settings.get("temperature", 1.0)) if settings.get("do_sample") else 0.0


def _cut(text: str, stop: Sequence[str]) -> str:
    ends = [place for place in map(text.find, stop) if place >= 0]
    return text[: min(ends)] if ends else text
