"""`python -m megatron_coreward` is the command line."""

import sys

from megatron_coreward.cli import main

sys.exit(main())
