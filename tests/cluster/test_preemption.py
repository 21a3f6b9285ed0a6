"""A signal is a note that waits look at; a second one does what it always did."""

import os
import signal
import threading

import pytest

from megatron_coreward.cluster.preemption import Preempted, StopSignals


def test_a_signal_becomes_a_request_and_the_former_handler_comes_back() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    with StopSignals(["SIGUSR1"]) as stop:
        stop.check()
        os.kill(os.getpid(), signal.SIGUSR1)
        with pytest.raises(Preempted, match="SIGUSR1"):
            stop.check()
    assert signal.getsignal(signal.SIGUSR1) == before


def test_the_second_signal_of_a_kind_has_its_former_effect() -> None:
    taken: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: taken.append(number))
    try:
        with StopSignals(["SIGUSR1"]):
            os.kill(os.getpid(), signal.SIGUSR1)
            assert taken == []
            os.kill(os.getpid(), signal.SIGUSR1)
            assert taken == [signal.SIGUSR1]
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_signals_are_taken_back_from_a_library_that_took_them() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    taken: list[int] = []

    def of_a_library(number: int, frame: object) -> None:
        taken.append(number)

    try:
        with StopSignals(["SIGUSR1"]) as stop:
            signal.signal(signal.SIGUSR1, of_a_library)
            stop.take()
            stop.take()
            os.kill(os.getpid(), signal.SIGUSR1)
            assert stop.signal == "SIGUSR1"
            assert taken == []
        assert signal.getsignal(signal.SIGUSR1) == of_a_library
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_outside_the_main_thread_nothing_is_installed() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    seen: list[object] = []

    def work() -> None:
        with StopSignals(["SIGUSR1"]):
            seen.append(signal.getsignal(signal.SIGUSR1))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(timeout=10)
    assert seen == [before]
