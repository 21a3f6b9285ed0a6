"""Majority voting, a baseline: the policy's own vote on the same group is the label (arXiv 2508.00410)."""

from megatron_coreward.rewards.methods.base import Evidence, Judgement, Needs
from megatron_coreward.types import RolloutGroup


class MajorityVoting:
    name = "majority_voting"
    needs = Needs()

    def judge(self, group: RolloutGroup, evidence: Evidence) -> Judgement:
        label = evidence.label_from_vote(group.uid, group.view, "policy")
        return Judgement(label, evidence.matches(group, label))
