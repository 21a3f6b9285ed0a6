"""Weights over gloo: every worker gets exactly its own blocks, and whatever goes wrong on the way is told."""

import itertools
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from megatron_coreward.config.architecture import Architecture, Experts
from megatron_coreward.weights.gloo import GlooSender, Inbox, Session, serve_store
from megatron_coreward.weights.layouts import ActorLayout, EngineLayout
from megatron_coreward.weights.plan import Params
from megatron_coreward.weights.segment import tensor_at
from megatron_coreward.weights.send import LocalBlock

pytestmark = pytest.mark.timeout(120)

DENSE = Architecture(
    family="qwen2",
    num_layers=2,
    hidden_size=8,
    num_heads=4,
    num_kv_heads=2,
    head_dim=2,
    ffn_size=12,
    vocab_size=131,
    max_position=64,
    tied=False,
    qkv_bias=True,
    qk_norm=False,
    rope_theta=1e4,
    rope_scaling=None,
    norm_eps=1e-6,
    experts=None,
)
MOE = Architecture(**{**{f: getattr(DENSE, f) for f in DENSE.__slots__}, "experts": Experts(4, 2, 8, True)})
CASES = {
    "TP 2 to TP 1": (DENSE, ActorLayout(tensor_parallel=2), EngineLayout(1, 1)),
    "TP 1 to TP 2": (DENSE, ActorLayout(), EngineLayout(1, 2)),
    "PP 2 to two engines": (DENSE, ActorLayout(pipeline_parallel=2), EngineLayout(2, 1)),
    "DP 2 to TP 4, more workers than key heads": (DENSE, ActorLayout(data_parallel=2), EngineLayout(1, 4)),
    "experts, EP 2": (MOE, ActorLayout(data_parallel=2, expert_parallel=2), EngineLayout(1, 2)),
}


class Transfer:
    """All ranks and workers of a transfer, in threads of this process."""

    def __init__(self, arch: Architecture, actor: ActorLayout, engines: EngineLayout, bucket_bytes: int = 600) -> None:
        self.store = serve_store("127.0.0.1", 30)
        self.session = Session("127.0.0.1", self.store.port, 30, actor, engines, Params(arch, "float32"), bucket_bytes)
        generator = torch.Generator().manual_seed(1)
        self.tensors = {m.name: torch.randn(m.shape, generator=generator) for m in self.session.metas}
        self.senders = [GlooSender(self.held(rank), self.session, rank) for rank in range(actor.world_size)]
        self.workers = list(itertools.product(range(engines.num_engines), range(engines.num_workers)))
        self.inboxes = [Inbox(self.session, engine, worker) for engine, worker in self.workers]
        self.pool = ThreadPoolExecutor(len(self.senders) + len(self.inboxes))

    def held(self, rank: int) -> list[LocalBlock]:
        held = []
        for name, bounds in self.session.actor.held(rank, self.session.params.arch):
            index = tuple(slice(*cut) for cut in bounds)
            held.append(LocalBlock(name, index, lambda name=name, index=index: self.tensors[name][index]))
        return held

    def update(self, version: int, expect: int | None = None, hashes: bool = True) -> list[dict[str, torch.Tensor]]:
        """One update; each worker's tensors as they were when their bucket was loaded."""
        for inbox in self.inboxes:
            inbox.begin()
        found: list[dict[str, torch.Tensor]] = [{} for _ in self.inboxes]
        for number, bucket in enumerate(self.session.buckets):
            writing = [self.pool.submit(s.write, number, version, hashes) for s in self.senders]
            taking = [self.pool.submit(i.take, number, version if expect is None else expect) for i in self.inboxes]
            for future in writing:
                assert future.result(timeout=60) == []
            for own, future in zip(found, taking, strict=True):
                memory = future.result(timeout=60)
                for entry in bucket.entries:
                    own[entry.meta.name] = tensor_at(memory, entry.offset, entry.meta).clone()
        for inbox in self.inboxes:
            inbox.end()
        return found

    def close(self) -> None:
        for end in [*self.senders, *self.inboxes]:
            end.close()
        self.pool.shutdown(wait=False, cancel_futures=True)


@pytest.fixture(params=CASES)
def transfer(request: pytest.FixtureRequest) -> Iterator[Transfer]:
    arch, actor, engines = CASES[request.param]
    made = Transfer(arch, actor, engines)
    yield made
    made.close()


def needed(transfer: Transfer, engine_worker: tuple[int, int]) -> dict[str, np.ndarray[Any, Any]]:
    """Name -> which elements a worker needs."""
    masks = {meta.name: np.zeros(meta.shape, dtype=bool) for meta in transfer.session.metas}
    for name, bounds in transfer.session.engines.needed(engine_worker[1], transfer.session.params.arch):
        masks[name][tuple(slice(*cut) for cut in bounds)] = True
    return masks


def test_a_worker_gets_its_own_blocks_and_nothing_else(transfer: Transfer) -> None:
    assert len(transfer.session.buckets) > 5
    for version in (4, 6):
        for tensor in transfer.tensors.values():
            tensor.add_(version)
        received = transfer.update(version)
        for place, own in zip(transfer.workers, received, strict=True):
            for name, mask in needed(transfer, place).items():
                assert torch.equal(own[name][torch.from_numpy(mask)], transfer.tensors[name][torch.from_numpy(mask)])
                if version == 4:
                    assert own[name][torch.from_numpy(~mask)].isnan().all()


@pytest.fixture
def small() -> Iterator[Transfer]:
    made = Transfer(*CASES["TP 2 to TP 1"])
    yield made
    made.close()


def test_weights_of_another_version_are_refused(small: Transfer) -> None:
    with pytest.raises(RuntimeError, match="bucket 0 of version 4 .* expected bucket 0 of version 6"):
        small.update(4, expect=6)


def test_after_an_update_that_failed_the_engine_takes_no_other(small: Transfer) -> None:
    with pytest.raises(RuntimeError, match="version"):
        small.update(4, expect=6)
    with pytest.raises(RuntimeError, match="failed before"):
        small.inboxes[0].begin()


def test_a_message_that_is_damaged_on_the_way_is_refused(small: Transfer, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_coreward.weights import gloo

    def damaged(*args: Any) -> torch.Tensor:
        message = pack(*args)
        message[-1] ^= 1
        return message

    pack = gloo._pack
    monkeypatch.setattr(gloo, "_pack", damaged)
    with pytest.raises(RuntimeError, match="rank 0 sent of bucket 0 arrived damaged"):
        small.update(4)


def test_a_sender_that_ends_is_not_waited_for_longer_than_the_limit() -> None:
    arch, actor, engines = CASES["TP 2 to TP 1"]
    made = Transfer(arch, actor, engines)
    object.__setattr__(made.session, "timeout_s", 2.0)
    made.inboxes[0].begin()
    for sender in made.senders:  # rank 1 comes and never writes
        threading.Thread(target=lambda s=sender: setattr(s, "_group", made.session.join(s._rank)), daemon=True).start()
    with pytest.raises(RuntimeError, match=r"[Tt]imed out"):
        made.inboxes[0].take(0, 4)
    made.close()


def test_a_rank_that_lacks_what_it_has_to_send_is_told_before_anything_is_sent(small: Transfer) -> None:
    with pytest.raises(ValueError, match=r"rank 0 does not hold .* of 'model.embed_tokens.weight'"):
        GlooSender([], small.session, 0)
