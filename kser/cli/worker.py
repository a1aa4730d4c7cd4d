"""``kser worker``: run the tasks of a registry."""

import faulthandler
import logging
import math
import os
import re
import sys
from collections.abc import Sequence
from typing import Any, get_args

import click
from click.core import ParameterSource

from kser.cli import logs
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
from kser.errors import ConfigurationError, FencedError, TransportError
from kser.loading import load
from kser.worker import Worker
from kser.worker.dispatch import Ordering
from kser.worker.members import places
from kser.worker.processes import LEFT, TWIN, Processes
from kser.worker.shutdown import end_within, obey_stdin, stopping_on_signals
from kser.worker.worker import Delivery, Events, LostOffset

__all__ = ["LEFT", "TWIN", "worker"]

logger = logging.getLogger(__name__)

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


class Within(click.ParamType):  # type: ignore[type-arg]  # not generic before click 8.4
    """A number of this kind from ``least`` on, up to ``most`` where that is given."""

    def __init__(self, kind: type[int] | type[float], least: int, most: int | None = None) -> None:
        self.name = "integer" if kind is int else "number"
        self._kind = kind
        self._least = least
        self._most = most

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | float:
        """The number."""
        text = f"{self._least} or more" if self._most is None else f"{self._least} to {self._most}"
        try:
            number = self._kind(value)
        except ValueError:
            self.fail(f"{value!r} is no {self.name}: give {text}", param, ctx)
        # The comparison is this way round because of "nan".
        if not self._least <= number < math.inf or (self._most is not None and number > self._most):
            self.fail(f"{value}: give {text}", param, ctx)
        return number


def count(*names: str, default: int, note: str) -> Decorator:
    """An option that is a whole number from 1."""
    return option(*names, type=Within(int, 1), default=default, show_default=True, metavar="N", help=note)


@click.command(
    "worker",
    short_help="Run the tasks of a registry.",
    epilog=example(
        "kser worker shop.tasks:registry --topics shop --bootstrap-servers 127.0.0.1:9092",
        "kser worker app.py:registry --topics shop,mails --group shop --drain 120 --health 8081",
        "kser worker shop.tasks:registry --topics shop --processes 4 --concurrency 32 --group-protocol consumer",
        "kser worker shop.tasks:registry --topics shop --name shop-1 --delivery at_least_once --max-bytes 256MiB",
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
    type=Within(float, 0),
    default=30,
    show_default=True,
    metavar="SECONDS",
    help="What a running task gets to end when the worker stops or loses its partition.",
)
@option(
    "--health",
    type=Within(int, 1, 65535),
    metavar="PORT",
    help="Serve /healthz and /readyz on 127.0.0.1; with --processes on this port and those after it.",
)
@option(
    "--health-host",
    default="127.0.0.1",
    show_default=True,
    metavar="ADDRESS",
    help="Where that port listens; 0.0.0.0 for probes from outside, as in Kubernetes.",
)
@option(
    "--on-lost-offset",
    type=click.Choice(get_args(LostOffset)),
    default="stop",
    show_default=True,
    help="When the committed offset does not exist any more: stop, or go on at the earliest or latest message.",
)
@count("--max-in-flight", default=4000, note="Messages taken and not run, beyond which no more are fetched.")
@option(
    "--max-bytes",
    type=Size(),
    default="64MiB",
    show_default=True,
    metavar="SIZE",
    help="Bytes of messages taken and not settled.",
)
@count("--max-poll-records", default=500, note="Messages taken from the client at a time.")
@option(
    "--events",
    type=click.Choice(get_args(Events)),
    default="all",
    show_default=True,
    help="What is told: sequence: what became of operations and tasks ({group}.events); all: also what runs, its "
    "progress and log lines, and the workers ({group}.telemetry).",
)
@option(
    "--wait",
    "wait_s",
    type=Within(float, 0),
    default=900,
    show_default=True,
    metavar="SECONDS",
    help="How long a message that this worker cannot run waits for one that can, before it fails.",
)
@option(
    "--relay/--no-relay",
    default=True,
    show_default=True,
    help="Move delayed messages back to their topics when they are due. One worker of a group has to.",
)
@option(
    "--group-protocol",
    type=click.Choice(["classic", "consumer"]),
    help="How the group shares its partitions: consumer is KIP-848, for Kafka 4.0 or newer. The same as -X "
    "group.protocol=...  [default: classic; consumer on the embedded broker]",
)
@option(
    "--create-topics/--no-create-topics",
    default=True,
    show_default=True,
    help="Create what is missing of the group's own topics, or refuse to start.",
)
@option(
    "--stop-with-stdin",
    is_flag=True,
    help="Stop when stdin ends or brings a byte: for a parent that must leave no worker behind.",
)
@option("--log-process", is_flag=True, help="Log lines name the process; --processes does it for its own.")
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
    health_host: str,
    group_protocol: str | None,
    stop_with_stdin: bool,
    log_process: bool,
    connection: Connection,
    concurrency: int,
    isolated: int,
    **settings: Any,
) -> None:
    """Run the tasks of a registry, taking messages from topics, until SIGTERM or Ctrl-C.

    Asked to stop, it takes nothing more, lets what runs end (--drain), settles it and leaves the group. Asked twice, it
    does not wait. What did not end is run by another worker.

    \b
    Exit codes: 0 asked to stop, 1 failure, 2 misuse or a wrong setting, 3 another
    worker took this one's name, 4 tasks were left running when --drain was over,
    or too many threads with tasks that ignore their timeout.
    With --processes: 0, or the code of the first process that ended otherwise.
    """  # noqa: D301 - click wants the character
    if log_process:
        logs.name_process()
    _choose_protocol(connection, group_protocol)
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
        health_host=health_host,
        concurrency=concurrency,
        isolated=isolated,
        location=registry,
        **settings,
    )
    if processes > 1:
        # The settings are checked by now: what is wrong with them is told once, not by each child.
        several = Processes(_commands(processes, name, health), end_s=running.end_s)
        if stop_with_stdin:
            obey_stdin(lambda: several.stopping, several.stop)
        sys.exit(several.run())
    if stop_with_stdin:
        obey_stdin(lambda: running.stopping, running.stop)
    logger.info(
        "Worker.Starting... %s, group %s, topics %s, brokers %s",
        running.name,
        running.group,
        ", ".join(running.topics),
        config["bootstrap.servers"],
    )
    running.on_drain = lambda: end_within(running.end_s)
    try:
        with stopping_on_signals(running.stop):
            running.run()
    except FencedError as exc:
        raise CommandFailed(exc.message, code=TWIN) from exc
    except TransportError as exc:
        if not running.worn:
            raise
        raise CommandFailed(exc.message, code=LEFT) from exc
    finally:
        faulthandler.cancel_dump_traceback_later()
    logger.info("Worker.Stopped: %s", ", ".join(f"{n} {kind}" for kind, n in running.stats.items()) or "nothing came")
    if running.stats["broken"]:
        raise CommandFailed("The worker stopped because of a record it could not handle; the log names it")
    if running.left:
        raise CommandFailed(
            f"{running.left} task(s) did not end within {drain:g} s and were left; another worker runs them again",
            code=LEFT,
        )


def _choose_protocol(connection: Connection, chosen: str | None) -> None:
    """Make --group-protocol a property. As a variable it is weaker than a typed -X, like all of them."""
    ctx = click.get_current_context()
    typed = ctx.get_parameter_source("group_protocol") is ParameterSource.COMMANDLINE
    named = any(text.partition("=")[0].strip() == "group.protocol" for text in ctx.params["properties"])
    if chosen is not None and (typed or not named):
        connection.kafka["group.protocol"] = chosen


def _commands(processes: int, name: str | None, health: int | None) -> list[list[str]]:
    """The commands of the children: this one for a single process, each with a name and a port of its own."""
    os.environ.pop("KSER_PROCESSES", None)
    given = _without(sys.argv[1:], "--processes")
    # The last one of an option counts; after "--" there are none.
    end = given.index("--") if "--" in given else len(given)
    commands = []
    for place in places(processes, name, health):
        own = ["--stop-with-stdin", "--log-process"]
        if place.name is not None:
            own += ["--name", place.name]
        if place.health_port is not None:
            own += ["--health", str(place.health_port)]
        if not place.relay:
            own.append("--no-relay")
        commands.append([sys.executable, "-m", "kser", *given[:end], *own, *given[end:]])
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
