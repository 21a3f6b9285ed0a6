"""`verify-sync CONFIG [key=value ...]`: sync a config's weights and prove that they arrive."""

import argparse
from pathlib import Path
from typing import Any


def add(commands: Any) -> None:
    verify = commands.add_parser(
        "verify-sync",
        help="start a recipe's actors and engines, sync the weights, and prove that they arrive",
        example="megatron-coreward verify-sync configs/math_co_rewarding_i.yaml rollout.num_engines=2",
    )
    verify.add_argument("config", type=Path, metavar="CONFIG", help="the recipe")
    verify.add_argument("overrides", nargs="*", metavar="key=value", help="config keys, as for train")
    verify.set_defaults(run=_verify)


def _verify(options: argparse.Namespace) -> None:
    from megatron_coreward.cluster.verify_sync import verify_sync
    from megatron_coreward.config.load import load_config

    for check in verify_sync(load_config(options.config, options.overrides)):
        print(
            f"{check.role:8} version {check.version}: {check.gigabytes:.3f} GB in {check.seconds:.2f} s, "
            f"checksums equal, log-prob gap {check.canary_gap:.1e} nats"
        )
    print("the weight sync of this config works")
