"""What librdkafka says on its own: log lines and client-level errors, brought to Python logging without spam."""

import logging
import re
import threading
import time
from collections.abc import Callable

from confluent_kafka import KafkaError

from kser.confluent.errors import REFUSED, translate
from kser.errors import Error

__all__ = ["ClientState", "QuietLog", "logger"]

#: Everything of the Kafka client is logged here.
logger = logging.getLogger("kser.confluent")

#: Seconds in which lines that differ in numbers only are logged once: a dead broker is tried again for ever.
REPEAT_AFTER_S = 60.0
#: Seconds for which a refusal counts; the client tries again every 10 s at most and is refused anew.
REFUSED_FOR_S = 15.0
#: Different lines remembered; beyond it all are forgotten, which costs a repeated line and no memory.
_REMEMBERED = 500
_NUMBERS = re.compile(r"\d+")


class QuietLog:
    """The logger given to a client: passes each kind of line once a minute, with the number held back since.

    May be called from any thread. Never raises: an exception in a callback of librdkafka comes out garbled.

    Args:
        clock: seconds, for tests.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        #: kind of line -> when it was logged last, and how many were held back since.
        self._seen: dict[tuple[str, str], tuple[float, int]] = {}

    def log(self, level: int, text: str, *args: object) -> None:
        """Called by confluent-kafka with ``"%s [%s] %s", facility, client, line``, or by kser with any text."""
        try:
            self._log(level, text, args)
        except Exception:
            logger.exception("A line of the Kafka client could not be logged")

    def _log(self, level: int, text: str, args: tuple[object, ...]) -> None:
        # What needs a decision comes as an exception; what librdkafka calls an error it goes on to cure by itself.
        level = min(level, logging.WARNING)
        if not logger.isEnabledFor(level):
            return
        line = text % args if args else text
        held = self._held_back((str(args[0]) if args else "", _NUMBERS.sub("#", line)))
        if held is None:
            return
        logger.log(level, "%s%s", line, f" ({held} more like it since)" if held else "")

    def _held_back(self, kind: tuple[str, str]) -> int | None:
        """How many of this kind were held back, or None when this one is to be held back too."""
        now = self._clock()
        with self._lock:
            last, held = self._seen.get(kind, (-REPEAT_AFTER_S, 0))
            if now - last < REPEAT_AFTER_S:
                self._seen[kind] = (last, held + 1)
                return None
            if len(self._seen) >= _REMEMBERED:
                self._seen.clear()
            self._seen[kind] = (now, 0)
            return held


class ClientState:
    """Whether the brokers answer one client, told by its error callback: said once a change, not once an event.

    Args:
        what: the client in logs and errors, e.g. ``consumer of group shop``.
        brokers: its ``bootstrap.servers``.
    """

    def __init__(self, what: str, brokers: str) -> None:
        #: For the client's own lines, and for what may repeat.
        self.quiet = QuietLog()
        self._what = what
        self._brokers = brokers
        self._down = False
        self._was_up = False
        #: Why the brokers do not let this client in (credentials, certificates), and when they said so last.
        self._refusal: Error | None = None
        self._refused_at = 0.0

    def on_error(self, error: KafkaError) -> None:
        """The client's ``error_cb``. Never raises."""
        if error.code() in REFUSED:
            self._refused_at = time.monotonic()
            if self._refusal is None:
                self._refusal = translate(error, f"Connecting the {self._what} to {self._brokers}")
                logger.error("%s", self._refusal.message)
        elif error.code() == KafkaError._ALL_BROKERS_DOWN:
            if not self._down:
                self._down = True
                logger.warning("The %s reaches no broker of %s: it goes on trying", self._what, self._brokers)
        else:
            self.quiet.log(logging.DEBUG, "%s [%s] %s", error.name(), self._what, error.str())

    def up(self) -> None:
        """Something was answered."""
        self._was_up = True
        if self._down or self._refusal is not None:
            self._down = False
            self._refusal = None
            logger.info("The %s reaches %s again", self._what, self._brokers)

    @property
    def refusal(self) -> Error | None:
        """Why the brokers do not let this client in, while they have never yet: then waiting is no cure.

        Passes when they say it no more, so that a client outlives a hiccup of theirs. Later ones are only logged.
        """
        if self._refusal is None or self._was_up or time.monotonic() - self._refused_at > REFUSED_FOR_S:
            return None
        return self._refusal
