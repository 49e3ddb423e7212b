"""Work that waits for others is tried again by itself: later each time, and not at all once it is stopped."""

from __future__ import annotations

import threading

import pytest

from server_ref import postponed
from server_ref.postponed import Postponed


class Timers:
    """Stands for ``threading.Timer``: what was started, and for when."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pauses: list[float] = []
        self.running: list[Timers.One] = []
        monkeypatch.setattr(postponed.threading, "Timer", lambda pause, retry: Timers.One(self, pause, retry))

    class One:
        def __init__(self, timers: Timers, pause: float, retry: object) -> None:
            self.timers, self.pause, self.retry = timers, pause, retry
            self.daemon = False

        def start(self) -> None:
            assert self.daemon, "a thread that waits must not keep the process"
            self.timers.pauses.append(self.pause)
            self.timers.running.append(self)

        def cancel(self) -> None:
            if self in self.timers.running:
                self.timers.running.remove(self)


@pytest.fixture
def timers(monkeypatch):
    return Timers(monkeypatch)


def test_waits_double_up_to_half_a_minute_and_begin_anew_once_it_has_worked(timers):
    now = [100.0]
    work = Postponed(lambda: None, lambda: now[0])
    assert not work.waiting
    for expected in (1, 2, 4, 8, 16, 30, 30):
        work.again()
        assert timers.pauses[-1] == pytest.approx(expected, abs=0.1)
        assert len(timers.running) == 1, "one timer at a time"
        now[0] += expected - 0.001
        assert work.waiting
        now[0] += timers.pauses[-1] - expected + 0.001
        assert not work.waiting, "when the timer fires it is not too early"
    work.done()
    assert not work.waiting
    work.again()
    assert timers.pauses[-1] == pytest.approx(1, abs=0.1)


def test_what_was_done_is_not_waited_for(timers):
    work = Postponed(lambda: None, lambda: 0.0)
    work.again()
    assert work.waiting
    work.done()
    assert not work.waiting


def test_nothing_is_tried_after_the_stop_even_if_it_fails_once_more(timers):
    work = Postponed(lambda: None, lambda: 0.0)
    work.again()
    work.stop()
    assert timers.running == []
    work.again()
    assert timers.running == [], "the last batch of a server that stops may fail too"


def test_it_really_calls(monkeypatch):
    monkeypatch.setattr(postponed, "_FIRST_S", 0.001)
    called = threading.Event()
    work = Postponed(called.set)
    work.again()
    assert called.wait(60)
    work.stop()
