r"""When two answers are the same: the relation that votes, rewards and scores all rest on.

`exact`: the extracted strings are equal, as in the published implementation. `hendrycks`: their normal forms by the
rules of the MATH benchmark are equal (`hendrycks.py`). `math`: the answers are read (`latex.py`,
`reading.py`) and compared kind by kind (`sameness.py`): plain numbers and words in this process, everything else in
processes of its own with limits on time and memory (`symbolic.py`).

Invariants: symmetric; no answer (None or blank) is equivalent to nothing, not even to another missing one; rational
numbers are compared exactly; a verdict depends on the two answers alone. A comparison that computes for the whole limit
counts as "not equivalent" and in `timeouts`; one that got no verdict because its process died or the machine stalled
counts so too, but is not remembered.
"""

import atexit
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, lru_cache
from threading import Lock
from types import TracebackType
from typing import TypeGuard

from megatron_coreward.config.schema import Equivalence
from megatron_coreward.rewards import hendrycks
from megatron_coreward.rewards.arithmetic import Quick
from megatron_coreward.rewards.classes import cliques
from megatron_coreward.rewards.latex import MAX_LENGTH
from megatron_coreward.rewards.reading import read
from megatron_coreward.rewards.sameness import Undecided, same
from megatron_coreward.rewards.symbolic import Comparer, Outcome, Request, SymbolicPool

Relation = Equivalence
PairKey = tuple[str, str] | bytes

FEW_PAIRS = 100  # fewer are tried in this process first, which may need no other
SHORT_PAIR = 100  # characters; longer pairs are remembered by a digest
CACHE_SIZE = 500_000  # verdicts on pairs that went to a process: 60 to 150 MiB


@dataclass(frozen=True, slots=True)
class Form:
    """What stands for an answer: equal texts are the same answer; of two plain forms, only equal ones are."""

    text: str
    plain: bool


class AnswerEquivalence:
    """One relation, its processes and its memory. Use it as a context manager, or close it.

    comparisons: pairs that needed a process; timeouts: those of them that got no verdict.
    """

    def __init__(
        self,
        relation: Relation = "math",
        timeout_s: float = 5.0,
        num_workers: int | None = None,
        symbolic: bool = True,
        comparer: Comparer | None = None,
    ) -> None:
        """
        Args:
            timeout_s: how long a pair may be computed, in seconds of processor time.
            num_workers: comparison processes; None for one a core of this machine.
            symbolic: False leaves `math` with what needs no process: what that leaves open counts as not the same.
            comparer: compares instead of processes of this machine.
        """
        self.relation: Relation = relation
        self._symbolic = symbolic
        self.comparisons = 0
        self.timeouts = 0
        self._pool: Comparer = comparer or SymbolicPool(timeout_s, num_workers)
        self._verdicts: dict[PairKey, bool] = {}  # in order of arrival
        self._lock = Lock()

    def equivalent(self, a: str | None, b: str | None) -> bool:
        """Whether two extracted answers are the same under the relation."""
        if not has_answer(a) or not has_answer(b):
            return False
        return self._same(self._form(a), self._form(b))

    def classes(self, answers: Sequence[str | None]) -> list[int | None]:
        """The equivalence class of each answer, numbered in order of first sight; None for no answer.

        Which answers are in a class does not depend on their order; `classes.py` has the rule.
        """
        self.compare([answers])
        spelt = Counter(answers)  # a group has few spellings of few answers; each is read once
        form_of = {answer: self._form(answer) for answer in spelt if has_answer(answer)}
        given: Counter[Form] = Counter()
        for answer, form in form_of.items():
            given[form] += spelt[answer]
        forms = list(given)
        found = cliques(
            [form.text for form in forms], list(given.values()), lambda i, j: self._same(forms[i], forms[j])
        )
        founder_of = dict(zip(forms, found, strict=True))
        numbers: dict[int, int] = {}
        class_of: dict[str | None, int] = {}
        class_of |= {a: numbers.setdefault(founder_of[form], len(numbers)) for a, form in form_of.items()}
        return [class_of.get(answer) for answer in answers]

    def compare(self, groups: Iterable[Sequence[str | None]]) -> None:
        """Compares all answers of each group with each other, and remembers the verdicts.

        The groups of a whole step are handed to the processes together, which keeps them all busy.
        """
        if not self._symbolic or self.relation != "math":
            return
        requests: list[Request] = []
        asked: set[PairKey] = set()
        for group in groups:
            forms = list(dict.fromkeys(self._form(answer) for answer in dict.fromkeys(group) if has_answer(answer)))
            pairs = []
            for i, first in enumerate(forms):
                for j in range(i):
                    if self._known(first, forms[j]) is None and (key := _key(first.text, forms[j].text)) not in asked:
                        asked.add(key)
                        pairs.append((j, i))
            if pairs:
                requests.append(Request(tuple(form.text for form in forms), tuple(pairs)))
        if sum(len(request.pairs) for request in requests) <= FEW_PAIRS:
            requests = [rest for request in requests if (rest := _needing_a_process(request)).pairs]
        if requests:
            self._remember(requests, self._pool.compare(requests))

    def close(self) -> None:
        """End the processes. The relation stays usable and remembers its verdicts."""
        self._pool.close()

    def __enter__(self) -> "AnswerEquivalence":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _form(self, answer: str) -> Form:
        return form_of(self.relation, answer)

    def _same(self, a: Form, b: Form) -> bool:
        quick = self._quick(a, b)
        if quick is not None:
            return quick
        request = Request((a.text, b.text) if a.text < b.text else (b.text, a.text), ((0, 1),))
        return self._remember([request], self._pool.compare([request]))

    def _quick(self, a: Form, b: Form) -> bool | None:
        """What needs no process; None if one is needed."""
        known = self._known(a, b)
        if known is not None:
            return known
        verdict = _without_process(*((a.text, b.text) if a.text < b.text else (b.text, a.text)))
        return False if verdict is None and not self._symbolic else verdict

    def _known(self, a: Form, b: Form) -> bool | None:
        """What needs not even a reading of the answers; None if one is needed."""
        if a.text == b.text or (a.plain and b.plain):
            return a.text == b.text
        with self._lock:
            return self._verdicts.get(_key(a.text, b.text))

    def _remember(self, requests: Sequence[Request], outcomes: Sequence[Sequence[Outcome]]) -> bool:
        """Keeps the verdicts and counts the pairs; returns the last of them."""
        last = False
        with self._lock:
            for request, verdicts in zip(requests, outcomes, strict=True):
                for (i, j), verdict in zip(request.pairs, verdicts, strict=True):
                    last = verdict is True
                    self.comparisons += 1
                    self.timeouts += not isinstance(verdict, bool)
                    if verdict != "lost":
                        self._verdicts[_key(request.texts[i], request.texts[j])] = last
                        if len(self._verdicts) > CACHE_SIZE:
                            del self._verdicts[next(iter(self._verdicts))]
        return last


def form_of(relation: Relation, answer: str) -> Form:
    """What stands for an answer under a relation."""
    return _FORMS[relation](answer)


def may_be_same(a: Form, b: Form) -> bool:
    """Whether two forms of one relation are the same answer, or only a process could say that they are not."""
    if a.text == b.text or (a.plain and b.plain):
        return a.text == b.text
    return _without_process(*sorted((a.text, b.text))) is not False


def _math_form(answer: str) -> Form:
    # A long answer is not remembered: an attacker's would fill the memory.
    return Form(answer.strip(), True) if len(answer) > MAX_LENGTH else _short_math_form(answer)


@lru_cache(maxsize=65536)  # questions share answers, and metrics read them again
def _short_math_form(answer: str) -> Form:
    text = answer.strip()
    return Form(str(Fraction(text)), True) if _NUMERAL.fullmatch(text) else Form(text, False)


_NUMERAL = re.compile(r"[+-]?(?:\d+(?:\.\d+)?|\.\d+)", re.ASCII)


def _needing_a_process(request: Request) -> Request:
    texts = request.texts
    return Request(
        texts, tuple((i, j) for i, j in request.pairs if _without_process(*sorted((texts[i], texts[j]))) is None)
    )


# What stands for an answer under each relation. Forms that are all plain are the same only if their texts are equal.
_FORMS: dict[Relation, Callable[[str], Form]] = {
    "exact": lambda answer: Form(answer, True),
    "hendrycks": lambda answer: Form(hendrycks.comparable(answer), True),
    "math": _math_form,
}


@lru_cache(maxsize=65536)
def _without_process(a: str, b: str) -> bool | None:
    try:
        return same(read(a), read(b), Quick())
    except (Undecided, RecursionError):
        return None


def _key(a: str, b: str) -> PairKey:
    """A name for a pair, in either order, that is short however long its answers are."""
    pair = (a, b) if a < b else (b, a)
    if len(a) + len(b) <= SHORT_PAIR:
        return pair
    return hashlib.blake2b(repr(pair).encode(errors="replace"), digest_size=16).digest()


def has_answer(answer: str | None) -> TypeGuard[str]:
    """Whether there is an answer at all: a string that is not blank."""
    return answer is not None and bool(answer.strip())


def equivalent(a: str | None, b: str | None) -> bool:
    """Whether two extracted answers are mathematically the same, by one shared `AnswerEquivalence("math")`."""
    return _shared_equivalence().equivalent(a, b)


@cache
def _shared_equivalence() -> AnswerEquivalence:
    equivalence = AnswerEquivalence("math")
    atexit.register(equivalence.close)
    return equivalence
