"""Retry: whether a failed task is tried again, and when."""

import math
import zlib
from collections.abc import Collection
from dataclasses import dataclass

from kser.errors import ConfigurationError

__all__ = ["Retry"]


@dataclass(frozen=True, slots=True)
class Retry:
    """How a task that failed on a worker is tried again. Give it to a class: ``retry = Retry(attempts=5)``.

    Attempt n + 1 comes ``backoff_s * factor ** (n - 1)`` seconds after attempt n failed, ``max_s`` at most, give or
    take ``jitter``. Up to 30 s the message waits in its worker, and those of the same key behind it; longer in a topic
    of the group, and then those behind it go first, unless the class says ``order = "strict"``.

    A failure between attempts calls no hook, and its operation waits. After the last one the task fails as any other.
    Of an Operation it is what comes before its first task that is tried again: build_tasks() and prerun(). A message
    that no object can be made of, because a constructor or postinit() raises, fails at once.

    Args:
        attempts: how often it is run at most, the first time included.
        backoff_s: seconds before the second attempt.
        factor: each further delay is so many times the one before.
        jitter: a delay is up to this share of it shorter or longer, so that what failed together does not come back
            together. The same message always gets the same.
        max_s: longest delay, in seconds, before the jitter.
        retry_on: exception classes; an exception of another one is final. A task that returns a failed Result is tried
            again when Exception is among them.
        give_up_on: exception classes that are final, even when ``retry_on`` has them.

    Raises ConfigurationError for values that cannot be.
    """

    attempts: int = 3
    backoff_s: float = 1.0
    factor: float = 2.0
    jitter: float = 0.1
    max_s: float = 3600.0
    retry_on: Collection[type[BaseException]] = (Exception,)
    give_up_on: Collection[type[BaseException]] = ()

    def __post_init__(self) -> None:
        if isinstance(self.attempts, bool) or not isinstance(self.attempts, int) or self.attempts < 1:
            raise ConfigurationError(f"Retry(attempts={self.attempts!r}): give a whole number from 1")
        for name, least, most in (
            ("backoff_s", 0, math.inf),
            ("factor", 1, math.inf),
            ("jitter", 0, 1),
            ("max_s", 0, math.inf),
        ):
            value = getattr(self, name)
            if (
                isinstance(value, bool)
                or not isinstance(value, (int, float))
                or not least <= value <= most
                or (name in ("backoff_s", "factor") and math.isinf(value))
            ):
                limits = f"from {least}" if most == math.inf else f"from {least} to {most}"
                raise ConfigurationError(f"Retry({name}={value!r}): give a number {limits}")
        for name in ("retry_on", "give_up_on"):
            given = getattr(self, name)
            classes = (given,) if isinstance(given, type) else given
            if not isinstance(classes, Collection) or not all(
                isinstance(each, type) and issubclass(each, BaseException) for each in classes
            ):
                raise ConfigurationError(f"Retry({name}={given!r}): give exception classes, such as (TimeoutError,)")
            object.__setattr__(self, name, tuple(classes))

    def delay_s(self, attempt: int, cause: BaseException | None, uuid: str) -> float | None:
        """Seconds before the next attempt of the task ``uuid``, after this one failed; None when it was the last.

        Args:
            attempt: the one that failed, from 1.
            cause: what it raised; None when it returned a failed Result.
            uuid: of the task.
        """
        if attempt >= self.attempts or not self._wants(cause):
            return None
        try:
            delay = min(self.backoff_s * self.factor ** (attempt - 1), self.max_s)
        except OverflowError:
            delay = self.max_s
        if self.jitter and math.isfinite(delay):
            share = zlib.crc32(f"{uuid}:{attempt}".encode("utf-8", "replace")) / 0xFFFFFFFF  # the same when redelivered
            delay *= 1 + self.jitter * (2 * share - 1)
        return delay

    def _wants(self, cause: BaseException | None) -> bool:
        if cause is None:
            return Exception in self.retry_on
        return isinstance(cause, tuple(self.retry_on)) and not isinstance(cause, tuple(self.give_up_on))
