"""What tests/actor/test_token_stats.py runs on the ranks."""

import torch
import torch.distributed as dist

from megatron_coreward.actor import token_stats
from megatron_coreward.actor.token_stats import VocabularyShard, score_tokens

SIZE, PADDED = 19, 24  # tokens of the vocabulary, without and with padding: the second rank has 7 of its 12 columns


def scores_of_many_chunks(rank: int, port: int) -> list[float]:
    """How far this rank's statistics and gradient are from those of the whole vocabulary."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    token_stats.CHUNK_ELEMENTS = 64  # rows of 12 columns: five a chunk; of 7 columns it would be nine
    generator = torch.Generator().manual_seed(0)
    whole = 3 * torch.randn(40, PADDED, generator=generator)
    predicts, targets = torch.arange(40), torch.randint(SIZE, (40,), generator=generator)
    width = PADDED // 2
    own = whole[:, rank * width : (rank + 1) * width].clone().requires_grad_()
    shard = VocabularyShard(rank * width, min((rank + 1) * width, SIZE), SIZE, dist.group.WORLD)
    scores = score_tokens(own, predicts, targets, shard, 1.0)
    scores.logprobs.sum().backward()
    reference = whole.clone().requires_grad_()
    logp = reference[:, :SIZE].log_softmax(-1)
    expected = logp.gather(1, targets[:, None])[:, 0]
    expected.sum().backward()
    assert own.grad is not None
    assert reference.grad is not None
    differences = [
        scores.logprobs - expected,
        scores.entropy + (logp.exp() * logp).sum(-1),
        own.grad - reference.grad[:, rank * width : (rank + 1) * width],
    ]
    dist.destroy_process_group()
    return [float(difference.detach().abs().max()) for difference in differences]
