"""The collapse guard's settings: what indicates collapse, how many indicators at once, for how long, and what follows.

Thresholds were set with runs of the demo: healthy ones of both instantiations on three seeds stay clear of an alarm,
majority voting at learning rates at which accuracy is lost raises one (tests/guard/test_recorded_runs.py).
"""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from megatron_coreward.config.component import Component, Fraction, NonNegative, Positive

GuardAction = Literal["off", "warn", "raise_kl", "freeze_teacher", "rollback", "stop"]


class GuardSettings(Component):
    """The collapse guard: indicators of collapse in label telemetry, and what follows from them."""

    action: GuardAction = "warn"
    """What happens when indicators of collapse have lasted for act_after steps; before that, the guard warns. off looks
    for nothing; warn only says so; raise_kl multiplies the weight of the KL term by kl_factor; freeze_teacher ends the
    teacher's updates, so that labels do not follow the policy; rollback goes back to the newest checkpoint from before
    what the indicators rest on (window steps, or two draws of the anchors, before the first alarm of the episode), with
    the KL term raised by kl_factor, because the same step from the same weights would only collapse again; stop ends
    the run with status 3."""
    kl_factor: Annotated[float, Field(gt=1)] = 3.0
    """Factor by which raise_kl and rollback raise the weight of the KL term."""
    max_actions: Positive = 3
    """Actions in a run. After this many of raise_kl the guard only warns; after this many of rollback the run stops."""
    cooldown: NonNegative = 10
    """Steps after an action in which no indicator counts, so that the action can take effect."""

    warmup: Positive = 10
    """First steps, whose mean is the baseline that later steps are compared with."""
    window: Positive = 5
    """Newest steps whose mean is compared with the baseline, because single steps are noisy."""
    min_indicators: Annotated[int, Field(ge=2)] = 2
    """Indicators that raise an alarm if they occur at once; one of them must be one of damage. The indicator of anchors
    suffices alone."""
    warn_after: Positive = 5
    """Steps in a row with that many indicators after which the guard warns; at most act_after. The indicator of anchors
    warns at once, because it is a mean of two draws already."""
    act_after: Positive = 10
    """Steps in a row with that many indicators after which the guard acts. If it is anchors alone, a second draw must
    show them too."""

    anchors: NonNegative = 0
    """Anchor questions: training questions with a clear majority at the start, which the policy answers again every
    anchor_every steps, beside its training. 0: none, and nothing is drawn for the guard."""
    min_anchors: NonNegative = 0
    """Fewest anchor questions that must be found: with fewer the run ends before its first step. 0: it goes on with
    those that there are."""
    anchor_every: Positive = 10
    """Steps between two draws of the anchor questions."""
    anchor_rollouts: Positive = 4
    """Rollouts of each anchor question in a draw."""

    # Indicators of change. A policy that has learned shows them too: they are never enough by themselves.
    consensus: Fraction = 0.7
    """Indicator of change: share of the way to unanimity that vote share and distinct answers have both gone."""
    entropy_fall: Fraction = 0.8
    """Indicator of change: share of the policy's entropy that is gone."""
    kl: Annotated[float, Field(gt=0)] = 0.1
    """Indicator of change: KL divergence from the reference, in nats per token."""
    vote_entropy_fall: Fraction = 0.8
    """Indicator of change: share of the entropy of the votes that is gone."""
    saturation: Fraction = 0.8
    """Indicator of change: share of groups in which all rollouts have the same reward, so that nothing is learned."""
    locking: Fraction = 0.8
    """Indicator of change: share of the label changes between epochs that is gone: what is wrong then stays wrong."""
    # Indicators of damage.
    length_fall: Fraction = 0.25
    """Indicator of damage: share of the mean response length that is gone."""
    variety_fall: Fraction = 0.5
    """Indicator of damage: share of a step's distinct labels that is gone; questions are then answered alike."""
    no_answer_rise: Fraction = 0.1
    """Indicator of damage: share of rollouts without an answer, above that of the baseline."""
    truncated_rise: Fraction = 0.2
    """Indicator of damage: share of rollouts cut off at rollout.max_response_tokens, above that of the baseline."""
    entropy_rise: Annotated[float, Field(gt=1)] = 3.0
    """Indicator of damage: the policy's entropy as a multiple of the baseline's."""
    anchor_fall: Fraction = 0.09
    """Indicator of damage, and enough for an alarm: of the rollouts on anchor questions that give the majority answer
    of the start, the share that is gone since they were most, in the last draw and over the last two. Learning adds to
    them, because clear majorities are mostly right. With fewer than 220 rollouts in a draw (55 anchors of 4) the limit
    widens as the standard error of a draw does: by sqrt(220 / rollouts), so 12% with 32 anchors of 4."""
    repetition_rise: Fraction = 0.1
    """Indicator of damage: share of n-grams that repeat an earlier one of their response, above that of the
    baseline."""
    agreement_fall: Fraction = 0.2
    """Indicator of damage: share of questions on which policy and teacher, or the two views, vote alike, below that of
    the baseline."""
    label_flips: Annotated[float, Field(gt=0)] = 1.25
    """Indicator of damage: labels of a question that change from one epoch to the next, divided by rollouts that differ
    from their majority. A label that only sampling noise moves changes less often than rollouts do, so 1 means that
    answers themselves move."""
    min_flip_rate: Fraction = 0.1
    """Share of labels that must change between epochs before label_flips counts, whatever the ratio."""

    @model_validator(mode="after")
    def _bounds(self) -> Self:
        if self.warn_after > self.act_after:
            raise ValueError(f"warn_after ({self.warn_after}) must not be above act_after ({self.act_after})")
        if self.min_anchors > self.anchors:
            raise ValueError(f"min_anchors ({self.min_anchors}) must not be above anchors ({self.anchors})")
        return self
