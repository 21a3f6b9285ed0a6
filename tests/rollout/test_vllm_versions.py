"""What differs between the releases of vLLM that GPU machines have (0.26) and that the tests run on (0.32)."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_coreward.errors import RunError
from megatron_coreward.rollout.engine import RolloutEngine
from megatron_coreward.rollout.requests import SamplingRequest
from megatron_coreward.rollout.setup import EngineSetup
from megatron_coreward.telemetry.memory import DeviceMemory

pytest.importorskip("vllm")


class OldLLM:
    """`vllm.LLM` of 0.26, as far as the engine asks: it knows no versions of weights."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.failures: list[str | None] = [None, None]  # of its workers

    def init_weight_transfer_engine(self, request: dict[str, Any]) -> None:
        self.calls.append("init")

    def start_weight_update(self) -> None:
        self.calls.append("start")

    def update_weights(self, request: dict[str, Any]) -> None:
        self.calls.append("update")

    def collective_rpc(self, what: Any) -> list[str | None]:
        return self.failures

    def finish_weight_update(self) -> None:
        self.calls.append("finish")

    def reset_prefix_cache(self) -> bool:
        return True

    def generate(self, prompts: list[Any], params: list[Any], use_tqdm: bool) -> list[Any]:
        flat = SimpleNamespace(logprobs=[-0.5, -1.0], start_indices=[0, 1])
        answer = SimpleNamespace(token_ids=[5, 6], logprobs=flat, finish_reason="stop")  # no weight_versions
        return [SimpleNamespace(outputs=[answer] * one.n) for one in params]


class NewLLM(OldLLM):
    """Of 0.32: tokens are marked with the version that `finish_weight_update` was given."""

    def __init__(self) -> None:
        super().__init__()
        self.version = "default"

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.calls.append("finish")
        self.version = weight_version or self.version

    def get_weight_version(self) -> str:
        return self.version

    def generate(self, prompts: list[Any], params: list[Any], use_tqdm: bool) -> list[Any]:
        outputs = super().generate(prompts, params, use_tqdm)
        for answer in (answer for output in outputs for answer in output.outputs):
            answer.weight_versions = [SimpleNamespace(version=self.version)]
        return outputs


def engine_of(llm: Any) -> RolloutEngine:
    engine = RolloutEngine.__new__(RolloutEngine)
    tokenizer = SimpleNamespace(batch_decode=lambda ids, skip_special_tokens: ["text"] * len(ids))
    held = {"_llm": llm, "_tokenizer": tokenizer, "_versions_known": hasattr(llm, "get_weight_version")}
    held |= {"_max_model_len": 64, "_tensor_parallel": 1, "_on_cpu": True, "_routing": None}
    for name, value in (held | {"_init_info": None, "_version": None}).items():
        setattr(engine, name, value)
    return engine


REQUEST = SamplingRequest(np.asarray([1, 2]), n=2, seed=0, temperature=1.0, top_p=1.0, max_tokens=4)


@pytest.mark.parametrize("llm", [OldLLM, NewLLM])
def test_samples_come_from_the_version_that_was_asked_for_with_either(llm: Any) -> None:
    engine = engine_of(llm())
    with pytest.raises(RunError, match="no weights were synced"):
        engine.sample([REQUEST], 0)
    for version in (2, 4):
        engine.receive_weights({}, 0, version)
        samples = engine.sample([REQUEST], version)
        assert [sample.weight_version for sample in samples[0]] == [version] * 2
        with pytest.raises(RunError, match=f"holds weights of version {version}, expected version 9"):
            engine.sample([REQUEST], 9)


@pytest.mark.parametrize("llm", [OldLLM, NewLLM])
def test_a_failure_in_any_worker_leaves_no_weights_to_sample_from_with_either(llm: Any) -> None:
    engine = engine_of(llm())
    engine._llm.failures = [None, "rank 1 sent too little"]
    with pytest.raises(RunError, match="rank 1 sent too little"):
        engine.receive_weights({"sender": 1}, 0, 2)
    with pytest.raises(RunError, match="no weights were synced"):
        engine.sample([REQUEST], 2)
    engine._llm.failures = [None, None]
    engine.receive_weights({"sender": 1}, 0, 2)
    assert [sample.weight_version for sample in engine.sample([REQUEST], 2)[0]] == [2, 2]
    assert engine._llm.calls == ["init", *["start", "update", "finish"] * 2]


def test_an_engine_on_a_gpu_measures_where_its_workers_are_when_it_sleeps() -> None:
    engine = engine_of(NewLLM())
    engine._on_cpu = False
    free = iter([(30, 20), (70, 60)])  # bytes of the two workers' GPUs
    engine.receive_weights({"sender": 1}, 0, 2)
    engine._llm.collective_rpc = lambda what: next(free)
    engine._llm.sleep = lambda level: engine._llm.calls.append(f"sleep {level}")
    assert engine.sleep() == DeviceMemory(free=60, freed=40)
    assert engine._llm.calls == ["init", "start", "update", "finish", "sleep 2"]
    with pytest.raises(RunError, match="no weights were synced"):
        engine.sample([REQUEST], 2)


def test_a_sample_of_other_weights_is_refused_if_vllm_shows_it() -> None:
    engine = engine_of(NewLLM())
    engine.receive_weights({}, 0, 2)
    generate = engine._llm.generate

    def mixed(*args: Any, **kwargs: Any) -> Any:
        outputs = generate(*args, **kwargs)
        outputs[0].outputs[0].weight_versions = [SimpleNamespace(version="1"), SimpleNamespace(version="2")]
        return outputs

    engine._llm.generate = mixed
    with pytest.raises(RunError, match="tokens of weight versions"):
        engine.sample([REQUEST], 2)


@pytest.mark.parametrize("lacking", ["_layerwise_process", "initialize_layerwise_reload"])
def test_a_release_without_what_is_used_of_it_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, lacking: str) -> None:
    from vllm.model_executor.model_loader.reload import layerwise

    from megatron_coreward.weights.receivers import relayout

    monkeypatch.delattr(layerwise, lacking)
    with pytest.raises(
        RunError, match=f"has no {lacking} in its layerwise reload; weight syncs work with 0.26 to 0.33"
    ):
        relayout.layerwise()


def test_the_receiving_engine_has_every_method_that_any_release_calls_abstract_and_is_found_by_its_name() -> None:
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    from megatron_coreward.weights.receivers.engine import CorewardEngine, register
    from megatron_coreward.weights.spec import VLLM_BACKEND

    wanted = ["init_transfer_engine", "start_weight_update", "finish_weight_update", "receive_weights", "shutdown"]
    for name in (*wanted, "trainer_send_weights"):
        assert not getattr(getattr(CorewardEngine, name), "__isabstractmethod__", False), name
    register()
    assert WeightTransferEngineFactory._registry[VLLM_BACKEND]() is CorewardEngine


@pytest.mark.parametrize(("tensor_parallel", "backend"), [(1, None), (2, "mp")])
def test_the_processes_of_an_engine_are_its_own_even_within_a_placement_group(
    tensor_parallel: int, backend: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM would otherwise take Ray's, on GPUs that are taken; on CPU it never does: only what it is given shows."""
    given: dict[str, Any] = {}

    def start(*_: Any, **settings: Any) -> Any:
        given.update(settings)
        raise InterruptedError

    monkeypatch.setattr("megatron_coreward.rollout.environment.prepare", lambda cpu_threads: True)
    monkeypatch.setattr("vllm.LLM", start)
    with pytest.raises(InterruptedError):
        RolloutEngine(EngineSetup(Path("model"), "float32", 64, tensor_parallel=tensor_parallel))
    assert given["tensor_parallel_size"] == tensor_parallel
    assert given["distributed_executor_backend"] == backend
