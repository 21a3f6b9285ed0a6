"""Logits of a Megatron checkpoint, from the actor's own model on one rank and in fp32. A program of its own:

python -m megatron_coreward.actor.write_logits CONFIG_DIR TOKENS.npy LOGITS.npy CHECKPOINT policy|teacher
"""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import torch

from megatron_coreward.actor import cpu_backend

cpu_backend.install()  # before megatron is first imported

from megatron_coreward.actor import parallel  # noqa: E402
from megatron_coreward.actor.forward_backward import forward_only  # noqa: E402
from megatron_coreward.actor.hf_weights import load_megatron  # noqa: E402
from megatron_coreward.actor.microbatch import build_pack  # noqa: E402
from megatron_coreward.actor.model import build_chunks  # noqa: E402
from megatron_coreward.checkpoint.convert import key_prefix  # noqa: E402
from megatron_coreward.config.architecture import read_architecture  # noqa: E402
from megatron_coreward.config.schema import ActorSettings  # noqa: E402
from megatron_coreward.types import Sequences  # noqa: E402
from megatron_coreward.weights.ports import free_port  # noqa: E402


def main(config: Path, tokens: Path, target: Path, checkpoint: Path, weights: str) -> None:
    """Writes [T, V] logits of the T tokens, without the padding of the vocabulary."""
    arch, ids = read_architecture(config), np.load(tokens).astype(np.int32)
    ranks = parallel.initialize(ActorSettings(cpu_threads=torch.get_num_threads()), 0, "127.0.0.1", free_port(), seed=0)
    chunks = build_chunks(arch, ActorSettings(), torch.float32, len(ids))
    load_megatron(chunks, arch, ranks, checkpoint, key_prefix(weights))
    whole = Sequences([ids], np.asarray([1], dtype=np.int32))
    pack = build_pack(whole, [0], len(ids), parallel.device())
    every_token = dataclasses.replace(pack, predicts=torch.arange(len(ids), device=parallel.device()))
    logits = forward_only(chunks, [every_token], lambda _, hidden, weight: hidden @ weight[: arch.vocab_size].t())
    assert logits is not None  # the only rank is the last stage
    np.save(target, logits[0].cpu().numpy())
    parallel.shutdown()


if __name__ == "__main__":
    config, tokens, target, checkpoint, weights = sys.argv[1:]
    main(Path(config), Path(tokens), Path(target), Path(checkpoint), weights)
