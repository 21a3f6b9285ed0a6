"""`python -m megatron_coreward.checkpoint.write_logits MODEL TOKENS.npy LOGITS.npy`: fp32 logits from transformers."""

import sys
from pathlib import Path

import numpy as np
import torch


def main(model: Path, tokens: Path, target: Path) -> None:
    """Writes [T, V] logits of the T tokens, on the CPU."""
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, local_files_only=True)
    with torch.no_grad():
        logits = network(torch.from_numpy(np.load(tokens)).long()[None]).logits[0]
    np.save(target, logits.numpy())


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
