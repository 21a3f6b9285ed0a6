"""The processes of a run, started side by side and ended in any case."""

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

from megatron_coreward.actor.setup import ActorSetup
from megatron_coreward.checkpoint.convert import megatron_directory
from megatron_coreward.cluster.actor_group import ActorGroup
from megatron_coreward.cluster.colocation import Colocation
from megatron_coreward.cluster.engine_group import EngineGroup
from megatron_coreward.cluster.placement import ReservedPlacement
from megatron_coreward.cluster.ray_start import start_ray
from megatron_coreward.cluster.watchdog import Watchdog
from megatron_coreward.config.methods import needs_of
from megatron_coreward.config.schema import RunConfig
from megatron_coreward.planner.placement import Node, ResourceRequest
from megatron_coreward.rollout import orphans
from megatron_coreward.rollout.setup import EngineSetup
from megatron_coreward.weights import mailbox
from megatron_coreward.weights.spec import Transport, choose_transport

ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # torch's, of which either may be set
LOGS = "logs"  # in the run directory: what the processes print
CANARY_TOKENS = 64  # whose log-probs check a weight sync: an engine reads them and writes one more


@dataclass(frozen=True, slots=True)
class Processes:
    """The processes of a run, and how weights travel between them."""

    actors: ActorGroup
    engines: EngineGroup
    transport: Transport
    colocation: Colocation | None  # None: the engines have GPUs of their own
    watchdog: Watchdog
    nodes: tuple[Node, ...] = ()  # of the run, the driver's first


@contextmanager
def processes(config: RunConfig, watchdog: Watchdog | None = None) -> Iterator[Processes]:
    """The actors and engines of a run, started side by side, ended in any case.

    After an error nobody waits for them: they may hang in a collective whose partner is gone, or in rollouts.
    """
    start_ray(config.watchdog.start_limit_s)
    watchdog = watchdog or Watchdog(config.watchdog, logs=config.run_dir / LOGS)
    colocated = config.rollout.placement == "colocated"
    resource_request = ResourceRequest.of_run(config)
    max_sequence = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    with ExitStack() as stack:
        placement = stack.enter_context(ReservedPlacement(resource_request, config.watchdog.start_limit_s))
        transport = choose_transport(
            config.sync.transport,
            gpus=placement.on_gpus,
            colocated=colocated,
            num_hosts=placement.num_hosts,
            allocator_settings=",".join(os.environ.get(name, "") for name in ALLOCATOR_VARIABLES),
        )

        def start_actors() -> ActorGroup:
            actors = ActorGroup(actor_setup(config, max_sequence), placement, watchdog)
            stack.push(partial(_leave, actors))
            return actors

        actors = None if colocated else start_actors()
        setup = engine_setup(config, max(max_sequence, CANARY_TOKENS + 1))
        engines = EngineGroup(setup, config.rollout.num_engines, placement, watchdog)
        stack.push(partial(_leave, engines))
        colocation = None
        if actors is None:  # an engine plans its memory by what is free when it starts; actors come when it is asleep
            engines.wait()
            slept = engines.call("sleep")
            actors = start_actors()
            colocation = Colocation(actors, engines, slept)
        actors.wait()
        engines.wait()
        yield Processes(actors, engines, transport, colocation, watchdog, tuple(placement.nodes))


def _leave(group: ActorGroup | EngineGroup, kind: object, error: object, trace: object) -> None:
    if kind is None:
        group.shutdown()
    else:
        group.shutdown(patience_s=0.5)
        for _ in range(5):  # those who were killed need a moment to be gone, and hold their mailboxes until then
            mailbox.remove_orphans()
            orphans.remove_orphans()
            time.sleep(0.2)


def actor_setup(config: RunConfig, max_sequence: int) -> ActorSetup:
    """What the ranks of a run are built from."""
    return ActorSetup(
        settings=config.actor,
        loss=config.loss,
        hf_path=config.model.hf_path.resolve(),
        megatron_path=config.model.megatron_path and megatron_directory(config.model.megatron_path).resolve(),
        dtype=config.model.dtype,
        temperature=config.rollout.temperature,
        max_sequence_length=max_sequence,
        total_updates=config.steps * config.loss.updates_per_batch,
        seed=config.seed,
        teacher=needs_of(config.method).teacher,
        frozen_reference=bool(config.loss.kl_coef) and config.loss.kl_reference == "frozen",
        skip_nonfinite_gradients=config.faults.nonfinite_gradients == "skip",
    )


def engine_setup(config: RunConfig, max_model_len: int) -> EngineSetup:
    """What the engines of a run are built from."""
    settings = config.rollout
    return EngineSetup(
        config.model.hf_path.resolve(),
        config.model.dtype,
        max_model_len,
        tensor_parallel=settings.tensor_parallel,
        max_num_seqs=settings.max_num_seqs,
        kv_cache_gib=settings.kv_cache_gib,
        gpu_memory_utilization=settings.gpu_memory_utilization,
        cpu_threads=settings.cpu_threads,
        seed=config.seed,
        quantization=settings.quantization,
        cuda_graphs=settings.cuda_graphs,
        return_experts=config.actor.router_replay == "rollout",
    )
