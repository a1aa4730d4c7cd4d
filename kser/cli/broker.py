"""``kser broker``: the embedded broker, in the foreground."""

import threading
from collections.abc import Mapping

import click

from kser.cli.errors import CommandFailed
from kser.cli.options import TopicWithPartitions, example, format_option, log_level_option, option
from kser.cli.output import write_json
from kser.worker.shutdown import stopping_on_signals
from kser.worker.topic_findings import count
from kser.worker.topic_plan import DEFAULT_PARTITIONS, TopicPlan

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
    variable="KSER_BROKER_TOPIC",
    type=TopicWithPartitions(),
    multiple=True,
    metavar="NAME:PARTITIONS",
    help=f"A topic to create; may be repeated. Without a number it gets {DEFAULT_PARTITIONS} partitions.",
)
@option(
    "--group",
    metavar="NAME",
    help="Create the topics of this consumer group, too, with as many partitions as they need.",
)
@format_option
@log_level_option("warning")
def broker(topics: tuple[tuple[str, int | None], ...], group: str | None, output: str) -> None:
    """Run a Kafka broker on 127.0.0.1 until Ctrl-C or SIGTERM, for development and tests.

    Any Kafka client can use it. It keeps everything in memory, at most 5 MB or 100,000 records a partition, and it is
    all gone at the end. A topic that is not named here is made by its first use, with 4 partitions.
    """
    from kser.confluent.embedded import EmbeddedBroker  # here: its package loads the Kafka client

    tasks = {name: partitions or DEFAULT_PARTITIONS for name, partitions in topics}
    wanted = group_topics(group, tasks) if group else tasks
    ended = threading.Event()
    with stopping_on_signals(ended.set), EmbeddedBroker(wanted) as running:
        if output == "json":
            write_json({"bootstrap_servers": running.bootstrap_servers, "topics": wanted})
        else:
            _introduce(running.bootstrap_servers, tasks, group)
        while not ended.wait(_LOOK_EVERY_S):
            if not running.alive:
                raise CommandFailed(f"The broker on {running.bootstrap_servers} has ended; its topics are lost")


def _introduce(address: str, tasks: dict[str, int], group: str | None) -> None:
    named = [f"{name} ({count(partitions, 'partition')})" for name, partitions in tasks.items()]
    named += [f"those of group {group}"] if group else []
    for line in (
        f"Kafka broker on {address}, in memory: at most 5 MB or 100,000 records a partition, gone with Ctrl-C",
        f"Topics: {', '.join(named) or 'none yet'}; any other is made by its first use, with 4 partitions",
        "In another terminal:",
        f"  export KSER_BOOTSTRAP_SERVERS={address}",
    ):
        click.echo(line)


def group_topics(group: str, tasks: Mapping[str, int]) -> dict[str, int]:
    """Task topics and those of a group to match them, name -> partitions: on this broker nobody else can make them."""
    return {spec.name: spec.partitions for spec in TopicPlan(group=group, tasks=tasks).specs({})}
