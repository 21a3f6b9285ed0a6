"""Co-rewarding-I+II on the original questions alone, as the published implementation combines the two (`use_aug`).

The teacher samples the rephrasing only and the policy the original only; the policy's rollouts are judged against the
teacher's vote. Half of the rollouts and of the update of `co_rewarding_i+ii`.
"""

from megatron_coreward.rewards.methods.base import Evidence, Judgement, Needs, other_view
from megatron_coreward.types import RolloutGroup


class CoRewardingIAndIIOriginal:
    name = "co_rewarding_i+ii_original"
    needs = Needs(teacher=True, teacher_views=("rephrased",))

    def judge(self, group: RolloutGroup, evidence: Evidence) -> Judgement:
        label = evidence.label_from_vote(group.uid, other_view(group.view), "teacher")
        return Judgement(label, evidence.matches(group, label))
