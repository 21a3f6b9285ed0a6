"""Co-rewarding-II: a slowly moving teacher labels the policy's rollouts (arXiv 2508.00410).

The label is the vote over the teacher's rollouts of the same question; the teacher is an average over past policies.
"""

from megatron_coreward.rewards.methods.base import Evidence, Judgement, Needs
from megatron_coreward.types import RolloutGroup


class CoRewardingII:
    name = "co_rewarding_ii"
    needs = Needs(teacher=True)

    def judge(self, group: RolloutGroup, evidence: Evidence) -> Judgement:
        label = evidence.label_from_vote(group.uid, group.view, "teacher")
        return Judgement(label, evidence.matches(group, label))
