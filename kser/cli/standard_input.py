"""Standard input as a leash: a command stops when its parent has gone, or asks it to."""

import io
import logging
import os
import sys
import threading
from collections.abc import Callable

__all__ = ["stop_with_stdin"]

logger = logging.getLogger(__name__)


def stop_with_stdin(stopping: Callable[[], int], stop: Callable[[], None]) -> None:
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
