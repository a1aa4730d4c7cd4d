"""How much a task may tell: pure rules, measured on a clock that the caller gives (seconds, never going back)."""

from collections.abc import Hashable
from typing import Final, Generic, TypeVar

__all__ = ["ProgressLimiter", "TokenBucket"]

V = TypeVar("V")


class TokenBucket:
    """At most ``burst`` at once, and ``rate`` a second in the long run.

    Within any t seconds it lets at most ``burst + rate * t`` pass.
    """

    __slots__ = ("_at", "_tokens", "burst", "rate")

    def __init__(self, rate: float, burst: float) -> None:
        self.rate = rate
        self.burst = burst
        self._tokens = float(burst)
        self._at: float | None = None

    def take(self, now: float) -> bool:
        """Whether one more may pass."""
        if self._at is not None:
            self._tokens = min(self._tokens + (now - self._at) * self.rate, self.burst)
        self._at = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True


class ProgressLimiter(Generic[V]):
    """Which reports of progress are sent: of each group one every ``every_s``, of all of them as a bucket lets pass.

    Reports in between are replaced by the next one of their group; the last one of each group is always sent, at the
    latest by rest().

    Args:
        every_s: least seconds between two reports of a group.
        rate: reports a second, of all groups.
        burst: reports at once.
        most: groups there may be; what comes of another one is refused.
    """

    def __init__(self, *, every_s: float = 0.5, rate: float = 20, burst: float = 40, most: int = 1000) -> None:
        self._every_s = every_s
        self._bucket = TokenBucket(rate, burst)
        self._most = most
        #: The newest report of each group that was not sent, in the order in which they began to wait.
        self._waiting: dict[Hashable, V] = {}
        #: When a report of each group was sent last.
        self._sent: dict[Hashable, float] = {}

    @property
    def waiting(self) -> bool:
        """Whether anything waits to be sent."""
        return bool(self._waiting)

    def offer(self, group: Hashable, report: V) -> bool:
        """Take a report; False when there are too many groups."""
        if group not in self._sent:
            if len(self._sent) >= self._most:
                return False
            self._sent[group] = _NEVER
        self._waiting[group] = report
        return True

    def due(self, now: float) -> list[V]:
        """Those that may be sent now: the caller does so."""
        ready = [group for group in self._waiting if now - self._sent[group] >= self._every_s]
        found = []
        for group in ready:
            if not self._bucket.take(now):
                break
            found.append(self._waiting.pop(group))
            self._sent[group] = now
        return found

    def rest(self) -> list[V]:
        """All that were not sent: nothing more comes."""
        found = list(self._waiting.values())
        self._waiting.clear()
        return found


_NEVER: Final = float("-inf")
