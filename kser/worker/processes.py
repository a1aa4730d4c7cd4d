"""Several workers of one group as processes of one parent: started, stopped and, when they die, started again.

Each is a process of its own from the start, never a fork: the Kafka client has threads. A child gets a pipe as its
standard input, which ends with the parent, and stops when that ends: nothing is left behind, however the parent dies.
"""

import logging
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from typing import Final

from kser.worker.shutdown import stopping_on_signals

__all__ = ["Processes"]

logger = logging.getLogger(__name__)

#: First and longest wait before a child that died is started again, in seconds; a child that lived this long is new.
_BACKOFF_S: Final = 1.0
_LONGEST_S: Final = 60.0
#: What a child gets to end beyond its own budget, in seconds, before it is killed.
_MARGIN_S: Final = 45.0
#: How often the children are looked at, in seconds.
_LOOK_S: Final = 0.1


class _Child:
    """One place among the children."""

    def __init__(self, number: int, command: Sequence[str]) -> None:
        self.number = number
        self.command = list(command)
        self.process: subprocess.Popen[bytes] | None = None
        self.started = 0.0
        self.due = 0.0
        self.backoff_s = _BACKOFF_S

    def start(self) -> None:
        self.process = subprocess.Popen(self.command, stdin=subprocess.PIPE)  # noqa: S603 - the caller's own
        self.started = time.monotonic()
        logger.info("Process %d started: %d", self.number, self.process.pid)


class Processes:
    """Runs commands as child processes until it is asked to stop.

    Args:
        commands: one for each child. A child must end when its standard input does.
        drain_s: what a child may take to end by itself.
        ended: exit codes of a child that no restart cures: then all are stopped.

    Thread rule: run() belongs to the main thread, because of the signals; stop() may be called from anywhere.
    """

    def __init__(self, commands: Sequence[Sequence[str]], *, drain_s: float, ended: Sequence[int] = (1, 2, 3)) -> None:
        self._children = [_Child(number, command) for number, command in enumerate(commands)]
        self._drain_s = drain_s
        self._ended = frozenset(ended)
        self._asked = 0
        self._changed = threading.Event()

    def stop(self) -> None:
        """Ask the children to end; a second time: not to wait for their tasks."""
        self._asked += 1
        self._changed.set()

    def run(self) -> int:
        """Start all, and keep them running. Gives 0 once all ended after stop() or SIGTERM, else a child's code."""
        code = 0
        try:
            with stopping_on_signals(self.stop):
                for child in self._children:
                    child.start()
                while not self._asked:
                    for child in self._children:
                        code = code or self._look(child)
                    if code:
                        break
                    self._changed.wait(_LOOK_S)
                codes = self._end()
        finally:
            self._kill()
        return code or next((each for each in codes if each), 0)

    def _look(self, child: _Child) -> int:
        """Start a child again that died, when it is time. Its exit code when that would not help."""
        now = time.monotonic()
        if child.process is None:
            if now >= child.due:
                child.start()
            return 0
        code = child.process.poll()
        if code is None:
            return 0
        self._let_go(child)
        if code in self._ended:
            logger.error(
                "Process %d ended with exit code %d, which starting it again does not cure", child.number, code
            )
            return code
        if now - child.started >= _LONGEST_S:
            child.backoff_s = _BACKOFF_S
        child.due = now + child.backoff_s
        logger.error("Process %d %s; it is started again in %g s", child.number, exit_text(code), child.backoff_s)
        child.backoff_s = min(child.backoff_s * 2, _LONGEST_S)
        return 0

    def _end(self) -> list[int]:
        """Ask the children to end and wait for it; their exit codes."""
        said = 0
        codes: list[int] = []
        end = time.monotonic() + self._drain_s + _MARGIN_S
        while any(child.process is not None for child in self._children) and time.monotonic() < end:
            wanted = max(self._asked, 1)
            while said < wanted:
                said += 1
                self._signal(lambda process: process.send_signal(signal.SIGTERM))
            for child in self._children:
                if child.process is not None and (code := child.process.poll()) is not None:
                    self._let_go(child)
                    if code:
                        logger.warning("Process %d %s", child.number, exit_text(code))
                    codes.append(code if code >= 0 else 1)
            self._changed.clear()
            self._changed.wait(_LOOK_S)
        return codes

    def _signal(self, send: Callable[[subprocess.Popen[bytes]], None]) -> None:
        for child in self._children:
            if child.process is not None and child.process.poll() is None:
                send(child.process)

    def _kill(self) -> None:
        for child in self._children:
            if child.process is not None:
                if child.process.poll() is None:
                    logger.error("Process %d did not end in time: killed", child.number)
                    child.process.kill()
                    child.process.wait(10)
                self._let_go(child)

    def _let_go(self, child: _Child) -> None:
        process, child.process = child.process, None
        if process is not None and process.stdin is not None:
            process.stdin.close()


def exit_text(code: int) -> str:
    """How a process ended, in words."""
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"
