"""The clock that the memory transport measures on, so that a test can hold the time in its hand."""

import threading
import time
from typing import Protocol

__all__ = ["Clock", "RealClock"]


class Clock(Protocol):
    """Time, and a way to wait for it. Threads may share it. Tests turn one of their own: `kser.testing.FakeClock`."""

    def monotonic(self) -> float:
        """Seconds since some moment; never goes back."""

    def time_ms(self) -> int:
        """Milliseconds since the epoch, for timestamps."""

    def wait(self, condition: threading.Condition, timeout_s: float) -> None:
        """Wait, with ``condition`` held, until it is notified or ``timeout_s`` is over. May return early."""


class RealClock:
    """The clock of this machine."""

    def monotonic(self) -> float:
        """Seconds since some moment; never goes back."""
        return time.monotonic()

    def time_ms(self) -> int:
        """Milliseconds since the epoch."""
        return time.time_ns() // 1_000_000

    def wait(self, condition: threading.Condition, timeout_s: float) -> None:
        """Wait until ``condition`` is notified or ``timeout_s`` is over."""
        condition.wait(timeout_s)
