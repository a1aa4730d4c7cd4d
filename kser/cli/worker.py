"""``kser worker``: run the tasks of a registry."""

import logging
import os
import re
import sys
import threading
from collections.abc import Sequence
from typing import Any, get_args

import click

from kser.cli.connection import Connection
from kser.cli.errors import CommandFailed
from kser.cli.options import (
    Decorator,
    TopicWithPartitions,
    example,
    group_option,
    kafka_options,
    log_level_option,
    option,
    registry_argument,
)
from kser.errors import ConfigurationError, FencedError
from kser.loading import load
from kser.worker import Worker
from kser.worker.dispatch import Ordering
from kser.worker.processes import Processes
from kser.worker.shutdown import stopping_on_signals
from kser.worker.worker import Delivery, LostOffset

__all__ = ["LEFT", "TWIN", "worker"]

logger = logging.getLogger(__name__)

#: Exit codes beyond 0 (asked to stop), 1 (failure) and 2 (misuse).
TWIN, LEFT = 3, 4

_SIZES = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "ki": 1024, "mi": 1024**2, "gi": 1024**3}


class Size(click.ParamType):  # type: ignore[type-arg]  # not generic before click 8.4
    """``64MiB``, ``500kB``, ``1000000`` -> bytes."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The number of bytes."""
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"(\d+)\s*([kmg]i?)?b?", str(value).strip().lower())
        if found is None or not int(found[1]):
            self.fail(f"{value!r} is no size: write 64MiB, 500kB or a number of bytes", param, ctx)
        return int(found[1]) * _SIZES[found[2] or ""]


def count(*names: str, default: int, note: str) -> Decorator:
    """An option that is a whole number from 1."""
    return option(*names, type=click.IntRange(min=1), default=default, show_default=True, metavar="N", help=note)


@click.command(
    "worker",
    short_help="Run the tasks of a registry.",
    epilog=example(
        "kser worker shop.tasks:registry --topics shop --bootstrap-servers 127.0.0.1:9092",
        "kser worker app.py:registry --topics shop,mails --group shop --drain 120 --health 8081",
        "kser worker shop.tasks:registry --topics shop --processes 4 --concurrency 32 -X group.protocol=consumer",
    ),
)
@registry_argument
@option("--topics", type=TopicWithPartitions(many=True), metavar="A,B", help="Topics to take messages from.")
@group_option
@option(
    "--name",
    metavar="SLOT",
    help="Name of this worker, unique in the group and the same after a restart: makes it a static member, whose "
    "restart moves no partition.  [default: host and a free number]",
)
@option(
    "--delivery",
    type=click.Choice(get_args(Delivery)),
    help="exactly_once: what follows from a message and its offset are one transaction. at_least_once: the one is "
    "confirmed before the other.  [default: exactly_once; at_least_once on the embedded broker]",
)
@option(
    "--ordering",
    type=click.Choice(get_args(Ordering)),
    default="key",
    show_default=True,
    help="What runs one after the other: messages of a key, of a partition, or none.",
)
@count("--concurrency", default=16, note="Threads that run tasks.")
@count("--coroutines", default=256, note="`async def` tasks side by side.")
@count("--isolated", default=2, note="Child processes for tasks with isolate=True.")
@count("--processes", default=1, note="Workers of the group to start, each a process of its own.")
@option(
    "--drain",
    type=click.FloatRange(min=0),
    default=30,
    show_default=True,
    metavar="SECONDS",
    help="What a running task gets to end when the worker stops or loses its partition.",
)
@option("--health", type=click.IntRange(1, 65535), metavar="PORT", help="Serve /healthz and /readyz on 127.0.0.1.")
@option(
    "--on-lost-offset",
    type=click.Choice(get_args(LostOffset)),
    default="stop",
    show_default=True,
    help="When the committed offset does not exist any more: stop, or go on at the earliest or latest message.",
)
@count("--max-in-flight", default=4000, note="Messages taken and not run, beyond which no more are fetched.")
@option("--max-bytes", type=Size(), default="64MiB", show_default=True, metavar="SIZE", help="The same in bytes.")
@count("--max-poll-records", default=500, note="Messages taken from the client at a time.")
@option(
    "--events",
    type=click.Choice(["sequence", "none"]),
    default="sequence",
    show_default=True,
    help="What is told in the group's events topic.",
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
    processes: int,
    drain: float,
    health: int | None,
    stop_with_stdin: bool,
    connection: Connection,
    concurrency: int,
    isolated: int,
    events: str,
    **settings: Any,
) -> None:
    r"""Run the tasks of a registry, taking messages from topics, until SIGTERM or Ctrl-C.

    Asked to stop, it takes nothing more, lets what runs end (--drain), settles it and leaves the group. Asked twice, it
    does not wait. What did not end is run by another worker.

    \b
    Exit codes: 0 asked to stop, 1 failure, 2 misuse, 3 another worker has the same
    name, 4 tasks were left running when the budget was over.
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
        health_port=health,
        concurrency=concurrency,
        isolated=isolated,
        events=events != "none",
        location=registry,
        **settings,
    )
    if processes > 1:
        # The settings are checked by now: what is wrong with them is told once, not by each child.
        sys.exit(Processes(_commands(processes, name, health), drain_s=drain, ended=(1, 2, TWIN)).run())
    if stop_with_stdin:
        threading.Thread(target=_stop_with_stdin, args=[running], name="kser-stdin", daemon=True).start()
    logger.info(
        "Worker.Starting... %s, group %s, topics %s, brokers %s",
        running.name,
        running.group,
        ", ".join(running.topics),
        config["bootstrap.servers"],
    )
    try:
        with stopping_on_signals(running.stop):
            running.run()
    except FencedError as exc:
        raise CommandFailed(exc.message, code=TWIN) from exc
    logger.info("Worker.Stopped: %s", ", ".join(f"{n} {kind}" for kind, n in running.stats.items()) or "nothing came")
    if running.stats["broken"]:
        raise CommandFailed("The worker stopped because of a record it could not handle; the log names it")
    if running.left:
        raise CommandFailed(
            f"{running.left} task(s) did not end within {drain:g} s and were left; another worker runs them again",
            code=LEFT,
        )


def _commands(processes: int, name: str | None, health: int | None) -> list[list[str]]:
    """The commands of the children: this one for a single process, each with a name and a port of its own."""
    os.environ.pop("KSER_PROCESSES", None)
    given = _without(sys.argv[1:], "--processes")
    commands = []
    for number in range(processes):
        own = ["--stop-with-stdin"]
        if name is not None:
            own += ["--name", f"{name}-{number}"]
        if health is not None:
            own += ["--health", str(health + number)]
        commands.append([sys.executable, "-m", "kser", *given, *own])
    return commands


def _without(arguments: Sequence[str], option_name: str) -> list[str]:
    kept: list[str] = []
    skip = False
    for argument in arguments:
        if skip:
            skip = False
        elif argument == option_name:
            skip = True
        elif not argument.startswith(f"{option_name}="):
            kept.append(argument)
    return kept


def _stop_with_stdin(running: Worker) -> None:
    if sys.stdin is not None:
        while sys.stdin.buffer.read(4096):
            pass
    logger.info("Standard input has ended")
    running.stop()
