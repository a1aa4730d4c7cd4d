"""ConfluentSink: writes records with confluent-kafka, in transactions when it has a transactional id."""

import logging
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import count, islice, repeat
from typing import Any, Final

from confluent_kafka import KafkaError, KafkaException, Message, Producer

from kser.confluent.aside import Aside
from kser.confluent.config import new_client
from kser.confluent.errors import is_fatal, kafka_error, kafka_errors, too_large, translate
from kser.confluent.logs import ClientState, logger
from kser.confluent.numbered import Numbered
from kser.confluent.source import ConfluentMember, message_partition, to_offsets
from kser.errors import DeliveryError, Error, FencedError, GroupError, TransportError, ValidationError
from kser.tracebacks import log_raised
from kser.transport import EXPIRED_SHARE, DeliveryCallback, GroupMember, OutRecord, Position

__all__ = ["ConfluentSink"]

#: Longest wait for room in a full buffer: by then not one message was confirmed in all that time.
_ROOM_S: Final = 30.0
#: Longest wait for the coordinator when the first transaction begins, and for one answer of it.
_INIT_S: Final = 30.0
_INIT_QUESTION_S: Final = 5.0
#: How long one try of send_offsets() may take, and how many there are. librdkafka#5456: it may take longer.
_OFFSETS_S: Final = 5.0
_OFFSETS_TRIES: Final = 3
#: Before an abort, what is on its way gets this long to be registered (librdkafka#4849).
_BEFORE_ABORT_S: Final = 5.0
#: What the client itself may take to end, once nothing is left in it.
_DESTROY_S: Final = 5.0
#: How long the first record of a sink may wait for the client to find the brokers.
_MEETING_S: Final = 0.1
#: Longest single wait of deliver(): after each it looks whether the brokers refuse this client.
_LOOK_S: Final = 1.0
#: How long what deliver() gave up may take to come back out of the client.
_GIVE_UP_S: Final = 5.0
#: A broker refuses a whole batch of records with these, for one that is in it.
_OF_A_BATCH: Final = frozenset({"MSG_SIZE_TOO_LARGE", "RECORD_LIST_TOO_LARGE", "INVALID_RECORD", "INVALID_TIMESTAMP"})
#: What confluent-kafka raises for something that is no record.
_MALFORMED: Final = (TypeError, ValueError, OverflowError)
_PURGED: Final = frozenset({KafkaError._PURGE_QUEUE, KafkaError._PURGE_INFLIGHT})
#: The broker and an idempotent producer do not agree on where the producer is.
_SEQUENCE: Final = frozenset(
    {
        KafkaError.OUT_OF_ORDER_SEQUENCE_NUMBER,
        KafkaError.INVALID_PRODUCER_ID_MAPPING,
        KafkaError.UNKNOWN_PRODUCER_ID,
        KafkaError._FATAL,
    }
)


# The last transaction of a sink that was fenced cannot be aborted, and nobody has to be told so on stderr.
warnings.filterwarnings("ignore", "Producer abort_transaction failed during close", RuntimeWarning)


class ConfluentSink:
    """Writes records. Implements kser.transport.Sink, whose docstrings say what each method does.

    May be shared by threads; a transaction belongs to one thread at a time. An ``on_delivery`` callback may call
    produce() of its own sink; poll() and flush() do nothing there.

    Errors of a transaction's calls have in ``extra`` ``abort`` (True: nothing is stored, call abort(), then begin())
    and ``fatal`` (True: this sink is of no more use; close it and make one of the same transactional id); a FencedError
    of a transaction that had its time has ``expired`` (True: its coordinator ended it).

    Args:
        config: of producer_config(): librdkafka properties, with ``transactional.id`` for transactions and
            ``delivery.report.only.error`` for callbacks of failures only.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._id: str | None = config.get("transactional.id")
        self._name = f"transactional producer {self._id}" if self._id else "producer"
        self._state = ClientState(self._name, str(config["bootstrap.servers"]))
        self._config = dict(config)
        self._limit = int(config.get("message.max.bytes", 1_000_000))
        self._transaction_s = float(config.get("transaction.timeout.ms", 60_000)) / 1000
        #: Deliveries that failed and had no on_delivery to tell.
        self.failed = 0
        self._lock = threading.Lock()
        self._local = threading.local()
        #: What a callback raised that is no Exception (KeyboardInterrupt), for the call that served it.
        self._escaped: BaseException | None = None
        self._confirmed = False
        #: Why what is queued is given up, when that is known better than by the client.
        self._reason: Error | None = None
        #: How often what is queued was given up. The client may get round to it late, and then takes records with it
        #: that were handed over after that: those are handed over again.
        self._purges = 0
        #: How often a call that serves callbacks broke: one of the callbacks may not have been heard.
        self._broke = 0
        #: The client in which that was, until there is a new one.
        self._broken: Producer | None = None
        self._producer: Producer | None = new_client(Producer, self._config, self._state)
        self._met = self._id is not None
        self._initialised = False
        self._open = False
        #: When the transaction was begun, time.monotonic().
        self._began = 0.0
        #: send_offsets() failed: a commit would store the records without the offsets.
        self._offsets_missing = False
        #: What ended the transactions of this sink for good.
        self._dead: Error | None = None
        #: The first delivery that failed since begin().
        self._failure: Error | None = None
        #: Records that produce_all() handed over since begin().
        self._handed = 0

    # -- records -------------------------------------------------------------------------------------------------------

    def produce(self, record: OutRecord, on_delivery: DeliveryCallback | None = None) -> None:
        """See Sink. Where the brokers refuse this client, on_delivery gets a ConfigurationError that says why."""
        producer = self._client()
        topic, key, value, headers, partition = record
        told = partial(self._unclaimed if on_delivery is None else partial(self._deliver, on_delivery), self._purges)
        number = -1 if partition is None else partition
        names: list[tuple[str, str | bytes | None]] | None = list(headers) if headers else None
        if not self._met:
            self._meet(producer, topic)
        give_up_at = 0.0
        while True:
            try:
                producer.produce(topic, value, key, number, told, None, 0, names)
                return
            except BufferError:
                give_up_at = give_up_at or time.monotonic() + _ROOM_S
                self._wait_for_room(producer, give_up_at)
            except (KafkaException, RuntimeError) as exc:
                error = kafka_error(exc)
                if error is None:
                    raise TransportError(f"Writing to topic {record.topic} failed: {exc}") from exc
                if not is_fatal(error) or self._id is not None or not self._renew(producer):
                    raise self._refused(error, record) from exc
                producer = self._client()

    def produce_at(
        self, topic: str, key: bytes, value: bytes, tell: Callable[[int, Error | None], None], index: int
    ) -> None:
        """produce() of a record without headers, whose delivery is told by ``tell(index, error)``, maybe twice.

        For many records with one who wants to know: cheaper by half than a record object and a callback for each.
        """
        producer = self._producer
        if producer is not None and self._met:
            try:
                producer.produce(topic, value, key, -1, partial(self._tell, tell, index, self._purges))
                return
            except (BufferError, KafkaException, RuntimeError):
                pass  # produce() meets the same, and does about it what can be done
        self.produce(OutRecord(topic, key, value), partial(tell, index))

    def numbered(self, tell: Callable[[int, Error], None]) -> Numbered:
        """For very many records without headers, with one who wants to know which failed. See Numbered."""
        return Numbered(self, tell)

    def produce_all(self, records: Sequence[OutRecord]) -> None:
        """See Sink."""
        producer, at, give_up_at = self._client(), 0, 0.0
        handed = self._handed
        while (
            stop := self._hand_over(producer, records, at, map(partial, repeat(self._counted), count(handed + at)))
        ) is not None:
            if stop[0] > at:
                at, give_up_at = stop[0], 0.0
            try:
                if isinstance(stop[1], BufferError):
                    give_up_at = give_up_at or time.monotonic() + _ROOM_S
                    self._wait_for_room(producer, give_up_at)
                else:
                    producer = self._replaced(producer, stop[1], records[at])
            except Error as failure:
                failure.extra["index"] = at
                self._handed = handed + at
                raise
        self._handed = handed + len(records)

    def deliver(self, records: Sequence[OutRecord], timeout_s: float = 30) -> list[tuple[int, Error]]:
        """See Sink."""
        if self._id is not None or self._inside_callback:
            where = f"of {self._name}" if self._id else "inside an on_delivery"
            raise TransportError(f"deliver() {where}: it is for sinks without transactions, outside their callbacks")
        end = time.monotonic() + timeout_s
        failures = self._deliver_until(end, records)
        doubtful = [at for at in sorted(failures) if failures[at].extra.get("kafka_error") in _OF_A_BATCH]
        if len(doubtful) > 1:  # each alone gets its own verdict
            for at in doubtful:
                del failures[at]
                if alone := self._deliver_until(end, [records[at]]):
                    failures[at] = alone[0]
        return sorted(failures.items(), key=lambda failure: failure[0])

    def poll(self, timeout_s: float) -> int:
        """See Sink."""
        producer = self._client()
        return 0 if self._inside_callback else self._serve(producer, partial(producer.poll, max(timeout_s, 0)))

    def flush(self, timeout_s: float) -> int:
        """See Sink."""
        producer = self._client()
        if not self._inside_callback:
            self._serve(producer, partial(producer.flush, max(timeout_s, 0)))
        return len(producer)

    def drop_queued(self) -> None:
        """See Sink. The callbacks are called before it returns."""
        producer = self._client()
        self._purges += 1
        with kafka_errors("Dropping what is queued"):
            producer.purge(in_queue=True, in_flight=False)
        if not self._inside_callback:
            self._serve(producer, partial(producer.poll, 0))

    def close(self, timeout_s: float = 10) -> None:
        """See Sink. An open transaction is aborted. What is not confirmed in time is dropped, with a warning."""
        with self._lock:
            producer = self._producer
            if producer is None:
                return
            end = time.monotonic() + timeout_s
            if self._open and self._dead is None:
                self._abort_at_last(timeout_s / 2)
            self._producer = None
        self._serve(producer, lambda: producer.flush(max(end - time.monotonic(), 0)))
        if left := len(producer):
            logger.warning("The %s is closed with %s records not confirmed: they may be lost", self._name, left)
        self._destroy(producer)

    # -- transactions --------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """See Sink. Raises TransportError (retriable: try again) when no coordinator answers, FencedError."""
        producer = self._transactional("begin()")
        if self._open:
            raise TransportError(f"A transaction of {self._id} is open: commit() or abort() it before begin()")
        if not self._initialised:
            self._initialise(producer)
        self._transaction_call(f"Beginning a transaction of {self._id}", producer.begin_transaction)
        self._open, self._offsets_missing, self._failure, self._handed = True, False, None, 0
        self._began = time.monotonic()

    def send_offsets(self, positions: Sequence[Position], member: GroupMember) -> None:
        """See Sink.

        A try that got no answer is repeated. After an error commit() refuses, until another send_offsets() succeeded.
        librdkafka#5456: it can block for ever after a broker died, so call it in a thread that may be left behind.
        """
        producer = self._transactional("send_offsets()")
        if not isinstance(member, ConfluentMember):
            raise TypeError(
                f"{type(member).__name__} is no member of a ConfluentSource: give what its member() returns"
            )
        self._offsets_missing = True
        if not member.joined:
            raise GroupError(
                f"Offsets of {self._id} were not sent: the member has not joined its group; abort()",
                extra={"abort": True},
            )
        foreign = [f"{p.topic}[{p.partition}]" for p in positions if (p.topic, p.partition) not in member.owned]
        if foreign:
            raise GroupError(
                f"Offsets of {', '.join(foreign)} were not sent: the member does not own that any more; abort()",
                extra={"abort": True},
            )
        offsets = to_offsets(positions)
        doing = f"Sending offsets with the transaction of {self._id}"
        for left in reversed(range(_OFFSETS_TRIES)):
            try:
                self._transaction_call(
                    doing, lambda: producer.send_offsets_to_transaction(offsets, member.metadata, _OFFSETS_S)
                )
                break
            except TransportError as exc:
                if not exc.retriable or not left:
                    raise
        self._offsets_missing = False

    def commit(self, timeout_s: float = 30) -> None:  # noqa: ARG002 - of the protocol; see below
        """See Sink. Takes as long as the transaction's own timeout leaves (``transaction.timeout.ms``, 10 s).

        Source: rdkafka.h: any other timeout than that one "risks internal state desynchronization".
        """
        producer = self._transactional("commit()")
        if self._offsets_missing:
            raise TransportError(
                f"The transaction of {self._id} has not got its offsets: abort() it, its records would be doubled",
                extra={"abort": True},
            )
        self._transaction_call(f"Committing the transaction of {self._id}", producer.commit_transaction)
        self._open = False

    def abort(self, timeout_s: float = 30) -> None:
        """See Sink."""
        producer = self._transactional("abort()")
        end = time.monotonic() + timeout_s
        self._serve(producer, lambda: producer.flush(min(_BEFORE_ABORT_S, timeout_s / 2)))
        while True:
            left = max(end - time.monotonic(), 1)
            # No limit is that of the transaction, the one that librdkafka wants; close() may not have that much time.
            limit = (left,) if left < self._transaction_s else ()
            try:
                self._transaction_call(
                    f"Aborting the transaction of {self._id}", partial(producer.abort_transaction, *limit)
                )
                break
            except TransportError as exc:
                if not exc.retriable or time.monotonic() >= end:
                    raise
        self._open = self._offsets_missing = False

    # -- callbacks: librdkafka calls these inside poll(), flush() and a transaction's calls; nothing may be raised ---

    def _again(self, error: KafkaError, message: Message, told: Callable[[KafkaError | None, Message], None]) -> bool:
        """Hand over once more what a purge of records before it took with it. False when it is not that."""
        producer = self._producer
        if error.code() != KafkaError._PURGE_QUEUE or self._id is not None or producer is None:
            return False
        topic, partition, headers = message.topic() or "", message_partition(message), message.headers()
        try:
            producer.produce(topic, message.value(), message.key(), partition, told, None, 0, headers)
        except (BufferError, KafkaException, RuntimeError):
            return False
        return True

    def _deliver(self, on_delivery: DeliveryCallback, purges: int, error: KafkaError | None, message: Message) -> None:
        """For records of produce(). ``purges``: how often what was queued had been given up by then."""
        try:
            _clear_pending()
            if error is None:
                self._confirmed = True
                on_delivery(None)
            elif purges != self._purges or not self._again(error, message, partial(self._deliver, on_delivery, purges)):
                on_delivery(self._undelivered(error, message))
        except Exception:  # noqa: BLE001 - the caller's code
            log_raised(logger, "on_delivery %r raised", on_delivery)
        except BaseException as exc:  # noqa: BLE001 - raised again by the call that served this callback
            self._escaped = exc

    def _tell(
        self,
        tell: Callable[[int, Error | None], None],
        index: int,
        purges: int,
        error: KafkaError | None,
        message: Message,
    ) -> None:
        """For records of produce_at()."""
        try:
            if error is None:
                self._confirmed = True
                tell(index, None)
                return
        except SystemError:
            pass  # see _clear_pending(): what comes now begins with that
        except BaseException as exc:  # noqa: BLE001 - as above
            self._escaped = exc
            return
        _clear_pending()  # already partial() would end in a SystemError, and the failure be told to nobody
        self._deliver(partial(tell, index), purges, error, message)

    def _unclaimed(self, purges: int, error: KafkaError | None, message: Message) -> None:
        """For records that came without an on_delivery."""
        if error is None:
            self._confirmed = True
            return
        try:
            _clear_pending()
            if purges == self._purges and self._again(error, message, partial(self._unclaimed, purges)):
                return
            failure = self._undelivered(error, message)
            self.failed += 1
            if self._id is None:  # else commit() tells
                self._state.quiet.log(logging.ERROR, "%s [%s] %s", error.name(), self._name, failure.message)
        except BaseException as exc:  # noqa: BLE001 - as above
            self._escaped = exc

    def _counted(self, index: int, error: KafkaError | None, message: Message) -> None:
        """For a record of produce_all(): the ``index``-th since begin()."""
        first = self._failure is None
        self._unclaimed(-1, error, message)  # within a transaction nothing is handed over again
        if first and self._failure is not None:
            self._failure.extra["index"] = index

    def _undelivered(self, error: KafkaError, message: Message) -> Error:
        topic = message.topic() or ""
        size = len(message) + len(message.key() or b"")
        what = f"A record for topic {topic} was refused by the broker, whose max.message.bytes may be lower still: it"
        failure = too_large(error, what, size, self._limit, topic=topic)
        if failure is None and error.code() in _PURGED:  # the call that purged may have ended, or be another thread's
            failure = self._reason or self._state.refusal
        if failure is None and error.code() in _PURGED:
            failure = _given_up(topic, error.name())
        if failure is None:
            failure = translate(error, f"Delivering a record to topic {topic}", topic=topic)
        if self._id is None and (isinstance(failure, FencedError) or error.code() in _SEQUENCE):
            # Nobody fences a plain producer: it lost its place, gets a new id, and the record may be sent again.
            failure = TransportError(failure.message, retriable=True, extra=failure.extra)
        self._failure = self._failure or failure
        return failure

    # -- inside --------------------------------------------------------------------------------------------------------

    @contextmanager
    def _serving(self) -> Iterator[None]:
        """Around calls that serve callbacks: another such call inside of one would crash confluent-kafka."""
        self._local.inside = True
        try:
            yield
        finally:
            self._local.inside = False

    @property
    def _inside_callback(self) -> bool:
        return getattr(self._local, "inside", False)

    def _client(self) -> Producer:
        producer = self._producer
        if producer is None:
            raise TransportError(f"The {self._name} is closed: make a new one")
        return producer

    def _transactional(self, doing: str) -> Producer:
        if self._id is None:
            raise TransportError(f"{doing}: this sink has no transactional id, so it has no transactions")
        if self._dead is not None:
            raise self._dead.with_traceback(None)
        return self._client()

    def _serve(self, producer: Producer, call: Callable[[], int]) -> int:
        """Run a call that serves callbacks."""
        try:
            if producer is self._broken and self._id is None and len(producer):
                # After a fatal error it takes back what was on its way, to send it again, and never does: not one
                # callback would come of that before its timeout. (A client that was not that broken gets it again.)
                producer.purge(in_queue=True, in_flight=False)
            with self._serving():
                served = call()
        except (KafkaException, SystemError) as exc:
            # The client broke for good; the next produce() or begin() tells, or renews it. SystemError: what
            # confluent-kafka 2.16 makes of a fatal error that it meets in flush().
            logger.warning("The %s: %s", self._name, exc)
            self._broke += 1
            self._broken = producer
            served = 0
        except BaseException:  # a signal may have hit a callback, of whatever thread its record is
            self._broke += 1
            raise
        if self._confirmed:
            self._confirmed = False
            self._state.up()
        elif self._reason is None and (refusal := self._state.refusal) is not None and len(producer):
            # Nothing can be delivered: tell so now and with the reason, not after a timeout without one.
            self._reason = refusal
            self._purges += 1
            producer.purge(in_queue=True, in_flight=False)
            served += self._serve(producer, partial(producer.poll, 0))
            self._reason = None
        self._raise_escaped()
        return served

    def _raise_escaped(self) -> None:
        if self._escaped is not None:
            escaped, self._escaped = self._escaped, None
            raise escaped

    def _hand_over(
        self, producer: Producer, records: Sequence[OutRecord], start: int, callbacks: Iterable[Callable[..., None]]
    ) -> tuple[int, Exception] | None:
        """Hand over the records from ``start`` on. None, or the one that the client does not take, and what it said."""
        produce, at = producer.produce, start
        try:
            for at, (topic, key, value, headers, partition), told in zip(  # noqa: B007 - the except needs it
                count(start), islice(records, start, None), callbacks, strict=False
            ):
                number = -1 if partition is None else partition
                produce(topic, value, key, number, told, None, 0, list(headers) if headers else None)
        except (BufferError, KafkaException, RuntimeError, *_MALFORMED) as exc:
            return at, exc
        return None

    def _replaced(self, producer: Producer, exc: Exception, record: OutRecord) -> Producer:
        """The client to go on with when ``producer`` itself is the reason that it takes no record any more.

        Raises what is wrong with the record when it is that, TransportError when this sink is closed.
        """
        error = kafka_error(exc)
        current = self._client()
        if current is not producer:
            return current
        if error is not None:
            if is_fatal(error) and self._id is None and self._renew(producer):
                return self._client()
            raise self._refused(error, record) from exc
        if isinstance(exc, _MALFORMED):
            raise ValidationError(f"A record for topic {record.topic!r} cannot be written: {exc}") from exc
        raise TransportError(f"Writing to topic {record.topic} failed: {exc}") from exc

    def _deliver_until(self, end: float, records: Sequence[OutRecord]) -> dict[int, Error]:
        """Write records and wait for them until ``end``, a time.monotonic(). The failures, by index."""
        producer, at, stop = self._client(), 0, None
        failures: dict[int, Error] = {}
        purges, broke = self._purges, self._broke

        def told(index: int, error: KafkaError | None, message: Message) -> None:
            if error is None:
                return
            try:
                _clear_pending()
                if purges != self._purges or not self._again(error, message, partial(told, index)):
                    failures[index] = self._undelivered(error, message)
            except BaseException as exc:  # noqa: BLE001 - as in _deliver()
                give_up(range(index, index + 1), "_PURGE_INFLIGHT")  # the thread that raises it may be another one
                self._escaped = exc

        def give_up(indexes: range, why: str) -> None:
            failures.update({n: _given_up(records[n].topic, why) for n in indexes if n not in failures})

        if not self._met and records:
            self._meet(producer, records[0].topic)
        while (stop := self._hand_over(producer, records, at, map(partial, repeat(told), count(at)))) is not None:
            at = stop[0]
            if isinstance(stop[1], BufferError):
                if time.monotonic() >= end:
                    give_up(range(at, len(records)), "_PURGE_QUEUE")
                    break
                self._serve(producer, partial(producer.poll, _MEETING_S))
                continue
            try:
                renewed = self._replaced(producer, stop[1], records[at])
            except Error as failure:
                self._client()  # raises when the sink is closed
                failures[at] = failure
                at += 1
            else:  # what the old one had is told by now, or lost
                give_up(range(at), "_PURGE_INFLIGHT")
                producer, broke = renewed, self._broke
        if not self._settled(producer, end):
            self._purges += 1
            producer.purge()  # what is in flight too: the next call would wait for it
            if not self._settled(producer, time.monotonic() + _GIVE_UP_S):
                give_up(range(len(records)), "_PURGE_INFLIGHT")
        if broke != self._broke:  # whoever was not told of a failure must not take it for a success
            give_up(range(len(records)), "_PURGE_INFLIGHT")
        if len(failures) < len(records):
            self._state.up()
        return failures

    def _settled(self, producer: Producer, end: float) -> bool:
        """Wait until nothing is open in the client; False when something still is at ``end``."""
        while True:
            left = max(end - time.monotonic(), 0)
            with kafka_errors(f"Waiting for the {self._name}"):  # another thread closes it
                self._serve(producer, partial(producer.flush, min(left, _LOOK_S)))
                if not len(producer):
                    return True
            if not left:
                return False

    def _wait_for_room(self, producer: Producer, give_up_at: float) -> None:
        if self._inside_callback or time.monotonic() >= give_up_at:
            raise TransportError(
                f"The {self._name} has no room for more records: {len(producer)} wait to be confirmed", retriable=True
            )
        self._serve(producer, partial(producer.poll, 0.05))

    def _meet(self, producer: Producer, topic: str) -> None:
        """Before the first record: a record that comes before the brokers are found waits 500 ms for its producer id.

        librdkafka looks for the id whenever it has learnt of brokers, else twice a second only; this makes it learn.
        """
        self._met = True
        if not self._inside_callback:
            with suppress(KafkaException):  # nobody answers: records wait then, as ever
                for _ in range(2):
                    producer.list_topics(topic, timeout=_MEETING_S)

    def _refused(self, error: KafkaError, record: OutRecord) -> Error:
        headers = sum(len(name) + len(value or b"") for name, value in record.headers)
        size = len(record.key or b"") + len(record.value or b"") + headers
        what = f"A record for topic {record.topic}"
        failure = too_large(error, what, size, self._limit, topic=record.topic)
        return failure or self._dated(translate(error, f"Writing to topic {record.topic}", topic=record.topic))

    def _renew(self, broken: Producer) -> bool:
        """A new client instead of one that had a fatal error; False inside callbacks, where it cannot be done."""
        if self._inside_callback:
            return False
        with self._lock:
            if self._producer is broken:
                logger.warning(
                    "The %s had a fatal error: it is replaced, what was under way is reported failed", self._name
                )
                self._producer = new_client(Producer, self._config, self._state)
                self._purges += 1  # else what is purged there would be reported failed and be written here even so
                self._destroy(broken)
                self._broken = None
        return True

    def _transaction_call(self, doing: str, call: Callable[[], Any]) -> None:
        try:
            with self._serving():
                try:
                    call()
                except SystemError:
                    call()  # confluent-kafka lost the exception of a fatal error: the same call tells it again
        except (KafkaException, RuntimeError, SystemError) as exc:
            error = kafka_error(exc)
            if error is None:
                raise TransportError(f"{doing} failed: {exc}") from exc
            failure = self._dated(
                translate(error, doing, strict=True, abort=error.txn_requires_abort(), fatal=is_fatal(error))
            )
            if error.txn_requires_abort() and self._failure is not None:
                failure.message = f"{failure.message}; the first record failed so: {self._failure.message}"
                failure.extra["record"] = self._failure
            if is_fatal(error):
                self._dead = failure
            raise failure from exc
        self._state.up()
        self._raise_escaped()

    def _dated(self, failure: Error) -> Error:
        """Note on a fence that its transaction had its time: a coordinator that ended it itself answers the same."""
        age_s = time.monotonic() - self._began
        if isinstance(failure, FencedError) and self._open and age_s >= EXPIRED_SHARE * self._transaction_s:
            failure.extra["expired"] = True
        return failure

    def _initialise(self, producer: Producer) -> None:
        """Learn of the coordinator, fence and end what an earlier life of this id left open."""
        end = time.monotonic() + _INIT_S
        while True:
            try:
                self._transaction_call(
                    f"Starting transactions of {self._id}", partial(producer.init_transactions, _INIT_QUESTION_S)
                )
            except TransportError as exc:
                self._serve(producer, partial(producer.poll, 0))  # what the client noticed meanwhile
                if (refusal := self._state.refusal) is not None:
                    raise refusal from exc
                if not exc.retriable or time.monotonic() >= end:
                    raise
            else:
                self._initialised = True
                return

    def _abort_at_last(self, timeout_s: float) -> None:
        try:
            self.abort(timeout_s)
        except Error as exc:
            logger.warning("The %s is closed with a transaction open: %s", self._name, exc.message)

    def _destroy(self, producer: Producer) -> None:
        """Let go of a client; what is still in it is given up, and told so."""
        try:
            producer.purge()
            self._serve(producer, partial(producer.poll, 0))
            if self._id is None or self._initialised:
                Aside().call(producer.close, _DESTROY_S)
            # else: close() would warn of an init_transactions() that never came through; letting go is all there is
        except TimeoutError:
            logger.warning("The %s did not end within %g s and is left behind", self._name, _DESTROY_S)
        except (KafkaException, RuntimeError, RuntimeWarning, SystemError) as exc:
            # SystemError: what confluent-kafka 2.16 makes of a fatal error that it meets in close()
            logger.warning("Closing the %s: %s", self._name, exc)


class _Cleared(Exception):  # noqa: N818 - no error: it is raised to be caught
    """Takes the place of an exception that confluent-kafka left behind."""


_CLEARED: Final = _Cleared()


def _clear_pending() -> None:
    """First of all in a callback: nothing that was raised outside of it comes out inside of it.

    After a fatal error confluent-kafka 2.16 calls the callbacks that are left with its exception set in the thread, and
    any call of C code in there might end in a SystemError because of it. Raising another one replaces it.
    """
    try:
        raise _CLEARED
    except _Cleared as exc:
        exc.__traceback__ = None


def _given_up(topic: str, kafka_error: str) -> DeliveryError:
    stored = "; it may have been stored even so" if kafka_error == "_PURGE_INFLIGHT" else ""
    return DeliveryError(
        f"A record for topic {topic} was given up before a broker confirmed it{stored}; is the broker reachable?",
        retriable=True,
        extra={"topic": topic, "kafka_error": kafka_error},
    )
