"""Bounds for calls of the client that know none: Consumer.commit(), Consumer.close(), Producer.close()."""

import contextvars
import threading
import time
from collections.abc import Callable
from typing import Any

from confluent_kafka import cimpl

__all__ = ["Aside"]

#: By what confluent-kafka 2.16 tells which thread uses a Consumer; older ones have no such gate.
_gate: contextvars.ContextVar[int] | None = getattr(cimpl, "_reentry_identity_var", None)


class Aside:
    """Runs a call in a thread of its own for an owner who waits only so long for it. One thread uses it."""

    def __init__(self) -> None:
        #: The last call, when it took longer than it was waited for.
        self._overdue: threading.Thread | None = None

    def call(self, function: Callable[[], Any], timeout_s: float) -> Any:
        """What ``function`` gives or raises. TimeoutError when it takes longer, or one before it still does."""
        end = time.monotonic() + timeout_s
        if self._overdue is not None and not _ended(self._overdue, timeout_s):
            raise TimeoutError
        outcome: list[tuple[Any, BaseException | None]] = []
        owner = threading.get_ident()

        def run() -> None:
            if _gate is not None:
                _gate.set(owner)  # the owner waits for this call, so it counts as the owner's own
            try:
                outcome.append((function(), None))
            except BaseException as exc:  # noqa: BLE001 - raised in the owner's thread
                outcome.append((None, exc))

        thread = threading.Thread(target=run, name="kser-kafka-call", daemon=True)
        thread.start()
        self._overdue = thread
        if not _ended(thread, end - time.monotonic()):
            raise TimeoutError
        self._overdue = None
        value, exc = outcome[0]
        if exc is not None:
            raise exc
        return value


def _ended(thread: threading.Thread, timeout_s: float) -> bool:
    thread.join(max(timeout_s, 0))
    return not thread.is_alive()
