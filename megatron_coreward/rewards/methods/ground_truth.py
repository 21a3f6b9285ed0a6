"""Ground truth, a baseline with labels (GT-GRPO): the data set's answer is the label."""

from megatron_coreward.rewards.methods.base import Evidence, Judgement, Needs
from megatron_coreward.types import RolloutGroup


class GroundTruth:
    name = "ground_truth"
    needs = Needs(gold=True)

    def judge(self, group: RolloutGroup, evidence: Evidence) -> Judgement:
        label = evidence.gold(group.uid)
        return Judgement(label, evidence.matches(group, label))
