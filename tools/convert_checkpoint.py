"""Converts checkpoints between Hugging Face and Megatron: `megatron-coreward convert`, without an installation.

python tools/convert_checkpoint.py to-megatron SRC DST [--dtype bfloat16] [--workers 8]
python tools/convert_checkpoint.py to-hf SRC DST [--shard-gb 5] [--weights policy|teacher]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from megatron_coreward.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
