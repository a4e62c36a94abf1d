from __future__ import annotations

import logging
import threading
import time

import pytest

from co3d_ensemble.base import progress
from co3d_ensemble.base.progress import Progress, tracked


@pytest.fixture
def fast(monkeypatch):
    """A second is a hundredth of one."""
    for name in ("FIRST_LINE", "EARLY_LINES", "LATE_LINES", "EARLY"):
        monkeypatch.setattr(progress, name, getattr(progress, name) / 100)


def lines(caplog):
    return [record.getMessage() for record in caplog.records]


def test_lines_come_by_time_however_long_one_item_takes_and_then_further_apart(fast, caplog):
    with caplog.at_level(logging.INFO), Progress("rendering", 3, "frames"):
        time.sleep(1.5)
    times = [record.created for record in caplog.records]
    gaps = [later - earlier for earlier, later in zip(times, times[1:], strict=False)]
    assert 7 <= len(times) <= 10 and lines(caplog)[0] == "rendering: 0 of 3 frames, 00:00 so far"
    assert sum(gap < 0.2 for gap in gaps) >= 4 and max(gaps) >= 0.25


def test_a_line_has_the_count_and_the_time_left_of_the_last_items(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    shown = Progress("scoring", 20, "frames", done=4)
    assert shown.seconds_left() is None
    for _ in range(4):
        now[0] += 10
        shown.advance()
    assert shown.line() == "scoring: 8 of 20 frames, 02:00 left"
    now[0] += 20  # the frame at hand takes longer than the ones before
    assert shown.seconds_left() == pytest.approx(12 * 60 / 4)
    shown.note("psnr 20", seconds_left=65)
    now[0] += 5
    assert shown.line() == "scoring: 8 of 20 frames, 01:00 left, psnr 20"
    shown.close()


def test_what_is_over_soon_says_nothing_and_leaves_no_thread(caplog):
    with caplog.at_level(logging.INFO):
        assert list(tracked(range(3), "counting", "numbers")) == [0, 1, 2]
    assert lines(caplog) == [] and not [thread for thread in threading.enumerate() if "counting" in thread.name]


def test_the_end_is_told_where_lines_were(fast, caplog):
    with caplog.at_level(logging.INFO):
        for _ in tracked(iter(range(2)), "counting", "numbers", total=2):
            time.sleep(0.1)
    assert lines(caplog)[-1] == "counting: all 2 numbers done in 00:00" and len(lines(caplog)) >= 2


def test_a_loop_that_is_left_early_ends_its_progress(caplog):
    for _ in tracked(range(3), "leaving", "numbers"):
        break
    assert not [thread for thread in threading.enumerate() if "leaving" in thread.name]


def test_on_a_terminal_there_is_a_bar_that_shows_the_time_left(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setattr(progress, "BAR_SECONDS", 0.02)
    with Progress("rendering", 4, "frames") as shown:
        shown.advance()
        time.sleep(0.2)
    told = capsys.readouterr().err
    assert "rendering: " in told and "1/4" in told and "00:00 left" in told
    with Progress("reading", None) as shown:
        shown.advance(2)
    assert "reading: 2" in capsys.readouterr().err
