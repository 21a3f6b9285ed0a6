"""Can this model be trained on its own labels with this data? A short run at a high rate, until it collapses.

Rewards from a model's own answers sharpen what it believes. That helps while its beliefs are mostly right, and every
run falls in the end; how soon depends on the model and the data more than on the method (arXiv 2603.08660, which takes
the step of the collapse as a measure of trainability). Here the rate is raised, so that the end comes sooner, and the
collapse is seen without ground truths: by the guard, whose anchor questions show when the policy begins to forget what
it was sure of.

What a run can bear is counted in learning rate summed over steps, because Adam moves each weight by about its rate in
a step. What is borne at the raised rate is a lower bound: on the demo a run at half the rate bore more than twice that
sum (docs/stability.md). So a forecast says how far a planned run is safe, not when it will collapse.
"""

import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from megatron_coreward.config.methods import method_title, needs_of
from megatron_coreward.config.schema import RunConfig
from megatron_coreward.errors import HaltedError, InputError
from megatron_coreward.guard import Decision, replay_rows
from megatron_coreward.telemetry import keys
from megatron_coreward.telemetry.jsonl import FILE_NAME, Row, read_rows
from megatron_coreward.trainer.anchors import too_few
from megatron_coreward.trainer.finish import REPORT, try_report

FACTOR = 4.0  # by which the rate is raised
STEPS = 100
# Anchor questions below which nothing can be said: with 48, of 4 rollouts, 10% of their answers may go before an alarm,
# hardly more than with 64 (9%); with 16 it is 17%.
FEWEST_CLEAR = 48
# Anchors cost a tenth of the usual batch; a run whose only result is when it collapses needs them often.
SETTINGS = (
    "actor.lr_schedule=constant",
    "actor.lr_warmup=0",
    "guard.action=stop",
    "guard.anchors=64",
    "guard.anchor_every=4",
    "guard.anchor_rollouts=4",
    f"guard.min_anchors={FEWEST_CLEAR}",
    "validation.every=0",
    "validation.at_start=false",
    "data.val_files=[]",
    "checkpoint.best_metric=null",
    "checkpoint.every=0",
    "checkpoint.resume=never",
    "telemetry.dump_rollouts=false",
)
LEAST_SHARE = 0.1  # of the planned sum: a model that does not bear that much should not be trained so


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a short run at a high rate says of a planned one."""

    collapse_step: int | None  # of the short run; None: it went to its end
    steps: int  # of the short run
    rate: float  # its learning rate
    planned_steps: int
    planned_sum: float  # of the learning rate over the planned steps
    anchors_kept: float  # share of the anchors' answers that are kept at the end of the short run
    reason: str  # what the guard saw
    updates_per_batch: int = 1  # optimizer steps in a step, of both runs

    @property
    def borne_sum(self) -> float:
        """Learning rate, summed over the optimizer steps before the collapse; a lower bound if there was none."""
        return (
            self.rate * self.updates_per_batch * (self.steps if self.collapse_step is None else self.collapse_step - 1)
        )

    @property
    def share(self) -> float:
        """Of the planned run's sum, that the short run bore."""
        return self.borne_sum / self.planned_sum

    @property
    def safe_steps(self) -> int:
        """Steps of the planned run, by a constant rate, that sum to no more than the short run bore."""
        return min(self.planned_steps, int(self.share * self.planned_steps + 1e-6))

    @property
    def recommendation(self) -> str:
        """In words, for people."""
        if self.share >= 1:
            went = "went" if self.collapse_step is None else "collapsed later than"
            far = "as far as the plan does, without a collapse" if self.collapse_step is None else "the plan goes"
            return f"train as planned: the short run {went} {far}"
        safe = f"{self.safe_steps} of the {self.planned_steps} planned steps are as far as the short run went"
        if self.collapse_step is None:
            return f"{safe}, without a collapse: train with guard.anchors on, or forecast with more steps"
        if self.share >= LEAST_SHARE:
            return (
                f"{safe} before it collapsed; a lower rate allows more, but it is not known how many: train with "
                "guard.anchors on and guard.action=rollback, and keep checkpoints"
            )
        return (
            f"do not train this model on its own labels as planned: {safe} before it collapsed; try a lower rate, a "
            "stronger model, easier questions or ground truths"
        )


def forecast(
    load: Callable[[Sequence[str]], RunConfig],
    run: Callable[[RunConfig], object],
    factor: float = FACTOR,
    steps: int = STEPS,
    notify: Callable[[str], None] = lambda text: None,
) -> Forecast:
    """Trains for at most `steps` at `factor` times the planned rate, in <run_dir>/forecast, until the guard stops it.
    The report of that run is there as well.

    Args:
        load: makes the configuration with further overrides.
        run: trains (`trainer.run.train`).
        notify: called if the report cannot be written.

    Raises:
        InputError: a method that reads ground truths, or too few questions of which the model is sure.
    """
    planned = load(())
    if needs_of(planned.method).ground_truth:
        raise InputError(
            f"method: found {method_title(planned.method)}, which reads ground truths; allowed for a forecast: methods "
            "that learn without labels"
        )
    rate, run_dir = factor * planned.actor.lr, planned.run_dir / "forecast"
    config = load((*SETTINGS, f"run_dir={run_dir}", f"steps={steps}", f"actor.lr={rate:g}"))
    shutil.rmtree(run_dir, ignore_errors=True)  # of an earlier forecast
    with suppress(HaltedError):  # the guard has seen a collapse, which is what the run was for
        run(config)
    found = read_forecast(config, planned, read_rows(run_dir / FILE_NAME))
    if not (run_dir / REPORT).is_file():  # a run that its guard has halted has none
        try_report(config, notify)
    return found


def read_forecast(config: RunConfig, planned: RunConfig, rows: Sequence[Row]) -> Forecast:
    """What the metrics of the short run say. Raises InputError if there were too few anchors."""
    kept = [value for row in rows if (value := row.get("anchor/kept")) is not None]
    found = max((row.get("anchor/questions") or 0 for row in rows), default=0)
    if not kept or found < FEWEST_CLEAR:
        raise InputError(too_few(int(found), FEWEST_CLEAR))
    trained = [row for row in rows if row[keys.STEP] != 0]
    alarm = _collapse([decision for _, decision in replay_rows(config.guard, trained)])
    return Forecast(
        collapse_step=None if alarm is None else alarm.step - alarm.lasted + 1,
        steps=len(trained),
        rate=config.actor.lr,
        planned_steps=planned.steps,
        planned_sum=rate_sum(planned),
        anchors_kept=kept[-1],
        reason="" if alarm is None else alarm.reason,
        updates_per_batch=config.loss.updates_per_batch,
    )


def _collapse(decisions: Sequence[Decision]) -> Decision | None:
    """The decision to act, or a warning that was still there at the end: a warning that passed was no collapse."""
    acted = next((decision for decision in decisions if decision.level == "act"), None)
    return acted or next((decision for decision in decisions[-1:] if decision.level != "none"), None)


def rate_sum(config: RunConfig) -> float:
    """The learning rate summed over all optimizer steps, after the schedule's shape."""
    actor, updates = config.actor, config.steps * config.loss.updates_per_batch
    warmup = actor.lr_warmup * actor.lr / 2
    after = actor.lr if actor.lr_schedule == "constant" else (actor.lr + actor.min_lr) / 2
    return updates * (warmup + (1 - actor.lr_warmup) * after)


def describe(forecast: Forecast, where: Path) -> str:
    """The forecast on a few lines."""
    collapse = (
        f"no collapse in {forecast.steps} steps"
        if forecast.collapse_step is None
        else f"collapse at step {forecast.collapse_step} ({forecast.reason})"
    )
    return "\n".join(
        (
            f"short run at a learning rate of {forecast.rate:g}: {collapse}",
            f"anchor questions: {forecast.anchors_kept:.0%} of their answers kept",
            f"learning rate summed over steps: {forecast.borne_sum:.2g} without a collapse, "
            f"{forecast.planned_sum:.2g} planned ({forecast.share:.0%})",
            f"recommendation: {forecast.recommendation}",
            f"its curves: {where}",
        )
    )
