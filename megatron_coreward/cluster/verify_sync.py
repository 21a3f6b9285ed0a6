"""`verify-sync CONFIG`: is the weight sync of this config right, before a run depends on it?

Starts the actors and engines of the config, syncs the weights of every role that the method has, with checksums, and
compares the engines' log-probs of the canary with the actors'. In the end it asks for samples of weights that were
never synced, which the engines must refuse.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

from transformers import AutoTokenizer

from megatron_coreward.cluster.colocation import no_handoff
from megatron_coreward.cluster.processes import processes
from megatron_coreward.cluster.weight_sync import canary_tokens, open_sync
from megatron_coreward.config.methods import needs_of
from megatron_coreward.config.schema import RunConfig
from megatron_coreward.config.validate import validate
from megatron_coreward.data.dataset import ProblemSet, load_problems
from megatron_coreward.errors import RunError
from megatron_coreward.rollout.requests import SamplingRequest
from megatron_coreward.telemetry.timing import PhaseTimer
from megatron_coreward.types import Role, WeightVersion
from megatron_coreward.weights.layouts import EngineLayout
from megatron_coreward.weights.spec import tensors_to_send


@dataclass(frozen=True, slots=True)
class SyncCheck:
    """One weight sync."""

    role: Role
    version: int
    seconds: float
    gigabytes: float  # of the model, once
    canary_gap: float  # nats


def verify_sync(config: RunConfig, rounds: int = 2) -> Iterator[SyncCheck]:
    """Syncs the weights of each role `rounds` times and yields what each sync took.

    Raises:
        InputError: before any process starts, if config or model cannot work.
        RunError: the weights did not arrive as they were sent.
    """
    arch = validate(config)
    EngineLayout(config.rollout.num_engines, config.rollout.tensor_parallel).check(arch)
    config = config.model_copy(update={"sync": config.sync.model_copy(update={"checksums": True})})
    roles: tuple[Role, ...] = ("policy", "teacher") if needs_of(config.method).teacher else ("policy",)
    gigabytes = sum(meta.nbytes for meta in tensors_to_send(arch, config.model.dtype)) / 1e9
    with processes(config) as running, ExitStack() as stack:
        sync = open_sync(config, running, canary_tokens(_problems(config)))
        stack.enter_context((running.colocation or no_handoff)(PhaseTimer()))
        for number in range(rounds):
            for role in roles:
                report = sync.sync_weights(role, number)
                assert report is not None
                version = WeightVersion(role, number).number
                yield SyncCheck(role, version, report.seconds, gigabytes, report.canary_gap)
        request = SamplingRequest([1], n=1, seed=0, temperature=1.0, top_p=1.0, max_tokens=1)
        try:
            running.engines.sample([request], version + 2)
        except RunError:
            return
        raise RunError(f"an engine sampled with weights of version {version + 2}, which were never synced")


def _problems(config: RunConfig) -> ProblemSet:
    """The questions that the run reads, as it renders them."""
    return load_problems(
        config.data.train_files,
        (),
        AutoTokenizer.from_pretrained(config.model.hf_path),
        system_prompt=config.data.system_prompt,
        max_prompt_tokens=config.data.max_prompt_tokens,
        over_length="drop",
    )
