"""A vote that may be over before its last answer is in: which label a group will have, whatever is still to come.

The answers of a group come in any order. As soon as no answer that is still out can change the pseudo-label or the
abstention of `rewards.voting.majority_vote` of the whole group, the vote is decided, and what is still being sampled
for it can be aborted. An answer that is out may be anything: a member of any class, a new class, or none.

Pairs of answers that need a process to be compared (`math`) count as possibly the same, so nothing here waits for one.

Invariants (tests/rewards/test_early_vote.py):
  1. A decided vote has the label, spelling included, and the abstention of the full group's vote. So has the vote over
     the answers that are in, whether or not those that are out are counted as missing.
  2. Under `exact`, a vote is decided as soon as that can be known.
  3. Whether it is decided depends on the answers and their samples, not on the order in which they came.
"""

from dataclasses import dataclass

from megatron_coreward.rewards.equivalence import Form, Relation, form_of, has_answer, may_be_same


@dataclass(frozen=True, slots=True)
class _Seen:
    """A distinct answer among those that are in."""

    form: Form
    count: int  # rollouts that gave it
    first: int  # the first of them, in sample order


class EarlyVote:
    """The vote of one group of G rollouts, answer by answer."""

    def __init__(self, num_rollouts: int, relation: Relation = "exact", min_margin: float = 0.0) -> None:
        """
        Args:
            num_rollouts: G.
            min_margin: as `majority_vote` has it.
        """
        self._relation: Relation = relation
        self._min_margin = min_margin
        self._num_rollouts = num_rollouts
        self._out = set(range(num_rollouts))
        self._seen: dict[Form, _Seen] = {}
        self._nearness: dict[tuple[Form, Form], bool] = {}

    def add(self, sample: int, answer: str | None) -> None:
        """The answer of a rollout, by its place in the group (None or blank: no answer).

        Raises ValueError for a place that is not in the group, or that had its answer.
        """
        if sample not in self._out:
            raise ValueError(f"sample {sample} is not among those that are still out: {sorted(self._out)}")
        self._out.remove(sample)
        if has_answer(answer):
            form = form_of(self._relation, answer)
            before = self._seen.get(form, _Seen(form, 0, sample))
            self._seen[form] = _Seen(form, before.count + 1, min(before.first, sample))

    @property
    def outstanding(self) -> frozenset[int]:
        """The samples whose answer is not in."""
        return frozenset(self._out)

    @property
    def decided(self) -> bool:
        """Whether no answer that is still out can change the label or the abstention."""
        if not self._out:
            return True
        if not self._seen:
            return False
        seen, out = list(self._seen.values()), len(self._out)
        leader = max(seen, key=lambda answer: (answer.count, -answer.first))
        rival = max((answer.count for answer in seen if answer is not leader), default=0)
        may_win = leader.count >= rival + out
        may_abstain = (leader.count + out - rival) / self._num_rollouts < self._min_margin
        # Both are bounds that compare no answers, and nearly always leave nothing to ask.
        return (may_win and self._wins_for_certain(leader, seen)) or (may_abstain and self._abstains_for_certain(seen))

    def _wins_for_certain(self, leader: _Seen, seen: list[_Seen]) -> bool:
        """Whether the class of `leader` wins with a sufficient margin, under the spelling that it would have now.

        Rollouts with one form are always in one class, so the leader's class keeps at least its count. The others are
        cliques of the relation (`classes.py`): each lies within the neighbourhood of any of its members, and may get
        all that is out. That bound holds although a further answer may divide a class.
        """
        out, first_out = len(self._out), min(self._out)
        others = [answer for answer in seen if answer is not leader]
        largest_rival = 0
        for near in [[], *([other for other in others if self._near(answer, other)] for answer in others)]:
            rival = sum(other.count for other in near)
            largest_rival = max(largest_rival, rival)
            seen_first = leader.first < min([first_out, *(other.first for other in near)])
            if leader.count < rival + out or (leader.count == rival + out and not seen_first):
                return False
        if (leader.count - largest_rival - out) / self._num_rollouts < self._min_margin:
            return False
        if self._relation == "exact":  # a class has one spelling
            return True
        earlier = [other for other in others if other.first < leader.first]
        return leader.first < first_out and not any(self._near(leader, other) for other in earlier)

    def _abstains_for_certain(self, seen: list[_Seen]) -> bool:
        """Whether the margin stays too small even if all that is out joins one class.

        Two answers that surely differ are in two classes, so the runner-up has at least the smaller count of them.
        """
        most = max(sum(other.count for other in seen if self._near(answer, other)) for answer in seen) + len(self._out)
        runner_up = max((min(a.count, b.count) for a in seen for b in seen if not self._near(a, b)), default=0)
        return (most - runner_up) / self._num_rollouts < self._min_margin

    def _near(self, a: _Seen, b: _Seen) -> bool:
        """Whether two answers may be in one class. A pair is read once."""
        pair = (a.form, b.form)
        if pair not in self._nearness:
            self._nearness[pair] = self._nearness[pair[::-1]] = may_be_same(*pair)
        return self._nearness[pair]
