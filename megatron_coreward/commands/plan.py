"""`plan CONFIG [key=value ...]`: memory, layout and time of a run before it is queued."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_coreward.errors import InputError

if TYPE_CHECKING:
    from megatron_coreward.config.architecture import Architecture
    from megatron_coreward.config.schema import RunConfig
    from megatron_coreward.planner.plan import Machine


def add(commands: Any) -> None:
    from megatron_coreward.planner.hardware import GPUS, Assumptions

    plan = commands.add_parser(
        "plan",
        help="plan memory, layout and time of a run before it is queued",
        example="megatron-coreward plan configs/large/qwen3_14b_math_co_rewarding_i_8x141.yaml --gpus 16 --search",
    )
    plan.add_argument("config", type=Path, metavar="CONFIG", help="the recipe")
    plan.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="config keys, such as actor.tensor_parallel=4",
    )
    plan.add_argument("--gpu", help=f"kind of GPU: {', '.join(GPUS)} (default: the recipe's gpu, or h100)")
    plan.add_argument(
        "--gpus",
        type=int,
        metavar="N",
        help="number of GPUs, used or not; default: those of the layout",
    )
    plan.add_argument(
        "--placement",
        choices=("disaggregated", "colocated"),
        help="whether engines have their own GPUs or share those of the actor (default: rollout.placement)",
    )
    plan.add_argument("--search", action="store_true", help="propose layouts for --gpus GPUs, fastest first")
    plan.add_argument("--top", type=int, default=5, metavar="K", help="number of layouts to propose")
    plan.add_argument(
        "--assume",
        action="append",
        default=[],
        metavar="KEY=NUMBER",
        help=f"change an assumption of the plan: {', '.join(Assumptions.__slots__)}",
    )
    plan.add_argument("--json", action="store_true", help="print bytes and seconds as JSON")
    plan.set_defaults(run=_plan)


def _plan(options: argparse.Namespace) -> None:
    from megatron_coreward.config.load import load_config
    from megatron_coreward.planner.hardware import assume, find_gpu
    from megatron_coreward.planner.models import architecture_of
    from megatron_coreward.planner.plan import Machine, gpus_of, make_plan, placed
    from megatron_coreward.planner.report import overrides, report
    from megatron_coreward.planner.search import nearest
    from megatron_coreward.planner.step_time import transfers

    for name in ("gpus", "top"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise InputError(f"--{name}: {value}; allowed: 1 or more")
    config = load_config(options.config, options.overrides)
    arch = architecture_of(config.model)
    placement = options.placement or config.rollout.placement
    config = placed(config, placement)
    machine = Machine(find_gpu(options.gpu or config.gpu or "h100"), placement, assume(options.assume))
    gpus = options.gpus or gpus_of(config, placement)
    model = config.model.hf_path.name

    if options.search:
        _search(options, config, arch, machine, gpus)
        return
    contradictions: list[str] = []  # no GPU would resolve them
    problems: list[str] = []
    needed = gpus_of(config, placement)
    if needed > gpus:
        problems.append(f"the layout takes {needed} GPUs, --gpus is {gpus}")
    try:
        plan = make_plan(config, arch, machine)
        sync = transfers(config, arch)
        busiest = float(max(sync.bytes_sent.max(), sync.bytes_received.max()))
        plan = make_plan(config, arch, machine, busiest, options.gpus if needed <= gpus else None)
        problems += plan.problems
    except InputError as e:
        contradictions = str(e).splitlines()
        plan = None
    wrong = [*contradictions, *problems]
    closest = nearest(config, arch, machine, gpus) if wrong else None
    if options.json:
        answer: dict[str, Any] = {} if plan is None else plan.to_json()
        answer |= {"fits": not wrong, "problems": wrong}
        answer["nearest"] = None if closest is None else closest.to_json()
        print(json.dumps(answer, indent=1))
    else:
        parts = [] if plan is None else [report(plan, model)]
        if not wrong:
            parts.append("fits")
        if closest is not None:
            found = f"nearest layout that fits, {closest.num_gpus} GPUs, {closest.seconds:.1f} s a step:"
            parts.append(f"{found}\n  {overrides(closest)}")
        if parts:
            print("\n\n".join(parts))
    said = []
    if contradictions:
        said += [f"{options.config}: settings that cannot work, whatever the GPUs:", *contradictions]
    if problems:
        said += [f"{options.config} does not fit on {gpus} x {machine.gpu.name}:", *problems]
    if said:
        raise InputError("\n".join(said))


def _search(
    options: argparse.Namespace, config: "RunConfig", arch: "Architecture", machine: "Machine", gpus: int
) -> None:
    """Prints the layouts that fit. Raises InputError if none does."""
    from megatron_coreward.planner.plan import fixed_problems
    from megatron_coreward.planner.report import ranking
    from megatron_coreward.planner.search import search

    unfixable = fixed_problems(config, arch, machine)
    found = [] if unfixable else search(config, arch, machine, gpus)[: options.top]
    if options.json:
        print(json.dumps([plan.to_json() for plan in found], indent=1))
    elif found:
        print(ranking(found))
    if not found:
        why = "".join(f"\n{problem}" for problem in unfixable)
        name = f"{config.model.hf_path.name} fits on {gpus} x {machine.gpu.name}"
        raise InputError(f"no layout of {name}{':' if why else ''}{why}")
