r"""When two answers are the same: the relation that votes, rewards and scores all rest on.

`exact`: the extracted strings are equal, as in the published implementation. `hendrycks`: their normal forms by the
rules of the MATH benchmark are equal (`hendrycks.py`). `math`: their normal forms are equal
(`latex.py`); failing that, and only where the forms leave the question open, math-verify decides in a process of its
own under a time limit (`symbolic.py`).

Invariants: symmetric; no answer (None or blank) is equivalent to nothing, not even to another missing one; plain
rational numbers are compared exactly and never leave this process; a comparison that runs over its limit counts as
"not equivalent" and is counted in `timeouts`.
"""

import atexit
import hashlib
from collections.abc import Sequence
from functools import cache
from threading import Lock
from types import TracebackType
from typing import TypeGuard

from megatron_coreward.config.schema import Equivalence
from megatron_coreward.rewards import hendrycks
from megatron_coreward.rewards.latex import CanonicalAnswer, canonical
from megatron_coreward.rewards.symbolic import SymbolicPool

Relation = Equivalence

CACHE_SIZE = 100_000  # verdicts on pairs that went to a process


class AnswerEquivalence:
    """One relation, its processes and its memory. Use it as a context manager, or close it.

    comparisons: pairs that needed a process; timeouts: those of them whose process ran over the limit or died.
    """

    def __init__(
        self, relation: Relation = "math", timeout_s: float = 5.0, num_workers: int = 1, symbolic: bool = True
    ) -> None:
        """`symbolic=False` leaves `math` with the normal forms alone: what they leave open counts as not the same."""
        self.relation: Relation = relation
        self._symbolic = symbolic
        self.comparisons = 0
        self.timeouts = 0
        self._pool = SymbolicPool(timeout_s, num_workers)
        self._verdicts: dict[bytes, bool] = {}  # by the digest of a pair, in order of arrival
        self._lock = Lock()

    def equivalent(self, a: str | None, b: str | None) -> bool:
        """Whether two extracted answers are the same under the relation."""
        if not has_answer(a) or not has_answer(b):
            return False
        return self._same(self._form(a), self._form(b))

    def classes(self, answers: Sequence[str | None]) -> list[int | None]:
        """The equivalence class of each answer, numbered in order of first sight; None for no answer.

        An answer joins the first class whose first member it is equivalent to, so classes exist even where the
        relation is not transitive.
        """
        founders: list[CanonicalAnswer] = []
        class_of: dict[CanonicalAnswer, int] = {}
        known: dict[str | None, int | None] = {}  # most answers of a group are spelled alike
        for answer in answers:
            if answer in known:
                continue
            if not has_answer(answer):
                known[answer] = None
                continue
            form = self._form(answer)
            if form not in class_of:
                joined = next((i for i, founder in enumerate(founders) if self._same(founder, form)), len(founders))
                if joined == len(founders):
                    founders.append(form)
                class_of[form] = joined
            known[answer] = class_of[form]
        return [known[answer] for answer in answers]

    def close(self) -> None:
        """End the processes. The judge stays usable and remembers its verdicts."""
        self._pool.close()

    def __enter__(self) -> "AnswerEquivalence":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _form(self, answer: str) -> CanonicalAnswer:
        if self.relation == "math":
            return canonical(answer)
        return CanonicalAnswer(answer if self.relation == "exact" else hendrycks.comparable(answer), "opaque")

    def _same(self, a: CanonicalAnswer, b: CanonicalAnswer) -> bool:
        if a.text == b.text:
            return True
        if not self._symbolic or not a.may_equal(b):
            return False
        pair = (a.text, b.text) if a.text < b.text else (b.text, a.text)
        key = _digest(pair)
        with self._lock:
            known = self._verdicts.get(key)
        if known is not None:
            return known
        verdict = self._pool.equivalent(*pair)
        with self._lock:
            self.comparisons += 1
            self.timeouts += verdict is None
            self._verdicts[key] = bool(verdict)
            if len(self._verdicts) > CACHE_SIZE:
                del self._verdicts[next(iter(self._verdicts))]
        return bool(verdict)


def _digest(pair: tuple[str, str]) -> bytes:
    """A name for a pair that is short however long its answers are."""
    return hashlib.blake2b(repr(pair).encode(), digest_size=16).digest()


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
