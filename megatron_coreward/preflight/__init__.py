"""Everything that can be known to be wrong with a run before it costs anything: no process, no GPU, no model in memory.

Neither torch nor Ray nor an engine is imported, so that an answer takes a second and not ten. Every check runs,
whatever the others found, as far as it can; the message has all problems, one a line.

| module | asks |
|---|---|
| `config.validate` | does the config contradict itself or the model's shape, are the files there? |
| `packages` | are the pinned packages installed? |
| `model` | are weights and tokenizer whole, do they belong together, can the engine run them? |
| `prompts` | do the questions pair, render and fit? |
| `machine` | are there devices, memory and disk for it? |
| `resume` | is this the run that the run directory holds? |
"""

from collections.abc import Iterable, Iterator

from megatron_coreward.config.architecture import Architecture, read_architecture
from megatron_coreward.config.schema import RunConfig
from megatron_coreward.config.validate import file_problems, model_problems, setting_problems
from megatron_coreward.errors import InputError
from megatron_coreward.preflight import machine, model, packages, prompts, resume


def preflight(config: RunConfig) -> Architecture:
    """Checks a resolved config against the model, the data, the run directory and this machine.

    Raises:
        InputError: every problem found, one a line.
    """
    problems = [*setting_problems(config), *file_problems(config), *packages.problems(config)]
    arch: Architecture | None = None
    try:
        arch = read_architecture(config.model.hf_path)
    except InputError as error:
        problems.insert(0, f"model.hf_path: {error}")
    if arch is not None:
        problems += model_problems(config, arch)
        problems += _new_keys(problems, model.layout_problems(config, arch))
        problems += model.weight_problems(config, arch)
    problems += model.tokenizer_problems(config, arch)
    problems += prompts.problems(config)
    problems += machine.problems(config, arch)
    problems += resume.problems(config)
    if problems or arch is None:
        raise InputError("\n".join(dict.fromkeys(problems)))
    return arch


def _new_keys(known: list[str], found: Iterable[str]) -> Iterator[str]:
    """Those of keys that nothing was found about yet: layouts repeat some of the checks of `config.validate`."""
    keys = {problem.split(":")[0] for problem in known}
    return (problem for problem in found if problem.split(":")[0] not in keys)
