"""Compares two checkpoints of either kind, or one with its manifest: `megatron-coreward convert verify`.

python tools/verify_checkpoint.py A [B] [--logits]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from megatron_coreward.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", "verify", *sys.argv[1:]]))
