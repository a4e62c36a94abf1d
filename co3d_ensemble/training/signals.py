"""Ctrl-C and SIGTERM as requests to stop after the current step."""

from __future__ import annotations

import logging
import signal
import threading
from types import FrameType

logger = logging.getLogger(__name__)

EXIT_INTERRUPTED = 130  # 128 + SIGINT, the shells' convention
EXIT_PREEMPTED = 143  # 128 + SIGTERM

_REASONS = {signal.SIGINT: "interrupted", signal.SIGTERM: "preempted"}
REASONS = ("", "preempted", "interrupted")  # where processes differ the later one holds


class StopSignals:
    """``with StopSignals() as stop:`` — afterwards the handlers are the ones from before. Inert outside the main thread.

    Attributes:
        reason: "" until a signal came, then ``interrupted`` (Ctrl-C) or ``preempted`` (SIGTERM). A second Ctrl-C raises
            ``KeyboardInterrupt`` at once.
    """

    def __init__(self) -> None:
        self.reason = ""
        self._interrupts = 0
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in _REASONS:
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not installed from Python
        self._before.clear()

    def _handle(self, number: int, _: FrameType | None) -> None:
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            raise KeyboardInterrupt
        self.reason = self.reason or _REASONS[signal.Signals(number)]
        logger.warning("%s: stopping after this step (a second Ctrl-C aborts at once)", signal.Signals(number).name)
