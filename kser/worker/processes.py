"""Several workers of one group as processes of one parent: started, stopped and, when they die, started again.

Each is a process of its own from the start, never a fork: the Kafka client has threads. A child gets a pipe as its
standard input, which ends with the parent, and stops when that ends: nothing is left behind, however the parent dies.
A byte in the pipe asks it to stop, each further one again. That is no signal, because systemd and terminals send theirs
to all processes at once: a child would count the same request twice, and not drain.
"""

import contextlib
import logging
import signal
import subprocess
import time
from collections.abc import Sequence
from typing import Final

from kser.worker.shutdown import stopping_on_signals

__all__ = ["FAILED", "LEFT", "MISUSE", "TWIN", "Processes"]

logger = logging.getLogger(__name__)

#: Exit codes of a worker that did not end well: a failure, misuse, another worker of its name, tasks left running.
FAILED, MISUSE, TWIN, LEFT = 1, 2, 3, 4
#: First and longest wait before a child that died is started again, in seconds; a child that lived this long is new.
_BACKOFF_S: Final = 1.0
_LONGEST_S: Final = 60.0
#: What a child gets beyond the time after which it ends itself, in seconds, before it is killed.
_MARGIN_S: Final = 10.0
#: How often the children are looked at, in seconds.
_LOOK_S: Final = 0.1


class _Child:
    """One place among the children."""

    def __init__(self, number: int, command: Sequence[str], orders: bytes = b"") -> None:
        self.number = number
        self.command = list(command)
        self.orders = orders
        self.process: subprocess.Popen[bytes] | None = None
        self.started = 0.0
        self.due = 0.0
        self.backoff_s = _BACKOFF_S

    def start(self) -> None:
        """Start it; later, when the system cannot now."""
        self.started = time.monotonic()
        try:
            self.process = subprocess.Popen(  # noqa: S603 - the caller's own
                self.command, stdin=subprocess.PIPE, bufsize=0, start_new_session=True
            )
        except OSError as exc:
            self.again(f"cannot be started ({exc.strerror or exc})")
        else:
            logger.info("Process %d started: %d", self.number, self.process.pid)
            self._tell(self.orders)

    def again(self, why: str) -> None:
        """Have it started again after a while, which grows as long as it does not live."""
        now = time.monotonic()
        if now - self.started >= _LONGEST_S:
            self.backoff_s = _BACKOFF_S
        self.due = now + self.backoff_s
        logger.error("Process %d %s; it is started again in %g s", self.number, why, self.backoff_s)
        self.backoff_s = min(self.backoff_s * 2, _LONGEST_S)

    def ask(self) -> None:
        """Ask it to stop, or once more."""
        self._tell(b"\n")

    def _tell(self, said: bytes) -> None:
        if said and self.process is not None and self.process.stdin is not None:
            with contextlib.suppress(OSError):  # it has just ended
                self.process.stdin.write(said)

    def let_go(self) -> None:
        """It has ended: close its pipe."""
        process, self.process = self.process, None
        if process is not None and process.stdin is not None:
            process.stdin.close()


class Processes:
    """Runs commands as child processes until it is asked to stop.

    Args:
        commands: one for each child. A child must stop when its standard input brings a byte, not wait for its tasks
            when it brings another one, and stop when it ends.
        end_s: what a child may take to end. It watches that itself (Worker.end_s), and says where it hangs; what does
            not even end then is killed a little later.
        orders: what each child finds in its standard input when it starts.
        ended: exit codes of a child that no restart cures: then all are stopped.

    Thread rule: run() belongs to the main thread, because of the signals; stop() may be called from anywhere.
    """

    def __init__(
        self,
        commands: Sequence[Sequence[str]],
        *,
        end_s: float,
        ended: Sequence[int] = (FAILED, MISUSE, TWIN),
        orders: Sequence[bytes] = (),
    ) -> None:
        self._children = [
            _Child(number, command, told)
            for number, (command, told) in enumerate(zip(commands, orders or [b""] * len(commands), strict=True))
        ]
        self._end_s = end_s
        self._ended = frozenset(ended)
        self._asked = 0

    def stop(self) -> None:
        """Ask the children to end; a second time: not to wait for their tasks."""
        # Nothing but a number: a signal handler that wanted a lock might wait for the very code it interrupted.
        self._asked += 1

    @property
    def stopping(self) -> int:
        """How often stop() was called."""
        return self._asked

    def run(self) -> int:
        """Start all, and keep them running. Gives 0 once all ended after stop() or SIGTERM, else a child's code."""
        code = 0
        with stopping_on_signals(self.stop):
            try:
                while not self._asked and not code:
                    for child in self._children:
                        code = code or self._look(child)
                    time.sleep(_LOOK_S)
            finally:
                codes = self._end()
        return code or next((each for each in codes if each), 0)

    def _look(self, child: _Child) -> int:
        """Start a child that does not run, when it is time. Its exit code when that would not help."""
        if child.process is None:
            if time.monotonic() >= child.due and not self._asked:
                child.start()
            return 0
        code = child.process.poll()
        if code is None:
            return 0
        child.let_go()
        if code in self._ended:
            logger.error(
                "Process %d ended with exit code %d, which starting it again does not cure", child.number, code
            )
            return code
        child.again(exit_text(code))
        return 0

    def _end(self) -> list[int]:
        """Ask the children to end, wait for it, kill the rest; their exit codes."""
        said = 0
        codes: list[int] = []
        end = time.monotonic() + self._end_s + _MARGIN_S
        while running := [child for child in self._children if child.process is not None]:
            if time.monotonic() >= end:
                return [*codes, *(_kill(child) for child in running)]
            wanted = max(self._asked, 1)
            for child in running:
                assert child.process is not None
                for _ in range(wanted - said):
                    child.ask()
                if (code := child.process.poll()) is None:
                    continue
                child.let_go()
                if code == -signal.SIGTERM:
                    continue  # somebody told it as well, before it came so far as to listen: nothing to drain
                if code:
                    logger.warning("Process %d %s", child.number, exit_text(code))
                codes.append(code if code >= 0 else 1)
            said = wanted
            time.sleep(_LOOK_S / 2)
        return codes


def _kill(child: _Child) -> int:
    """End a child by force; the exit code that this means for the parent."""
    assert child.process is not None
    logger.error("Process %d did not end in time: killed", child.number)
    child.process.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):  # stuck in the kernel: it ends when that lets it
        child.process.wait(10)
    child.let_go()
    return 1


def exit_text(code: int) -> str:
    """How a process ended, in words."""
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"
