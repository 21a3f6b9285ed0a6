"""Everything that can be known to be wrong with a run before it costs anything: no process, no GPU, no model in memory.

Neither torch nor Ray nor an engine is imported, so that an answer takes a second and not ten. Every check runs,
whatever the others found, as far as it can; the message has all problems, one a line.

| module | asks |
|---|---|
| `config.validate` | does the config contradict itself or the model's shape, are the files there? |
| `method` | can the method be loaded, and does one of your own do what it says? |
| `packages` | are the pinned packages installed? |
| `model` | are weights and tokenizer whole, do they belong together, can the engine run them? |
| `prompts` | do the questions pair, render and fit? |
| `machine` | are there devices, memory and disk for it? |
| `ray_address` | does the cluster that is to be joined answer? |
| `resume` | is this the run that the run directory holds? |
"""

from collections.abc import Iterable, Iterator

from megatron_coreward.config.architecture import Architecture, read_architecture
from megatron_coreward.config.schema import RunConfig
from megatron_coreward.config.validate import file_problems, model_problems, setting_problems
from megatron_coreward.errors import InputError, environment_problem
from megatron_coreward.preflight import machine, method, model, packages, prompts, ray_address, resume


def preflight(config: RunConfig) -> Architecture:
    """Checks a resolved config against the model, the data, the run directory and this machine.

    Raises:
        InputError: every problem found, one a line.
    """
    problems = [
        *_found(setting_problems(config), file_problems(config), method.problems(config), packages.problems(config))
    ]
    arch: Architecture | None = None
    try:
        arch = read_architecture(config.model.hf_path)
    except InputError as error:
        problems.insert(0, f"model.hf_path: {error}")
    except OSError as error:
        problems.insert(0, f"model.hf_path: {environment_problem(error, config.model.hf_path)}")
    if arch is not None:
        problems += _found(model_problems(config, arch))
        problems += _new_keys(problems, _found(model.layout_problems(config, arch)))
        problems += _found(model.weight_problems(config, arch))
    problems += _found(
        model.tokenizer_problems(config, arch),
        prompts.problems(config),
        machine.problems(config, arch),
        ray_address.problems(),
        resume.problems(config),
    )
    if problems or arch is None:
        raise InputError("\n".join(dict.fromkeys(problems)))
    return arch


def refuse_another_run(config: RunConfig) -> None:
    """All that a run which only lacks its report or its trackers' rows is asked: that it is the one in its directory.

    Raises:
        InputError: every problem found, one a line.
    """
    problems = [*_found(setting_problems(config), resume.problems(config))]
    if problems:
        raise InputError("\n".join(dict.fromkeys(problems)))


def _found(*checks: Iterable[str]) -> Iterator[str]:
    """The problems of checks; what the file system says against one of them is a problem, too, and ends that one."""
    for check in checks:
        try:
            yield from check
        except OSError as error:
            yield environment_problem(error)


def _new_keys(known: list[str], found: Iterable[str]) -> Iterator[str]:
    """Those of keys that nothing was found about yet: layouts repeat some of the checks of `config.validate`."""
    keys = {problem.split(":")[0] for problem in known}
    return (problem for problem in found if problem.split(":")[0] not in keys)
