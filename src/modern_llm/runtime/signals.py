"""Signals that ask a run to stop: after the step it is in, or at once where nothing is lost."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self, TypeVar

from modern_llm.errors import StoppedBySignal
from modern_llm.runtime.ranks import group

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
T = TypeVar("T")
_entered: list["StopSignal"] = []


class StopSignal:
    """While entered, SIGTERM, SIGINT and SIGUSR1 set ``requested``, and end what `unless` calls.

    A second SIGINT raises ``KeyboardInterrupt``: the user does not want to wait. A request that is
    still unanswered when the block ends goes to the `stop_at_once` around it, if there is one.

    Of several ranks, a signal may reach one, and the others a step later: it is noted, and
    requested of all of them where they `agree`. Nobody leaves what the others are in before that.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self._noted: str | None = None  # by this rank
        self._before: dict[int, Any] = {}
        self._leave = False  # inside `unless`

    def agree(self) -> None:
        """Take over what any rank was asked; all ranks call it at the same place."""
        asked = 0 if self._noted is None else signal.Signals[self._noted].value
        if number := group().highest(asked):
            self.requested = signal.Signals(number).name

    def unless(self, call: Callable[[], T]) -> T | None:
        """What ``call`` returns, or ``None`` if a signal came before its end: it is left there.

        For work that is lost without harm, such as a validation pass.
        """
        result = None
        try:
            try:
                self._leave = group().world_size == 1
                if self.requested is None:
                    result = call()
            finally:
                self._leave = False
        except (_Stop, Exception):  # a library may raise its own in the place of the first
            if self.requested is None:
                raise
        return result if self.requested is None else None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._noted == "SIGINT":
            raise KeyboardInterrupt
        self._note(signal.Signals(number).name)
        if self._leave:
            self._leave = False  # once: another signal must not end what cleans up
            raise _Stop

    def _note(self, name: str) -> None:
        self._noted = name
        if group().world_size == 1:  # nobody to agree with
            self.requested = name

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._handle) for number in STOP_SIGNALS}
        _entered.append(self)
        around = self._before[signal.SIGTERM]
        if isinstance(around, _StopNow) and around.requested:  # asked before, and not answered
            self._note(around.requested)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _entered.remove(self)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._noted is not None and kind is None:
            number = signal.Signals[self._noted]
            around = self._before[number]
            if isinstance(around, _StopNow):
                around(number, None)


def leave_together() -> None:
    """End what `StopSignal.unless` calls if any rank was asked to; all ranks call it together.

    One process needs it not: there the signal itself ends the call.
    """
    if _entered and group().world_size > 1:
        _entered[-1].agree()
        if _entered[-1].requested is not None:
            raise _Stop


class _Stop(BaseException):  # passes what catches Exception
    """Leaves the block of `stop_at_once`, or the call of `StopSignal.unless`."""

    exit_code = StoppedBySignal.exit_code  # what the other ranks are told


class _StopNow:
    """Signal handler that notes the signal and, where it may, leaves the block.

    Extensions written in C may lose the exception, or raise their own in its place (matplotlib
    does), so the note counts, not the exception.
    """

    requested: str | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.requested = signal.Signals(number).name
        self.leave()

    def leave(self) -> None:
        """Leave the block, if a signal came and no other rank is in step with this one."""
        if self.requested is not None and group().may_leave:
            raise _Stop


@contextmanager
def stop_at_once() -> Iterator[None]:
    """While entered, a stop signal ends the block where it is.

    For work between training loops, such as preparing data and evaluation: its files appear whole
    or not at all, so there is nothing to be saved. A rank that is in step with others only notes
    the signal for the next training loop, or `leave_if_asked`. One that follows rank 0 ends as
    rank 0 does, which has the signal too or finishes.

    Raises:
        StoppedBySignal: a signal came.
    """
    now, leads = _StopNow(), group().leads
    before = {number: signal.signal(number, now) for number in STOP_SIGNALS}
    try:
        yield
    except BaseException:
        if now.requested is None or not leads:
            raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if now.requested is not None and leads:
        raise StoppedBySignal(
            f"{now.requested}: what is finished stands; the same command goes on from there "
            "(without --force)"
        )


def leave_if_asked() -> None:
    """End the block of `stop_at_once` if a signal came while the ranks were in step."""
    now = signal.getsignal(signal.SIGTERM)
    if isinstance(now, _StopNow):
        now.leave()
