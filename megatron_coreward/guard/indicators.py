"""The indicators of collapse in label telemetry, as pure functions of a baseline and of the recent past.

Majority labels reward agreement, and agreement is cheap: a policy can reach it by answering shorter, by dropping the
reasoning, or by being wrong in the same way every time. Certainty and distance alone are no
collapse, learning looks the same; with damage they are.

An indicator whose metrics a run does not have stays silent.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from megatron_coreward.config.guard import GuardSettings

Means = Mapping[str, float]  # metric -> mean, if the run has it

# What the guard reads of a row of metrics; nothing here knows a ground truth.
METRICS = (
    "vote/share",
    "vote/distinct_answers",
    "vote/no_answer_rate",
    "vote/entropy",
    "vote/label_variety",
    "teacher_vote/share",
    "advantage/zero_variance_share",
    "rollout/response_tokens_mean",
    "rollout/truncated_share",
    "rollout/repeated_ngrams",
    "rollout/teacher_stopped_share",
    "rollout/entropy",
    "loss/kl",
    "label/teacher_agreement",
    "label/view_agreement",
    "label/flip_rate",
    "anchor/kept",
    "anchor/questions",
)
# Drawn every few steps: the last value counts until there is another one.
HELD = ("anchor/kept", "anchor/questions")
# Rollouts of a draw in the smallest of the runs by which guard.anchor_fall was chosen: 55 anchors, 4 rollouts of each.
FEWEST_ROLLOUTS = 220


@dataclass(frozen=True, slots=True)
class Indicator:
    """One indicator that is there, with the numbers that it rests on."""

    name: str
    damage: bool  # False: change, which learning shows as well
    words: str
    enough: bool = False  # True: a warning needs no other indicator, and no more steps


def find_indicators(base: Means, now: Means, settings: GuardSettings) -> tuple[Indicator, ...]:
    """The indicators of collapse in `now`, against `base`; both are means over several steps."""
    found = (detect(base, now, settings) for detect in _DETECTORS)
    return tuple(indicator for indicator in found if indicator is not None)


def _consensus(base: Means, now: Means, settings: GuardSettings) -> Indicator | None:
    share, distinct = "vote/share", "vote/distinct_answers"
    if not _have(base, now, share, distinct) or base[share] >= 1 or base[distinct] <= 1:
        return None
    share_gone = (now[share] - base[share]) / (1 - base[share])
    distinct_gone = (base[distinct] - now[distinct]) / (base[distinct] - 1)
    if min(share_gone, distinct_gone) < settings.consensus:
        return None
    return Indicator(
        "consensus",
        False,
        f"vote share {base[share]:.2f} -> {now[share]:.2f} and distinct answers {base[distinct]:.1f} -> "
        f"{now[distinct]:.1f}, at least {settings.consensus:.0%} of the way to unanimity",
    )


def _vote_entropy(base: Means, now: Means, settings: GuardSettings) -> Indicator | None:
    key = "vote/entropy"
    if not _have(base, now, key) or base[key] <= 0 or now[key] > (1 - settings.vote_entropy_fall) * base[key]:
        return None
    limit = f"limit {-settings.vote_entropy_fall:.0%}"
    return Indicator("vote_entropy", False, f"entropy of the votes {base[key]:.2f} -> {now[key]:.2f} ({limit})")


def _saturation(base: Means, now: Means, settings: GuardSettings) -> Indicator | None:
    key = "advantage/zero_variance_share"
    if not _have(base, now, key) or base[key] >= settings.saturation or now[key] < settings.saturation:
        return None
    return Indicator(
        "saturation",
        False,
        f"groups in which all rollouts are rewarded alike {base[key]:.0%} -> {now[key]:.0%} "
        f"(limit {settings.saturation:.0%})",
    )


def _locking(base: Means, now: Means, settings: GuardSettings) -> Indicator | None:
    """Labels that no longer change: right ones need not, and wrong ones will not any more."""
    key = "label/flip_rate"
    if not _have(base, now, key) or base[key] < settings.min_flip_rate:
        return None
    if now[key] > (1 - settings.locking) * base[key]:
        return None
    limit = f"limit {-settings.locking:.0%}"
    return Indicator("locking", False, f"labels that change between epochs {base[key]:.0%} -> {now[key]:.0%} ({limit})")


def anchor_limit(settings: GuardSettings, questions: float | None) -> float:
    """The share of the anchors' answers that may go: `guard.anchor_fall`, wider in proportion to the standard error of
    a draw if that is of fewer than FEWEST_ROLLOUTS rollouts, so that chance alone does not raise more alarms then.

    Args:
        questions: anchors that there are; None: a record that does not say, for which nothing is widened.
    """
    if not questions:
        return settings.anchor_fall
    rollouts = questions * settings.anchor_rollouts
    return min(1.0, settings.anchor_fall * math.sqrt(max(1.0, FEWEST_ROLLOUTS / rollouts)))


def _anchors(base: Means, now: Means, settings: GuardSettings) -> Indicator | None:
    """What the policy was sure of is going. That is seen in the answers themselves, and needs no other indicator."""
    key = "anchor/kept"
    fall = anchor_limit(settings, now.get("anchor/questions"))
    if key not in now or now[key] > 1 - fall:
        return None
    limit = f"limit {-fall:.0%}"
    return Indicator("anchors", True, f"answers to the anchor questions kept to {now[key]:.0%} ({limit})", enough=True)


def _repetition(base: Means, now: Means, settings: GuardSettings) -> Indicator | None:
    return _risen("repetition", "repeated n-grams", "rollout/repeated_ngrams", settings.repetition_rise, base, now)


def _entropy_fall(base: Means, now: Means, settings: GuardSettings) -> Indicator | None:
    key = "rollout/entropy"
    if not _have(base, now, key) or base[key] <= 0 or now[key] > (1 - settings.entropy_fall) * base[key]:
        return None
    return Indicator(
        "entropy_fall", False, f"entropy {base[key]:.3g} -> {now[key]:.3g} nats (limit {-settings.entropy_fall:.0%})"
    )


def _entropy_rise(base: Means, now: Means, settings: GuardSettings) -> Indicator | None:
    key = "rollout/entropy"
    if not _have(base, now, key) or base[key] <= 0 or now[key] < settings.entropy_rise * base[key]:
        return None
    return Indicator(
        "entropy_rise", True, f"entropy {base[key]:.3g} -> {now[key]:.3g} nats (limit x{settings.entropy_rise:g})"
    )


def _length(base: Means, now: Means, settings: GuardSettings) -> Indicator | None:
    key = "rollout/response_tokens_mean"
    if not _have(base, now, key) or now[key] > (1 - settings.length_fall) * base[key]:
        return None
    return Indicator(
        "length", True, f"response length {base[key]:.0f} -> {now[key]:.0f} tokens (limit {-settings.length_fall:.0%})"
    )


def _variety(base: Means, now: Means, settings: GuardSettings) -> Indicator | None:
    key = "vote/label_variety"
    if not _have(base, now, key) or now[key] > (1 - settings.variety_fall) * base[key]:
        return None
    limit = f"limit {-settings.variety_fall:.0%}"
    return Indicator("variety", True, f"distinct labels of a step {base[key]:.0%} -> {now[key]:.0%} ({limit})")


def _no_answer(base: Means, now: Means, settings: GuardSettings) -> Indicator | None:
    return _risen("no_answer", "rollouts without an answer", "vote/no_answer_rate", settings.no_answer_rise, base, now)


def _truncated(base: Means, now: Means, settings: GuardSettings) -> Indicator | None:
    return _risen("truncated", "rollouts cut off", "rollout/truncated_share", settings.truncated_rise, base, now)


def _agreement(base: Means, now: Means, settings: GuardSettings) -> Indicator | None:
    for key, who in (("label/teacher_agreement", "policy and teacher"), ("label/view_agreement", "the two views")):
        if _have(base, now, key) and now[key] <= base[key] - settings.agreement_fall:
            limit = f"limit -{settings.agreement_fall:.2f}"
            return Indicator("agreement", True, f"votes of {who} agree {base[key]:.0%} -> {now[key]:.0%} ({limit})")
    return None


def _kl(base: Means, now: Means, settings: GuardSettings) -> Indicator | None:
    key = "loss/kl"
    if key not in now or now[key] < settings.kl:
        return None
    return Indicator("kl", False, f"KL to the reference {now[key]:.3g} nats a token (limit {settings.kl:g})")


def _label_flips(base: Means, now: Means, settings: GuardSettings) -> Indicator | None:
    """Labels that change more often than rollouts disagree: the answers move, not the sampling."""
    flips, share = now.get("label/flip_rate"), now.get("vote/share")
    if "rollout/teacher_stopped_share" not in now:  # votes that end early are over answers that agree more than others
        share = now.get("teacher_vote/share", share)
    if flips is None or share is None or flips < settings.min_flip_rate:
        return None
    if flips < settings.label_flips * (1 - share):
        return None
    return Indicator(
        "label_flips",
        True,
        f"{flips:.0%} of labels differ from the question's last one, {1 - share:.0%} of rollouts from their majority "
        f"(limit x{settings.label_flips:g})",
    )


def _risen(name: str, what: str, key: str, rise: float, base: Means, now: Means) -> Indicator | None:
    if not _have(base, now, key) or now[key] < base[key] + rise:
        return None
    return Indicator(name, True, f"{what} {base[key]:.0%} -> {now[key]:.0%} (limit +{rise:.2f})")


def _have(base: Means, now: Means, *keys: str) -> bool:
    return all(key in base and key in now for key in keys)


_DETECTORS: tuple[Callable[[Means, Means, GuardSettings], Indicator | None], ...] = (
    _consensus,
    _entropy_fall,
    _entropy_rise,
    _length,
    _variety,
    _no_answer,
    _truncated,
    _agreement,
    _kl,
    _label_flips,
    _vote_entropy,
    _saturation,
    _locking,
    _anchors,
    _repetition,
)
