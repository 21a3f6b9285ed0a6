r"""How well and how fast answers are compared: spellings, differences, groups, and hostile strings.

    python benchmarks/bench_answers.py [--answers FILE] [--pairs 20000] [--hostile 100000]
    python benchmarks/bench_answers.py --only lookalikes [--answers FILE | --generated dapo | --generated amc]

FILE is a parquet file in the published format; without it, what needs answers is left out. Prints one JSON object:

spellings  share of (answer, respelling) pairs, weighted by the answer, that are equivalent; the failures by respelling
different  share of random pairs of answers with different values that are told apart; the pairs that are not
lookalikes of answers that differ in their digits alone: pairs, and how many are equated (each is listed); alone, with
           spellings
grouping   seconds for the classes of 128 questions x 16 answers, with and without what was learned before
step       the same for 256 x 64, by one process and by two
hostile    of N pairs: rate, slowest, comparisons that ran over the limit, memory of this process and of the workers
"""

import argparse
import json
import random
import re
import resource
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import islice, pairwise
from os import chdir, getcwd, getpid
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.answer_cases import MARKER, hostile, variants
from megatron_coreward.data.parquet import read_rows
from megatron_coreward.rewards import latex, reading
from megatron_coreward.rewards.answer import extract_answer
from megatron_coreward.rewards.arithmetic import plain_value
from megatron_coreward.rewards.equivalence import AnswerEquivalence, _without_process
from megatron_coreward.rewards.kinds import Scalar

QUESTIONS, SAMPLES = 128, 16
HOSTILE_TIMEOUT_S = 0.5
START_SLACK_S = 60.0  # a new process on a crowded machine; the comparison's own promise is its limit plus this


def spellings(answers: Sequence[str]) -> dict[str, Any]:
    """Every answer against each of its respellings."""
    tried, missed = Counter[str](), Counter[str]()
    failures: dict[str, list[tuple[str, str]]] = defaultdict(list)
    with AnswerEquivalence("math", timeout_s=10.0) as equivalence:
        for answer, count in Counter(answers).items():
            for name, respelt in variants(answer):
                tried[name] += count
                if not equivalence.equivalent(respelt, answer):
                    missed[name] += count
                    failures[name].append((answer, respelt))
        share = 1 - missed.total() / tried.total()
        return {
            "answers": len(answers),
            "respellings": len(tried),
            "pairs": tried.total(),
            "equivalent": share,
            "worst": min((1 - missed[name] / tried[name], name) for name in tried),
            "needed_algebra": equivalence.comparisons,
            "failures": failures,
        }


def different(answers: Sequence[str], pairs: int, seed: int = 0) -> dict[str, Any]:
    """Random pairs of answers; a pair counts where a person would call it different, by the spelling alone: the
    strings without white space, `\\left`, `\\right`, `\\text` and the `d` of `\\dfrac` are not the same."""
    rng = random.Random(seed)
    by_look = {_look(answer): answer for answer in answers}
    distinct = sorted(by_look.values())
    equated = []
    begin = time.perf_counter()
    with AnswerEquivalence("math", timeout_s=10.0) as equivalence:
        for _ in range(pairs):
            a, b = rng.sample(distinct, 2)
            if equivalence.equivalent(a, b):
                equated.append((a, b))
        return {
            "pairs": pairs,
            "distinct_answers": len(distinct),
            "told_apart": 1 - len(equated) / pairs,
            "equated": equated,
            "needed_algebra": equivalence.comparisons,
            "over_the_limit": equivalence.timeouts,
            "seconds": time.perf_counter() - begin,
        }


def lookalikes(answers: Sequence[str], limit: int, seed: int = 0) -> dict[str, Any]:
    """Answers of the set that another one equals but for its digits and white space: `\\frac{3}{4}`, `\\frac{4}{3}`.

    Every answer is paired with the next of its shape. Of the equated, those that differ in white space and leading
    or trailing zeros alone are the same, and the rest is listed for a person to judge.
    """
    shapes: dict[str, list[str]] = defaultdict(list)
    for answer in sorted(set(answers)):
        shapes[re.sub(r"\d+|\s+", lambda match: "0" if match[0].isdigit() else "", answer)].append(answer)
    rng = random.Random(seed)
    pairs = []
    for alike in shapes.values():
        rng.shuffle(alike)
        pairs += list(pairwise(alike))
    pairs = rng.sample(pairs, min(limit, len(pairs)))
    with AnswerEquivalence("math", timeout_s=10.0) as equivalence:
        equivalence.compare(pairs)
        equated = [pair for pair in pairs if equivalence.equivalent(*pair)]
        differing = [(a, b) for a, b in equated if _look(a) != _look(b)]
        return {
            "answers": len(set(answers)),
            "pairs": len(pairs),
            "equated": len(equated),
            "equated_and_written_differently": differing,
            "needed_a_process": equivalence.comparisons,
            "over_the_limit": equivalence.timeouts,
        }


def generated(kind: str, count: int = 5000, seed: int = 0) -> list[str]:
    """Answers like those of a benchmark, drawn at random, for data sets that are not at hand.

    `dapo`: integers, most of them small, some with many digits or a sign, as DAPO-Math-17k has. `amc`: integers,
    fractions, roots, multiples of pi, percentages, money, points and letters of choices, as AMC has.
    """
    rng = random.Random(seed)

    def integer() -> str:
        value = int(10 ** rng.uniform(0, rng.choice((2, 3, 3, 6, 12))))
        return str(-value if rng.random() < 0.05 else value)

    def of_amc() -> str:
        a, b, c = (rng.randint(1, 60) for _ in range(3))
        return rng.choice(
            (integer(), rf"\frac{{{a}}}{{{b}}}", rf"{a}\sqrt{{{b}}}", rf"\frac{{{a}\sqrt{{{b}}}}}{{{c}}}", rf"{a}\pi",
             rf"{a}+{b}\sqrt{{{c}}}", rf"({a}, {b})", rf"{a}\%", rf"\${a}.{b:02}", f"{a}:{b:02}",
             rf"\textbf{{({rng.choice('ABCDE')})}}\ {a}", rng.choice("ABCDE"), rf"{a}^{{{b}}}",
             rf"{a}\frac{{1}}{{{b}}}")
        )  # fmt: skip

    return [integer() if kind == "dapo" else of_amc() for _ in range(count)]


def _look(answer: str) -> str:
    for piece in (" ", "\n", r"\left", r"\right", r"\text", r"\,", r"\;", r"\!", "$", "{", "}"):
        answer = answer.replace(piece, "")
    return answer.replace(r"\dfrac", r"\frac").replace("dollars", "").rstrip(".")


def _is_number(answer: str) -> bool:
    value = reading.read(answer)
    return isinstance(value, Scalar) and plain_value(value.node) is not None


def grouping(answers: Sequence[str], *, algebra_only: bool = False, right_share: float = 0.6) -> dict[str, Any]:
    """A step's worth of groups as rollouts make them: right answers in several spellings, and some wrong ones.

    With `right_share` 0 every answer of a group is another question's.
    """
    rng = random.Random(1)
    pool = sorted({answer for answer in answers if not algebra_only or not _is_number(answer)})
    groups = []
    for right in rng.sample(pool, QUESTIONS):
        spelt = [right, *(respelt for _, respelt in variants(right))]
        wrong = rng.sample(pool, 4 if right_share else SAMPLES)
        draw = [rng.choice(spelt) if rng.random() < right_share else wrong[i % len(wrong)] for i in range(SAMPLES)]
        groups.append([None if rng.random() < 0.05 else answer for answer in draw])
    return _timed(groups, 1)


def step(answers: Sequence[str], *, algebra_only: bool = False) -> dict[str, Any]:
    """The groups of a large step, 256 questions x 64 answers with 4 to 12 distinct ones, by one process and by two."""
    rng = random.Random(1)
    pool = sorted({answer for answer in answers if not algebra_only or not _is_number(answer)})
    groups = []
    for right in rng.sample(pool, 256):
        number = rng.randint(4, 12)
        spelt = [right, *(respelt for _, respelt in variants(right))][:3]
        distinct = (spelt + rng.sample(pool, number))[:number]
        groups.append([rng.choice(distinct) for _ in range(64)])
    one, two = _timed(groups, 1), _timed(groups, 2)
    return {"one_process": one, "two_processes": two, "speedup": one["cold_s"] / two["cold_s"]}


def _timed(groups: Sequence[Sequence[str | None]], workers: int) -> dict[str, Any]:
    """Seconds for the classes of all groups, from nothing (processes not started) and once more."""
    for memory in (latex._clean, reading.read, reading._read, _without_process):
        memory.cache_clear()
    with AnswerEquivalence("math", timeout_s=5.0, num_workers=workers) as equivalence:
        seconds = []
        for _ in range(2):
            begin = time.perf_counter()
            equivalence.compare(groups)
            classes = [equivalence.classes(group) for group in groups]
            seconds.append(time.perf_counter() - begin)
        return {
            "groups": len(groups),
            "cold_s": seconds[0],
            "warm_s": seconds[1],
            "comparisons": equivalence.comparisons,
            "over_the_limit": equivalence.timeouts,
            "classes_mean": sum(len(set(group) - {None}) for group in classes) / len(classes),
        }


def hostile_run(count: int, workers: int = 2, seed: int = 0, timeout_s: float = HOSTILE_TIMEOUT_S) -> dict[str, Any]:
    """Extraction and comparison of `count` hostile pairs, by as many threads as there are worker processes.

    Raises AssertionError where a comparison takes longer than it may, where an answer was executed, and where honest
    pairs are no longer answered.
    """
    here = getcwd()
    slowest = (0.0, "")
    memory: list[dict[str, float]] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        AnswerEquivalence("math", timeout_s=timeout_s, num_workers=workers) as equivalence,
    ):
        chdir(folder)  # what an answer that is executed would leave behind lies here
        try:
            assert equivalence.equivalent("x+x", "2x")  # the processes start

            def one(pair: tuple[str, str]) -> tuple[float, str]:
                begin = time.perf_counter()
                extract_answer(rf"so \boxed{{{pair[0]}}} and {pair[1]}")
                graded, reverse = equivalence.equivalent(*pair), equivalence.equivalent(*pair[::-1])
                assert graded == reverse, pair
                return time.perf_counter() - begin, pair[0]

            begin, done = time.perf_counter(), 0
            memory.append(_memory_mib())
            with ThreadPoolExecutor(workers) as threads:
                cases = hostile(seed, count)
                while part := list(islice(cases, max(1, min(count // 8, 1000)))):
                    slowest = max(slowest, *threads.map(one, part))
                    memory.append(_memory_mib())
                    done += len(part)
                    where = f"{done} of {count} pairs after {time.perf_counter() - begin:.0f} s"
                    figures = f"slowest {slowest[0]:.1f} s, {equivalence.timeouts} over the limit"
                    memories = ", ".join(f"{who} {mib:.0f} MiB" for who, mib in memory[-1].items())
                    print(f"{where}: {figures}, {memories}", file=sys.stderr, flush=True)
            seconds = time.perf_counter() - begin
            assert equivalence.equivalent("y+y", "2y"), "honest pairs are no longer answered"
            assert not list(Path(folder).rglob(f"*{MARKER}*")), "an answer was executed"
        finally:
            chdir(here)
        assert slowest[0] < 2 * (timeout_s + START_SLACK_S), f"{slowest[0]:.1f} s for {slowest[1][:200]!r}"
        return {
            "pairs": count,
            "seconds": seconds,
            "pairs_per_s": count / seconds,
            "slowest_s": slowest[0],
            "slowest": slowest[1][:80],
            "comparisons": equivalence.comparisons,
            "over_the_limit": equivalence.timeouts,
            "limit_s": timeout_s,
            "memory_mib": memory,
        }


def _memory_mib() -> dict[str, float]:
    """Resident memory of this process and, together, of its worker processes with the copies that they compare in."""
    page = resource.getpagesize()

    def resident(pid: int) -> float:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * page / 2**20

    def children(pid: int) -> list[int]:
        tasks = Path(f"/proc/{pid}/task").glob("*/children")
        return [int(child) for task in tasks for child in task.read_text().split()]

    loaded = children(getpid())
    workers = []
    for process in loaded:
        with suppress(FileNotFoundError, ProcessLookupError):  # it ended meanwhile
            workers += [resident(pid) for pid in (process, *children(process))]
    return {"driver": round(resident(getpid())), "workers": round(sum(workers)), "num_workers": len(loaded)}


def _ground_truths(file: Path) -> list[str]:
    return [row.ground_truth for row in read_rows(file) if row.ground_truth is not None]


def main(arguments: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=Path, help="parquet file in the published format")
    parser.add_argument("--pairs", type=int, default=20_000)
    parser.add_argument("--hostile", type=int, default=2_000)
    parser.add_argument("--timeout", type=float, default=HOSTILE_TIMEOUT_S, help="seconds for a hostile comparison")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=("spellings", "different", "lookalikes", "grouping", "hostile"))
    parser.add_argument("--generated", choices=("dapo", "amc"), help="answers drawn at random instead of a file's")
    options = parser.parse_args(None if arguments is None else list(arguments))
    if options.generated:
        answers = generated(options.generated, seed=options.seed)
    else:
        answers = _ground_truths(options.answers) if options.answers and options.only != "hostile" else []
    wanted = (options.only,) if options.only else ("spellings", "different", "lookalikes", "grouping", "hostile")
    result: dict[str, Any] = {}
    if answers:
        if "spellings" in wanted:
            result["spellings"] = spellings(answers)
        if "different" in wanted:
            result["different"] = different(answers, options.pairs, options.seed)
        if "lookalikes" in wanted:
            result["lookalikes"] = lookalikes(answers, options.pairs, options.seed)
            if options.only:
                result["spellings"] = spellings(answers)
        if "grouping" in wanted:
            result["grouping"] = grouping(answers)
            result["grouping_algebra_only"] = grouping(answers, algebra_only=True)
            result["grouping_all_different"] = grouping(answers, right_share=0)
            result["step"] = step(answers)
            result["step_algebra_only"] = step(answers, algebra_only=True)
    elif options.only != "hostile":
        result["left_out"] = "everything but hostile needs --answers or --generated"
    if "hostile" in wanted:
        result["hostile"] = hostile_run(options.hostile, options.workers, options.seed, options.timeout)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
