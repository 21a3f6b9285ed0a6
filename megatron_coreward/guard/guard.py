"""The collapse guard: one row of label telemetry a step in, a decision with its reason out.

Invariants (tests/guard/test_guard.py):
  1. A decision is a function of the settings and of the rows so far: the same rows give the same decisions, in a run,
     in a resumed run (`state_dict`) and in a replay.
  2. No decision rests on ground truths or on validation.
  3. Certainty and distance alone never raise an alarm, however large; nor do indicators that do not last, except for
     anchors, which are enough by themselves: they warn at once, and alone they lead to an action only if they last
     and a second draw of the anchor questions shows them too.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

from megatron_coreward.config.guard import GuardAction, GuardSettings
from megatron_coreward.guard.indicators import HELD, METRICS, Indicator, find_indicators
from megatron_coreward.telemetry import keys

Level = Literal["none", "warn", "act"]
CONFIRMED = 2  # draws of the anchor questions that have to show an alarm of theirs before it is acted on
_LEVELS: tuple[Level, ...] = ("none", "warn", "act")


@dataclass(frozen=True, slots=True)
class Decision:
    """What the guard makes of a step."""

    step: int
    level: Level
    action: GuardAction | None  # what to do now; None: go on
    indicators: tuple[Indicator, ...]  # those that are there, an alarm or not
    lasted: int  # steps in a row with enough indicators
    good_step: int  # the last step from before the indicators: where to go back to
    news: bool  # whether people should know: an alarm begins, grows, or is acted on

    @property
    def reason(self) -> str:
        """In words and numbers, against the mean of the first steps."""
        if not self.indicators:
            return "no indicators of collapse"
        return f"{'; '.join(indicator.words for indicator in self.indicators)}; for {self.lasted} steps"

    def metrics(self) -> dict[str, float]:
        """For the step's row."""
        return {"guard/level": float(_LEVELS.index(self.level)), "guard/indicators": float(len(self.indicators))}

    def __str__(self) -> str:
        if self.level == "none":
            return f"step {self.step}: {self.reason}"
        doing = "" if self.action in (None, "warn") else f" Action: {self.action}."
        return f"step {self.step}: training may be collapsing: {self.reason}.{doing}"


class Guard:
    """The guard of one run, and what it has done so far."""

    def __init__(self, settings: GuardSettings, rollbacks: int = 0) -> None:
        """Args:
        rollbacks: how often this run has gone back already. It is no part of the state: a state that is loaded to
            go back must not forget that it did.
        """
        self._settings = settings
        self._rollbacks = rollbacks
        self._seen = 0
        # Metric -> sum and count of its first steps: over the warm-up, or as many from where it appears later on.
        self._base: dict[str, list[float]] = {}
        self._late: set[str] = set()  # metrics that appeared after the warm-up
        self._held: dict[str, float] = {}  # last values of `indicators.HELD`
        self._recent: list[dict[str, float]] = []
        self._lasted = 0
        self._since = 0  # step of the first alarm of the episode: alarms with short gaps between them are one
        self._last_alarm = 0  # step of the newest
        self._several = 0  # steps in a row with as many indicators as an alarm without anchors takes
        self._draws = 0  # draws of the anchor questions that showed the alarm
        self._level: Level = "none"
        self._quiet_until = 0  # no indicator counts up to this step
        self._raises = 0
        self._frozen = False

    @property
    def kl_factor(self) -> float:
        """What the weight of the KL term is multiplied by."""
        return self._settings.kl_factor ** (self._raises + self._rollbacks)

    @property
    def teacher_frozen(self) -> bool:
        """Whether the teacher's moves are left out from now on."""
        return self._frozen

    def observe(self, step: int, row: Mapping[str, float | None]) -> Decision:
        """Takes in the metrics of a step (those of `indicators.METRICS` that it has; others are not read) and decides.

        What the decision says is taken as done: `kl_factor` and `teacher_frozen` follow it.
        """
        settings = self._settings
        values = {key: float(value) for key in METRICS if (value := row.get(key)) is not None and math.isfinite(value)}
        self._seen += 1
        drawn = {key: values.pop(key) for key in HELD if key in values}
        self._held |= drawn
        self._recent = [*self._recent, values][-settings.window :]
        if settings.action == "off":
            return self._decision(step, ())
        self._extend_base(values)
        if self._seen <= settings.warmup:
            return self._decision(step, ())
        base = {
            key: total / count
            for key, (total, count) in self._base.items()
            if key not in self._late or count >= settings.warmup
        }
        indicators = find_indicators(base, self._means() | self._held, settings)
        several = len(indicators) >= settings.min_indicators and any(indicator.damage for indicator in indicators)
        alarming = several or any(indicator.enough for indicator in indicators)
        if not alarming or step <= self._quiet_until:
            self._lasted = self._several = self._draws = 0
        else:
            # Before its first alarm a run has no episode that this one could belong to.
            if not self._last_alarm or step - self._last_alarm > self._reach(indicators):
                self._since = step
            self._last_alarm = step
            self._lasted += 1
            self._several = self._several + 1 if several else 0
            self._draws += "anchor/kept" in drawn and any(indicator.enough for indicator in indicators)
        return self._decision(step, indicators)

    def _reach(self, indicators: tuple[Indicator, ...]) -> int:
        """Steps before an alarm in which what it shows may have begun: the window of means, and for anchors two draws,
        because a reading is the mean of two."""
        draws = 2 * self._settings.anchor_every if any(indicator.enough for indicator in indicators) else 0
        return max(self._settings.window, draws)

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "seen": self._seen,
            "base": {key: list(entry) for key, entry in self._base.items()},
            "late": sorted(self._late),
            "held": dict(self._held),
            "recent": [dict(values) for values in self._recent],
            "lasted": self._lasted,
            "since": self._since,
            "last_alarm": self._last_alarm,
            "several": self._several,
            "draws": self._draws,
            "level": self._level,
            "quiet_until": self._quiet_until,
            "raises": self._raises,
            "frozen": self._frozen,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from a state of `state_dict`, also from that of an earlier version, which held nothing, had no late
        metrics and counted neither draws nor gaps.

        Raises KeyError for a state with anything else missing.
        """
        self._last_alarm, self._several = int(state.get("last_alarm", 0)), int(state.get("several", 0))
        self._draws = int(state.get("draws", 0))
        self._late, self._held = set(state.get("late", ())), dict(state.get("held", {}))
        self._seen, self._lasted, self._since = int(state["seen"]), int(state["lasted"]), int(state["since"])
        self._base = {key: list(entry) for key, entry in state["base"].items()}
        self._recent = [dict(values) for values in state["recent"]]
        self._level = _LEVELS[_LEVELS.index(state["level"])]
        self._quiet_until, self._raises = int(state["quiet_until"]), int(state["raises"])
        self._frozen = bool(state["frozen"])

    def _extend_base(self, values: Mapping[str, float]) -> None:
        warming_up = self._seen <= self._settings.warmup
        for key, value in values.items():
            total, count = self._base.get(key, (0.0, 0))
            if not warming_up and count == 0:
                self._late.add(key)
            if warming_up or (key in self._late and count < self._settings.warmup):
                self._base[key] = [total + value, count + 1]

    def _means(self) -> dict[str, float]:
        found: dict[str, list[float]] = {}
        for values in self._recent:
            for key, value in values.items():
                found.setdefault(key, []).append(value)
        return {key: fmean(values) for key, values in found.items()}

    def _decision(self, step: int, indicators: tuple[Indicator, ...]) -> Decision:
        settings, lasted, since = self._settings, self._lasted, self._since
        level: Level = "none"
        if self._several >= settings.act_after or (lasted >= settings.act_after and self._draws >= CONFIRMED):
            level = "act"
        elif lasted >= settings.warn_after or (lasted and any(indicator.enough for indicator in indicators)):
            level = "warn"
        rising = _LEVELS.index(level) > _LEVELS.index(self._level)
        action = self._possible_action() if level == "act" else None
        if action == "warn" and not rising:
            action = None
        self._take(action, step)
        self._level = level if self._lasted else "none"
        return Decision(
            step=step,
            level=level,
            action=action,
            indicators=indicators,
            lasted=lasted,
            good_step=max(0, since - self._reach(indicators)) if lasted else step,
            news=rising or action is not None,
        )

    def _possible_action(self) -> GuardAction:
        """What the configured action comes to now: it may be used up."""
        action, used_up = self._settings.action, self._settings.max_actions
        if action == "rollback" and self._rollbacks >= used_up:
            return "stop"
        if (action == "raise_kl" and self._raises >= used_up) or (action == "freeze_teacher" and self._frozen):
            return "warn"
        return action

    def _take(self, action: GuardAction | None, step: int) -> None:
        """Notes an action in the state. After those that change training, the indicators get time to go, and what the
        anchors showed before counts no more: only a new draw does."""
        self._raises += action == "raise_kl"
        self._frozen = self._frozen or action == "freeze_teacher"
        if action in ("raise_kl", "freeze_teacher"):
            self._lasted, self._quiet_until = 0, step + self._settings.cooldown
            self._several, self._draws, self._held = 0, 0, {}


def replay_rows(settings: GuardSettings, rows: Iterable[Mapping[str, float | None]]) -> Iterator[tuple[int, Decision]]:
    """The decisions on the rows of training steps, from the first on."""
    guard = Guard(settings)
    for row in rows:
        step = int(row[keys.STEP] or 0)
        yield step, guard.observe(step, row)
