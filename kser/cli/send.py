"""``kser send``: one message."""

import uuid as uuids
from typing import Any

import click

from kser import results
from kser.cli.connection import Connection
from kser.cli.errors import CommandFailed
from kser.cli.options import (
    example,
    format_option,
    kafka_options,
    key_option,
    log_level_option,
    option,
    params_option,
    topic_option,
)
from kser.cli.output import write_json
from kser.errors import ConfigurationError
from kser.schemas import Message

__all__ = ["NO_TOPIC", "send", "tell_sent"]

NO_TOPIC = "No topic is named: add --topic NAME, set KSER_TOPIC, or list one under `topics:` in --config-file"


def _named(ctx: click.Context, param: click.Parameter, value: str) -> str:
    if not value.strip():
        raise click.BadParameter(f"{value!r}: write the name of a task, as `kser tasks` shows it", ctx, param)
    return value


@click.command(
    "send",
    short_help="Send one message to a task, by its name.",
    epilog=example(
        'kser send shop.tasks.Charge --topic shop --params \'{"order": "A7", "amount": 12}\'',
        "kser send shop.tasks.Charge --topic shop --params @order.json --format json",
    ),
)
@click.argument("entrypoint", callback=_named)
@topic_option
@params_option
@option("--uuid", metavar="TEXT", help="Identifies the task; the same again when it is sent again.  [default: random]")
@key_option
@option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=60,
    show_default=True,
    metavar="SECONDS",
    help="Longest wait for the broker's confirmation.",
)
@kafka_options
@format_option
@log_level_option("warning")
def send(
    entrypoint: str,
    topic: str | None,
    params: dict[str, Any],
    uuid: str | None,
    message_key: str | None,
    timeout: float,
    connection: Connection,
    output: str,
) -> None:
    """Send one message that names ENTRYPOINT, and wait until the broker has confirmed it.

    Any name can be sent: whether a worker knows it shows when one takes the message.
    """
    target = connection.topic(topic)
    if target is None:
        raise ConfigurationError(NO_TOPIC)
    kmsg = Message(uuid or str(uuids.uuid4()), entrypoint, params)
    with connection.patience(), connection.producer() as producer:
        result = producer.send(target, kmsg, timeout, key=message_key)
    tell_sent(kmsg.uuid, entrypoint, target, result, output)


def tell_sent(uuid: str, entrypoint: str, topic: str, result: results.Result, output: str) -> None:
    """Print where a message went. Raises CommandFailed with the reason when it was not confirmed."""
    if not results.is_success(result):
        raise CommandFailed(f"{entrypoint}[{uuid}] is not confirmed in topic {topic}: {result.stderr}")
    if output == "json":
        write_json({"uuid": uuid, "entrypoint": entrypoint, "topic": topic, "result": result})
    else:
        click.echo(f"{entrypoint}[{uuid}] sent to {topic}")
