"""A tiny Qwen3 whose responses end after lengths with a long tail, and with answers that mostly agree.

Its next token depends on the last one alone: embedding and output layer hold the logarithms of a table of transition
probabilities, and what the layers between add is small. So lengths come about as those of any model do, by sampling an
end-of-sequence token; a response is cut off only at `rollout.max_response_tokens`. The layers compute as much as those
of any model of the size.

A response is a run of `a` or, in `LONG_SHARE` of the cases, of `l`, which goes on `TAIL` times as long in the mean: a
mixture of two geometric distributions. Then it says `\\boxed{d}` with a digit d, `7` in `AGREEING` of the cases.
"""

from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from megatron_coreward.demo.model import write_model
from megatron_coreward.demo.tokenizer import END, byte_level_tokenizer

LONG_SHARE = 0.06  # of responses, whose mean length is TAIL times that of the others
TAIL = 20
AGREEING = 0.8  # share of responses with the answer 7
BOX = r"\boxed{"
_NEVER = 1e-6  # probability of what the table does not name


def transitions(mean_tokens: float) -> dict[str, dict[str, float]]:
    """Probabilities of the next character, by the last one; "" is whatever a prompt ends with, END ends a response."""
    short, long = 1.0 / mean_tokens, 1.0 / (mean_tokens * TAIL)
    table = {
        "": {"a": 1.0 - LONG_SHARE, "l": LONG_SHARE},
        "a": {"a": 1.0 - short, BOX[0]: short},
        "l": {"l": 1.0 - long, BOX[0]: long},
        BOX[-1]: {"7": AGREEING} | dict.fromkeys("0123", (1.0 - AGREEING) / 4),
        "}": {END: 1.0},
    }
    table |= {before: {after: 1.0} for before, after in pairwise(BOX)}
    return table | {digit: {"}": 1.0} for digit in "01237"}


def write_long_tailed_model(directory: Path, mean_tokens: float, noise: float = 0.02) -> Path:
    """Writes the model: 4 layers of 128. `mean_tokens`: of a run of `a`; `noise`: scale of what the layers add."""
    tokenizer = byte_level_tokenizer()
    write_model(directory, tokenizer)
    table = transitions(mean_tokens)
    ids = {
        text: tokenizer.convert_tokens_to_ids(text) for text in {*table, *(t for row in table.values() for t in row)}
    }
    states = {text: place for place, text in enumerate(table)}  # a state has a unit of the residual stream for itself
    (file,) = directory.glob("*.safetensors")
    weights = load_file(file)
    embedding, output = weights["model.embed_tokens.weight"], weights["lm_head.weight"]
    hidden = embedding.shape[1]
    embedding.zero_()
    embedding[:, states[""]] = 1.0
    for text, place in states.items():
        if text:
            embedding[ids[text]] = 0.0
            embedding[ids[text], place] = 1.0
    scale = hidden**0.5  # of a unit vector after the last norm
    output.zero_()
    for before, row in table.items():
        output[:, states[before]] = torch.log(torch.tensor(_NEVER)) / scale
        for after, probability in row.items():
            output[ids[after], states[before]] = torch.log(torch.tensor(probability)) / scale
    for name, weight in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight.mul_(noise)
    save_file(weights, file, metadata={"format": "pt"})
    return directory
