"""A recorder beside what a command does: in a thread of its own, for as long as a block lasts."""

import contextlib
import logging
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

from kser.errors import ConfigurationError, Error
from kser.transport import Transport

if TYPE_CHECKING:
    from kser.storage.recorder import Recorder
    from kser.storage.sql import SqlStorage

__all__ = ["recording"]

logger = logging.getLogger(__name__)

#: What a recorder gets to end, in seconds.
_END_S = 15.0
#: Seconds before it is started again when broker or database did not answer.
_AGAIN_S = 2.0


@contextlib.contextmanager
def recording(transport: Transport, storage: "SqlStorage", group: str) -> Iterator[None]:
    """While the block runs, what the workers of this group tell is put into the storage, which has its tables.

    A broker or database that is away is waited for. What else ends the recorder is logged; the block goes on without.
    """
    thread = _Recording(transport, storage, group)
    thread.start()
    try:
        yield
    finally:
        thread.stop()


class _Recording(threading.Thread):
    """Runs a recorder, and another one when that lost its broker."""

    def __init__(self, transport: Transport, storage: "SqlStorage", group: str) -> None:
        super().__init__(name="kser-recorder", daemon=True)
        self._transport = transport
        self._storage = storage
        self._group = group
        self._ended = threading.Event()
        self._recorder: Recorder | None = None

    def run(self) -> None:
        """Record until stop()."""
        from kser.storage.recorder import Recorder  # here: it loads SQL

        while not self._ended.is_set():
            self._recorder = Recorder(self._transport, self._storage, group=self._group)
            try:
                if not self._ended.is_set():  # stop() may have come before there was a recorder to be stopped
                    self._recorder.run()
            except ConfigurationError as exc:
                logger.error("Nothing is recorded of group %s: %s", self._group, exc.message)
                return
            except Error as exc:
                logger.warning("The recorder of group %s starts again: %s", self._group, exc.message)
                self._ended.wait(_AGAIN_S)
            except Exception:
                logger.exception("Nothing is recorded any more of group %s", self._group)
                return

    def stop(self) -> None:
        """Have it end after the batch at hand, and wait for that."""
        self._ended.set()
        if self._recorder is not None:
            self._recorder.stop()
        self.join(_END_S)
        if self.is_alive():
            logger.warning("The recorder of group %s did not end within %g s and is left behind", self._group, _END_S)
