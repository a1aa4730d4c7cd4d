"""Runs taken records, one at a time, in a thread of its own, so that the poll thread never waits for a task."""

import logging
import queue
import threading
from dataclasses import dataclass

from kser.transport import Record
from kser.worker.offsets import PartitionState
from kser.worker.runner import Outcome, Runner

__all__ = ["Executor", "Finished"]

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Finished:
    """One record that was run. ``outcome`` is None when it was not: its partition was closed before its turn came."""

    state: PartitionState
    record: Record
    outcome: Outcome | None


class Executor:
    """One thread that runs records in the order they are handed over.

    Thread rule: submit(), hold(), release() and stop() belong to the poll thread; ``finished`` is a queue it reads.
    """

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._todo: queue.SimpleQueue[list[tuple[PartitionState, Record]] | None] = queue.SimpleQueue()
        self._open = threading.Event()
        self._open.set()
        #: What has been run, in order.
        self.finished: queue.SimpleQueue[Finished] = queue.SimpleQueue()
        #: The record in hand, or None.
        self.running: tuple[PartitionState, Record] | None = None
        self._thread = threading.Thread(target=self._work, name="kser-executor", daemon=True)
        self._thread.start()

    @property
    def doing(self) -> str:
        """What is being run, ``entrypoint[uuid]``, or ""."""
        return self._runner.doing if self.running is not None else ""

    def submit(self, records: list[tuple[PartitionState, Record]]) -> None:
        """Run these after what was handed over before. Each comes back in ``finished``."""
        self._todo.put(records)

    def hold(self) -> None:
        """Start nothing more until release(); what runs goes on."""
        self._open.clear()

    def release(self) -> None:
        """Start again."""
        self._open.set()

    def stop(self, timeout_s: float) -> bool:
        """End the thread once it has nothing to do; False when it is still busy after ``timeout_s``."""
        self._todo.put(None)
        self._open.set()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _work(self) -> None:
        while (chunk := self._todo.get()) is not None:
            for state, record in chunk:
                self._open.wait()
                if state.closed:
                    self.finished.put(Finished(state, record, None))
                    continue
                self.running = (state, record)
                try:
                    outcome: Outcome | None = self._runner.run(record)
                except Exception:
                    # A fault of kser itself, not of the task. Unsettled, so that a worker with the cure runs it again.
                    logger.exception("Record %s/%s/%s broke the worker", record.topic, record.partition, record.offset)
                    outcome = Outcome("broken")
                # In this order: whoever sees nothing running finds the last one in ``finished``.
                self.finished.put(Finished(state, record, outcome))
                self.running = None
