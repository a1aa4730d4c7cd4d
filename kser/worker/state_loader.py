"""StateLoader: reads the keyed state of partitions in threads of its own, so that the poll thread never waits for it.

A partition whose first claim has come is held back until its state is here. While no broker answers it stays held back,
and the others go on.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Final

from kser.errors import Error, TransportError
from kser.transport import Partition
from kser.worker.offsets import PartitionState
from kser.worker.state import LoadedState, StateStore

__all__ = ["StateLoader"]

logger = logging.getLogger(__name__)

#: Seconds until the state is asked for again, at first and at most.
_AGAIN_S: Final = 0.5
_LONGEST_AGAIN_S: Final = 10.0


class StateLoader:
    """Loads the state of partitions as it is asked for.

    Thread rule: belongs to the poll thread.

    Args:
        store: where the state goes.
        wake: called from any thread when a state is here, or cannot be had.
    """

    def __init__(self, store: StateStore, wake: Callable[[], object]) -> None:
        self._store = store
        self._wake = wake
        #: Partitions that wait for their state.
        self.loading: set[Partition] = set()
        #: Partitions whose state is here.
        self.loaded: set[Partition] = set()
        self._answers: deque[tuple[PartitionState, LoadedState | Error]] = deque()

    def start(self, state: PartitionState) -> None:
        """Load the state of this partition; it is ``loading`` until collect() tells of it."""
        if state.of not in self.loading:
            self.loading.add(state.of)
            threading.Thread(target=self._read, args=[state], name="kser-state", daemon=True).start()

    def collect(self) -> list[Partition]:
        """The partitions whose state is here now. Raises the Error because of which one can never be had."""
        ready: list[Partition] = []
        while self._answers:
            state, answer = self._answers.popleft()
            if state.gone:
                continue
            self.loading.discard(state.of)
            if isinstance(answer, Error):
                raise answer
            self._store.take_in(answer)
            self.loaded.add(state.of)
            ready.append(state.of)
        return ready

    def drop(self, partitions: Iterable[Partition]) -> None:
        """Forget those that were let go of, once their states are ``gone``."""
        partitions = list(partitions)
        self.loading.difference_update(partitions)
        self.loaded.difference_update(partitions)
        self._store.drop(partitions)

    def _read(self, state: PartitionState) -> None:
        wait_s, said = _AGAIN_S, False
        while not state.closed:
            try:
                answer: LoadedState | Error = self._store.read([state.of])
            except TransportError as exc:
                if not said:
                    said = True
                    logger.warning("%s/%s waits for the state of its keys, others go on: %s", *state.of, exc.message)
                time.sleep(wait_s)
                wait_s = min(2 * wait_s, _LONGEST_AGAIN_S)
                continue
            except Error as exc:
                answer = exc
            except Exception as exc:  # a fault of kser itself: the worker must not wait for it for ever
                logger.exception("Reading the state of %s/%s failed", *state.of)
                answer = TransportError(f"The state of {state.of.topic}/{state.of.partition} cannot be read: {exc!r}")
            self._answers.append((state, answer))
            self._wake()
            return
