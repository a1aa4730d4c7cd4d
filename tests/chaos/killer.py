"""A worker that is killed (-9) at a named point of settling: a transport whose sources and sinks do it.

python -m tests.chaos.killer '{"point": "after commit", "after": 5, "bootstrap": ..., see Settings}'
"""

import json
import os
import signal
import sys
import threading
from typing import Any, NamedTuple

from kser import Worker
from kser.cli import logs
from kser.confluent.transport import ConfluentTransport
from tests.chaos.app import registry

__all__ = ["AT_LEAST_ONCE", "EXACTLY_ONCE", "NOTING", "POINTS", "Options"]

#: Point -> what is called then: (method, "before" it or "after" it).
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
    "before storing offsets": (("commit", "commit_later"), "before"),
    "after storing offsets": (("commit", "commit_later"), "after"),
}
ON_ASSIGN = {"after reading committed": (("committed",), "after")}
#: Exactly once the only commit of a Source while partitions stay: that they are being worked on.
NOTING = {
    "before noting that work begins": (("commit",), "before"),
    "after noting that work begins": (("commit",), "after"),
}
POINTS = EXACTLY_ONCE | AT_LEAST_ONCE | ON_ASSIGN | NOTING
#: Points of the Source; the others are of the Sink.
OF_SOURCE = {"before storing offsets", "after storing offsets", *ON_ASSIGN, *NOTING}


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

    def taken(self, count: int) -> None:
        with self.lock:
            self.left -= count

    def reached(self, method: str, when: str, *, source: bool) -> None:
        """Called around each method; does not return when this is the point."""
        point = self.options.point
        if point is None or self.left > 0 or (point in OF_SOURCE) is not source:
            return
        methods, wanted = POINTS[point]
        if method in methods and when == wanted:
            os.kill(os.getpid(), signal.SIGKILL)


class _Through:
    """Passes every call on to ``inner``."""

    SOURCE = False

    def __init__(self, inner: Any, armed: _Armed) -> None:
        self._inner = inner
        self._armed = armed

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if not callable(found):
            return found

        def call(*args: Any, **kwargs: Any) -> Any:
            self._armed.reached(name, "before", source=self.SOURCE)
            value = found(*args, **kwargs)
            self._armed.reached(name, "after", source=self.SOURCE)
            return value

        return call


class _Source(_Through):
    SOURCE = True

    def poll(self, *args: Any) -> Any:
        records = self._inner.poll(*args)
        self._armed.taken(len(records))
        return records

    def commit_later(self, positions: Any, on_stored: Any) -> None:
        """It is over when it tells so, and nobody has heard it yet."""

        def stored(error: Any) -> None:
            self._armed.reached("commit_later", "after", source=True)
            on_stored(error)

        self._armed.reached("commit_later", "before", source=True)
        self._inner.commit_later(positions, stored)


class KillingTransport(ConfluentTransport):
    """Kafka, and death at the point."""

    def __init__(self, config: dict[str, Any], options: Options) -> None:
        super().__init__(config)
        self._armed = _Armed(options)

    def source(self, *args: Any, **kwargs: Any) -> Any:
        return _Source(super().source(*args, **kwargs), self._armed)

    def sink(self, *args: Any, **kwargs: Any) -> Any:
        return _Through(super().sink(*args, **kwargs), self._armed)


def main() -> None:
    """Run it until SIGTERM, or until it is killed."""
    options = Options(**json.loads(sys.argv[1]))
    logs.configure(options.log_level, chosen=True)
    config = {**options.properties, "bootstrap.servers": options.bootstrap}
    Worker(
        registry,
        topics=[options.topic],
        group=options.group,
        transport=KillingTransport(config, options),
        name=options.name,
        delivery=options.delivery,  # type: ignore[arg-type]  # checked by Worker
        drain_s=options.drain_s,
        settle_limit_s=options.settle_limit_s,
    ).run()


if __name__ == "__main__":
    main()
