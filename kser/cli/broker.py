"""``kser broker``: the embedded broker, in the foreground."""

import threading

import click

from kser.cli.errors import CommandFailed
from kser.cli.options import TopicWithPartitions, example, format_option, log_level_option, option
from kser.cli.output import write_json
from kser.worker.shutdown import stopping_on_signals
from kser.worker.topics import DEFAULT_PARTITIONS, group_topics

__all__ = ["broker"]

#: Seconds between two looks whether the broker is still there.
_LOOK_EVERY_S = 0.5


@click.command(
    "broker",
    short_help="Run a Kafka broker in memory, nothing to install.",
    epilog=example("kser broker --topic shop:6 --group shop"),
)
@option(
    "--topic",
    "topics",
    type=TopicWithPartitions(),
    multiple=True,
    metavar="NAME:PARTITIONS",
    help=f"A topic to create; may be repeated. Without a number it gets {DEFAULT_PARTITIONS} partitions.",
)
@option("--group", metavar="NAME", help="Create the topics of this consumer group, too.")
@format_option
@log_level_option("warning")
def broker(topics: tuple[tuple[str, int | None], ...], group: str | None, output: str) -> None:
    """Run a Kafka broker on 127.0.0.1 until Ctrl-C or SIGTERM, for development and tests.

    Any Kafka client can use it. It keeps everything in memory, at most 5 MB or 100,000 records a partition, and it is
    all gone at the end. A topic that is not named here is made by its first use, with 4 partitions.
    """
    from kser.confluent.embedded import EmbeddedBroker  # here: its package loads the Kafka client

    wanted = {name: partitions or DEFAULT_PARTITIONS for name, partitions in topics}
    for spec in group_topics(group) if group else []:
        wanted.setdefault(spec.name, spec.partitions)
    ended = threading.Event()
    with stopping_on_signals(ended.set), EmbeddedBroker(wanted) as running:
        if output == "json":
            write_json({"bootstrap_servers": running.bootstrap_servers, "topics": wanted})
        else:
            _introduce(running.bootstrap_servers, wanted)
        while not ended.wait(_LOOK_EVERY_S):
            if not running.alive:
                raise CommandFailed(f"The broker on {running.bootstrap_servers} has ended; its topics are lost")


def _introduce(address: str, topics: dict[str, int]) -> None:
    named = ", ".join(f"{name} ({partitions} partitions)" for name, partitions in topics.items())
    for line in (
        f"Kafka broker on {address}, in memory: at most 5 MB or 100,000 records a partition, gone with Ctrl-C",
        f"Topics: {named or 'none yet'}; any other is made by its first use, with 4 partitions",
        "In another terminal:",
        f"  export KSER_BOOTSTRAP_SERVERS={address}",
    ):
        click.echo(line)
