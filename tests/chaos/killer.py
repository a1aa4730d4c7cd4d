"""A worker that is killed (-9) at a named point of settling: a transport whose sources and sinks do it.

python -m tests.chaos.killer '{"point": "after commit", "after": 5, "bootstrap": ..., see Settings}'
"""

import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

from kser import Worker
from kser.cli import logs
from kser.confluent.transport import ConfluentTransport
from tests.chaos.app import registry

__all__ = ["AT_LEAST_ONCE", "EXACTLY_ONCE", "LETTING_GO", "NOTING", "POINTS", "Options"]

#: Point -> what is called then: (method, "before" it or "after" it). In a transaction that hands something off.
EXACTLY_ONCE = {
    "before begin": (("begin",), "before"),
    "after begin": (("begin",), "after"),
    "after produce": (("produce_all", "produce"), "after"),
    "after send_offsets": (("send_offsets",), "after"),
    "before commit": (("commit",), "before"),
    "after commit": (("commit",), "after"),
}
AT_LEAST_ONCE = {
    "before deliver": (("deliver",), "before"),
    "after deliver": (("deliver",), "after"),
    "before storing offsets": (("commit_later",), "before"),
    "after storing offsets": (("commit_later",), "after"),
}
ON_ASSIGN = {"after reading committed": (("committed",), "after")}
#: That the partitions are being worked on, and that they are let go of, is committed by itself: exactly once in a
#: transaction of offsets alone, at least once by the Source.
NOTING = {
    "before noting that work begins": (("commit",), "before"),
    "after noting that work begins": (("commit",), "after"),
}
LETTING_GO = {
    "before letting go": (("commit",), "before"),
    "after letting go": (("commit",), "after"),
}
POINTS = EXACTLY_ONCE | AT_LEAST_ONCE | ON_ASSIGN | NOTING | LETTING_GO
#: Points of the Source; the others are of the Sink, and those that are noted of either.
OF_SOURCE = {"before storing offsets", "after storing offsets", *ON_ASSIGN}
NOTED = {*NOTING, *LETTING_GO}


class Options(NamedTuple):
    """How this worker runs."""

    bootstrap: str
    topic: str
    group: str
    delivery: str
    properties: dict[str, str]
    name: str | None
    drain_s: float
    settle_limit_s: float = 20
    #: One of POINTS; None: it is not killed.
    point: str | None = None
    #: How many records it must have taken before.
    after: int = 0
    log_level: str = "info"


class _Armed:
    """Counts the records taken, and kills when it is time."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.left = options.after
        self.lock = threading.Lock()
        #: Whether the worker was asked to stop.
        self.stopping: Callable[[], int] = lambda: 0

    def taken(self, count: int) -> None:
        with self.lock:
            self.left -= count

    def reached(self, method: str, when: str, *, source: bool, alone: bool) -> None:
        """Called around each method; does not return when this is the point. ``alone``: nothing but offsets is meant.

        The relay has a source, sinks and threads of its own: it is none of these points.
        """
        point = self.options.point
        if point is None or self.left > 0 or threading.current_thread().name.startswith("kser-relay"):
            return
        methods, wanted = POINTS[point]
        if method not in methods or when != wanted:
            return
        if point in NOTED:
            meant = alone and bool(self.stopping()) is (point in LETTING_GO)
        else:
            meant = (point in OF_SOURCE) is source and not (alone and not source)
        if meant:
            os.kill(os.getpid(), signal.SIGKILL)


class _Through:
    """Passes every call on to ``inner``."""

    SOURCE = False

    def __init__(self, inner: Any, armed: _Armed) -> None:
        self._inner = inner
        self._armed = armed
        #: Whether the transaction under way has offsets and no records.
        self._alone = False

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if not callable(found):
            return found

        def call(*args: Any, **kwargs: Any) -> Any:
            if name in ("produce", "produce_all"):
                self._alone = False
            self._reached(name, "before")
            value = found(*args, **kwargs)
            self._reached(name, "after")
            if name == "begin":
                self._alone = True
            return value

        return call

    def _reached(self, name: str, when: str) -> None:
        alone = self._alone or (self.SOURCE and name == "commit")
        self._armed.reached(name, when, source=self.SOURCE, alone=alone)


class _Source(_Through):
    SOURCE = True

    def poll(self, *args: Any) -> Any:
        records = self._inner.poll(*args)
        self._armed.taken(len(records))
        return records

    def commit_later(self, positions: Any, on_stored: Any) -> None:
        """It is over when it tells so, and nobody has heard it yet."""

        def stored(error: Any) -> None:
            self._reached("commit_later", "after")
            on_stored(error)

        self._reached("commit_later", "before")
        self._inner.commit_later(positions, stored)


class KillingTransport(ConfluentTransport):
    """Kafka, and death at the point."""

    def __init__(self, config: dict[str, Any], options: Options) -> None:
        super().__init__(config)
        self.armed = _Armed(options)

    def source(self, *args: Any, **kwargs: Any) -> Any:
        return _Source(super().source(*args, **kwargs), self.armed)

    def sink(self, *args: Any, **kwargs: Any) -> Any:
        return _Through(super().sink(*args, **kwargs), self.armed)


def main() -> None:
    """Run it until SIGTERM, or until it is killed."""
    options = Options(**json.loads(sys.argv[1]))
    logs.configure(options.log_level, chosen=True)
    config = {**options.properties, "bootstrap.servers": options.bootstrap}
    transport = KillingTransport(config, options)
    worker = Worker(
        registry,
        topics=[options.topic],
        group=options.group,
        transport=transport,
        name=options.name,
        delivery=options.delivery,  # type: ignore[arg-type]  # checked by Worker
        drain_s=options.drain_s,
        settle_limit_s=options.settle_limit_s,
    )
    transport.armed.stopping = lambda: worker.stopping
    worker.run()


if __name__ == "__main__":
    main()
