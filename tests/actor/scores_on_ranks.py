"""What tests/actor/test_token_stats.py runs on the ranks."""

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region

from megatron_coreward.actor import token_stats
from megatron_coreward.actor.token_stats import VocabularyShard, score_tokens

HIDDEN, ROWS = 6, 40
# Tokens of the vocabulary and rows of the output layer on each of two ranks: the second rank has 7 of its 12; has none.
VOCABULARIES = [(19, 12), (12, 12)]


def scores_of_many_chunks(rank: int, port: int) -> list[float]:
    """How far this rank's statistics and gradients are from those of the whole vocabulary, in fp64."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    token_stats.CHUNK_ELEMENTS["cpu"] = 64  # rows of 12 columns: five a chunk; of 7 columns nine
    token_stats.BLOCK_ELEMENTS["cpu"] = 24
    errors = []
    for size, width in VOCABULARIES:
        generator = torch.Generator().manual_seed(0)
        hidden = 2 * torch.randn(ROWS, HIDDEN, generator=generator)
        weight = torch.randn(2 * width, HIDDEN, generator=generator)
        targets = torch.randint(size, (ROWS,), generator=generator)
        factors = torch.rand(ROWS, generator=generator)

        own, states = (
            weight[rank * width : (rank + 1) * width].clone().requires_grad_(),
            hidden.clone().requires_grad_(),
        )
        start = min(rank * width, size)
        shard = VocabularyShard(start, min((rank + 1) * width, size), size, dist.group.WORLD)
        copied = copy_to_tensor_model_parallel_region(states, group=dist.group.WORLD)
        scores = score_tokens(copied, own, targets, shard, 0.7)
        (scores.logprobs * factors).sum().backward()

        whole, reference = weight.double().requires_grad_(), hidden.double().requires_grad_()
        logp = (reference @ whole[:size].t() / 0.7).log_softmax(-1)
        expected = logp.gather(1, targets[:, None])[:, 0]
        (expected * factors).sum().backward()
        assert own.grad is not None
        assert whole.grad is not None
        assert states.grad is not None
        differences = [
            scores.logprobs - expected,
            scores.entropy + (logp.exp() * logp).sum(-1),
            scores.self_certainty + logp.mean(-1) + torch.tensor(float(size)).log(),
            own.grad - whole.grad[rank * width : (rank + 1) * width],
            states.grad - reference.grad,
        ]
        errors += [float(difference.detach().abs().max()) for difference in differences]
    dist.destroy_process_group()
    return errors
