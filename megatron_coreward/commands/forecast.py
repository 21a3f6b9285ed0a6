"""`forecast CONFIG [key=value ...]`: whether a model can be trained on its own labels, from a short run to collapse."""

import argparse
from pathlib import Path
from typing import Any

from megatron_coreward.commands.arguments import whole
from megatron_coreward.errors import InputError
from megatron_coreward.telemetry.untrusted_text import say


def add(commands: Any) -> None:
    forecast = commands.add_parser(
        "forecast",
        help="find out by a short run at a high learning rate whether a model can be trained on its own labels",
        example="megatron-coreward forecast configs/math_co_rewarding_i.yaml",
    )
    forecast.add_argument("config", type=Path, metavar="CONFIG", help="the recipe of the planned run")
    forecast.add_argument("overrides", nargs="*", metavar="key=value", help="config keys, as for train")
    forecast.add_argument("--steps", type=whole(20), default=100, help="largest number of steps of the short run")
    forecast.add_argument(
        "--rate-factor", type=float, default=4.0, help="factor of the short run's learning rate over the planned one"
    )
    forecast.set_defaults(run=_forecast)


def _forecast(options: argparse.Namespace) -> None:
    from megatron_coreward.config.load import load_config
    from megatron_coreward.config.schema import RunConfig

    if not 1 <= options.rate_factor <= 100:
        raise InputError(f"--rate-factor: found {options.rate_factor:g}; allowed: 1 to 100")

    def load(overrides: Any) -> RunConfig:
        return load_config(options.config, [*options.overrides, *overrides])

    planned = load(())
    from megatron_coreward.cluster.ray_start import stop_ray
    from megatron_coreward.trainer.forecast import describe, forecast
    from megatron_coreward.trainer.run import train

    try:
        found = forecast(load, train, options.rate_factor, options.steps, say)
    finally:
        stop_ray()
    say(describe(found, planned.run_dir / "forecast" / "report.html"))
