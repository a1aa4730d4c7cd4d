"""For the tests of those who use kser: a clock that the test turns, and a wait with a deadline.

clock = FakeClock()
transport = MemoryTransport(clock=clock)
source = transport.source("shop")
source.subscribe(["orders"], listener)
source.poll(60)           # returns at once, and it is a minute later
clock.advance(6)          # long enough for the member to be put out of its group
"""

import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import TypeVar

__all__ = ["FakeClock", "eventually"]

T = TypeVar("T")


class FakeClock:
    """A clock for MemoryTransport that stands still until somebody moves it. May be shared by threads.

    No wait hangs a test, in either mode:

    - With ``auto_advance`` a wait for which nothing has come moves the clock to its own end and returns: an idle
      ``poll(60)`` takes no real time. For tests in one thread; with several, time runs as fast as an idle one polls.
    - Without it a wait really waits, until something comes or advance() reaches its end. One that nobody ends within
      ``hang_s`` real seconds raises TimeoutError, which says so.

    Args:
        start_ms: the first time_ms(), milliseconds since the epoch.
        auto_advance: see above.
        hang_s: real seconds, see above.
    """

    def __init__(self, start_ms: int = 1_700_000_000_000, *, auto_advance: bool = True, hang_s: float = 30) -> None:
        self._start_ms = start_ms
        self._auto_advance = auto_advance
        self._hang_s = hang_s
        self._now = 0.0
        #: Every condition that was ever waited on: whoever holds one of them sees the time stand still.
        self._conditions: list[threading.Condition] = []
        self._lock = threading.Lock()

    def monotonic(self) -> float:
        """Seconds since the clock was made."""
        return self._now

    def time_ms(self) -> int:
        """Milliseconds since the epoch."""
        return self._start_ms + round(self._now * 1000)

    def advance(self, seconds: float) -> None:
        """Move on, and wake all who wait, so that they see what is due. Raises ValueError for a negative number."""
        if seconds < 0:
            raise ValueError(f"A clock cannot go back by {-seconds} s")
        with ExitStack() as held:
            # All of them first: who measures how long to wait does so before or after the move, never around it.
            with self._lock:
                conditions = list(self._conditions)
            for condition in conditions:
                held.enter_context(condition)
            self._now += seconds
            for condition in conditions:
                condition.notify_all()

    def wait(self, condition: threading.Condition, timeout_s: float) -> None:
        """Wait, with ``condition`` held, until it is notified or the clock has moved on by ``timeout_s``."""
        with self._lock:
            if condition not in self._conditions:
                self._conditions.append(condition)
        if timeout_s <= 0:
            return
        if self._auto_advance:
            self._now += timeout_s
        elif not condition.wait(self._hang_s):
            raise TimeoutError(
                f"Waited {self._hang_s} real seconds for {timeout_s} s of a FakeClock that nobody advanced: call "
                "advance() from another thread, or make the clock with auto_advance=True"
            )


def eventually(condition: Callable[[], T], timeout_s: float = 10, what: str = "") -> T:
    """The first true value that ``condition`` gives; it is asked again and again, at short intervals.

    Args:
        condition: called in this thread; may do work of its own, like polling.
        timeout_s: real seconds.
        what: what is waited for, in words, for the error.

    Raises AssertionError when there is none within ``timeout_s``.
    """
    end = time.monotonic() + timeout_s
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() >= end:
            raise AssertionError(f"Not within {timeout_s} s: {what or condition}; the last answer was {value!r}")
        time.sleep(0.002)
