"""Weights that came over gloo make an engine the model that was sent, and it got no more than its part."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron_coreward.weights.gloo import GlooSender, Session, serve_store
from megatron_coreward.weights.send import HeldBlock
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megatron_coreward.config.architecture import read_architecture
from megatron_coreward.weights.layouts import ActorLayout, EngineLayout
from megatron_coreward.weights.plan import Params
from tests.rollout.engine_process import EngineProcess

pytestmark = [pytest.mark.engine, pytest.mark.timeout(400)]
TOKENS = np.random.default_rng(1).integers(3, 250, 150).tolist()
# Kind of model -> (the actor's layout, the engine's tensor parallelism)
CASES = {
    "tied, TP 2": (ActorLayout(pipeline_parallel=2), 2),
    "experts": (ActorLayout(tensor_parallel=2, data_parallel=2, expert_parallel=2), 1),
}


def senders(path: Path, session: Session, store: Any) -> list[GlooSender]:
    """The ranks of an actor that holds the weights of a checkpoint."""
    tensors = load_file(path / "model.safetensors")

    def held(rank: int) -> Iterator[HeldBlock]:
        for name, bounds in session.actor.held(rank, session.params.arch):
            index = tuple(slice(*cut) for cut in bounds)
            yield HeldBlock(name, index, lambda name=name, index=index: tensors[name][index])

    return [GlooSender(list(held(rank)), session, rank, store) for rank in range(session.actor.world_size)]


@torch.no_grad()
def expected(path: Path) -> np.ndarray[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    rows = model(torch.tensor([TOKENS])).logits[0, :-1].log_softmax(-1)
    return rows.gather(-1, torch.tensor(TOKENS[1:])[:, None])[:, 0].numpy()


@pytest.mark.parametrize("kind", CASES)
def test_each_of_two_updates_makes_the_engine_the_model_that_was_sent(
    kind: str, checkpoint: Callable[[str, int], Path]
) -> None:
    actor, tensor_parallel = CASES[kind]
    engine = EngineProcess(
        checkpoint(kind, 0),
        dtype="float32",
        weight_transfer="gloo",
        tensor_parallel=tensor_parallel,
        max_model_len=512,
        max_num_seqs=64,
        kv_cache_gib=0.125,
    )
    pool = ThreadPoolExecutor(actor.world_size)
    try:
        for version in (1, 2):
            path = checkpoint(kind, version)
            store = serve_store("127.0.0.1", 60)
            params = Params(read_architecture(path), "float32")
            session = Session("127.0.0.1", store.port, 60, actor, EngineLayout(1, tensor_parallel), params, 20_000)
            ranks = senders(path, session, store)
            engine.start_update(ranks[0].init_info)
            for bucket in range(len(session.buckets)):
                writing = [pool.submit(rank.write, bucket, version, True) for rank in ranks]
                engine.load_bucket(bucket, version)
                for future in writing:
                    future.result(timeout=60)
            engine.finish_update(version)
            np.testing.assert_allclose(engine.score(TOKENS), expected(path), atol=1e-4)
            for rank in ranks:
                rank.close()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        engine.close()
