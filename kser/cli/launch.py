"""``kser launch``: build an operation and send it on its way, and follow it to its end."""

from typing import Any

import click

from kser import results
from kser.cli import logs
from kser.cli.connection import Connection
from kser.cli.options import (
    example,
    format_option,
    group_option,
    kafka_options,
    key_option,
    log_level_option,
    option,
    params_option,
    registry_argument,
    topic_option,
)
from kser.cli.send import NO_TOPIC, tell_sent
from kser.cli.watch import Deadline, watch
from kser.entry import Entrypoint
from kser.errors import ConfigurationError
from kser.events import events_topic
from kser.headers import Headers
from kser.launching import build
from kser.loading import find_class, load
from kser.results import Result
from kser.schemas import Message
from kser.sequencing.operation import Operation
from kser.sequencing.registry import OperationRegistry
from kser.sequencing.task import MessageSender, Task

__all__ = ["launch"]

#: Longest wait for the broker's confirmation when --timeout is longer, or not given.
_CONFIRMED_S = 60.0
#: Longest wait for a sign of life of the broker.
_ANSWERS_S = 10.0


@click.command(
    "launch",
    short_help="Launch an operation, and watch it advance.",
    epilog=example(
        'kser launch shop.tasks:registry Order --topic shop --params \'{"order": "A7", "amount": 12}\' --watch',
        "kser launch app.py Order --topic shop --params @order.json --watch --timeout 600 --format json",
    ),
)
@registry_argument
@click.argument("operation")
@topic_option
@params_option
@key_option
@option(
    "--key",
    metavar="TEXT",
    help="What it is for, an order's number say: of all that are launched with the same one, one is started.",
)
@option("--watch", "follow", is_flag=True, help="Show its steps, and end when it ends: exit code 0 on SUCCESS, else 1.")
@group_option
@option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help="Give up after so long; the operation goes on without.  [default: 60 to be sent, then no limit]",
)
@kafka_options
@format_option
@log_level_option("warning")
def launch(
    registry: str,
    operation: str,
    topic: str | None,
    params: dict[str, Any],
    message_key: str | None,
    key: str | None,
    follow: bool,
    group: str | None,
    timeout: float | None,
    connection: Connection,
    output: str,
) -> None:
    """Build OPERATION and send its first task; the workers of --group do the rest.

    OPERATION is a name that `kser tasks` shows, or just the name of its class. A task is sent as it is.
    """
    loaded = load(registry)
    if (default := connection.topic(topic)) is not None:
        loaded.configure(topic=default)
    made = build(find_class(loaded, operation), params, message_key, key)
    target = _target(made, loaded, topic)
    deadline = Deadline(timeout)
    if not follow:
        tell_sent(made.uuid, made.path, target, _send(made, loaded, connection, target, deadline), output)
        return
    named = connection.group(group)
    transport = connection.transport()
    with connection.patience():
        transport.admin().cluster_id(min(_ANSWERS_S, deadline.left))  # else reader() waits for its own time
        # Before the first event can come; with a key it may have come long ago.
        reader = transport.reader([events_topic(named)], start="beginning" if key else "end")
    try:
        sent = _send(made, loaded, connection, target, deadline)
        if not results.is_success(sent) or output != "json":
            tell_sent(made.uuid, made.path, target, sent, output)
        logs.tell_all()
        watch(reader, made.uuid, made.path, group=named, topic=target, deadline=deadline, output=output)
    finally:
        reader.close()


def _target(made: Entrypoint, registry: OperationRegistry, given: str | None) -> str:
    """Where the first message goes. A class that names its own topic keeps it, but for a lone task sent elsewhere."""
    if given and not isinstance(made, Operation):
        return given
    first = made.tasks[0] if isinstance(made, Operation) else made
    topic = first.home_topic() if isinstance(first, Task) else registry.topic
    if topic is None:
        raise ConfigurationError(NO_TOPIC)
    return topic


def _send(
    made: Entrypoint, registry: OperationRegistry, connection: Connection, topic: str, deadline: Deadline
) -> Result:
    timeout = min(_CONFIRMED_S, deadline.left)
    with connection.patience(), connection.producer() as producer:
        if isinstance(made, Operation):
            registry.configure(producer=_Within(producer, timeout))
            return made.launch()
        kmsg = made.to_Message().sent_as(registry.transport)
        return producer.send(topic, kmsg, timeout, key=made.key if isinstance(made, Task) else None)


class _Within:
    """A producer that waits no longer than --timeout: launch() itself takes none. Implements MessageSender."""

    def __init__(self, producer: MessageSender, timeout: float) -> None:
        self._producer = producer
        self._timeout = timeout

    def send(
        self, topic: str, kmsg: Message, timeout: float = 60, *, key: str | None = None, headers: Headers = ()
    ) -> Result:
        """As the producer, within the shorter time."""
        more: dict[str, Any] = {"headers": headers} if headers else {}
        return self._producer.send(topic, kmsg, min(timeout, self._timeout), key=key, **more)
