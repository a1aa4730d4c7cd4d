"""Consumer that takes messages over HTTP, where the other drivers take them from Kafka."""

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Final

from flask import Blueprint, Flask

from kser import headers
from kser.controller import Controller
from kser.errors import ConfigurationError, Error, NotFound, ValidationError
from kser.http.endpoint import Take, endpoint, handing_to
from kser.http.serving import DEFAULT_PORT, Server
from kser.http.wire import Posted
from kser.producer import BaseProducer
from kser.results import Result, from_exception
from kser.sequencing.itinerary import Itinerary
from kser.sequencing.registry import OperationRegistry
from kser.worker.shutdown import stopping_on_signals

__all__ = ["Consumer"]

_OPTIONS: Final = frozenset({"host", "port", "token", "threads"})
#: A server nobody called for so long is idle, in seconds.
_IDLE_S: Final = 0.2
_LOOK_S: Final = 0.05


class Consumer:
    """Takes messages that a `kser.http.producer.Producer` posts, and runs them, or hands them to another producer.

    Without ``producer`` a message is run through REGISTRY before the request is answered, and the answer says that it
    was run: killed in between, the sender gets an error and sends it again under the same uuid. Nothing is sent on from
    here, so a step of an operation is refused, and so is what has a delay or an idempotency key; the message of an
    operation itself (`Operation.send()`) runs all of it. With ``producer`` what is taken goes to its broker.

    Args:
        config: ``host`` (default 127.0.0.1), ``port`` (5000; 0 takes a free one), ``token`` (needed for any other host
            than this machine) and ``threads`` (16), which is how many messages run at a time.
        topics: topics that messages may name; those for others are refused.
        producer: where they go instead of being run here. Whoever made it closes it.

    Raises ConfigurationError for an option that does not exist, or cannot be.
    """

    #: What runs the messages: set it on the instance to ``registry.controller``, or to the registry.
    REGISTRY: ClassVar[type[Controller] | Controller | OperationRegistry] = Controller

    _logger: ClassVar[logging.Logger] = logging.getLogger(__name__)

    def __init__(
        self, config: Mapping[str, Any] | None = None, topics: Sequence[str] = (), producer: BaseProducer | None = None
    ) -> None:
        options = dict(config or {})
        if unknown := sorted(map(str, set(options) - _OPTIONS)):
            raise ConfigurationError(f"Unknown option {', '.join(unknown)}: there are {', '.join(sorted(_OPTIONS))}")
        self.topics = [topics] if isinstance(topics, str) else list(topics)
        self._host = str(options.get("host") or "127.0.0.1")
        self._port = _number(options, "port", DEFAULT_PORT)
        self._token = options.get("token")
        self._threads = _number(options, "threads", 16)
        self._hand: Take | None = handing_to(producer) if producer is not None else None
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._running = 0
        self._last = time.monotonic()
        #: Where run() listens; "" before that.
        self.url = ""

    def blueprint(self) -> Blueprint:
        """The endpoint alone, for a Flask program of one's own: ``app.register_blueprint(consumer.blueprint())``."""
        return endpoint(self._take, token=self._token)

    def run(self, *, until_idle: bool = False) -> None:
        """Serve the endpoint until SIGTERM, SIGINT or stop(). Blocks.

        Args:
            until_idle: return as well once nobody has called for 0.2 s.

        Raises ConfigurationError when it may not, or cannot, listen there.
        """
        app = Flask(__name__)
        app.register_blueprint(self.blueprint())
        server = Server(app, host=self._host, port=self._port, token=self._token, threads=self._threads)
        self._logger.info("%s.Starting... on %s", type(self).__name__, server.url)
        self._last = time.monotonic()
        with server, stopping_on_signals(self._stop.set):
            self.url = server.url
            while not self._stop.wait(_LOOK_S) and not (until_idle and self._idle):
                if not server.alive:
                    raise ConfigurationError(f"The server on {self.url} has ended; the log says why")

    def stop(self) -> None:
        """Ask run() to end. From any thread."""
        self._stop.set()

    @property
    def _idle(self) -> bool:
        with self._lock:
            return not self._running and time.monotonic() - self._last >= _IDLE_S

    def _take(self, messages: Sequence[Posted]) -> list[Result]:
        with self._lock:
            self._running += 1
        try:
            for topic in dict.fromkeys(message.topic for message in messages):
                if topic not in self.topics:
                    raise NotFound(f"Nothing takes topic {topic!r} here: there is {', '.join(self.topics) or 'none'}")
            return self._hand(messages) if self._hand is not None else [self._execute(it) for it in messages]
        finally:
            with self._lock:
                self._running -= 1
                self._last = time.monotonic()

    def _execute(self, posted: Posted) -> Result:
        """Run one message; that it was, whatever came of it, which the log and the hooks of the controller tell."""
        kmsg = posted.kmsg
        try:
            _check_complete(posted)
            raw = kmsg.to_bytes()
        except Error as exc:
            return from_exception(exc, kmsg.uuid)
        # The workers behind the consumers of the other drivers take a registry as well.
        controller = self.REGISTRY.controller if isinstance(self.REGISTRY, OperationRegistry) else self.REGISTRY
        ran = controller.run(raw)
        return Result(uuid=kmsg.uuid, stdout=f"{kmsg.entrypoint}[{kmsg.uuid}] was run, with retcode {ran.retcode}")


def _number(options: Mapping[str, Any], name: str, default: int) -> int:
    """The whole number that an option is, as a number or a text. Raises ConfigurationError."""
    value = options.get(name)
    try:
        return default if value is None else int(value)
    except (TypeError, ValueError):
        raise ConfigurationError(f"{name}={value!r}: give a whole number") from None


def _check_complete(posted: Posted) -> None:
    """Raise ValidationError for what more would belong to than running this message: that takes workers."""
    kmsg, itinerary = posted.kmsg, Itinerary.of(posted.kmsg)
    if itinerary is not None and itinerary.frames:
        what = f"is a step of operation {itinerary.root.uuid}; send the operation itself (Operation.send())"
    elif any(name == headers.NOT_BEFORE for name, _ in posted.headers):
        what = "is to run later; send it without a delay"
    elif any(name == headers.CLAIM for name, _ in posted.headers):
        what = "has an idempotency key; send it without"
    else:
        return
    raise ValidationError(
        f"{kmsg.entrypoint}[{kmsg.uuid}] {what}, or give this Consumer a producer: messages are run here one by one, "
        "and nothing is kept or sent on"
    )
