"""Bounds for calls of the client that know none: Consumer.commit(), Consumer.close(), Producer.close()."""

import contextvars
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

from confluent_kafka import cimpl

__all__ = ["Aside"]

#: By what confluent-kafka 2.16 tells which thread uses a Consumer; older ones have no such gate.
_gate: contextvars.ContextVar[int] | None = getattr(cimpl, "_reentry_identity_var", None)


class _Call:
    """One call, from its order to its outcome."""

    __slots__ = ("done", "error", "function", "owner", "value")

    def __init__(self, function: Callable[[], Any]) -> None:
        self.function = function
        self.owner = threading.get_ident()
        #: Held until the outcome is there.
        self.done = threading.Lock()
        self.done.acquire()
        self.value: Any = None
        self.error: BaseException | None = None


class Aside:
    """Runs calls in a thread of its own for an owner who waits only so long for each. One thread uses it.

    Its thread is started by the first call and ends with close(), or with the one who has it.
    """

    def __init__(self) -> None:
        self._orders: queue.SimpleQueue[_Call | None] | None = None
        #: The last call, when it took longer than it was waited for.
        self._overdue: _Call | None = None

    def __del__(self) -> None:
        self.close()

    def call(self, function: Callable[[], Any], timeout_s: float) -> Any:
        """What ``function`` gives or raises. TimeoutError when it takes longer, or one before it still does."""
        end = time.monotonic() + timeout_s
        if self._overdue is not None and not _ended(self._overdue, timeout_s):
            raise TimeoutError
        if self._orders is None:
            self._orders = queue.SimpleQueue()
            threading.Thread(target=_work, args=(self._orders,), name="kser-kafka-call", daemon=True).start()
        self._overdue = call = _Call(function)
        self._orders.put(call)
        if not _ended(call, end - time.monotonic()):
            raise TimeoutError
        self._overdue = None
        if call.error is not None:
            raise call.error
        return call.value

    @property
    def overdue(self) -> bool:
        """Whether a call that took longer than it was waited for is still under way."""
        return self._overdue is not None and self._overdue.done.locked()

    def close(self) -> None:
        """Let the thread end, once the call under way has. A later call() starts another one."""
        orders, self._orders = self._orders, None
        if orders is not None:
            orders.put(None)


def _work(orders: "queue.SimpleQueue[_Call | None]") -> None:
    while (call := orders.get()) is not None:
        if _gate is not None:
            _gate.set(call.owner)  # the owner waits for this call, so it counts as the owner's own
        try:
            call.value = call.function()
        except BaseException as exc:  # noqa: BLE001 - raised in the owner's thread
            call.error = exc
        call.done.release()
        del call  # it holds what the function needs, until the next one comes


def _ended(call: _Call, timeout_s: float) -> bool:
    if not call.done.acquire(timeout=max(timeout_s, 0)):
        return False
    call.done.release()
    return True
