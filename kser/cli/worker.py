"""``kser worker``: run the tasks of a registry."""

import logging
import sys
import threading

import click

from kser.cli.connection import Connection
from kser.cli.errors import CommandFailed
from kser.cli.options import (
    TopicWithPartitions,
    example,
    group_option,
    kafka_options,
    log_level_option,
    option,
    registry_argument,
)
from kser.errors import ConfigurationError
from kser.loading import load
from kser.worker import Worker
from kser.worker.shutdown import stopping_on_signals

__all__ = ["worker"]

logger = logging.getLogger(__name__)


@click.command(
    "worker",
    short_help="Run the tasks of a registry.",
    epilog=example(
        "kser worker shop.tasks:registry --topics shop --bootstrap-servers 127.0.0.1:9092",
        "kser worker app.py:registry --topics shop,mails --group shop --drain 120",
    ),
)
@registry_argument
@option("--topics", type=TopicWithPartitions(many=True), metavar="A,B", help="Topics to take messages from.")
@group_option
@option("--name", metavar="TEXT", help="Name of this worker in events and logs.  [default: host-pid]")
@option(
    "--drain",
    type=click.FloatRange(min=0),
    default=30,
    show_default=True,
    metavar="SECONDS",
    help="What a running task gets to end when the worker is asked to stop.",
)
@option(
    "--create-topics/--no-create-topics",
    default=True,
    show_default=True,
    help="Create what is missing of the group's own topics, or refuse to start.",
)
@option("--stop-with-stdin", is_flag=True, help="Stop when stdin ends: for a parent that must leave no worker behind.")
@kafka_options
@log_level_option("info")
def worker(
    registry: str,
    topics: list[tuple[str, int | None]] | None,
    group: str | None,
    name: str | None,
    drain: float,
    create_topics: bool,
    stop_with_stdin: bool,
    connection: Connection,
) -> None:
    """Run the tasks of a registry, taking messages from topics, until SIGTERM or Ctrl-C.

    Asked to stop, it takes nothing more, lets what runs end (--drain), settles it and leaves the group: exit code 0.
    Asked twice, it does not wait. What did not end is run by another worker.
    """
    config, named = connection.config, connection.topics(topics)
    loaded = load(registry)
    if not loaded.tasks():
        raise ConfigurationError(f"Nothing is registered in {registry}: put @registry.subscribe on its classes")
    running = Worker(
        loaded,
        topics=named,
        group=connection.group(group),
        transport=connection.transport(),
        name=name,
        drain_s=drain,
        create_topics=create_topics,
    )
    if stop_with_stdin:
        threading.Thread(target=_stop_with_stdin, args=[running], name="kser-stdin", daemon=True).start()
    logger.info(
        "Worker.Starting... %s, group %s, topics %s, brokers %s",
        running.name,
        running.group,
        ", ".join(running.topics),
        config["bootstrap.servers"],
    )
    with stopping_on_signals(running.stop):
        running.run()
    logger.info("Worker.Stopped: %s", ", ".join(f"{n} {kind}" for kind, n in running.stats.items()) or "nothing came")
    if running.stats["broken"]:
        raise CommandFailed("The worker stopped because of a record it could not handle; the log names it")


def _stop_with_stdin(running: Worker) -> None:
    if sys.stdin is not None:
        while sys.stdin.buffer.read(4096):
            pass
    logger.info("Standard input has ended")
    running.stop()
