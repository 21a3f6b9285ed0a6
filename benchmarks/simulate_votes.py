"""How much of a teacher's sampling votes that end early spare: a simulation with the code that decides in a run.

    python benchmarks/simulate_votes.py [--groups 400] [--json]

All samples of a group begin at once and end in the order of their lengths, which are those of the model of
long_tailed.py: a mixture of two geometric distributions, one in 17 with 20 times the mean. An answer is the right one
with the probability that is given, else one of three others; length and answer are independent. Spared tokens are what
the aborted samples would still have drawn, over what the full groups draw.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.long_tailed import BOX, LONG_SHARE, TAIL
from megatron_coreward.rewards.early_vote import EarlyVote
from megatron_coreward.rewards.equivalence import Relation

MEAN_TOKENS = 12
SHARES, SIZES = (0.6, 0.7, 0.8, 0.9), (8, 16, 32)
RELATIONS: tuple[Relation, ...] = ("exact", "hendrycks", "math")
ANSWERS = (r"\frac{1}{2}", r"\frac{1}{3}", "x+1", "2")


def spared(rng: np.random.Generator, relation: Relation, size: int, share: float, groups: int) -> dict[str, float]:
    """Shares of samples that are aborted, and of tokens that are spared by it."""
    chances = [share, *([(1.0 - share) / 3] * 3)]
    aborted = left = tokens = 0
    for _ in range(groups):
        answers = rng.choice(ANSWERS, size, p=chances)
        means = np.where(rng.random(size) < LONG_SHARE, MEAN_TOKENS * TAIL, MEAN_TOKENS)
        lengths = rng.geometric(1.0 / means) + len(BOX) + 3
        order = np.argsort(lengths, kind="stable")
        vote = EarlyVote(size, relation)
        ended = 0
        while not vote.decided:
            vote.add(int(order[ended]), str(answers[order[ended]]))
            ended += 1
        rest = lengths[order[ended:]]
        aborted += len(rest)
        left += int((rest - lengths[order[ended - 1]]).sum())
        tokens += int(lengths.sum())
    return {"samples": aborted / (groups * size), "tokens": left / tokens}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, default=400)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    results: dict[str, dict[str, float]] = {}
    print(f"{'':<12}{'samples':>8}{'share':>8}{'aborted':>10}{'tokens spared':>16}")
    for relation in RELATIONS:
        for size in SIZES:
            for share in SHARES:
                found = spared(rng, relation, size, share, options.groups)
                results[f"{relation}/{size}/{share}"] = found
                print(f"{relation:<12}{size:>8}{share:>8.0%}{found['samples']:>10.1%}{found['tokens']:>16.1%}")
    if options.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
