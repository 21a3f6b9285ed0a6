"""The embedded task: two-step sums in stories, each with a rephrasing and a written-out answer.

    Tom has 23 apples. Tom finds 8, then loses 4. How many now?
    A bus starts with 23 riders; first 8 get on, later 4 leave. How full is it?
    23+8=31, 31-4=27. \\boxed{27}

Invariants:
1. A question's two texts pose the same sum in other scenarios and share no sentence.
2. The first operand has two digits, the others have one; no result along the way is negative.
3. No (operands, operations) of one split is in another, so no question text is either.
4. Everything is a function of the seed and the sizes.
"""

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Literal

from megatron_coreward.data.parquet import Message, Row, write_rows
from megatron_coreward.errors import InputError
from megatron_coreward.types import VIEWS, View

Operation = Literal["+", "-"]
OPERATIONS: tuple[Operation, Operation] = ("+", "-")

SOURCE = "demo/two-step-sums"
MAX_QUESTIONS = 16_000  # over all splits; of each pair of operations there are at least 5,640


@dataclass(frozen=True, slots=True)
class Sum:
    """`a o b p c` for two operations o, p, evaluated from left to right."""

    operands: tuple[int, int, int]
    operations: tuple[Operation, Operation]

    @property
    def subtotal(self) -> int:
        return _apply(self.operations[0], self.operands[0], self.operands[1])

    @property
    def result(self) -> int:
        return _apply(self.operations[1], self.subtotal, self.operands[2])

    @property
    def response(self) -> str:
        """The answer as a model is taught to write it."""
        (a, b, c), (first, second) = self.operands, self.operations
        return f"{a}{first}{b}={self.subtotal}, {self.subtotal}{second}{c}={self.result}. \\boxed{{{self.result}}}"


def _apply(operation: Operation, left: int, right: int) -> int:
    return left + right if operation == "+" else left - right


@dataclass(frozen=True, slots=True)
class Scenario:
    """A story with places for a subject, a thing, three numbers, and a phrase for each of its two steps."""

    story: str  # {who}, {what}, {a}, {first}, {second}
    who: tuple[str, ...]
    what: tuple[str, ...]
    phrases: Mapping[Operation, tuple[str, ...]]  # each with {n}

    def word(self, who: str, what: str, phrases: tuple[str, str], numbers: tuple[object, object, object]) -> str:
        a, b, c = numbers
        first, second = phrases[0].format(n=b), phrases[1].format(n=c)
        return self.story.format(who=who, what=what, a=a, first=first, second=second)


SCENARIOS: Mapping[View, tuple[Scenario, ...]] = {
    "original": (
        Scenario(
            "{who} has {a} {what}. {who} {first}, then {second}. How many now?",
            ("Tom", "Anna", "Ben", "Mia", "Leo", "Eva"),
            ("apples", "coins", "books", "cards", "shells", "pens"),
            {"+": ("finds {n}", "buys {n}", "wins {n}"), "-": ("loses {n}", "sells {n}", "gives away {n}")},
        ),
        Scenario(
            "There are {a} {what} in a {who}. We {first} and {second}. How many {what}?",
            ("box", "jar", "basket", "drawer"),
            ("buttons", "marbles", "beads", "nuts"),
            {"+": ("put in {n}", "add {n}"), "-": ("take out {n}", "remove {n}")},
        ),
        Scenario(
            "A {who} keeps {a} {what}. {first}, and soon {second}. How many stay?",
            ("farmer", "shepherd", "family"),
            ("sheep", "goats", "hens", "ducks"),
            {"+": ("{n} are born", "{n} are bought"), "-": ("{n} are given up", "{n} run off")},
        ),
    ),
    "rephrased": (
        Scenario(
            "A {who} starts with {a} {what}; first {first}, later {second}. How full is it?",
            ("bus", "train", "tram", "ferry"),
            ("riders", "people", "guests"),
            {"+": ("{n} get on", "{n} board"), "-": ("{n} get off", "{n} leave")},
        ),
        Scenario(
            "The {who} holds {a} liters of {what}. Today {first}; {second}. What is left?",
            ("tank", "barrel", "pool"),
            ("water", "milk", "oil"),
            {"+": ("{n} flow in", "{n} pour in"), "-": ("{n} leak out", "{n} drain off")},
        ),
        Scenario(
            "On {who} the account shows {a} {what}. {first}. {second}. Which balance results?",
            ("Monday", "Tuesday", "Friday", "Sunday"),
            ("dollars", "euros", "francs"),
            {"+": ("Income of {n}", "Deposit of {n}"), "-": ("Bill of {n}", "Rent of {n}")},
        ),
    ),
}


@dataclass(frozen=True, slots=True)
class Question:
    """A sum and how each view words it."""

    sum: Sum
    texts: Mapping[View, str]


@dataclass(frozen=True, slots=True)
class Splits:
    train: tuple[Question, ...]
    heldout: tuple[Question, ...]
    sft: tuple[tuple[str, str], ...]  # (question text, response text), the views alternating


@dataclass(frozen=True, slots=True)
class Files:
    """Where `write_parquet` writes; the rephrased files pair with those before them."""

    train: Path
    train_rephrased: Path
    heldout: Path
    heldout_rephrased: Path

    @classmethod
    def below(cls, directory: Path) -> "Files":
        """Those of a directory."""
        return cls(
            train=directory / "train.parquet",
            train_rephrased=directory / "train_rephrased.parquet",
            heldout=directory / "heldout.parquet",
            heldout_rephrased=directory / "heldout_rephrased.parquet",
        )


def make_splits(seed: int, num_train: int, num_heldout: int, num_sft: int) -> Splits:
    """Draws the splits. The held-out questions depend on the seed and their own number alone.

    Raises InputError for a negative size and for more questions than `MAX_QUESTIONS` in all.
    """
    sizes = {"num_train": num_train, "num_heldout": num_heldout, "num_sft": num_sft}
    for name, size in sizes.items():
        if size < 0:
            raise InputError(f"{name}: found {size}; allowed: 0 or more")
    if sum(sizes.values()) > MAX_QUESTIONS:
        raise InputError(f"{' + '.join(sizes)}: found {sum(sizes.values())}; allowed: at most {MAX_QUESTIONS}")

    generator = random.Random(seed)
    questions = _draw_questions(generator)
    heldout = tuple(next(questions) for _ in range(num_heldout))
    train = tuple(next(questions) for _ in range(num_train))
    taught = [next(questions) for _ in range(num_sft)]
    sft = tuple((question.texts[VIEWS[i % len(VIEWS)]], question.sum.response) for i, question in enumerate(taught))
    return Splits(train, heldout, sft)


def write_parquet(directory: Path, splits: Splits) -> Files:
    """Writes the training and held-out questions and their rephrasings in the published format."""
    files = Files.below(directory)
    write_rows(files.train, _rows(splits.train, "original"), split="train")
    write_rows(files.train_rephrased, _rows(splits.train, "rephrased"), split="train")
    write_rows(files.heldout, _rows(splits.heldout, "original"), split="heldout")
    write_rows(files.heldout_rephrased, _rows(splits.heldout, "rephrased"), split="heldout")
    return files


def template_texts() -> Iterator[str]:
    """Every wording of every scenario, with 0 for each number; the tokenizer's words come from these."""
    for view in VIEWS:
        for scenario in SCENARIOS[view]:
            phrases = [phrase for operation in OPERATIONS for phrase in scenario.phrases[operation]]
            for who, what, first, second in product(scenario.who, scenario.what, phrases, phrases):
                yield scenario.word(who, what, (first, second), (0, 0, 0))


def _draw_questions(generator: random.Random) -> Iterator[Question]:
    """Questions without end, no sum twice; the four pairs of operations are equally frequent."""
    seen: set[Sum] = set()
    while True:
        operations = (generator.choice(OPERATIONS), generator.choice(OPERATIONS))
        while True:
            operands = generator.randint(10, 99), generator.randint(2, 9), generator.randint(2, 9)
            drawn = Sum(operands, operations)
            if drawn.subtotal >= 0 and drawn.result >= 0 and drawn not in seen:
                break
        seen.add(drawn)
        yield Question(drawn, {view: _word(generator, view, drawn) for view in VIEWS})


def _word(generator: random.Random, view: View, posed: Sum) -> str:
    scenario = generator.choice(SCENARIOS[view])
    who, what = generator.choice(scenario.who), generator.choice(scenario.what)
    first, second = (generator.choice(scenario.phrases[operation]) for operation in posed.operations)
    return scenario.word(who, what, (first, second), posed.operands)


def _rows(questions: tuple[Question, ...], view: View) -> Iterator[Row]:
    for index, question in enumerate(questions):
        messages = (Message(role="user", content=question.texts[view]),)
        yield Row(messages, str(question.sum.result), SOURCE, index)
