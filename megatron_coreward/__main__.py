"""`python -m megatron_coreward` is the command line."""

from megatron_coreward.cli import console

console()
