"""Memory and time of the loss over a real vocabulary: hidden states and output layer in, log-probs and gradients out.

    python benchmarks/bench_loss.py [--rows 6000] [--vocabulary 151936] [--hidden 128] [--threads 1] [--json]

Two ways: `actor.token_stats`, chunk by chunk, and `whole`, which makes the logits of all rows at once and scores them
with torch's own log_softmax, as a plain training loop does. Bytes are counted, not estimated: every tensor storage that
torch makes within a pass is followed until it is freed (results and the gradients of the inputs included). Seconds are
the fastest of three passes without the counting.
"""

import argparse
import json
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).parents[1]))

from megatron_coreward.actor.token_stats import CHUNK_ELEMENTS, VocabularyShard, score_tokens


class CountBytes(TorchDispatchMode):
    """Bytes of the storages that operations make, now and at most, while it is entered."""

    def __init__(self, *known: torch.Tensor) -> None:
        super().__init__()
        self.now = self.most = 0
        self._seen = {t.untyped_storage()._cdata for t in known}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._follow(tensor.untyped_storage())
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        identity, size = storage._cdata, storage.nbytes()
        if identity in self._seen:
            return
        self._seen.add(identity)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._freed, identity, size)

    def _freed(self, identity: int, size: int) -> None:
        self._seen.discard(identity)
        self.now -= size


def fastest(call: Callable[[], Any], times: int = 3) -> float:
    taken = []
    for _ in range(times):
        begin = time.perf_counter()
        call()
        taken.append(time.perf_counter() - begin)
    return min(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=6000, help="response tokens of a pack")
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--hidden", type=int, default=128, help="hidden size; the products' share grows with it")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--whole", action="store_true", help="the other way too; needs 12 bytes and more a logit")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(options.rows, options.hidden, generator=generator).requires_grad_()
    weight = torch.randn(options.vocabulary, options.hidden, generator=generator).div_(options.hidden**0.5)
    weight.requires_grad_()
    targets = torch.randint(options.vocabulary, (options.rows,), generator=generator)
    shard = VocabularyShard(0, options.vocabulary, options.vocabulary, None)

    def ours(statistics: bool) -> torch.Tensor:
        return score_tokens(hidden, weight, targets, shard, 1.0, statistics).logprobs

    def whole() -> torch.Tensor:
        logp = (hidden @ weight.t()).log_softmax(-1)
        with torch.no_grad():
            -(logp.exp() * logp).sum(-1)
        return logp.gather(1, targets[:, None])[:, 0]

    def trains(forward: Callable[[], torch.Tensor]) -> Callable[[], None]:
        def call() -> None:
            hidden.grad = weight.grad = None
            forward().sum().backward()

        return call

    def scores(forward: Callable[[], torch.Tensor]) -> Callable[[], Any]:
        return torch.no_grad()(forward)

    cases: dict[str, Callable[[], Any]] = {
        "update": trains(lambda: ours(True)),
        "scoring with statistics": scores(lambda: ours(True)),
        "scoring": scores(lambda: ours(False)),
    }
    if options.whole:
        cases |= {"update, whole logits": trains(whole), "scoring, whole logits": scores(whole)}
    chunk = CHUNK_ELEMENTS["cpu"] // options.vocabulary * options.vocabulary
    gradients = 4 * (hidden.numel() + weight.numel())
    found: dict[str, Any] = {"rows": options.rows, "vocabulary": options.vocabulary, "hidden": options.hidden}
    found["chunk_logits_bytes"] = 4 * chunk
    for name, call in cases.items():
        hidden.grad = weight.grad = None
        with CountBytes(hidden, weight, targets) as counted:
            call()
        kept = gradients if name.startswith("update") else 0
        found[name] = {
            "seconds": fastest(call),
            "peak_bytes": counted.most,
            "peak_beside_gradients_bytes": counted.most - kept,
            "peak_over_chunk_logits": (counted.most - kept) / (4 * chunk),
            "bytes_per_logit": (counted.most - kept) / (options.rows * options.vocabulary),
        }
    if options.json:
        print(json.dumps(found))
        return
    print(f"{options.rows} rows x {options.vocabulary} tokens, hidden size {options.hidden}")
    for name in cases:
        of = found[name]
        beside, ratio = of["peak_beside_gradients_bytes"] / 2**20, of["peak_over_chunk_logits"]
        print(
            f"  {name:<26}{of['seconds']:8.2f} s   {beside:8.0f} MiB beside gradients: {ratio:.2f} of a chunk's logits"
        )


if __name__ == "__main__":
    main()
