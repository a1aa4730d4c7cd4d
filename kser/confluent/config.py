"""The settings of the Kafka clients: what the user gave, checked, over kser's defaults.

Users write librdkafka's property names (CONFIGURATION.md of github.com/confluentinc/librdkafka) for all clients in one
mapping; each client gets those that are meant for it. Properties that decide whether something is lost or done twice
are set by kser whatever the user wrote, with a warning.
"""

import difflib
from collections.abc import Callable, Collection, Mapping
from typing import Any, Final, Literal, TypeVar

from confluent_kafka import Consumer, KafkaException, Producer

from kser.confluent.errors import kafka_error
from kser.confluent.logs import ClientState, logger
from kser.confluent.properties import ALIASES, CONSUMER, KNOWN, PRODUCER
from kser.errors import ConfigurationError
from kser.masking import MASK, looks_secret
from kser.results import shown
from kser.tracebacks import log_raised
from kser.transport.groups import checked_member_id

__all__ = [
    "ENVIRONMENT_PREFIX",
    "Start",
    "admin_config",
    "checked",
    "consumer_config",
    "from_environment",
    "is_incremental",
    "masked",
    "new_client",
    "new_group_start",
    "producer_config",
    "reader_config",
]

#: Where a group without a committed offset starts.
Start = Literal["earliest", "latest", "error"]

ENVIRONMENT_PREFIX: Final = "KSER_KAFKA_"

_CLIENT_DEFAULTS: Final[dict[str, Any]] = {
    "client.id": "kser",
}
_FETCH_DEFAULTS: Final[dict[str, Any]] = {
    # librdkafka prefetches 64 MB and 100,000 messages, which looks like a leak and delays nothing but a rebalance.
    "queued.max.messages.kbytes": 16384,
    "queued.min.messages": 5000,
    "fetch.wait.max.ms": 100,
    # With such small buffers the fetcher often finds them full, and must not sleep 1 s then: 480,000 records a second
    # instead of 21,000 on the embedded broker, 720,000 instead of 225,000 on Apache Kafka.
    "fetch.queue.backoff.ms": 20,
}
_SOURCE_ALWAYS: Final[dict[str, Any]] = {
    "enable.auto.commit": False,
    "enable.auto.offset.store": False,
    # Also makes the client ask for stable offsets, so that none is read which a transaction is about to move.
    "isolation.level": "read_committed",
    # Never a silent reset: where to start is always said, a position that is gone is an OffsetLostError.
    "auto.offset.reset": "error",
    "enable.partition.eof": False,
}
_PRODUCER_DEFAULTS: Final[dict[str, Any]] = {
    "acks": "all",
    # The default of Java producers, so that both put a key into the same partition.
    "partitioner": "murmur2_random",
    "compression.type": "lz4",
    # Just below what a broker takes by default (1,048,588 with the batch's own header).
    "message.max.bytes": 1_048_000,
    # Whoever waits for a confirmation calls flush(), which sends at once: 0.4 ms for one message on Apache Kafka. Those
    # who do not wait yet gain by it: with 0 each produce() wakes the client's threads, which costs ten times as much.
    "linger.ms": 5,
    # A topic that is missing is told after this time, not after 30 s; one just created is known everywhere long before.
    "topic.metadata.propagation.max.ms": 2000,
}
_TRANSACTION_DEFAULTS: Final[dict[str, Any]] = {
    "linger.ms": 1,  # commit flushes anyway
    "transaction.timeout.ms": 10_000,
    # The next transaction of an id waits for the markers of its last one: 10 ms between two looks, not 100.
    "retry.backoff.ms": 10,
}
#: Set by kser itself, or without a meaning here: property -> what to do instead.
_NOT_FOR_USERS: Final[dict[str, str]] = {
    "transactional.id": "kser names its transactional producers itself",
    "enable.partition.eof": "kser sets it where it needs it",
    "delivery.report.only.error": "kser waits for every confirmation",
    "on_delivery": "give on_delivery with each record",
    "on_commit": "commits are synchronous and report their own errors",
    "logger": "the client logs to the Python logger kser.confluent",
    "key.serializer": "kser writes bytes itself",
    "value.serializer": "kser writes bytes itself",
    "key.deserializer": "kser reads bytes itself",
    "value.deserializer": "kser reads bytes itself",
}
#: Values that librdkafka takes in capitals too, and that are compared here.
_ANY_CASE: Final = frozenset({"acks", "auto.offset.reset", "group.protocol"})
#: Python callables that confluent-kafka takes beside librdkafka's properties.
_CALLBACKS: Final = frozenset({"error_cb", "stats_cb", "throttle_cb", "oauth_cb"})
#: KIP-848 leaves these to the broker; librdkafka refuses them together with group.protocol=consumer.
_CLASSIC_ONLY: Final = (
    "partition.assignment.strategy",
    "session.timeout.ms",
    "heartbeat.interval.ms",
    "group.protocol.type",
)
#: Without a meaning for an onlooker outside any group; each is checked against the others all the same.
_MEMBERS_ONLY: Final = (
    *_CLASSIC_ONLY,
    "group.instance.id",
    "group.protocol",
    "group.remote.assignor",
    "max.poll.interval.ms",
)
_STARTS: Final[dict[str, Start]] = {
    "smallest": "earliest",
    "earliest": "earliest",
    "beginning": "earliest",
    "largest": "latest",
    "latest": "latest",
    "end": "latest",
    "error": "error",
    "none": "error",
}
#: Holds secrets though its name does not look like it.
_SECRET_TOO: Final = frozenset({"sasl.oauthbearer.config"})

_Client = TypeVar("_Client")


# -- what the user gave ------------------------------------------------------------------------------------------------


def checked(user: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of the user's properties, second names replaced by the usual ones, that both kinds of client accept.

    No broker is asked, nothing is connected. Files it names (certificates, keys) are read.

    Raises ConfigurationError: which property is missing, unknown or has a value that cannot be, and what to write.
    """
    config = _named_once(user)
    for name, cure in _NOT_FOR_USERS.items():
        if name in config:
            raise ConfigurationError(f"Kafka property {name}: {cure}; leave it out", extra={"property": name})
    start = str(config.get("auto.offset.reset", "earliest"))
    if start not in _STARTS:
        raise ConfigurationError(
            f"Kafka property auto.offset.reset={start!r}: write earliest or latest, the start of a new group",
            extra={"property": "auto.offset.reset"},
        )
    _try_out(config)
    if not config.get("bootstrap.servers"):
        raise ConfigurationError(
            "Kafka property bootstrap.servers is missing: give the brokers' addresses, as in "
            '{"bootstrap.servers": "host1:9092,host2:9092"}, or set KSER_KAFKA_BOOTSTRAP_SERVERS',
            extra={"property": "bootstrap.servers"},
        )
    return config


def from_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The properties that KSER_KAFKA_* variables give: KSER_KAFKA_SASL_PASSWORD is ``sasl.password``.

    Empty variables count as not set. Raises ConfigurationError for a name that is no property.
    """
    names = {name.replace(".", "_").upper(): name for name in KNOWN}
    found: dict[str, str] = {}
    for variable in sorted(environ):
        if not variable.startswith(ENVIRONMENT_PREFIX) or not environ[variable]:
            continue
        suffix = variable.removeprefix(ENVIRONMENT_PREFIX)
        name = names.get(suffix)
        if name is None:
            raise ConfigurationError(
                f"Environment variable {variable} names no Kafka property{_nearest(suffix, names, ENVIRONMENT_PREFIX)}",
                extra={"property": variable},
            )
        found[name] = environ[variable]
    return found


def new_group_start(user: Mapping[str, Any]) -> Start:
    """Where a group that has committed nothing starts: the user's ``auto.offset.reset``, by default earliest."""
    return _STARTS[str(user.get("auto.offset.reset", "earliest"))]


def masked(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy to show to people: values that look secret are masked."""
    return {k: MASK if v not in (None, "") and _is_secret(k) else v for k, v in config.items()}


# -- what each client gets ---------------------------------------------------------------------------------------------


def consumer_config(
    user: Mapping[str, Any], group: str, *, kip848: bool = False, member_id: str | None = None
) -> dict[str, Any]:
    """For a member of ``group``. Warns of what is overridden.

    Args:
        user: properties that went through checked().
        group: the consumer group; wins over ``group.id`` in ``user``.
        kip848: use the group protocol of KIP-848 unless the user chose one.
        member_id: the name of a static member; wins over ``group.instance.id`` in ``user``.
    """
    if member_id is not None:
        user = {**user, "group.instance.id": checked_member_id(member_id)}
    _warn_overridden(user, "enable.auto.commit", unless=False, why="offsets are committed when the work is done")
    _warn_overridden(user, "isolation.level", unless="read_committed", why="aborted results must not be run")
    return _consumer(user, group, kip848=kip848)


def reader_config(user: Mapping[str, Any], group: str) -> dict[str, Any]:
    """For an onlooker outside any group. librdkafka wants a ``group`` even so; nothing is committed under it."""
    config = _CLIENT_DEFAULTS | _FETCH_DEFAULTS | _without(user, PRODUCER)
    config = _without(config, _MEMBERS_ONLY)
    # An onlooker that falls behind the retention goes on with what there still is.
    return config | _SOURCE_ALWAYS | {"group.id": group, "auto.offset.reset": "earliest", "enable.partition.eof": True}


def producer_config(
    user: Mapping[str, Any], transactional_id: str | None = None, *, failures_only: bool = False
) -> dict[str, Any]:
    """For a producer: idempotent with all acknowledgements, unless the user wants less; always so in transactions.

    With ``failures_only`` it calls an ``on_delivery`` only with an error. Raises ConfigurationError for acks=0.
    """
    only = {"delivery.report.only.error": True} if failures_only else {}
    if transactional_id is None:
        if _text(user.get("acks", "all")) == "0":
            raise ConfigurationError(
                "Kafka property acks=0: what is sent would count as sent without a broker's word; write all, or 1",
                extra={"property": "acks"},
            )
        return _plain_producer(user) | only
    _warn_overridden(user, "acks", unless="all", why="transactions need it so")
    _warn_overridden(user, "enable.idempotence", unless=True, why="transactions need it so")
    return _transactional_producer(user, transactional_id) | only


def admin_config(user: Mapping[str, Any]) -> dict[str, Any]:
    """For looking at topics and making them."""
    config = _CLIENT_DEFAULTS | _without(user, CONSUMER | PRODUCER)
    # Nobody polls an admin client all the time, so its log lines would pile up unread: its calls tell their errors.
    return config | {"allow.auto.create.topics": False, "log_level": 0}


def is_incremental(config: Mapping[str, Any]) -> bool:
    """Whether rebalances of a consumer with this config come as differences (cooperative, KIP-848)."""
    return config.get("group.protocol") == "consumer" or "cooperative" in str(
        config.get("partition.assignment.strategy", "")
    )


def new_client(
    factory: Callable[[dict[str, Any]], _Client], config: Mapping[str, Any], state: ClientState | None = None
) -> _Client:
    """A client made of ``config``, its log lines and errors told to ``state``.

    Raises ConfigurationError when librdkafka refuses. A broker that is down is no error here.
    """
    complete = {k: _guarded(v) if k in _CALLBACKS and k != "oauth_cb" else v for k, v in config.items()}
    if state is not None:
        complete |= {"logger": state.quiet, "error_cb": _both(state.on_error, complete.get("error_cb"))}
    try:
        return factory(complete)
    except (KafkaException, TypeError, ValueError) as exc:
        error = kafka_error(exc)
        raise _refusal((error.str() if error is not None else str(exc)) or "", config) from exc


# -- inside ------------------------------------------------------------------------------------------------------------


def _named_once(user: Mapping[str, Any]) -> dict[str, Any]:
    """The user's properties under one name each; None means not set; a list is joined with commas."""
    if not isinstance(user, Mapping):
        raise ConfigurationError(
            f"The Kafka configuration is {shown(user)}: give a dict of librdkafka properties, as in "
            '{"bootstrap.servers": "host:9092"}'
        )
    config: dict[str, Any] = {}
    for given, value in user.items():
        if not isinstance(given, str):
            raise ConfigurationError(f"Kafka property {given!r}: names are strings", extra={"property": str(given)})
        if value is None:
            continue
        name = ALIASES.get(given, given)
        if name in config:
            raise ConfigurationError(
                f"Kafka properties {name} and {given} are the same setting: give one of them",
                extra={"property": given},
            )
        config[name] = ",".join(str(v) for v in value) if isinstance(value, (list, tuple)) else value
        if name == "acks" and _text(value) == "-1":
            config[name] = "all"
        if name in _ANY_CASE and isinstance(value, str):
            config[name] = value.strip().lower()
        if callable(value) != (name in _CALLBACKS) and name not in _NOT_FOR_USERS:
            takes = "takes a function" if name in _CALLBACKS else "takes no function"
            raise ConfigurationError(f"Kafka property {given} {takes}, not {value!r}", extra={"property": given})
    return config


def _try_out(config: Mapping[str, Any]) -> None:
    """Let librdkafka itself judge: make a client of each kind, which without addresses connects to nothing."""
    alone = _without(config, {"bootstrap.servers", *_CALLBACKS}) | {"log_level": 0}
    new_client(Producer, _plain_producer(alone))
    new_client(Producer, _transactional_producer(alone, "kser"))
    new_client(Consumer, _consumer(alone, "kser", kip848=False)).close()


def _consumer(user: Mapping[str, Any], group: str, *, kip848: bool) -> dict[str, Any]:
    config = _CLIENT_DEFAULTS | _FETCH_DEFAULTS | _without(user, PRODUCER)
    if kip848 and "group.protocol" not in user:
        config = _without(config, _CLASSIC_ONLY) | {"group.protocol": "consumer"}
    elif config.get("group.protocol", "classic") == "classic":
        config.setdefault("partition.assignment.strategy", "cooperative-sticky")
        # Members learn of a rebalance by a heartbeat: with librdkafka's 3 s two of them took 9 s to share.
        config.setdefault("heartbeat.interval.ms", min(1000, int(config.get("session.timeout.ms", 45000)) // 3))
    return config | _SOURCE_ALWAYS | {"group.id": group}


def _plain_producer(user: Mapping[str, Any]) -> dict[str, Any]:
    given = _without(user, CONSUMER)
    config = _CLIENT_DEFAULTS | _PRODUCER_DEFAULTS | given
    config.setdefault("enable.idempotence", _may_be_idempotent(given))
    return config


def _transactional_producer(user: Mapping[str, Any], transactional_id: str) -> dict[str, Any]:
    # What idempotence excludes is left out here, so that one mapping serves plain and transactional producers.
    given = _without(user, CONSUMER | {"acks", "linger.ms", "retries", "max.in.flight"})
    config = _CLIENT_DEFAULTS | _PRODUCER_DEFAULTS | _TRANSACTION_DEFAULTS | given
    for name in ("delivery.timeout.ms", "socket.timeout.ms"):
        if _number(config.get(name)) > _number(config["transaction.timeout.ms"]):
            del config[name]  # librdkafka refuses a longer one, and takes the transaction's by itself
    return config | {"enable.idempotence": True, "transactional.id": transactional_id}


def _guarded(callback: Callable[[Any], object]) -> Callable[[Any], None]:
    """The user's callback, whose exceptions are logged: they would come out of some later call, garbled."""

    def guarded(event: Any) -> None:
        try:
            callback(event)
        except Exception:  # noqa: BLE001 - user code, called by the client
            log_raised(logger, "%r of the Kafka settings raised", callback)

    return guarded


def _both(own: Callable[[Any], None], users: Callable[[Any], None] | None) -> Callable[[Any], None]:
    if users is None:
        return own

    def both(event: Any) -> None:
        own(event)
        users(event)

    return both


def _refusal(text: str, config: Mapping[str, Any]) -> ConfigurationError:
    marker = 'No such configuration property: "'
    if marker in text:
        name: str | None = text.split(marker, 1)[1].split('"', 1)[0]
        message = f"Kafka property {name} does not exist{_nearest(str(name), KNOWN)}"
    else:
        spoken = {other: name for other, name in ALIASES.items() if name in config} | {name: name for name in config}
        name = next((spoken[n] for n in sorted(spoken, key=len, reverse=True) if n in text), None)
        message = f"Kafka settings are refused: {text}" + (f" (given: {name}={config[name]!r})" if name else "")
    for secret in (str(value) for key, value in config.items() if _is_secret(key)):
        if len(secret) > 2:
            message = message.replace(secret, MASK)
    return ConfigurationError(message, extra={"property": name})


def _nearest(name: str, known: Collection[str], prefix: str = "") -> str:
    dotted = name.replace("_", ".")
    found = [dotted] if dotted in known else difflib.get_close_matches(name, sorted(known), n=1)
    return f"; did you mean {prefix}{found[0]}?" if found else "; leave it out"


def _is_secret(name: str) -> bool:
    return name in _SECRET_TOO or looks_secret(name)


def _without(config: Mapping[str, Any], names: Any) -> dict[str, Any]:
    return {k: v for k, v in config.items() if k not in names}


def _warn_overridden(user: Mapping[str, Any], name: str, *, unless: Any, why: str) -> None:
    if name in user and _text(user[name]) != _text(unless):
        logger.warning("Kafka property %s=%s is overridden: %s", name, user[name], why)


def _may_be_idempotent(given: Mapping[str, Any]) -> bool:
    """As Java producers do: idempotent unless the user's own settings exclude it."""
    return (
        _text(given.get("acks", "all")) in ("all", "-1")
        and _text(given.get("retries", 1)) != "0"
        and _number(given.get("max.in.flight", 5)) <= 5
    )


def _text(value: Any) -> str:
    return str(value).strip().lower()


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return 0.0
