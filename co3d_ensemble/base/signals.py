"""Ctrl-C and SIGTERM: obeyed at once where all that matters is on disk, after the current step where it is not.

:func:`signals_raise` is around everything that a script does: a signal raises, files appear whole or not at all, and the same command
goes on. :class:`StopSignals` is around what has to end in order (a training's steps, child processes): there a signal is a
request, which the code looks at.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

logger = logging.getLogger(__name__)

EXIT_INTERRUPTED = 130  # 128 + SIGINT, the shells' convention
EXIT_PREEMPTED = 143  # 128 + SIGTERM

_REASONS = {signal.SIGINT: "interrupted", signal.SIGTERM: "preempted"}
REASONS = ("", "preempted", "interrupted")  # where processes differ the later one holds
EXIT_STATUS = {"interrupted": EXIT_INTERRUPTED, "preempted": EXIT_PREEMPTED}
# of a process that somebody told to stop: by itself, or by the system's default while Python was still starting
STOPPED_STATUS = (EXIT_INTERRUPTED, EXIT_PREEMPTED, -signal.SIGINT, -signal.SIGTERM)

_depth = 0  # of blocks whose handlers are installed in this process


class Terminated(KeyboardInterrupt):
    """SIGTERM; a kind of ``KeyboardInterrupt``, so that what cleans up after Ctrl-C cleans up after this."""


class Stopped(KeyboardInterrupt):
    """A signal within :meth:`StopSignals.at_once`; the reason is in the object that it was asked of."""


def exit_status(stop: KeyboardInterrupt) -> int:
    """128 plus the signal's number."""
    return EXIT_PREEMPTED if isinstance(stop, Terminated) else EXIT_INTERRUPTED


@contextmanager
def signals_raise() -> Iterator[None]:
    """SIGTERM raises :class:`Terminated`, as Ctrl-C raises ``KeyboardInterrupt``; a second signal ends the process at once, by the
    system's default, even within a library's own code. Afterwards the handlers are the ones from before. Inert outside the main thread.
    """

    def handle(number: int, _: FrameType | None) -> None:
        for own in _REASONS:
            signal.signal(own, signal.SIG_DFL)
        raise Terminated if number == signal.SIGTERM else KeyboardInterrupt

    with _handled_by(handle):
        yield


class StopSignals:
    """``with StopSignals() as stop:`` — afterwards the handlers are the ones from before. Inert outside the main thread.

    Attributes:
        reason: "" until a signal came, then ``interrupted`` (Ctrl-C) or ``preempted`` (SIGTERM). A second Ctrl-C raises
            ``KeyboardInterrupt`` at once, a third one ends the process by the system's default.
    """

    def __init__(self) -> None:
        self.reason = ""
        self._interrupts = 0
        self._raises = False
        self._installed: Any = None

    def __enter__(self) -> StopSignals:
        self._installed = _handled_by(self._handle)
        self._installed.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._installed.__exit__(*error)

    @contextmanager
    def at_once(self, wanted: bool = True) -> Iterator[None]:
        """A signal within the block raises :class:`Stopped`, one that came before it does so on entry: for what takes long and is
        done again by the run that goes on, as validations are.

        Args:
            wanted: False leaves signals to be looked at, for instance where other processes wait for this one.
        """
        if not wanted:
            yield
            return
        if self.reason:
            raise Stopped
        self._raises = True
        try:
            yield
        finally:
            self._raises = False

    def _handle(self, number: int, _: FrameType | None) -> None:
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            raise KeyboardInterrupt
        self.reason = self.reason or _REASONS[signal.Signals(number)]
        what = "stopping" if self._raises else "stopping after this step"
        logger.warning("%s: %s (a second Ctrl-C aborts at once)", signal.Signals(number).name, what)
        if self._raises:
            self._raises = False
            raise Stopped


@contextmanager
def _handled_by(handle: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    global _depth
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _REASONS}
    _depth += 1
    try:
        for number in _REASONS:
            signal.signal(number, handle)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not installed from Python
        _depth -= 1


def _of_a_forked_child() -> None:
    """A worker that is forked within a block ends by SIGTERM, and leaves Ctrl-C, which reaches it as well, to who forked it."""
    if _depth:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)


os.register_at_fork(after_in_child=_of_a_forked_child)
