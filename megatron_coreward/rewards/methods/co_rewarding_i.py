"""Co-rewarding-I: two views of a question label each other (arXiv 2508.00410).

Rollouts of a question are judged against the policy's vote on its rephrasing, rollouts of the rephrasing against the
vote on the question. A policy that agrees with itself on one wording alone earns nothing by it.
"""

from megatron_coreward.rewards.methods.base import GroupReward, Needs, RewardContext, other_view
from megatron_coreward.types import RolloutGroup


class CoRewardingI:
    name = "co_rewarding_i"
    needs = Needs(views=("original", "rephrased"))

    def score(self, group: RolloutGroup, context: RewardContext) -> GroupReward:
        label = context.label_from_vote(group.uid, other_view(group.view), "policy")
        return GroupReward(label, context.matches(group, label))
