"""How a run's experience comes about, put together from its settings: questions, their order, schedule, votes, log."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_coreward.cluster.rollout_engines import RolloutEngines
from megatron_coreward.config.schema import RunConfig
from megatron_coreward.data.sampler import BatchSampler
from megatron_coreward.rewards.equivalence import AnswerEquivalence
from megatron_coreward.rewards.methods import method_of
from megatron_coreward.telemetry.rollout_dump import ScoredGroup
from megatron_coreward.telemetry.timing import PhaseTimer
from megatron_coreward.trainer.early_stop import early_stop_metrics, early_vote_watchers
from megatron_coreward.trainer.experience import Collector, Experience, RolloutSource, ScoringActors
from megatron_coreward.trainer.online_rephrasing import RephrasedSource, Rewriter, Rewriting
from megatron_coreward.trainer.resampling import NOTE, ResamplingSource, StepQuestions
from megatron_coreward.trainer.rollout_log import LoggedCollector, RolloutLog
from megatron_coreward.trainer.schedule import RolloutSchedule
from megatron_coreward.trainer.streaming import StreamingSchedule
from megatron_coreward.types import Problem


@dataclass(frozen=True, slots=True)
class Collection:
    """What the trainer collects with."""

    collect: Callable[[int, int, PhaseTimer], Experience]
    metrics: Callable[[Sequence[ScoredGroup]], dict[str, float]]  # of sampling, once a step
    questions: Callable[[int], dict[str, Any] | None]  # their state after a step; None: a function of the step


def open_collection(
    config: RunConfig,
    problems: Sequence[Problem],
    rewriting: Rewriting | None,
    actors: ScoringActors,
    engines: RolloutEngines,
    equivalence: AnswerEquivalence,
    log: RolloutLog,
    steps_done: int,
    drawn: dict[str, Any] | None,
) -> Collection:
    """Args:
    rewriting: who rewrites the questions of each step; None: nobody.
    drawn: the state of the questions after `steps_done` steps, if a checkpoint has one.
    """
    method = method_of(config.method)
    questions: StepQuestions | None = None
    problems_of: Callable[[int], Sequence[Problem]]
    if config.rollout.resample_flat:
        questions = StepQuestions(problems, config, steps_done, drawn, lambda step: log.note(step, NOTE))
        problems_of = questions.of
    else:
        problems_of = BatchSampler(problems, config.data.batch_size, config.seed, config.data.shuffle).batch
    rewriter: Rewriter | None = None
    if rewriting is not None:
        rewriter = Rewriter(config, rewriting, problems_of, log.has)
        problems_of = rewriter.problems_of
    source: RolloutSource
    if config.rollout.schedule == "streaming":
        watch = early_vote_watchers(config)
        source = StreamingSchedule(config, method.needs, engines, problems_of, log.has, watch)
    else:
        source = RolloutSchedule(config, method.needs, engines, problems_of, log.has)
    if rewriter is not None:
        source = RephrasedSource(source, rewriter)
    collector = Collector(config, method, actors, source, equivalence, problems_of)
    further: ResamplingSource | None = None
    if questions is not None:
        further = ResamplingSource(config, method.needs, source, engines, questions, collector.score, log.has)
        collector = replace(collector, source=further)

    def metrics(scored: Sequence[ScoredGroup]) -> dict[str, float]:
        found = engines.take_sampling_metrics()
        if config.rollout.max_staleness and config.rollout.schedule == "deterministic":
            found = {}  # of rollouts that nobody waited for
        if config.teacher.early_stop and "rollout/aborted_tokens" in found:
            teachers = [item.group for item in scored if item.group.role == "teacher"]
            limit = config.rollout.max_response_tokens
            found |= early_stop_metrics(teachers, config.teacher.n, found["rollout/aborted_tokens"], limit)
        if rewriter is not None:
            found |= rewriter.metrics()
        return found if further is None else found | further.take_metrics()

    if questions is None:
        return Collection(LoggedCollector(collector, log).collect, metrics, lambda step: None)
    return Collection(LoggedCollector(collector, log, questions.note).collect, metrics, questions.state_after)
