"""The one map from the errors of confluent-kafka to those of kser."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from confluent_kafka import KafkaError, KafkaException

from kser.errors import (
    ConfigurationError,
    DeliveryError,
    Error,
    FencedError,
    GroupError,
    MessageTooLargeError,
    OffsetLostError,
    TransportError,
)

__all__ = ["LOST", "REFUSED", "is_fatal", "kafka_error", "kafka_errors", "too_large", "translate", "unanswered"]

#: The brokers will not let this client in, or not do this: no waiting cures it.
_CURES: Final[dict[int, str]] = {
    KafkaError._AUTHENTICATION: "check sasl.mechanism, sasl.username and sasl.password",
    KafkaError.SASL_AUTHENTICATION_FAILED: "check sasl.mechanism, sasl.username and sasl.password",
    KafkaError.UNSUPPORTED_SASL_MECHANISM: "set sasl.mechanism to one that the broker offers",
    KafkaError.ILLEGAL_SASL_STATE: "set security.protocol to that of the broker's listener",
    KafkaError._SSL: "check security.protocol, ssl.ca.location and the broker's certificate",
    KafkaError.TOPIC_AUTHORIZATION_FAILED: "give this user the right to the topic on the broker",
    KafkaError.GROUP_AUTHORIZATION_FAILED: "give this user the right to the consumer group on the broker",
    KafkaError.CLUSTER_AUTHORIZATION_FAILED: "give this user the right to it on the broker",
    KafkaError.TRANSACTIONAL_ID_AUTHORIZATION_FAILED: "give this user the right to the transactional id on the broker",
    KafkaError._INVALID_ARG: "correct the value",
    KafkaError.INVALID_GROUP_ID: "name the consumer group otherwise",
    KafkaError.INVALID_SESSION_TIMEOUT: "set session.timeout.ms within the broker's group.min/max.session.timeout.ms",
    KafkaError.INVALID_TRANSACTION_TIMEOUT: "set transaction.timeout.ms below the broker's transaction.max.timeout.ms",
    KafkaError.INCONSISTENT_GROUP_PROTOCOL: "give all members of the group the same partition.assignment.strategy",
    KafkaError.UNSUPPORTED_ASSIGNOR: "set group.remote.assignor to one that the broker has",
    KafkaError.UNSUPPORTED_VERSION: "the broker is too old for this; group.protocol=consumer needs Kafka 4.0 or newer",
}
#: Codes by which the brokers refuse a client as such.
REFUSED: Final = frozenset(
    {
        KafkaError._AUTHENTICATION,
        KafkaError.SASL_AUTHENTICATION_FAILED,
        KafkaError.UNSUPPORTED_SASL_MECHANISM,
        KafkaError.ILLEGAL_SASL_STATE,
        KafkaError._SSL,
    }
)
#: A position that does not exist in the partition.
LOST: Final = frozenset({KafkaError._AUTO_OFFSET_RESET, KafkaError.OFFSET_OUT_OF_RANGE, KafkaError._LOG_TRUNCATION})

_GROUP = frozenset(
    {
        KafkaError.ILLEGAL_GENERATION,
        KafkaError.UNKNOWN_MEMBER_ID,
        KafkaError.FENCED_INSTANCE_ID,
        KafkaError.UNRELEASED_INSTANCE_ID,
        KafkaError.STALE_MEMBER_EPOCH,
        KafkaError.FENCED_MEMBER_EPOCH,
        KafkaError._ASSIGNMENT_LOST,
    }
)
#: Why a member is out of its group -> what that means; None for all others.
_PUT_OUT: Final[dict[int | None, str]] = {
    KafkaError.FENCED_INSTANCE_ID: "another worker took over this name (group.instance.id): give each its own",
    KafkaError.UNRELEASED_INSTANCE_ID: "another worker has this name (group.instance.id) until its session ends",
    None: "other members of the group have its partitions now",
}
_FENCED = frozenset({KafkaError._FENCED, KafkaError.PRODUCER_FENCED, KafkaError.INVALID_PRODUCER_EPOCH})
_UNDELIVERED = frozenset({KafkaError._MSG_TIMED_OUT, KafkaError._PURGE_QUEUE, KafkaError._PURGE_INFLIGHT})
_TOO_LARGE = frozenset({KafkaError.MSG_SIZE_TOO_LARGE, KafkaError.RECORD_LIST_TOO_LARGE})
_MISSING = frozenset({KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_TOPIC, KafkaError._UNKNOWN_PARTITION})
#: Passing troubles that librdkafka does not flag as retriable in every place where it reports them.
_PASSING = frozenset(
    {
        KafkaError._ALL_BROKERS_DOWN,
        KafkaError._IN_PROGRESS,
        KafkaError._QUEUE_FULL,
        KafkaError._RESOLVE,
        KafkaError._TIMED_OUT,
        KafkaError._TIMED_OUT_QUEUE,
        KafkaError._TRANSPORT,
        KafkaError._WAIT_COORD,
        KafkaError.BROKER_NOT_AVAILABLE,
        KafkaError.CONCURRENT_TRANSACTIONS,
        KafkaError.COORDINATOR_LOAD_IN_PROGRESS,
        KafkaError.COORDINATOR_NOT_AVAILABLE,
        KafkaError.KAFKA_STORAGE_ERROR,
        KafkaError.LEADER_NOT_AVAILABLE,
        KafkaError.NETWORK_EXCEPTION,
        KafkaError.NOT_CONTROLLER,
        KafkaError.NOT_COORDINATOR,
        KafkaError.NOT_ENOUGH_REPLICAS,
        KafkaError.NOT_ENOUGH_REPLICAS_AFTER_APPEND,
        KafkaError.NOT_LEADER_FOR_PARTITION,
        KafkaError.REBALANCE_IN_PROGRESS,
        KafkaError.REPLICA_NOT_AVAILABLE,
        KafkaError.REQUEST_TIMED_OUT,
        KafkaError.THROTTLING_QUOTA_EXCEEDED,
        KafkaError.UNSTABLE_OFFSET_COMMIT,
    }
)


def translate(error: KafkaError, doing: str, *, strict: bool = False, **extra: Any) -> Error:
    """The error of kser for one of the client.

    Args:
        error: what the client reported.
        doing: what failed, as the start of a sentence: ``Committing the offsets of group shop``.
        strict: call an error retriable only where librdkafka flags it, as its transaction calls demand.
        extra: goes into ``extra`` of the error, beside ``kafka_error``, the name of the code.
    """
    code = _meant(error)
    extra["kafka_error"] = error.name() if code == error.code() else KafkaError(code).name()
    said = f"{doing} failed: {_sentence(error)}"
    if code in _CURES:
        return ConfigurationError(f"{said}; {_CURES[code]}", extra=extra)
    if code in _FENCED:
        return FencedError(f"{said}; another producer took over the same transactional id", extra=extra)
    if code in _GROUP:
        # A member whose dead predecessor still holds its name may come again when that one's session has ended.
        waits = code == KafkaError.UNRELEASED_INSTANCE_ID
        return GroupError(f"{said}; {_PUT_OUT.get(code, _PUT_OUT[None])}", retriable=waits, extra=extra)
    if code in LOST:
        return OffsetLostError(f"{said}; choose where to go on, earliest or latest", extra=extra)
    if code in _UNDELIVERED:
        return DeliveryError(f"{said}; is the broker reachable?", retriable=True, extra=extra)
    if code in _MISSING:
        return TransportError(f"{said}; create the topic, or correct its name", extra=extra)
    retriable = error.retriable() if strict else error.retriable() or code in _PASSING
    return TransportError(said, retriable=retriable and not is_fatal(error), extra=extra)


def too_large(error: KafkaError, what: str, size: int, limit: int, **extra: Any) -> Error | None:
    """The MessageTooLargeError when the error is about a record's size, else None. ``limit`` is the client's."""
    if error.code() not in _TOO_LARGE:
        return None
    return MessageTooLargeError(what, size, limit, kafka_error=error.name(), **extra)


def kafka_error(exc: BaseException) -> KafkaError | None:
    """The KafkaError inside an exception of the client; None for a misuse of it (RuntimeError) or anything else."""
    found = exc.args[0] if isinstance(exc, KafkaException) and exc.args else None
    return found if isinstance(found, KafkaError) else None


@contextmanager
def kafka_errors(doing: str, *, strict: bool = False, **extra: Any) -> Iterator[None]:
    """Within the block, what the client raises comes out as the error of kser. Arguments as for translate()."""
    try:
        yield
    except (KafkaException, RuntimeError) as exc:
        error = kafka_error(exc)
        if error is None:  # closed, or used against its rules
            raise TransportError(f"{doing} failed: {exc}", extra=extra) from exc
        raise translate(error, doing, strict=strict, **extra) from exc


def unanswered(doing: str, timeout_s: float, *, retriable: bool = True) -> TransportError:
    """The error for a call that got no answer in its time."""
    return TransportError(f"{doing}: no answer from the broker within {timeout_s:.3g} s", retriable=retriable)


def _meant(error: KafkaError) -> int:
    """The code; where it only says that there was a fatal error, the one whose description is in the text."""
    if error.code() != KafkaError._FATAL:
        return error.code()
    text = error.str() or ""
    told = [code for code in (*_GROUP, *_FENCED, *_CURES) if (KafkaError(code).str() or "?") in text]
    return max(told, key=lambda code: len(KafkaError(code).str() or ""), default=error.code())


def is_fatal(error: KafkaError) -> bool:
    """Whether the client is of no more use."""
    return error.fatal() or error.code() == KafkaError._FATAL


def _sentence(error: KafkaError) -> str:
    text = error.str() or error.name()
    name = error.name().lstrip("_")
    return f"{text} ({name})"
