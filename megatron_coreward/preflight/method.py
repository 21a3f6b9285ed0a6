"""The method of the run: can it be loaded and mixed, and do methods of one's own judge rollouts as they say?"""

from collections.abc import Iterator

from megatron_coreward.config import plugins
from megatron_coreward.config.methods import parts_of
from megatron_coreward.config.schema import RunConfig
from megatron_coreward.errors import InputError
from megatron_coreward.rewards.methods import METHODS, method_of
from megatron_coreward.rewards.trial import try_method


def problems(config: RunConfig) -> Iterator[str]:
    """What is wrong with the method."""
    try:
        method_of(config.method)
        for name, _ in parts_of(config.method):
            if name not in METHODS:
                try_method(name, plugins.load(name), config.teacher.early_stop)
    except InputError as error:
        yield str(error)
