import os
import signal
from contextlib import suppress

import pytest

from modern_llm.errors import StoppedBySignal
from modern_llm.runtime.signals import STOP_SIGNALS, StopSignal, stop_at_once


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_is_noted_and_does_nothing_else(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopSignal() as stop:
        assert stop.requested is None
        os.kill(os.getpid(), number)
        assert stop.requested == number.name
    assert signal.getsignal(number) is before


def test_a_second_interrupt_does_not_wait() -> None:
    before = signal.getsignal(signal.SIGINT)  # a job in the background ignores it
    with pytest.raises(KeyboardInterrupt), StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested == "SIGINT"
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_an_interrupt_after_a_termination_waits() -> None:
    """A scheduler's SIGTERM, then one ctrl-C: the step is still finished."""
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested == "SIGINT"
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested == "SIGTERM"


def test_a_call_that_may_be_lost_is_left_where_it_is() -> None:
    def interrupted() -> int:
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("not reached")

    def replaced() -> int:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except BaseException:
            raise ImportError("initialization failed") from None
        return 3

    def swallowed() -> int:
        with suppress(BaseException):
            os.kill(os.getpid(), signal.SIGTERM)
        return 3

    for call in (interrupted, replaced, swallowed):
        with StopSignal() as stop:
            assert stop.unless(lambda: 3) == 3
            with pytest.raises(ZeroDivisionError):
                stop.unless(lambda: 1 // 0)
            assert stop.unless(call) is None
            assert stop.requested == "SIGTERM"
            assert stop.unless(lambda: pytest.fail("called after the signal")) is None
            os.kill(os.getpid(), signal.SIGTERM)  # outside of a call it is noted alone


def test_handlers_come_back_after_an_error() -> None:
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    with pytest.raises(ZeroDivisionError), StopSignal():
        raise ZeroDivisionError
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_between_training_loops_a_signal_stops_at_once(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    told = f"{number.name}: .* goes on from there"
    with pytest.raises(StoppedBySignal, match=told), stop_at_once():
        try:
            os.kill(os.getpid(), number)
            raise AssertionError("not reached")
        except Exception:  # what a library may catch
            raise AssertionError("caught") from None
    assert signal.getsignal(number) is before


def test_a_request_that_no_step_answered_is_passed_on() -> None:
    with pytest.raises(StoppedBySignal, match="SIGUSR1"), stop_at_once():
        with StopSignal():
            os.kill(os.getpid(), signal.SIGUSR1)
        raise AssertionError("not reached")
    with stop_at_once(), StopSignal():
        pass
    with pytest.raises(ZeroDivisionError), stop_at_once(), StopSignal():
        os.kill(os.getpid(), signal.SIGUSR1)
        raise ZeroDivisionError  # an error of its own comes first


def test_a_signal_counts_whatever_a_library_makes_of_it() -> None:
    """An extension in C may lose the exception of a handler, or raise its own in its place."""
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    with pytest.raises(StoppedBySignal, match="SIGTERM"), stop_at_once():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except BaseException:
            raise ImportError("initialization failed") from None
    with pytest.raises(StoppedBySignal, match="SIGTERM"), stop_at_once():
        with suppress(BaseException):
            os.kill(os.getpid(), signal.SIGTERM)
        with StopSignal() as stop:
            assert stop.requested == "SIGTERM"  # a loop that begins now does not run on for hours
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before
