"""Ranks meet at a port that nobody is given in the meantime."""

import socket
from pathlib import Path

import pytest

from megatron_coreward.weights import ports


def test_a_port_is_free_and_outside_of_what_the_system_hands_out() -> None:
    found = {ports.free_port() for _ in range(50)}
    assert len(found) > 1
    assert all(ports.FIRST <= port <= ports.LAST for port in found)
    for port in found:
        with socket.socket() as listener:
            listener.bind(("", port))


def test_a_port_in_use_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("", ports.free_port()))
        monkeypatch.setattr(ports, "FIRST", taken.getsockname()[1])
        monkeypatch.setattr(ports, "LAST", taken.getsockname()[1] + 1)
        assert ports.free_port() != taken.getsockname()[1]


def test_where_the_system_s_range_leaves_no_room_any_free_port_will_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "range").write_text("1024\t60999\n")
    monkeypatch.setattr(ports, "_RANGE", tmp_path / "range")
    assert ports.free_port() > 0
