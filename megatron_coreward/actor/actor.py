"""A Megatron actor rank: the policy with its optimizer, the teacher and the frozen reference, under one layout.

Every method is called on all ranks with the same arguments, except the sequences of a batch, which differ by
data-parallel rank. Results come from the output ranks (last pipeline stage, first tensor-parallel rank); the others
return None.
"""

import gc
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_coreward.actor import cpu_backend

cpu_backend.install()  # before megatron is first imported

from megatron.core import parallel_state  # noqa: E402

from megatron_coreward.actor import parallel  # noqa: E402
from megatron_coreward.actor.export import export_hf, partial_directory  # noqa: E402
from megatron_coreward.actor.forward_backward import forward_backward, forward_only  # noqa: E402
from megatron_coreward.actor.hf_weights import load_hf, load_megatron, local_blocks  # noqa: E402
from megatron_coreward.actor.microbatch import Pack, build_pack  # noqa: E402
from megatron_coreward.actor.model import (  # noqa: E402
    DTYPES,
    build_chunks,
    forget_quantised_weights,
    fuses_gradients,
    resolve_backend,
)
from megatron_coreward.actor.offload import Offloaded, Part, free_memory  # noqa: E402
from megatron_coreward.actor.optimizer import (  # noqa: E402
    MOMENTS,
    adam_name,
    build_optimizer,
    build_scheduler,
    clip_gradients,
    wrap_chunks,
)
from megatron_coreward.actor.packing import ContextRank, MicroBatchPlan  # noqa: E402
from megatron_coreward.actor.router_replay import replays_of  # noqa: E402
from megatron_coreward.actor.saving import FileHashes, Saving  # noqa: E402
from megatron_coreward.actor.setup import ActorSetup, Weights  # noqa: E402
from megatron_coreward.actor.shards import main_shards  # noqa: E402
from megatron_coreward.actor.state import HostMemory, begin_save, load_state  # noqa: E402
from megatron_coreward.actor.teacher import EmaTeacher, FrozenModel  # noqa: E402
from megatron_coreward.actor.token_stats import Scores, VocabularyShard, score_tokens  # noqa: E402
from megatron_coreward.actor.train_step import pack_loss  # noqa: E402
from megatron_coreward.checkpoint.new_directory import removed_on_error  # noqa: E402
from megatron_coreward.config.accelerator import RECIPES, token_alignment  # noqa: E402
from megatron_coreward.config.architecture import read_architecture  # noqa: E402
from megatron_coreward.telemetry.memory import DeviceMemory  # noqa: E402
from megatron_coreward.types import FloatArray, Role, Sequences, TokenStats, TrainBatch  # noqa: E402
from megatron_coreward.weights.meeting import serve_store  # noqa: E402
from megatron_coreward.weights.senders import Sender, open_sender  # noqa: E402
from megatron_coreward.weights.spec import TransferSpec  # noqa: E402


class MegatronActor:
    def __init__(self, setup: ActorSetup, rank: int, address: str, port: int) -> None:
        self.setup = setup
        self.arch = read_architecture(setup.hf_path)
        self.ranks = parallel.initialize(setup.settings, rank, address, port, setup.seed)
        dtype = DTYPES[setup.dtype]

        def build(frozen: bool) -> Any:
            return build_chunks(self.arch, setup.settings, dtype, setup.max_sequence_length, frozen)

        chunks = build(frozen=False)
        if setup.megatron_path is None:
            load_hf(chunks, self.arch, self.ranks, setup.hf_path)
        else:
            load_megatron(chunks, self.arch, self.ranks, setup.megatron_path)
        self.policy = wrap_chunks(chunks)
        self.optimizer = build_optimizer(self.policy, setup.settings, dtype)
        self.scheduler = build_scheduler(self.optimizer, setup.settings, setup.total_updates)
        self.frozen: dict[Weights, FrozenModel] = {}
        self.teacher = EmaTeacher(self.optimizer) if setup.teacher else None
        kept: dict[Weights, bool] = {"teacher": setup.teacher, "reference": setup.frozen_reference}
        for name in (name for name, wanted in kept.items() if wanted):
            self.frozen[name] = FrozenModel(build(frozen=True), self.policy)
            self.frozen[name].start_as_policy(self.optimizer)
        rows = self.arch.padded_vocab_size(self.ranks.tp_size) // self.ranks.tp_size
        self._vocabulary = VocabularyShard(
            start=min(self.ranks.tp_rank * rows, self.arch.vocab_size),
            stop=min((self.ranks.tp_rank + 1) * rows, self.arch.vocab_size),
            size=self.arch.vocab_size,
            group=parallel_state.get_tensor_model_parallel_group() if self.ranks.tp_size > 1 else None,
        )
        self._context = ContextRank(parallel_state.get_context_parallel_rank(), setup.settings.context_parallel)
        self._address = address  # of rank 0
        self._senders: dict[Role, Sender] = {}  # one for both roles, unless engines of its own serve the teacher
        self._store: Any = None  # on rank 0: where the parties of a weight sync meet
        self._saving: Saving | None = None
        self._host_memory = HostMemory()
        self._gpu_is_lent = False  # to the engines: from `offload` to `onload`
        self._cold_scales = setup.settings.fp8 is not None and RECIPES[setup.settings.fp8].keeps_state
        self._offloaded = Offloaded(self._parts())
        self._offloaded.settle()

    def _parts(self) -> dict[str, Part]:
        """What can leave the device while others use it. Views of the model's own weights (fp32 runs) stay."""
        settings, optimizer, teacher = self.setup.settings, self.optimizer, self.teacher
        weights = {b.param_data.untyped_storage()._cdata for c in self.policy for b in _buffers(c)}

        def of_optimizer() -> Iterator[torch.Tensor]:
            for shard in main_shards(optimizer):
                kept = (shard.value, *(shard.state[name] for name in MOMENTS))
                yield from (t for t in kept if t.untyped_storage()._cdata not in weights)

        parts = {"optimizer": Part(of_optimizer, settings.offload_optimizer)}
        if teacher is not None:
            parts["teacher"] = Part(lambda: [*teacher.values, *teacher.compensations], settings.offload_teacher)
        if "reference" in self.frozen:
            parts["reference"] = Part(lambda: self.frozen["reference"].weights.storages)
        return parts

    def describe(self) -> dict[str, str]:
        """What this rank computes with, as far as it depends on what is installed."""
        config = self.policy[0].module.config
        return {
            "backend": resolve_backend(self.setup.settings.backend, DTYPES[self.setup.dtype]),
            "fp8": f"{config.fp8_recipe}{' with FP8 weights' if config.fp8_param else ''}" if config.fp8 else "off",
            "adam": adam_name(self.optimizer),
            "gradient accumulation": "fused" if fuses_gradients(self.policy[0]) else "separate",
        }

    def offload(self) -> DeviceMemory | None:
        """Frees the memory of all that neither a weight sync nor its canary needs: the optimizer's state, gradients,
        the EMA's state, the frozen reference. Weights of policy and teacher stay. Returns None without a GPU."""
        before = free_memory(cached=True)  # what only torch still holds is not asked back
        self._forget_quantised_weights()
        self._gpu_is_lent = True
        self._offloaded.leave("optimizer", "teacher", "reference")
        for chunk in self.policy:
            chunk.offload_grad_buffers()
        after = free_memory()
        return None if before is None or after is None else DeviceMemory(after, after - before)

    def onload(self) -> DeviceMemory | None:
        """Allocates the memory again. Gradients come back as zeros."""
        self._gpu_is_lent = False
        before = free_memory()
        for chunk in self.policy:
            chunk.restore_grad_buffers()
        self._offloaded.settle()
        after = free_memory()
        return None if before is None or after is None else DeviceMemory(after, after - before)

    def _forget_quantised_weights(self) -> None:
        for model in ([c.module for c in self.policy], *(frozen.chunks for frozen in self.frozen.values())):
            forget_quantised_weights(model)

    @property
    def is_output_rank(self) -> bool:
        """Whether results are taken from this rank."""
        return self.ranks.pp_rank == self.ranks.pp_size - 1 and self.ranks.tp_rank == 0

    def _chunks(self, weights: Weights) -> list[Any]:
        return self.policy if weights == "policy" else self.frozen[weights].chunks

    def _packs(self, sequences: Sequences, micro_batches: MicroBatchPlan, weights: Weights) -> list[Pack]:
        """The micro-batches' tensors, with the experts to replay if it is the policy that takes them.

        Only ranks that exchange activations of the same micro-batch with others, over a pipeline or over experts, need
        all of them to be of equal size.
        """
        s = self.setup.settings
        equal = s.pipeline_parallel > 1 or self.arch.experts is not None
        align, pad = token_alignment(s), self._context.multiple
        replayed = [replay.layer for replay in replays_of(self.policy)] if weights == "policy" else []

        def size(rows: Iterable[int]) -> int:
            tokens = sum(-(-len(sequences.token_ids[row]) // pad) * pad for row in rows)
            return micro_batches.num_tokens if equal else max(align, -(-tokens // align) * align)

        return [
            build_pack(sequences, rows, size(rows), parallel.device(), self._context, replayed)
            for rows in micro_batches.packs
        ]

    def token_stats(
        self,
        sequences: Sequences,
        micro_batches: MicroBatchPlan,
        weights: Weights,
        temperature: float,
        statistics: bool = True,
    ) -> TokenStats | None:
        """Log-probs of the response tokens of the rank's sequences, in its order, and if wanted entropy and
        self-certainty."""
        packs = self._packs(sequences, micro_batches, weights)

        def score(pack: Pack, hidden: torch.Tensor, weight: torch.Tensor) -> Scores:
            scores = score_tokens(hidden, weight, pack.targets, self._vocabulary, temperature, statistics)
            return _of_all_ranks(scores, pack, statistics)

        with self._bf16_under_delayed_scaling(weights):
            scores = forward_only(self._chunks(weights), packs, score)
        if self._gpu_is_lent:  # the canary: what it has made would stay beside the engines' caches
            self._forget_quantised_weights()
            free_memory(cached=True)
        if scores is None or not self.is_output_rank:
            return None

        def by_row(name: str) -> list[FloatArray]:
            rows: list[FloatArray] = [np.zeros(0, np.float32)] * len(sequences)
            for pack, of_pack in zip(packs, scores, strict=True):
                pieces = torch.split(getattr(of_pack, name).cpu(), list(pack.response_lengths))
                for row, piece in zip(pack.rows, pieces, strict=True):
                    rows[row] = piece.numpy()
            return rows

        more = (by_row("entropy"), by_row("self_certainty")) if statistics else ((), ())
        return TokenStats(by_row("logprobs"), *more)

    @contextmanager
    def _bf16_under_delayed_scaling(self, weights: Weights) -> Iterator[None]:
        """Passes without a gradient never update the scales of this recipe: before the first update they would compute
        with scale 1, where most weights are below what E4M3 distinguishes from zero."""
        config = self.policy[0].module.config
        fp8, keeps_state = config.fp8, bool(config.fp8) and RECIPES[config.fp8_recipe].keeps_state
        if weights == "policy" and keeps_state:
            config.fp8 = None
        try:
            yield
        finally:
            config.fp8 = fp8

    def accumulate(self, batch: TrainBatch, micro_batches: MicroBatchPlan) -> list[dict[str, torch.Tensor]] | None:
        """The gradient of the batch's loss, summed over ranks into the parameters' main gradients; weights stay."""
        setup = self.setup
        for chunk in self.policy:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

        def loss(
            pack: Pack, hidden: torch.Tensor, weight: torch.Tensor
        ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            scores = score_tokens(
                *(hidden, weight, pack.targets, self._vocabulary, setup.temperature),
                entropy_gradient=setup.loss.entropy_coef > 0,
            )
            return pack_loss(scores, pack, batch, setup.loss, _sum_over_context)

        return forward_backward(self.policy, self._packs(batch.sequences, micro_batches, "policy"), loss)

    def update(self, batch: TrainBatch, micro_batches: MicroBatchPlan) -> dict[str, float] | None:
        """One optimizer step on the batch. Returns sums over this rank's tokens, and the step's global figures.

        A gradient that is not finite moves nothing, neither weights nor moments. The schedule goes on.

        Raises:
            FloatingPointError: the gradient is not finite, and the setup does not say to skip such updates.
        """
        if self._cold_scales:
            # Scales start at 1, where E5M2 has nothing below 1e-5 and gradients of a mean over tokens vanish. A pass
            # whose gradient is thrown away finds the scales of the layers that the residual stream reaches; a second
            # one those of the layers behind them.
            self._cold_scales = False
            for _ in range(2):
                self.accumulate(batch, micro_batches)
        stats = self.accumulate(batch, micro_batches)
        with self._offloaded.at_hand("optimizer"):
            return self._apply(stats)

    def _apply(self, stats: list[dict[str, torch.Tensor]] | None) -> dict[str, float] | None:
        """The optimizer's step with the gradient that was accumulated; see `update`."""
        self.optimizer.prepare_grads()
        grad_norm = self.optimizer.get_grad_norm()
        finite = bool(np.isfinite(grad_norm))  # the same on every rank
        if not finite and not self.setup.skip_nonfinite_gradients:
            raise FloatingPointError(f"the gradient of this step is not finite (norm {grad_norm})")
        self.scheduler.step(1)
        if finite:
            clip_gradients(self.optimizer, grad_norm)
            self.optimizer.step_with_ready_grads()  # `step` would prepare gradients and take their norm again
        if stats is None or not self.is_output_rank:
            return None
        lr = float(self.optimizer.param_groups[0]["lr"])
        report = {"grad_norm": float(grad_norm), "lr": lr, "max:skipped": float(not finite)}
        for key in stats[0]:
            values = torch.stack([of_pack[key] for of_pack in stats])
            report[key] = float(values.max() if key.startswith("max:") else values.sum())
        return report

    def update_ema_teacher(self, decay: float) -> None:
        """teacher <- decay * teacher + (1 - decay) * policy."""
        if self.teacher is None:
            raise RuntimeError("this run keeps no teacher")
        with self._offloaded.at_hand("optimizer", "teacher"):
            self.teacher.update(decay)
            self.teacher.write_to(self.frozen["teacher"])

    def open_sender(self, spec: TransferSpec) -> TransferSpec:
        """Prepares to send weights, those of the spec's roles. Returns the spec with the place where all parties meet.

        Raises:
            ValueError: the plan wants something from this rank that it does not hold.
        """
        roles = [role for role in spec.roles if role in ("policy", *self.frozen)]
        self._close_senders(roles)
        if self._store is None and self.ranks.rank == 0:
            self._store = serve_store(self._address, spec.timeout_s)
        port = [self._store.port if self._store is not None else 0]
        dist.broadcast_object_list(port, src=0)
        spec = spec.at(self._address, port[0])
        blocks = {role: local_blocks(self._modules(role), self.arch, self.ranks) for role in roles}
        self._senders |= dict.fromkeys(roles, open_sender(spec, self.arch, self.ranks.rank, blocks, parallel.device()))
        return spec

    def send_weights(self, role: Role, version: int) -> None:
        """Sends a role's weights to its engines, which receive them at the same time (`Sender.send`)."""
        if role not in self._senders:
            raise RuntimeError("no sender was opened")
        self._senders[role].send(role, version)

    def _close_senders(self, roles: Iterable[Role]) -> None:
        for role in roles:
            sender = self._senders.pop(role, None)
            if sender is not None and sender not in self._senders.values():  # else the other role's, too
                sender.close()
            del sender
        gc.collect()  # ranks do not collect by themselves, and an error may hold the memory of a sync that failed

    def _modules(self, weights: Weights) -> list[Any]:
        return [c.module for c in self.policy] if weights == "policy" else self.frozen[weights].chunks

    def export_hf(self, weights: Weights, target: Path) -> None:
        """Writes a Hugging Face model directory, loadable with transformers."""
        with removed_on_error(partial_directory(target)):
            export_hf(self._modules(weights), self.arch, self.ranks, self.setup.hf_path, target)

    def begin_save(self, target: Path) -> None:
        """Begins to write the training state of all ranks into `target`, an empty directory; training may go on.

        Raises:
            RuntimeError: the save before this one was not finished.
        """
        if self._saving is not None:
            raise RuntimeError("the checkpoint before this one was not finished")
        with self._offloaded.at_hand("optimizer", "teacher"):
            self._saving = begin_save(
                self.policy, self.optimizer, self.scheduler, self.teacher, target, self._host_memory
            )

    def save_written(self) -> bool:
        """Whether this rank's part of the save under way is written: `finish_save` will not wait for it."""
        return self._saving is None or self._saving.written

    def finish_save(self) -> FileHashes:
        """Completes the save under way. Returns size and hash of the files that this rank has written.

        Raises:
            OSError: a rank could not write its part.
        """
        saving, self._saving = self._saving, None
        return saving.finish() if saving is not None else {}

    def save(self, target: Path) -> None:
        """Writes the training state of all ranks into `target`, an empty directory."""
        self.begin_save(target)
        self.finish_save()

    def load(self, source: Path) -> None:
        """Takes the training state from `source`, written under any layout."""
        with self._offloaded.at_hand("optimizer", "teacher"):
            load_state(
                *(self.policy, self.optimizer, self.scheduler, self.teacher, source), arch=self.arch, ranks=self.ranks
            )
            if self.teacher is not None:
                self.teacher.write_to(self.frozen["teacher"])

    def shutdown(self) -> None:
        self._close_senders(["policy", "teacher"])
        parallel.shutdown()


def _of_all_ranks(scores: Scores, pack: Pack, statistics: bool) -> Scores:
    """The scores of all response tokens of a pack, of which each context-parallel rank has computed some."""
    if pack.scored is None:
        return scores
    computed = torch.stack([scores.logprobs, *((scores.entropy, scores.self_certainty) if statistics else ())])
    whole = computed.new_zeros(len(computed), sum(pack.response_lengths))
    whole[:, pack.scored] = computed
    dist.all_reduce(whole, group=parallel_state.get_context_parallel_group())
    return Scores(*whole) if statistics else Scores(whole[0], scores.entropy, scores.self_certainty)


def _sum_over_context(values: torch.Tensor) -> torch.Tensor:
    if parallel_state.get_context_parallel_world_size() > 1:
        dist.all_reduce(values, group=parallel_state.get_context_parallel_group())
    return values


def _buffers(wrapped: Any) -> list[Any]:
    return [*wrapped.buffers, *wrapped.expert_parallel_buffers]
