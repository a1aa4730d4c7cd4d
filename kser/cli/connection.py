"""The broker of a command: settings from options, variables and a file, and what is made of them.

What wins, from weak to strong: the file, KSER_KAFKA_*, options given as KSER_* variables, options on the command line.
"""

import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import click

from kser.errors import ConfigurationError
from kser.producer import BaseProducer
from kser.transport import Transport

__all__ = ["DEFAULT_GROUP", "Connection", "Drivers", "parse_topic", "read_file"]

DEFAULT_GROUP = "kser"

#: Seconds without an answer after which a person wonders.
_LONG_S = 2.0
_BOOTSTRAP = "bootstrap.servers"
_NO_BROKER = (
    "No broker is named: add --bootstrap-servers HOST:PORT, or set KSER_BOOTSTRAP_SERVERS. For one at hand run "
    "`kser broker` (in memory) or `make kafka` (Apache Kafka): each prints its address"
)


def _kafka_transport(config: Mapping[str, Any]) -> Transport:
    from kser.confluent.transport import ConfluentTransport  # here: it loads the Kafka client

    return ConfluentTransport(config)


def _kafka_producer(config: Mapping[str, Any]) -> BaseProducer:
    from kser.confluent.producer import Producer  # here: it loads the Kafka client

    return Producer(config)


@dataclass(frozen=True)
class Drivers:
    """How commands talk to a broker: Kafka, unless they are called with another ``obj`` (tests, with a fake one)."""

    transport: Callable[[Mapping[str, Any]], Transport] = _kafka_transport
    producer: Callable[[Mapping[str, Any]], BaseProducer] = _kafka_producer


class Connection:
    """What a command knows of its broker. Nothing is read or connected before it is asked for.

    Args:
        drivers: what makes transports and producers.
        bootstrap_servers: the option.
        typed: True when that option was on the command line, and not in a variable.
        properties: ``name=value`` each, of -X.
        config_file: YAML file.

    Everything here raises ConfigurationError for settings that cannot be.
    """

    def __init__(
        self,
        drivers: Drivers,
        *,
        bootstrap_servers: str | None = None,
        typed: bool = True,
        properties: Sequence[str] = (),
        config_file: Path | None = None,
    ) -> None:
        self._drivers = drivers
        self._servers = {_BOOTSTRAP: bootstrap_servers} if bootstrap_servers else {}
        self._typed = typed
        self._properties = properties
        self._path = config_file

    @cached_property
    def kafka(self) -> dict[str, Any]:
        """The librdkafka properties, the addresses of brokers among them if there are any."""
        from kser.confluent.config import from_environment  # here: it loads the Kafka client
        from kser.confluent.properties import ALIASES

        typed = dict(_parse_property(text) for text in self._properties)
        layers = [self._file.get("kafka", {}), from_environment(os.environ)]
        layers += [typed, self._servers] if self._typed else [self._servers, typed]
        merged: dict[str, Any] = {}
        for layer in layers:
            # By one spelling each, so that a stronger layer replaces what a weaker one calls by its second name.
            merged |= {ALIASES.get(name, name): value for name, value in layer.items() if value is not None}
        return merged

    @property
    def config(self) -> dict[str, Any]:
        """The librdkafka properties. Raises ConfigurationError when no broker is named."""
        if not self.kafka.get(_BOOTSTRAP):
            raise ConfigurationError(_NO_BROKER)
        return self.kafka

    def group(self, given: str | None) -> str:
        """The consumer group: the option, else ``group.id``, else "kser"."""
        if given is not None and not given.strip():
            raise ConfigurationError("--group is empty: give the name of the consumer group, or leave it out")
        return given or str(self.kafka.get("group.id") or DEFAULT_GROUP)

    def topics(self, given: Sequence[tuple[str, int | None]] | None) -> list[str]:
        """Names of topics: the option, else those of the file. Raises ConfigurationError when there are none."""
        names = [name for name, _ in self.topics_with_partitions(given)]
        if not names:
            raise ConfigurationError(
                "No topics are named: add --topics a,b, set KSER_TOPICS, or list them under `topics:` in --config-file"
            )
        return names

    def topic(self, given: str | None) -> str | None:
        """The topic to send to: the option, else the file's, when it has just one; else None."""
        named = [name for name, _ in self._topics_of_file()]
        return given or (named[0] if len(named) == 1 else None)

    def topics_with_partitions(self, given: Sequence[tuple[str, int | None]] | None) -> list[tuple[str, int | None]]:
        """Topics and their numbers of partitions (None: not said): the option, else those of the file."""
        return list(given if given is not None else self._topics_of_file())

    def transport(self) -> Transport:
        """A transport for this broker."""
        return self._drivers.transport(self.config)

    def producer(self) -> BaseProducer:
        """A producer for this broker; whoever asked closes it."""
        return self._drivers.producer(self.config)

    @contextmanager
    def patience(self) -> Iterator[None]:
        """Around calls that wait for the broker: a terminal is told so when it takes long."""
        if sys.stderr is None or not sys.stderr.isatty():
            yield
            return
        text = f"kser: waiting for Kafka on {self.config[_BOOTSTRAP]} ..."
        timer = threading.Timer(_LONG_S, click.echo, [text], {"err": True})
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    @cached_property
    def _file(self) -> dict[str, Any]:
        return read_file(self._path) if self._path is not None else {}

    def _topics_of_file(self) -> list[tuple[str, int | None]]:
        return [parse_topic(name) for name in self._file.get("topics", [])]


def parse_topic(text: str) -> tuple[str, int | None]:
    """``name:partitions`` or ``name`` as (name, partitions or None). Raises ValueError, with what to write.

    A name that begins with ``^`` is a pattern, for workers, and may have colons of its own.
    """
    if text.strip().startswith("^"):
        return text.strip(), None
    name, colon, number = text.strip().partition(":")
    if not colon and name:
        return name, None
    if not name or not number.isdecimal() or int(number) < 1:
        raise ValueError(f"{text!r}: write name:partitions, as in orders:6")
    return name, int(number)


def read_file(path: Path) -> dict[str, Any]:
    """What a configuration file says: ``kafka`` -> dict of properties, ``topics`` -> list of names.

    Raises ConfigurationError, with the file, and the line where there is one.
    """
    import yaml  # here: only commands with a file need it

    try:
        data = yaml.safe_load(path.read_text("utf-8"))
    except OSError as exc:
        raise ConfigurationError(f"Configuration file {path} cannot be read: {exc.strerror}") from exc
    except UnicodeDecodeError as exc:
        raise ConfigurationError(f"Configuration file {path} is not UTF-8 text: {exc}") from exc
    except yaml.YAMLError as exc:
        mark = getattr(exc, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark is not None else str(path)
        problem = getattr(exc, "problem", None) or exc
        raise ConfigurationError(f"Configuration file {place} is not YAML: {problem}") from exc
    return _checked(path, {} if data is None else data)


def _checked(path: Path, data: Any) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise ConfigurationError(
            f"Configuration file {path} holds a {type(data).__name__}: write `kafka:` with properties below it"
        )
    unknown = [str(name) for name in data if name not in ("kafka", "topics")]
    if unknown:
        raise ConfigurationError(
            f"Configuration file {path}: unknown entry {', '.join(unknown)}; it takes `kafka:` and `topics:`, and "
            "Kafka's properties belong below `kafka:`"
        )
    kafka, topics = data.get("kafka") or {}, data.get("topics") or []
    if not isinstance(kafka, dict):
        raise ConfigurationError(
            f"Configuration file {path}: `kafka:` is a {type(kafka).__name__}; write properties below it, as in "
            "`  bootstrap.servers: host:9092`"
        )
    names = topics.split(",") if isinstance(topics, str) else topics
    if not isinstance(names, list) or not all(isinstance(name, str) and name.strip() for name in names):
        raise ConfigurationError(f"Configuration file {path}: `topics:` is a list of names, as in [orders, mails:6]")
    try:
        for name in names:
            parse_topic(name)
    except ValueError as exc:
        raise ConfigurationError(f"Configuration file {path}: topic {exc}") from None
    return {"kafka": kafka, "topics": [name.strip() for name in names]}


def _parse_property(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        shown = name.strip() if equals else text.split()[0] if text.split() else ""
        raise ConfigurationError(f"-X {shown}: write -X name=value, as in -X security.protocol=SSL")
    return name.strip(), value
