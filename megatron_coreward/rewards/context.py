"""The evidence of one step: everything that was gathered, and to each method only what it declared.

Invariants: each vote is computed once, when it is first asked for; a method cannot read what its needs do not name, so
a label-free method cannot see a gold answer even by mistake.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from megatron_coreward.rewards.equivalence import AnswerEquivalence
from megatron_coreward.rewards.methods.base import NO_ANSWER, AnswerClasses, Needs, Statistic
from megatron_coreward.rewards.methods.permission import require_ground_truth, require_token_stats, require_vote
from megatron_coreward.rewards.voting import Vote, majority_vote
from megatron_coreward.types import FloatArray, Role, RolloutGroup, TokenStats, View

GroupKey = tuple[str, View, Role]


class BatchRewardContext:
    """`RewardContext` over the groups of one step.

    policy_groups, teacher_groups: what either role sampled; token_stats: of the sequences of `policy_groups`, group
    after group and completion after completion; golds: the data set's answers by uid; votes_end_early: groups of the
    teacher have what decided their votes (`teacher.early_stop`), so nothing else of them may be read. Raises ValueError
    if something that `needs` declares is missing, if a group is in the wrong list or occurs twice, and if the
    statistics do not fit the completions.
    """

    def __init__(
        self,
        needs: Needs,
        equivalence: AnswerEquivalence,
        *,
        policy_groups: Sequence[RolloutGroup],
        teacher_groups: Sequence[RolloutGroup] = (),
        token_stats: TokenStats | None = None,
        ground_truths: Mapping[str, str | None] | None = None,
        min_margin: float = 0.0,
        votes_end_early: bool = False,
    ) -> None:
        self._needs = needs
        self._votes_end_early = votes_end_early
        self.equivalence = equivalence
        self.min_margin = min_margin
        self._ground_truths = ground_truths or {}
        self._groups: dict[GroupKey, RolloutGroup] = {}
        self._votes: dict[GroupKey, Vote] = {}
        self._compared = False
        for role, groups in (("policy", policy_groups), ("teacher", teacher_groups)):
            for group in groups:
                if group.role != role:
                    raise ValueError(
                        f"the group of {group.uid} ({group.view}) among those of the {role} is {group.role}'s"
                    )
                if _key(group) in self._groups:
                    raise ValueError(f"two groups of {group.uid} ({group.view}, {role})")
                self._groups[_key(group)] = group
        if needs.teacher and policy_groups and not teacher_groups:
            raise ValueError("the method needs votes of the teacher, but there are no groups of the teacher")
        if needs.token_stats and token_stats is None:
            raise ValueError("the method needs token statistics, but there are none")
        if needs.ground_truth and ground_truths is None:
            raise ValueError("the method needs the data set's answers, but there are none")
        self._means = _means_by_group(policy_groups, token_stats) if needs.token_stats and token_stats else {}

    def label_from_vote(self, uid: str, view: View, role: Role) -> str | None:
        """Majority answer of a group; None if the vote abstains. PermissionError: the needs do not name it."""
        require_vote(self._needs, view, role)
        return self.vote(uid, view, role).label

    def answer_classes(self, uid: str, views: Sequence[View], role: Role) -> AnswerClasses:
        """Answers of one or several groups of a question, classed together. PermissionError: the needs do not name
        them, or they are the teacher's and its votes end early."""
        for view in views:
            require_vote(self._needs, view, role)
        if role == "teacher" and self._votes_end_early:
            raise PermissionError(
                "the method reads all answers of the teacher, of which teacher.early_stop: true leaves those that "
                "decide the vote; allowed: false"
            )
        groups = [self._group(uid, view, role) for view in views]
        self._compare()
        answers = [answer for group in groups for answer in group.answers]
        classes = self.equivalence.classes(answers)
        numbers = np.array([NO_ANSWER if index is None else index for index in classes], dtype=np.int32)
        spellings: dict[int, str] = {}  # classes are numbered in the order in which they are first seen
        for index, answer in zip(classes, answers, strict=True):
            if index is not None and answer is not None:
                spellings.setdefault(index, answer)
        ends = np.cumsum([len(group.completions) for group in groups])
        return AnswerClasses(tuple(np.split(numbers, ends[:-1])), tuple(spellings.values()))

    def ground_truth(self, uid: str) -> str | None:
        """The data set's answer. PermissionError: the needs do not name it. KeyError: the question is unknown."""
        require_ground_truth(self._needs)
        if uid not in self._ground_truths:
            raise KeyError(f"no data set answer for {uid}")
        return self._ground_truths[uid]

    def sequence_means(self, group: RolloutGroup, statistic: Statistic) -> FloatArray:
        """[G] mean of a statistic over each response. PermissionError: the needs do not name it."""
        require_token_stats(self._needs)
        if _key(group) not in self._means:
            raise KeyError(f"no token statistics for {group.uid} ({group.view}, {group.role})")
        return self._means[_key(group)][statistic]

    def matches(self, group: RolloutGroup, label: str | None) -> FloatArray:
        """[G] 1.0 if the rollout's answer is equivalent to the label, else 0.0; all 0.0 without a label."""
        answers = group.answers
        self._compare()
        same = {answer: self.equivalence.equivalent(answer, label) for answer in dict.fromkeys(answers)}
        return np.array([same[answer] for answer in answers], dtype=np.float32)

    def vote(self, uid: str, view: View, role: Role) -> Vote:
        """The whole vote, for telemetry: not part of what a method sees. KeyError: there is no such group."""
        key, group = (uid, view, role), self._group(uid, view, role)
        self._compare()
        if key not in self._votes:
            self._votes[key] = majority_vote(group.answers, self.equivalence, self.min_margin)
        return self._votes[key]

    def _group(self, uid: str, view: View, role: Role) -> RolloutGroup:
        key = (uid, view, role)
        if key not in self._groups:
            raise KeyError(f"the {role} has no rollouts of {uid} ({view})")
        return self._groups[key]

    def _compare(self) -> None:
        """All comparisons of the step together: of a question, every view and role, for labels cross them."""
        if self._compared:
            return
        self._compared = True
        answers: dict[str, list[str | None]] = {}
        for group in self._groups.values():
            answers.setdefault(group.uid, []).extend(group.answers)
        self.equivalence.compare(answers.values())

    def votes(self) -> dict[GroupKey, Vote]:
        """All votes of the step, for telemetry."""
        return {key: self.vote(*key) for key in self._groups}


def _key(group: RolloutGroup) -> GroupKey:
    return (group.uid, group.view, group.role)


def _means_by_group(groups: Sequence[RolloutGroup], stats: TokenStats) -> dict[GroupKey, dict[Statistic, FloatArray]]:
    """[G] means per group and statistic; ValueError if the statistics are not those of the completions."""
    owners = [(group, index) for group in groups for index in range(len(group.completions))]
    lengths = [len(group.completions[index].token_ids) for group, index in owners]
    if 0 in lengths:
        group, index = owners[lengths.index(0)]
        raise ValueError(
            f"rollout {index} of {group.uid} ({group.view}) has no tokens, so a mean over them is undefined"
        )
    means: dict[GroupKey, dict[Statistic, FloatArray]] = {_key(group): {} for group in groups}
    sources: dict[Statistic, Sequence[FloatArray]] = {"entropy": stats.entropy, "self_certainty": stats.self_certainty}
    for statistic, values in sources.items():
        if [len(value) for value in values] != lengths:
            raise ValueError(f"{statistic} does not have one entry for each token of the {len(lengths)} rollouts")
        flat = np.array([np.mean(value, dtype=np.float64) for value in values], dtype=np.float32)
        ends = np.cumsum([len(group.completions) for group in groups])
        for group, part in zip(groups, np.split(flat, ends[:-1]), strict=True):
            means[_key(group)][statistic] = part
    return means
