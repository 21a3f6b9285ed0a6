"""Methods of one's own, as a user writes them, right and wrong; loaded by import path."""

import numpy as np

from megatron_coreward.rewards.methods.base import GroupReward, Needs, RewardContext
from megatron_coreward.types import RolloutGroup


class LengthPenalty:
    """Minus the share of the tokens of the group's longest response: of no view in particular, so for mixtures."""

    name = "length_penalty"
    needs = Needs(views=())
    label_free = True

    def score(self, group: RolloutGroup, context: RewardContext) -> GroupReward:
        lengths = np.float32([len(completion.token_ids) for completion in group.completions])
        return GroupReward(None, -lengths / lengths.max())


class FirstAnswer:
    """The first rollout's answer is the label."""

    name = "first_answer"
    needs = Needs()
    label_free = True

    def score(self, group: RolloutGroup, context: RewardContext) -> GroupReward:
        label = group.answers[0]
        return GroupReward(label, context.matches(group, label))


FIRST_ANSWER = FirstAnswer()  # an instance does as well


class Peeks(FirstAnswer):
    """Reads the data set's answer, and says that it does not."""

    def score(self, group: RolloutGroup, context: RewardContext) -> GroupReward:
        label = context.ground_truth(group.uid)
        return GroupReward(label, context.matches(group, label))


class AsksTheTeacher(FirstAnswer):
    def score(self, group: RolloutGroup, context: RewardContext) -> GroupReward:
        label = context.label_from_vote(group.uid, group.view, "teacher")
        return GroupReward(label, context.matches(group, label))


class VotesOfTheTeacher(AsksTheTeacher):
    """Takes the teacher's label, as Co-rewarding-II does."""

    needs = Needs(teacher=True)


class SharesOfTheTeacher(FirstAnswer):
    """Rewards an answer by its share among the teacher's."""

    needs = Needs(teacher=True)

    def score(self, group: RolloutGroup, context: RewardContext) -> GroupReward:
        classes = context.answer_classes(group.uid, (group.view,), "teacher")
        shares = dict(zip(classes.spellings, classes.shares().tolist(), strict=True))
        return GroupReward(None, np.float32([shares.get(answer or "", 0.0) for answer in group.answers]))


class HiddenAdvantages(FirstAnswer):
    """Returns advantages, and does not say that it does."""

    def score(self, group: RolloutGroup, context: RewardContext) -> GroupReward:
        rewards = context.matches(group, group.answers[0])
        return GroupReward(None, rewards, rewards - rewards.mean())


class FailsOnSilence(FirstAnswer):
    """Divides by the number of rollouts that have an answer."""

    def score(self, group: RolloutGroup, context: RewardContext) -> GroupReward:
        given = [answer for answer in group.answers if answer is not None]
        return GroupReward(None, context.matches(group, given[0]))


class FailsOnAgreement(FirstAnswer):
    def score(self, group: RolloutGroup, context: RewardContext) -> GroupReward:
        rewards = context.matches(group, group.answers[0])
        with np.errstate(all="ignore"):
            return GroupReward(None, (rewards / rewards.std()).astype(np.float32))


class FailsAlone(FirstAnswer):
    def score(self, group: RolloutGroup, context: RewardContext) -> GroupReward:
        return GroupReward(None, context.matches(group, group.answers[1]))


class ClaimsTooMuch(Peeks):
    needs = Needs(ground_truth=True)


class ClaimsTooLittle(FirstAnswer):
    label_free = False


class ClaimsNothing:
    name = "claims_nothing"
    needs = Needs()

    def score(self, group: RolloutGroup, context: RewardContext) -> GroupReward:
        return GroupReward(None, np.zeros(len(group.completions), dtype=np.float32))


class ReadsLabels(Peeks):
    """Reads the data set's answers, and says so."""

    needs = Needs(ground_truth=True)
    label_free = False


class WrongSignature(FirstAnswer):
    def score(self, group: RolloutGroup) -> GroupReward:  # type: ignore[override]
        return GroupReward(None, np.zeros(len(group.completions), dtype=np.float32))


class WrongShape(FirstAnswer):
    def score(self, group: RolloutGroup, context: RewardContext) -> GroupReward:
        return GroupReward(None, np.zeros(1, dtype=np.float32))


class NotFinite(FirstAnswer):
    def score(self, group: RolloutGroup, context: RewardContext) -> GroupReward:
        return GroupReward(None, np.full(len(group.completions), np.nan, dtype=np.float32))


class NoReward(FirstAnswer):
    def score(self, group: RolloutGroup, context: RewardContext) -> GroupReward:
        return None  # type: ignore[return-value]


class Fails(FirstAnswer):
    def score(self, group: RolloutGroup, context: RewardContext) -> GroupReward:
        raise ValueError("no such thing")


class NeedsArguments(FirstAnswer):
    def __init__(self, number: int) -> None:
        self.number = number


class NoNeeds(FirstAnswer):
    needs = "everything"  # type: ignore[assignment]


class NoName(FirstAnswer):
    name = ""
