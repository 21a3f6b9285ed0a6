"""Published parquet files to Problems: originals, optionally paired with their rephrasings, rendered and tokenised.

Pairs are made by source and `extra_info.index`, not by place, so files may differ in order; every original must have
exactly one rephrasing and every rephrasing an original, or is left out if that is asked for. The ground truth is the
original's.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Literal, overload

from megatron_coreward.data.parquet import Row, holds_pairs, read_rows
from megatron_coreward.data.prompts import Tokenizer, build_prompts, with_system_prompt
from megatron_coreward.data.rephrasing import numbers
from megatron_coreward.errors import InputError
from megatron_coreward.types import Problem, View

COMPARED_PAIRS = 512  # at most, over the whole set
FEWEST_PAIRS = 64  # with numbers; fewer say nothing
LEAST_SAME_NUMBERS = 0.1  # share of pairs


@dataclass(frozen=True, slots=True)
class ProblemSet(Sequence[Problem]):
    """The problems that a run reads, in file order, and what reading them showed."""

    problems: tuple[Problem, ...]
    num_dropped: int  # problems left out for a prompt over the limit, in either view
    num_without_ground_truth: int  # of `problems`
    longest_prompt: int  # tokens, among `problems`
    num_unpaired: int = 0  # questions and rephrasings left out for want of the other
    num_unanswered: int = 0  # problems left out for want of a ground truth

    def __len__(self) -> int:
        return len(self.problems)

    @overload
    def __getitem__(self, index: int) -> Problem: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Problem, ...]: ...
    def __getitem__(self, index: int | slice) -> Problem | tuple[Problem, ...]:
        return self.problems[index]

    def __iter__(self) -> Iterator[Problem]:
        return iter(self.problems)

    def with_ground_truth(self, missing: Literal["error", "drop", "keep"], complaint: str) -> "ProblemSet":
        """What is used where ground truths are read.

        Raises InputError for problems without one, beginning with `complaint`, unless they are to be dropped (and some
        are left) or kept.
        """
        if missing == "keep" or not self.num_without_ground_truth:
            return self
        answered = tuple(problem for problem in self.problems if problem.ground_truth is not None)
        if missing == "error" or not answered:
            ways = "data.missing_gold=keep" if not answered else "data.missing_gold of drop or keep"
            raise InputError(f"{complaint}; allowed: a ground truth each, or {ways}")
        longest = max(len(prompt.token_ids) for problem in answered for prompt in problem.prompts.values())
        return replace(
            self,
            problems=answered,
            num_without_ground_truth=0,
            longest_prompt=longest,
            num_unanswered=self.num_without_ground_truth,
        )

    def with_two_views(self) -> "ProblemSet":
        """Questions without a rephrasing get a copy of themselves, for runs that write rephrasings as they go."""
        problems = tuple(
            replace(problem, prompts={"rephrased": problem.prompts["original"], **problem.prompts})
            for problem in self.problems
        )
        return replace(self, problems=problems)

    def missing_in_training(self, method: str) -> str:
        """The complaint about training questions, for a method that reads ground truths."""
        return (
            f"data.train_files: method {method} needs reward_model.ground_truth, and "
            f"{self.num_without_ground_truth} of {len(self)} questions have none"
        )

    def missing_in_validation(self, file: Path) -> str:
        """The complaint about the validation questions of a file."""
        return f"data.val_files: {self.num_without_ground_truth} questions have no reward_model.ground_truth ({file})"

    def first(self, limit: int | None) -> "ProblemSet":
        """The first `limit` problems; None: all."""
        if limit is None or limit >= len(self):
            return self
        some = self.problems[:limit]
        return replace(
            self, problems=some, num_without_ground_truth=sum(problem.ground_truth is None for problem in some)
        )

    def by_source(self) -> dict[str, "ProblemSet"]:
        """The problems of each source, by its name, in order of first sight; what was left out counts for the first."""
        sources = dict.fromkeys(problem.source for problem in self.problems)
        if len(sources) == 1:
            return dict.fromkeys(sources, self)
        parts: dict[str, ProblemSet] = {}
        for source in sources:
            own = tuple(problem for problem in self.problems if problem.source == source)
            without = sum(problem.ground_truth is None for problem in own)
            part = ProblemSet(own, 0, without, self.longest_prompt)
            parts[source] = (
                part if parts else replace(part, num_dropped=self.num_dropped, num_unanswered=self.num_unanswered)
            )
        return parts


def data_sets(files: Sequence[tuple[Path, ProblemSet]]) -> dict[str, ProblemSet]:
    """The problems of each source of each file, named after the source.

    A source that several files have is followed by the name of the file, and by its whole path if two of them have that
    name too: no set takes the place of another.
    """
    parts = [(source, file, part) for file, found in files for source, part in found.by_source().items()]
    names = [source for source, _, _ in parts]
    for longer in (attrgetter("stem"), Path.as_posix):
        shared = {name for name, count in Counter(names).items() if count > 1}
        names = [
            f"{source}/{longer(file)}" if name in shared else name
            for name, (source, file, _) in zip(names, parts, strict=True)
        ]
    return {name: part for name, (_, _, part) in zip(names, parts, strict=True)}


@dataclass(frozen=True, slots=True)
class _Placed:
    """A row and where it came from, for messages."""

    row: Row
    file: Path
    number: int

    def __str__(self) -> str:
        return f"{self.file}, row {self.number}"


def load_problems(
    train_files: Sequence[Path],
    rephrased_files: Sequence[Path],
    tokenizer: Tokenizer,
    *,
    system_prompt: str | None,
    max_prompt_tokens: int,
    over_length: Literal["error", "drop"] = "error",
    unpaired: Literal["error", "drop"] = "error",
    thinking: bool | None = None,
    control_tokens: Literal["text", "special"] = "text",
) -> ProblemSet:
    """Reads, pairs, renders and tokenises; without rephrased files each problem has the original view only.

    `system_prompt` replaces the files' own, None keeps theirs, an empty string removes them. A problem that is over
    `max_prompt_tokens` in one view is dropped in both. `unpaired`: what becomes of questions without a rephrasing and
    rephrasings without a question. A file of pairs may be given as both. `thinking` and
    `control_tokens`: see `build_prompts`.

    Raises InputError for every fault of the files (see `parquet.read_rows`), a pair without partner, an index that
    two files share, and prompts over the limit unless they are to be dropped (or all would be).
    """
    views, num_unpaired = _read_views(train_files, rephrased_files, unpaired)
    originals = views["original"]
    placed = [rows[uid] for uid in originals for rows in views.values()]
    conversations = [with_system_prompt(place.row.messages, system_prompt) for place in placed]
    prompts = build_prompts(tokenizer, conversations, thinking, control_tokens)
    too_long = [
        (len(prompt.token_ids), place)
        for prompt, place in zip(prompts, placed, strict=True)
        if len(prompt.token_ids) > max_prompt_tokens
    ]
    dropped = {place.row.uid for _, place in too_long}
    if too_long and (over_length == "error" or len(dropped) == len(originals)):
        longest, place = max(too_long, key=lambda entry: entry[0])
        raise InputError(
            f"data.max_prompt_tokens: found {max_prompt_tokens}, but {len(dropped)} of {len(originals)} problems have "
            f"a longer prompt, the longest of {longest} tokens ({place}); allowed: a limit of at least {longest}, "
            "or data.over_length=drop with problems left to train on"
        )

    problems = []
    for number, (uid, place) in enumerate(originals.items()):
        if uid not in dropped:
            own = prompts[number * len(views) : (number + 1) * len(views)]
            problems.append(Problem(uid, dict(zip(views, own, strict=True)), place.row.ground_truth, place.row.source))
    return ProblemSet(
        problems=tuple(problems),
        num_dropped=len(dropped),
        num_without_ground_truth=sum(problem.ground_truth is None for problem in problems),
        longest_prompt=max(len(prompt.token_ids) for problem in problems for prompt in problem.prompts.values()),
        num_unpaired=num_unpaired,
    )


def _read_views(
    train_files: Sequence[Path], rephrased_files: Sequence[Path], unpaired: Literal["error", "drop"]
) -> tuple[dict[View, dict[str, _Placed]], int]:
    """The rows of each view by uid, all with a partner, and the number of those that had none."""
    for file in rephrased_files:
        if file in train_files and not holds_pairs(file):
            raise InputError(
                f"data.rephrased_files: {file} is in data.train_files too; allowed: the rephrasings of those "
                "questions, or a file that holds both"
            )
    originals = _read_view(train_files, "original")
    if not rephrased_files:
        return {"original": originals}, 0
    rephrasings = _read_view(rephrased_files, "rephrased")
    if unpaired == "error" or not originals.keys() & rephrasings.keys():
        _check_pairs(originals, rephrasings)
    for rows, others in ((originals, rephrasings), (rephrasings, originals)):
        _check_every_file_pairs(rows, others)
    paired = {uid: place for uid, place in originals.items() if uid in rephrasings}
    _check_numbers([(place, rephrasings[uid]) for uid, place in paired.items()])
    return {"original": paired, "rephrased": rephrasings}, len(originals.keys() ^ rephrasings.keys())


def _read_view(files: Sequence[Path], view: View) -> dict[str, _Placed]:
    """The rows of one view by uid, in file order."""
    placed: dict[str, _Placed] = {}
    for file in files:
        for number, row in enumerate(read_rows(file, view)):
            here = _Placed(row, file, number)
            first = placed.setdefault(row.uid, here)
            if first is not here:
                raise InputError(
                    f"{here}, column extra_info.index: found {row.index!r} of the source {row.source!r}, "
                    f"which {first} has too; allowed: one row an index within a source, over all files "
                    "(prepare-data --data-source NAME gives a set another name)"
                )
    if not placed:
        raise InputError("found no data files; allowed: at least one parquet file")
    return placed


def _check_pairs(originals: dict[str, _Placed], rephrased: dict[str, _Placed]) -> None:
    """Every original has its rephrasing and the other way round."""
    for rows, others, name in ((rephrased, originals, "original"), (originals, rephrased, "rephrasing")):
        lonely = [place for uid, place in rows.items() if uid not in others]
        if lonely:
            row = lonely[0].row
            raise InputError(
                f"{lonely[0]}, column extra_info.index: found {row.index!r} of the source {row.source!r}, for which "
                f"there is no {name} ({len(lonely)} such rows in all); allowed: the same source and index in "
                "data.train_files and data.rephrased_files, one row each, or data.unpaired=drop"
            )


def _check_every_file_pairs(rows: dict[str, _Placed], others: dict[str, _Placed]) -> None:
    """A file of which nothing has a partner is the wrong one, or its partner is missing."""
    paired = {place.file for uid, place in rows.items() if uid in others}
    for place in rows.values():
        if place.file not in paired:
            raise InputError(
                f"{place.file}: found no row with a partner, for example none for {place.row.index!r} of the source "
                f"{place.row.source!r}; allowed: files of data.train_files and data.rephrased_files that share sources "
                "and indices"
            )


def _check_numbers(pairs: Sequence[tuple[_Placed, _Placed]]) -> None:
    """Pairs have the same numbers often enough to be of the same questions.

    The published sets share one source name and all count from 0, so questions of one pair with rephrasings of another
    by their indices alone. Of the published pairs that have numbers, 71% have the same ones in both texts; of random
    pairs, less than 1%.
    """
    step = max(1, len(pairs) // COMPARED_PAIRS)
    texts = [tuple(place.row.messages[-1]["content"] for place in pair) for pair in pairs[::step]]
    found = [(numbers(question), numbers(rephrasing)) for question, rephrasing in texts]
    numbered = [(old, new) for old, new in found if old]
    same = sum(old == new for old, new in numbered)
    if len(numbered) >= FEWEST_PAIRS and same < LEAST_SAME_NUMBERS * len(numbered):
        question, rephrasing = pairs[0]
        raise InputError(
            f"data.rephrased_files: found the numbers of the question in {same} of {len(numbered)} rephrasings that "
            f"were compared, so they are of other questions, such as {rephrasing} of {question}; allowed: rephrasings "
            "of the questions in data.train_files (prepare-data --data-source NAME gives a set another name)"
        )
