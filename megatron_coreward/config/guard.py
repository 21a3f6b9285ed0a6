"""The collapse guard's settings: what counts as a sign of collapse, how many at once, for how long, and what follows.

Thresholds were set with runs of the demo: healthy ones of both instantiations on three seeds stay clear of an alarm,
majority voting at learning rates at which accuracy is lost raises one (tests/guard/test_recorded_runs.py).
"""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]

GuardAction = Literal["off", "warn", "raise_kl", "freeze_teacher", "rollback", "stop"]


class GuardSettings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    # What follows when signs of collapse have lasted for `act_after` steps. Before that, the guard warns.
    #   warn            says so, and nothing else
    #   raise_kl        multiplies the weight of the KL term by `kl_factor`
    #   freeze_teacher  the teacher moves no more, so that labels do not follow the policy
    #   rollback        back to the newest checkpoint from before the signs, with the KL term raised by `kl_factor`: the
    #                   same step from the same weights would only collapse again
    #   stop            ends the run
    action: GuardAction = "warn"
    kl_factor: Annotated[float, Field(gt=1)] = 3.0
    max_actions: Positive = 3  # of raise_kl, after which the guard only warns; of rollback, after which the run stops
    cooldown: NonNegative = 10  # steps after an action in which no sign counts: what was done has to take effect

    warmup: Positive = 10  # first steps; their mean is what later steps are compared with
    window: Positive = 5  # steps that are averaged: single steps are noisy
    min_indicators: Annotated[int, Field(ge=2)] = 2  # at once; one of them a sign of damage
    warn_after: Positive = 5  # steps in a row with so many signs
    act_after: Positive = 10

    # Signs of change. A policy that has learned shows them too: they are never enough by themselves.
    consensus: Fraction = 0.7  # share of the way to unanimity that vote share and distinct answers both have gone
    entropy_fall: Fraction = 0.8  # share of the policy's entropy that is gone
    kl: Annotated[float, Field(gt=0)] = 0.1  # nats a token to the reference
    # Signs of damage.
    length_fall: Fraction = 0.25  # share of the response length that is gone
    variety_fall: Fraction = 0.5  # share of the distinct labels of a step that is gone: questions are answered alike
    no_answer_rise: Fraction = 0.1  # rollouts without an answer, above the baseline
    truncated_rise: Fraction = 0.2  # rollouts cut off at the limit, above the baseline
    entropy_rise: Annotated[float, Field(gt=1)] = 3.0  # times the baseline
    agreement_fall: Fraction = 0.2  # votes of policy and teacher, or of the two views, that agree: below the baseline
    # Labels of one question that change from one epoch to the next, over rollouts that differ from their majority. A
    # label that only sampling noise moves changes less often than rollouts do, so 1 means that answers themselves move.
    label_flips: Annotated[float, Field(gt=0)] = 1.25
    min_flip_rate: Fraction = 0.1  # below it, flips are no sign whatever the ratio

    @model_validator(mode="after")
    def _warn_before_acting(self) -> Self:
        if self.warn_after > self.act_after:
            raise ValueError(f"warn_after ({self.warn_after}) must not be above act_after ({self.act_after})")
        return self
