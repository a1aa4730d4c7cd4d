"""SIGTERM and SIGINT ask a worker to stop; a second one asks it not to wait. So does a parent, by standard input."""

import contextlib
import faulthandler
import io
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

__all__ = ["end_within", "obey_stdin", "stopping_on_signals"]

logger = logging.getLogger(__name__)


@contextmanager
def stopping_on_signals(stop: Callable[[], None]) -> Iterator[None]:
    """Within the block SIGTERM and SIGINT call ``stop``; the handlers from before are put back at its end.

    Signals belong to the main thread: in any other one the block changes nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - the interface of signal handlers
        stop()

    before: dict[int, Any] = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def obey_stdin(stopping: Callable[[], int], stop: Callable[[], None]) -> None:
    """Have ``stop`` called for each byte of stdin and for its end, unless a signal has asked as often already.

    Args:
        stopping: how often it has been asked.
        stop: asks once more.
    """

    def listen() -> None:
        told = 0
        while read := _read_stdin():
            told += len(read)
            while stopping() < told:
                stop()
        logger.info("Standard input has ended")
        if not stopping():
            stop()

    threading.Thread(target=listen, name="kser-stdin", daemon=True).start()


def _read_stdin() -> bytes:
    try:
        # Not through sys.stdin: Python aborts when it ends while a thread waits there, holding its lock.
        return os.read(sys.stdin.fileno(), 1)
    except io.UnsupportedOperation:
        return sys.stdin.buffer.read(1)  # in tests it is no file
    except (AttributeError, OSError, ValueError):
        return b""  # closed, or its terminal is gone


def end_within(seconds: float) -> None:
    """End this process with code 1 after so long, whatever hangs, and say where; until that is cancelled.

    Closing a consumer hung once for good inside the Kafka client, with Python's lock in its hands (it was assigned
    partitions while it closed): nothing but a thread of C can end such a process.
    """
    stderr = sys.__stderr__
    if stderr is not None:
        with contextlib.suppress(OSError, ValueError):  # it is closed
            faulthandler.dump_traceback_later(seconds, exit=True, file=stderr)
