"""How far something is, told by time: a bar on a terminal, elsewhere a log line now and then, however long one item takes.

Lines come after 5 seconds, then every 10 in the first minute and every 30 after it; what is over sooner says nothing.
"""

from __future__ import annotations

import logging
import multiprocessing
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sized
from contextlib import ExitStack
from typing import TypeVar

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

logger = logging.getLogger(__name__)

FIRST_LINE, EARLY_LINES, LATE_LINES = 5.0, 10.0, 30.0  # seconds: until the first, between lines, and between those after
EARLY = 60.0  # seconds
BAR_SECONDS = 1.0  # between two refreshes of a bar
_BAR = "{desc}: {percentage:3.0f}% {bar} {n_fmt}/{total_fmt}{postfix}"
_BAR_WITHOUT_TOTAL = "{desc}: {n_fmt}{postfix}"
_MARKS = 33  # items whose times the time left is estimated from
Item = TypeVar("Item")


class Progress:
    """``with Progress("rendering", 18, "frames") as progress:`` and :meth:`advance` after each.

    A thread shows it, so that a line comes also where the program is deep in one item.

    Args:
        what: is being done.
        total: of items; None: not known.
        unit: the items in the plural.
        done: items of before, by an earlier call.
        bar: False tells by lines on terminals as well.
    """

    def __init__(self, what: str, total: int | None, unit: str = "", *, done: int = 0, bar: bool = True) -> None:
        self._what, self._total, self._unit, self._done = what, total, unit, done
        self._note, self._told_left = "", None  # type: tuple[str, tuple[float, float] | None]
        self._started = time.monotonic()
        self._marks: deque[tuple[float, int]] = deque([(self._started, done)], maxlen=_MARKS)
        self._lines = 0
        self._ended = threading.Event()
        self._stack = ExitStack()
        self._bar: tqdm | None = None
        if bar and sys.stderr.isatty() and multiprocessing.parent_process() is None:  # several workers would draw over each other
            shape = _BAR if total is not None else _BAR_WITHOUT_TOTAL
            self._stack.enter_context(logging_redirect_tqdm())
            self._bar = self._stack.enter_context(tqdm(total=total, initial=done, desc=what, bar_format=shape, dynamic_ncols=True))
        self._thread = threading.Thread(target=self._watch, name=f"progress of {what}", daemon=True)
        self._thread.start()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def advance(self, count: int = 1) -> None:
        """So many more are done."""
        self._done += count
        self._marks.append((time.monotonic(), self._done))
        if self._bar is not None:
            self._bar.update(count)

    def expect(self, total: int) -> None:
        """So many items are there, in place of what was said before."""
        self._total = total
        if self._bar is not None:
            self._bar.total = total

    def note(self, text: str, seconds_left: float | None = None) -> None:
        """What stands behind the count from now on, and a better estimate of the time left than that from the last items."""
        self._note = text
        self._told_left = None if seconds_left is None else (time.monotonic(), seconds_left)
        if self._bar is not None:
            self._bar.set_postfix_str(self._told())

    def seconds_left(self) -> float | None:
        """None where it cannot be known."""
        now = time.monotonic()
        if self._told_left is not None:
            then, left = self._told_left
            return max(0.0, left - (now - then))
        (since, before), done = self._marks[0], self._done
        if self._total is None or done <= before:
            return None
        return max(0, self._total - done) * (now - since) / (done - before)

    def line(self) -> str:
        """``rendering: 5 of 18 frames, 00:40 left, ...``"""
        count = str(self._done) if self._total is None else f"{self._done} of {self._total}"
        return f"{self._what}: {' '.join(filter(None, (count, self._unit)))}, {self._told()}"

    def close(self) -> None:
        """Ends the bar; where lines were shown, a last one."""
        if self._ended.is_set():
            return
        self._ended.set()
        self._thread.join()
        self._stack.close()
        if self._lines and self._done == self._total:
            took = tqdm.format_interval(time.monotonic() - self._started)
            logger.info("%s: all %s done in %s", self._what, " ".join(filter(None, (str(self._done), self._unit))), took)

    def _told(self) -> str:
        left = self.seconds_left()
        times = f"{tqdm.format_interval(time.monotonic() - self._started)} so far" if left is None else f"{tqdm.format_interval(left)} left"
        return ", ".join(filter(None, (times, self._note)))

    def _watch(self) -> None:
        due = self._started + (FIRST_LINE if self._bar is None else BAR_SECONDS)
        while not self._ended.wait(max(0.0, due - time.monotonic())):
            if self._bar is not None:
                self._bar.set_postfix_str(self._told())
                due += BAR_SECONDS
                continue
            logger.info("%s", self.line())
            self._lines += 1
            due += EARLY_LINES if due - self._started < EARLY else LATE_LINES


def tracked(items: Iterable[Item], what: str, unit: str = "", *, total: int | None = None) -> Iterator[Item]:
    """The items, with their :class:`Progress`: one is done when the next one is asked for.

    Args:
        total: None: as many as ``items`` has, where it has a length.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    with Progress(what, total, unit) as progress:
        for item in items:
            yield item
            progress.advance()
