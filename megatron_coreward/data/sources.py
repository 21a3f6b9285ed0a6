"""Published question sets that `prepare-data` knows, a row each: where they are, and which columns hold
question and answer."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from megatron_coreward.errors import InputError

AnswerFrom = Literal["as-is", "boxed", "hashes"]  # the column is the answer; its last \boxed{}; what follows its ####


@dataclass(frozen=True, slots=True)
class DataSource:
    """Where questions come from and how a row of theirs is read."""

    name: str
    hub: str | None  # dataset repository on the Hugging Face hub; None: local files only
    config: str | None  # subset; None: the only one
    splits: tuple[str, ...]
    question: str  # column
    answer: str  # column
    answer_from: AnswerFrom
    data_source: str  # as the published parquet files name it
    folder: str | None = None  # below data/, where the recipes look for it; None: no recipe does
    ability: str = "math"

    def default_path(self, split: str) -> Path | None:
        """Where the recipes look for a prepared split; None: nowhere."""
        name = "train_original" if split == "train" else split
        return Path("data") / self.folder / f"{name}.parquet" if self.folder else None


# What the published Co-rewarding sets call themselves, whichever questions they hold: what is prepared here pairs with
# their rephrasings.
PUBLISHED_SOURCE = "DigitalLearningGmbH/MATH-lighteval"


SOURCES: Mapping[str, DataSource] = {
    source.name: source
    for source in (
        DataSource(
            name="math",
            hub="DigitalLearningGmbH/MATH-lighteval",
            config="default",
            splits=("train", "test"),
            question="problem",
            answer="solution",
            answer_from="boxed",
            data_source=PUBLISHED_SOURCE,
            folder="math",
        ),
        DataSource(
            name="dapo-math",  # the English part
            hub="open-r1/DAPO-Math-17k-Processed",
            config="en",
            splits=("train",),
            question="prompt",
            answer="solution",
            answer_from="as-is",
            data_source=PUBLISHED_SOURCE,
            folder="dapo",
        ),
        DataSource(
            name="open-rs",
            hub="knoveleng/open-rs",
            config=None,
            splits=("train",),
            question="problem",
            answer="answer",
            answer_from="as-is",
            data_source=PUBLISHED_SOURCE,
            folder="open-rs",
        ),
        DataSource(
            name="gsm8k",
            hub="openai/gsm8k",
            config="main",
            splits=("train", "test"),
            question="question",
            answer="answer",
            answer_from="hashes",
            data_source="openai/gsm8k",
            folder="gsm8k",
        ),
        DataSource(
            name="math500",
            hub="HuggingFaceH4/MATH-500",
            config=None,
            splits=("test",),
            question="problem",
            answer="answer",
            answer_from="as-is",
            data_source="HuggingFaceH4/MATH-500",
            folder="math500",
        ),
        DataSource(
            name="amc",
            hub="AI-MO/aimo-validation-amc",
            config=None,
            splits=("train",),
            question="problem",
            answer="answer",
            answer_from="as-is",
            data_source="AI-MO/aimo-validation-amc",
            folder="amc",
        ),
    )
}

GENERIC = "custom"


def find_source(
    name: str,
    *,
    question: str | None = None,
    answer: str | None = None,
    answer_from: AnswerFrom | None = None,
    data_source: str | None = None,
) -> DataSource:
    """The source of a name, with other columns and another `data_source` if they are given; `custom` needs columns.

    Raises:
        InputError: a name that is not known, or columns missing.
    """
    if name == GENERIC:
        if question is None or answer is None:
            raise InputError(f"source {GENERIC} needs --question-column and --answer-column")
        return DataSource(name, None, None, (), question, answer, answer_from or "as-is", data_source or GENERIC)
    if name not in SOURCES:
        raise InputError(f"source: found {name!r}; allowed: {', '.join([*SOURCES, GENERIC])}")
    known = SOURCES[name]
    return replace(
        known,
        question=question or known.question,
        answer=answer or known.answer,
        answer_from=answer_from or known.answer_from,
        data_source=data_source or known.data_source,
    )
