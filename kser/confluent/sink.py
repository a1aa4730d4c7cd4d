"""ConfluentSink: writes records with confluent-kafka, in transactions when it has a transactional id."""

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final

from confluent_kafka import KafkaError, KafkaException, Message, Producer, TopicPartition

from kser.confluent.config import new_client
from kser.confluent.errors import kafka_error, kafka_errors, too_large, translate, unanswered
from kser.confluent.logs import ClientState, logger
from kser.confluent.source import ConfluentMember
from kser.errors import ConfigurationError, Error, FencedError, GroupError, TransportError
from kser.transport import DeliveryCallback, GroupMember, OutRecord, Position

__all__ = ["ConfluentSink"]

#: Longest wait for room in a full buffer: by then not one message was confirmed in all that time.
_ROOM_S: Final = 30.0
#: Longest wait for the coordinator when the first transaction begins.
_INIT_S: Final = 30.0
#: How long one try of send_offsets() may take, and how many there are. librdkafka#5456: it may take longer.
_OFFSETS_S: Final = 5.0
_OFFSETS_TRIES: Final = 3
#: Before an abort, what is on its way gets this long to be registered (librdkafka#4849).
_BEFORE_ABORT_S: Final = 5.0


class ConfluentSink:
    """Writes records. Implements kser.transport.Sink, whose docstrings say what each method does.

    May be shared by threads; a transaction belongs to one thread at a time. An ``on_delivery`` callback must not call
    poll() or flush() of its own sink (they do nothing there), and may call produce().

    Args:
        config: of producer_config(): librdkafka properties, with ``transactional.id`` for transactions.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = config
        self._id: str | None = config.get("transactional.id")
        what = f"transactional producer {self._id}" if self._id else "producer"
        self._state = ClientState(what, str(config["bootstrap.servers"]))
        self._limit = int(config.get("message.max.bytes", 1_000_000))
        #: Deliveries that failed and had no on_delivery to tell, and why the first of them did.
        self.failed = 0
        self.first_failure: Error | None = None
        self._lock = threading.Lock()
        self._local = threading.local()
        self._escaped: BaseException | None = None
        self._producer: Producer | None = new_client(Producer, {**config, "on_delivery": self._unclaimed}, self._state)
        self._initialised = False
        self._open = False
        #: send_offsets() failed: a commit would store the records without the offsets.
        self._offsets_missing = False
