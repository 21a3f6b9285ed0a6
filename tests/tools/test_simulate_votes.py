"""The simulation of early votes agrees with what can be said beforehand."""

import json
import sys

import numpy as np
import pytest

from benchmarks import simulate_votes
from benchmarks.simulate_votes import spared


def test_more_agreement_and_larger_groups_spare_more_and_a_label_in_its_spelling_spares_less() -> None:
    def tokens(relation: str, size: int, share: float) -> float:
        return spared(np.random.default_rng(1), relation, size, share, 300)["tokens"]  # type: ignore[arg-type]

    assert 0 < tokens("exact", 8, 0.6) < tokens("exact", 8, 0.9) < 1
    assert tokens("exact", 8, 0.6) < tokens("exact", 32, 0.6)
    assert tokens("hendrycks", 16, 0.8) < tokens("exact", 16, 0.8)


def test_unanimous_groups_need_half_of_their_samples_or_one_more() -> None:
    found = spared(np.random.default_rng(1), "exact", 8, 1.0, 200)
    assert 3 / 8 <= found["samples"] <= 4 / 8


def test_the_command_prints_every_case(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["simulate_votes.py", "--groups", "5", "--json"])
    simulate_votes.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(result) == 3 * 3 * 4
    assert "math/32/0.9" in result
