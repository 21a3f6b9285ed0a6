"""A teacher's group that only votes ends when its vote is decided (`teacher.early_stop`).

The label is that of the full group (`rewards.early_vote`). The group keeps the completions that had ended; nobody waits
for the others, and they are in no record but the counts of what was aborted.
"""

from collections.abc import Sequence

from megatron_coreward.config.schema import RunConfig
from megatron_coreward.rewards.early_vote import EarlyVote
from megatron_coreward.rollout.requests import GroupWatcher, SamplingRequest
from megatron_coreward.trainer.streaming import Watch
from megatron_coreward.types import Completion, Problem, Role, RolloutGroup, View


class VoteWatcher:
    """Ends a group as soon as its vote is decided."""

    def __init__(self, vote: EarlyVote) -> None:
        self._vote = vote

    def completed(self, sample: int, completion: Completion) -> bool:
        """Whether no further sample can change the label."""
        self._vote.add(sample, completion.answer)
        return self._vote.decided


def early_vote_watchers(config: RunConfig) -> Watch:
    """Watchers of the teacher's groups; none if the run does not end votes early."""

    def watch(role: Role, problem: Problem, view: View, request: SamplingRequest) -> GroupWatcher | None:
        if role != "teacher" or not config.teacher.early_stop:
            return None
        return VoteWatcher(EarlyVote(request.n, config.rewards.equivalence, config.rewards.min_margin))

    return watch


def early_stop_metrics(
    teacher_groups: Sequence[RolloutGroup], n: int, aborted_tokens: float, max_tokens: int
) -> dict[str, float]:
    """How much of the teacher's work was spared.

    What an aborted sample would still have drawn is not known. It is estimated as if every token were as likely as any
    other to be the last: then tokens drawn over samples ended is what is left of a sample, however long it is (maximum
    likelihood under censoring). If lengths have a longer tail than that, more is spared than the estimate says.

    Args:
        n: samples of a group (`teacher.n`).
        aborted_tokens: that had been drawn of the samples that were then aborted.
        max_tokens: of a response.
    """
    lengths = [len(c.token_ids) for group in teacher_groups for c in group.completions]
    if not lengths:
        return {}
    aborted = sum(n - len(group.completions) for group in teacher_groups)
    drawn = sum(lengths) + aborted_tokens
    left = min(drawn / len(lengths), max(max_tokens - aborted_tokens / aborted, 0.0)) if aborted else 0.0
    saved = aborted * left
    return {
        "rollout/teacher_tokens_saved": saved / (drawn + saved),
        "rollout/teacher_aborted_share": aborted / (n * len(teacher_groups)),
        "rollout/teacher_stopped_share": sum(len(g.completions) < n for g in teacher_groups) / len(teacher_groups),
    }
