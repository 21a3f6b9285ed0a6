"""The actor's weights as vLLM's trainer side wants them, for engines other than this project's own.

`vllm.distributed.weight_transfer` feeds its `ipc`, `nccl` and further engines from a `WeightSource`. All actor ranks
iterate together, as the interface asks; none holds more than two buckets of the model.
"""

from collections.abc import Iterator

import torch
from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

from megatron_coreward.weights.device import DeviceSender, tensor_in


class BucketSource(WeightSource):
    """Every tensor of the Hugging Face checkpoint, full, on this rank's device; in the order of `metadata`."""

    def __init__(self, sender: DeviceSender) -> None:
        self._sender = sender

    def metadata(self) -> list[ParamMeta]:
        return [ParamMeta(m.name, getattr(torch, m.dtype), m.shape) for m in self._sender.metas]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for number, bucket in enumerate(self._sender.buckets):
            memory = self._sender.fill(number, 0)
            for entry in bucket.entries:
                yield entry.meta.name, tensor_in(memory, entry).clone()  # vLLM may hold on to it beyond the bucket
