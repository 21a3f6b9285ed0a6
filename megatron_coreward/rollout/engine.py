"""A rollout engine: vLLM, as the rest of the system needs it. Prompts in, samples with log-probs out, weights swapped.

Invariants (tests/rollout):
  1. Samples come from complete weights only: none before the first update, none during one, and every token of a
     sample from the version that the caller asked for.
  2. A sample's log-probs are those of the distribution that it was drawn from (temperature, top-p and top-k applied).
  3. The same requests with the same seeds give the same samples, whatever else the engine did before.
  4. No cached key or value outlives an update of the weights.
  5. Groups that are streamed (`feed`) stand still while the engine does anything else (`rollout.step_loop`).
"""

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, cast

import numpy as np

from megatron_coreward.config.architecture import read_architecture
from megatron_coreward.errors import RunError
from megatron_coreward.rewards.answer import extract_answer
from megatron_coreward.rollout import environment
from megatron_coreward.rollout.orphans import EngineResources
from megatron_coreward.rollout.requests import Fed, GroupName, SamplingRequest, Taken
from megatron_coreward.rollout.setup import EngineSetup
from megatron_coreward.rollout.step_loop import Sample, StepLoop
from megatron_coreward.rollout.vllm_steps import VllmSteps, flat, sampling_params
from megatron_coreward.telemetry.memory import DeviceMemory
from megatron_coreward.types import Completion, Completions, ExpertArray, FloatArray, IntArray
from megatron_coreward.weights.spec import VLLM_BACKEND

# Without chunked prefill a prompt is read in one step, so this is also the least number of tokens of a step.
CPU_BATCHED_TOKENS = 8192


class RolloutEngine:
    """One vLLM engine with its tensor-parallel workers. Weights arrive through `receive_weights`.

    Its methods are called by one thread at a time, except `take`.
    """

    _stream: StepLoop | None = None  # begins with the first samples that are streamed

    def __init__(self, setup: EngineSetup, on_worker_death: Callable[[], None] = lambda: None) -> None:
        """Starts the engine with meaningless weights, or with those of the model directory (`setup.own_weights`).

        Args:
            on_worker_death: called, on a thread of its own, when a process of a tensor-parallel engine has died and the
                others have been ended.
        """
        on_cpu = environment.prepare(setup.cpu_threads)
        self._resources = EngineResources() if setup.tensor_parallel > 1 else None
        if self._resources is not None:
            os.environ["VLLM_RPC_BASE_PATH"] = str(self._resources.folder)

        from vllm import LLM

        if not on_cpu:
            from megatron_coreward.weights.receivers.engine import register

            register()  # in this process; workers of a tensor-parallel engine find the entry point of the package
        self._on_cpu = on_cpu
        self._max_model_len, self._max_num_seqs = setup.max_model_len, setup.max_num_seqs
        self._stream_begun = threading.Event()
        self._tensor_parallel = setup.tensor_parallel
        self._routing = read_architecture(setup.model_path) if setup.return_experts else None
        self._init_info: Mapping[str, Any] | None = None
        self._version: int | None = None
        self._llm: Any = LLM(str(setup.model_path), **_engine_arguments(setup, on_cpu))
        if self._resources is not None:
            self._resources.note_segments()
            self._llm.llm_engine.model_executor.register_failure_callback(on_worker_death)
        self._tokenizer: Any = self._llm.get_tokenizer()
        # vLLM marks tokens with the version of the weights from 0.30 on. Before, only this object knows it; nothing can
        # come between: an update and a call of `sample` are calls of one thread.
        self._versions_known = hasattr(self._llm, "get_weight_version")
        if setup.own_weights is not None:
            if self._versions_known:
                self._llm.llm_engine.set_weight_version(str(setup.own_weights))
            self._version = setup.own_weights

    @property
    def version(self) -> int | None:
        """The version of the weights; None before the first update, during one, and after one that failed."""
        return self._version

    @property
    def lost_a_process(self) -> bool:
        """Whether a process of a tensor-parallel engine has died; nothing can be asked of the engine any more."""
        return self._tensor_parallel > 1 and bool(self._llm.llm_engine.model_executor.is_failed)

    def sample(self, requests: Sequence[SamplingRequest], expected_version: int) -> Completions:
        """Draws `n` samples for each request, in the order of the requests.

        Sample i of a request depends on the request and on i alone, as far as the arithmetic does: matrix products
        of other batch sizes may round differently.

        Raises:
            RunError: the engine does not hold the expected weights, or a request was not finished.
            ValueError: prompt and answer do not fit into the engine's length.
        """
        self._require(expected_version)
        self._check_lengths(requests)
        if not requests:
            return Completions()
        # vLLM gives sample i the seed + i.
        params = [sampling_params(r, r.n, _spread(r.seed), r.max_tokens) for r in requests]
        with self._stream_standing_still():
            outputs = self._llm.generate([_prompt(r.prompt) for r in requests], params, use_tqdm=False)
        completions = [completion for output in outputs for completion in output.outputs]
        texts = iter(self._tokenizer.batch_decode([list(c.token_ids) for c in completions], skip_special_tokens=True))
        return Completions(
            [self._to_completion(c, next(texts), request, expected_version) for c in output.outputs]
            for request, output in zip(requests, outputs, strict=True)
        )

    def score(self, token_ids: Sequence[int] | IntArray) -> FloatArray:
        """Log-probs of tokens 2 to P of a sequence, each given the tokens before it, at temperature 1: [P - 1].

        Raises:
            RunError: no weights were synced yet.
            ValueError: fewer than 2 tokens, or as many as the engine's length or more.
        """
        if self._version is None:
            raise RunError("no weights were synced to this rollout engine yet")
        if not 2 <= len(token_ids) < self._max_model_len:
            raise ValueError(f"cannot score {len(token_ids)} tokens; allowed: 2 to {self._max_model_len - 1}")

        from vllm import SamplingParams

        # vLLM computes prompt log-probs past its prefix cache; one token must be generated along with them.
        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, flat_logprobs=True, detokenize=False)
        with self._stream_standing_still():
            (output,) = self._llm.generate([_prompt(token_ids)], params, use_tqdm=False)
        flat = output.prompt_logprobs  # position 0 is empty
        logprobs = np.asarray(flat.logprobs, dtype=np.float32)[flat.start_indices[1:]]
        if len(logprobs) != len(token_ids) - 1:
            raise RunError(f"vLLM scored {len(logprobs)} of {len(token_ids) - 1} tokens")
        return cast(FloatArray, logprobs)

    def receive_weights(
        self, spec: Mapping[str, Any], engine: int, version: int, canary: Sequence[int] | IntArray | None = None
    ) -> FloatArray | None:
        """Replaces all weights by those that the actor sends at the same time; there is nothing to sample from until
        then, and after an error until the next time. Returns what `score` says of the canary, if there is one.

        Args:
            spec: `TransferSpec.to_json()` of the senders. It changes when an engine was replaced: then all meet again.
            engine: the number of this engine.
            canary: [P] tokens.

        Raises:
            RunError: the weights did not come, or not as they were sent. The engine can be used again.
        """
        self._version = None
        with self._stream_standing_still(new_weights=True):
            self._receive({"spec": dict(spec), "engine": engine}, version)
        self._version = version
        return None if canary is None else self.score(canary)

    def _receive(self, init_info: Mapping[str, Any], version: int) -> None:
        if init_info != self._init_info:
            self._llm.init_weight_transfer_engine({"init_info": init_info})
            self._init_info = init_info
        self._llm.start_weight_update()
        self._llm.update_weights({"update_info": {"version": version}})
        failures = [failure for failure in self._llm.collective_rpc(_failure_of) if failure is not None]
        name = {"weight_version": "given up" if failures else str(version)} if self._versions_known else {}
        self._llm.finish_weight_update(**name)
        if failures:
            raise RunError(failures[0])
        if not self._llm.reset_prefix_cache():
            raise RunError("the prefix cache of the former weights could not be cleared: requests are still running")

    def feed(self, fed: Sequence[Fed]) -> None:
        """Draws samples of groups, as there is room, from the weights that `go_on` names and from those after them.

        Sample i of a group is the one that `sample` draws, if no update of the weights comes in between.

        Raises ValueError for a prompt and answer that do not fit into the engine's length.
        """
        self._check_lengths([one.request for one in fed])
        self._loop().feed(fed)

    def abort(self, names: Sequence[GroupName]) -> None:
        """Draws no further token for these groups; those of their samples that have ended by now may still come."""
        self._loop().abort(names)

    def go_on(self, version: int) -> None:
        """Lets the groups that were fed be drawn from the weights that the engine holds: they were checked.

        Raises RunError if it does not hold this version.
        """
        self._require(version)
        self._loop().go_on(version)

    def take(self, engine: int, patience_s: float) -> Taken:
        """The samples of groups that have ended since this was asked last; waits for one, `patience_s` at most.

        May be called while another method runs.

        Args:
            engine: the number of this engine, for its intervals.
        """
        if not self._stream_begun.wait(patience_s):
            return Taken((), Completions([[]]), (), ())
        samples, aborted, intervals = self._loop().take(patience_s)
        for sample in samples:
            if sample.request.stop and sample.cuts:
                self._end_at_stop(sample)
        # Of no samples at all, a tokenizer makes one empty text.
        token_ids = [sample.token_ids for sample in samples]
        texts = self._tokenizer.batch_decode(token_ids, skip_special_tokens=True) if samples else []
        return Taken(
            tuple((sample.name, sample.index) for sample in samples),
            Completions([[_completion_of(sample, text) for sample, text in zip(samples, texts, strict=True)]]),
            tuple(aborted),
            tuple(interval._replace(engine=engine) for interval in intervals),
        )

    def _loop(self) -> StepLoop:
        if self._stream is None:
            self._stream = StepLoop(VllmSteps(self._llm), self._max_num_seqs, _spread)
            self._stream_begun.set()
        return self._stream

    def _stream_standing_still(self, new_weights: bool = False) -> AbstractContextManager[None]:
        return nullcontext() if self._stream is None else self._stream.standing_still(new_weights)

    def sleep(self) -> DeviceMemory | None:
        """Frees the GPU's memory for a colocated actor: weights and key-value cache are dropped, and the next samples
        need `wake` and a new update. Without a GPU there is no memory to free, and the engine stays as it is.
        """
        if not self._on_cpu:
            self._version = None
        with self._stream_standing_still(new_weights=True):
            return self._switch(lambda: self._llm.sleep(level=2))

    def wake(self, part: Literal["weights", "kv_cache"] | None = None) -> DeviceMemory | None:
        """Allocates the memory again, all of it or first that of the weights, so that they can be updated while the
        actor still holds the rest. Without a GPU there is nothing to do.
        """
        return self._switch(lambda: self._llm.wake_up(tags=None if part is None else [part]))

    def _switch(self, switch: Callable[[], object]) -> DeviceMemory | None:
        if self._on_cpu:
            return None
        before = min(self._llm.collective_rpc(_free_bytes))
        switch()
        after = min(self._llm.collective_rpc(_free_bytes))
        return DeviceMemory(after, after - before)

    def shutdown(self) -> None:
        """Ends the engine and its worker processes. May be repeated."""
        if self._stream is not None:
            self._stream.close()
        if self._llm is not None:
            self._llm.llm_engine.engine_core.shutdown()
            self._llm = None
            self._version = None
        if self._resources is not None:
            self._resources.close()

    def _check_lengths(self, requests: Sequence[SamplingRequest]) -> None:
        for request in requests:
            if not 0 < len(request.prompt) <= self._max_model_len - request.max_tokens:
                raise ValueError(
                    f"a prompt of {len(request.prompt)} tokens with answers of up to {request.max_tokens} does not fit "
                    f"into the engine's {self._max_model_len} tokens"
                )

    def _require(self, expected_version: int) -> None:
        if self._version is None:
            raise RunError("no weights were synced to this rollout engine yet")
        held = self._llm.get_weight_version() if self._versions_known else str(self._version)
        if held != str(expected_version):
            raise RunError(f"this rollout engine holds weights of version {held}, expected version {expected_version}")

    def _to_completion(self, completion: Any, text: str, request: SamplingRequest, version: int) -> Completion:
        if completion.finish_reason not in ("stop", "length"):
            raise RunError(f"vLLM ended a request with finish reason {completion.finish_reason!r}")
        spans = completion.weight_versions if self._versions_known else ()
        sampled_by = {span.version for span in spans} or {str(self._version)}
        if sampled_by != {str(version)}:
            raise RunError(f"a sample has tokens of weight versions {sorted(sampled_by)}, expected only {version}")
        return Completion(
            token_ids=np.asarray(completion.token_ids, dtype=np.int32),
            logprobs=flat(completion.logprobs),
            text=text,
            answer=extract_answer(text, request.answer_formats, request.stop_at),
            finish_reason=completion.finish_reason,
            weight_version=version,
            routed_experts=self._experts(completion, request),
        )

    def _experts(self, completion: Any, request: SamplingRequest) -> ExpertArray | None:
        """[P + L - 1, layers, top k]; None if nothing reads them. The last token is never read by the model."""
        if self._routing is None or self._routing.experts is None or not request.logprobs:
            return None
        of_model = self._routing.experts
        tokens = len(request.prompt) + len(completion.token_ids) - 1
        expected = (tokens, self._routing.num_layers, of_model.top_k)
        experts: ExpertArray | None = completion.routed_experts
        if experts is None or experts.shape != expected:
            found = "none" if experts is None else str(list(experts.shape))
            raise RunError(
                f"actor.router_replay: experts that vLLM returned for a sample: found {found}, expected [tokens, "
                f"layers, experts of a token] = {list(expected)}"
            )
        # On a GPU the actor would end in an assertion of a kernel, which names nothing and leaves the process useless.
        least, most = int(experts.min(initial=0)), int(experts.max(initial=0))
        if least < 0 or most >= of_model.num:
            raise RunError(
                f"actor.router_replay: vLLM returned expert {least if least < 0 else most}, and the model has "
                f"{of_model.num}; allowed: 0 to {of_model.num - 1}"
            )
        return experts

    def _end_at_stop(self, sample: Sample) -> None:
        """Ends a sample at a stop string that began in one piece and ended in the next: vLLM saw only its halves."""
        longest = max(len(stop.encode()) for stop in sample.request.stop)  # in tokens, too
        for border in sample.cuts:
            for end in range(border + 1, min(border + longest, len(sample.token_ids)) + 1):
                near = self._tokenizer.decode(
                    sample.token_ids[max(0, border - longest) : end], skip_special_tokens=True
                )
                if any(stop in near for stop in sample.request.stop):
                    sample.cut(end, "stop")
                    return


def _completion_of(sample: Sample, text: str) -> Completion:
    """What was streamed, in one piece or in several."""
    (_, version), *later = sample.starts
    token_ids, logprobs = sample.arrays
    assert sample.finish_reason is not None
    answer = extract_answer(text, sample.request.answer_formats, sample.request.stop_at)
    return Completion(token_ids, logprobs, text, answer, sample.finish_reason, version, tuple(later))


def _failure_of(worker: object) -> str | None:
    """What went wrong in a worker's last update."""
    from megatron_coreward.weights.receivers.engine import failure_of

    return failure_of(worker)


def _engine_arguments(setup: EngineSetup, on_cpu: bool) -> dict[str, Any]:
    """What `vllm.LLM` is built with."""
    from vllm.config import WeightTransferConfig

    if on_cpu:
        device: dict[str, Any] = {
            "kv_cache_memory_bytes": int(setup.kv_cache_gib * 2**30),
            "enforce_eager": True,  # compiling takes 10 s more at start, and gains under a tenth for small models
            # vLLM 0.32 rewinds the generator of a seeded request whose prompt is read in several steps, which
            # torch refuses for CPU generators ("CPU Generator does not use offset").
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(CPU_BATCHED_TOKENS, setup.max_model_len),
        }
    else:
        device = {
            "gpu_memory_utilization": setup.gpu_memory_utilization,
            "enable_sleep_mode": True,
            "enforce_eager": not setup.cuda_graphs,
            "quantization": setup.quantization,
        }
        if setup.return_experts:
            device["enable_return_routed_experts"] = True
    return {
        "dtype": setup.dtype,
        "tensor_parallel_size": setup.tensor_parallel,
        # With a GPU, in a Ray placement group, vLLM would ask Ray for GPUs that this process has taken already.
        "distributed_executor_backend": "mp" if setup.tensor_parallel > 1 else None,
        "max_model_len": setup.max_model_len,
        "max_num_seqs": setup.max_num_seqs,
        "seed": setup.seed,
        "load_format": "dummy" if setup.own_weights is None else "auto",  # mostly, a sync comes before the first use
        "weight_transfer_config": WeightTransferConfig(backend=VLLM_BACKEND),
        "enable_prefix_caching": True,  # the n samples of a prompt share its keys and values
        "logprobs_mode": "processed_logprobs",  # of the distribution sampled from
        **device,
    }


def _free_bytes(worker: object) -> int:
    """Of the worker's GPU: the engine's own process has none if workers are processes of their own."""
    import torch

    free: int = torch.cuda.mem_get_info()[0]
    return free


def _prompt(token_ids: Sequence[int] | IntArray) -> dict[str, list[int]]:
    return {"prompt_token_ids": np.asarray(token_ids).tolist()}


def _spread(seed: int) -> int:
    """A seed far from those of neighbouring numbers (splitmix64), so that the `n` seeds of two requests never meet.

    Returns 0 <= seed < 2^62: room for + n within a signed 64-bit integer.
    """
    z = (seed + 0x9E3779B97F4A7C15) & (2**64 - 1)
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    return (z ^ (z >> 31)) >> 2
