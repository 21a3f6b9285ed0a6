"""Classes of the answers of one group, from pairwise equivalence that need not be transitive.

`6 \\text{ a.m.}` and `6 \\text{ p.m.}` differ, and `6:00` may be either. The rule: within a class every two answers are
equivalent. The answers with the fewest equivalents, which say most, found the classes; an answer that fits into several
joins the one with the most rollouts.

Invariants: a class never holds two answers that differ; if the relation is transitive, the classes are its classes;
the result depends on the answers and on how often each was given, not on their order.
"""

from collections.abc import Callable, Sequence


def cliques(forms: Sequence[str], counts: Sequence[int], same: Callable[[int, int], bool]) -> list[int]:
    """The class of each form, as an index of one of its members.

    Args:
        forms: distinct answers; their text breaks ties.
        counts: rollouts that gave each of them.
        same: whether two of them, by index, are equivalent.
    """
    number = range(len(forms))
    equivalents: list[set[int]] = [set() for _ in number]
    for i in number:
        for j in range(i):
            if same(j, i):
                equivalents[i].add(j)
                equivalents[j].add(i)
    members: dict[int, set[int]] = {}  # founder -> the class
    class_of = [0] * len(forms)
    for i in sorted(number, key=lambda i: (len(equivalents[i]), -counts[i], forms[i])):
        fitting = [founder for founder, members_ in members.items() if members_ <= equivalents[i]]
        founder = max(
            fitting, key=lambda founder: (sum(counts[j] for j in members[founder]), -_rank(forms, founder)), default=i
        )
        members.setdefault(founder, set()).add(i)
        class_of[i] = founder
    return class_of


def _rank(forms: Sequence[str], index: int) -> int:
    return sum(form < forms[index] for form in forms)
