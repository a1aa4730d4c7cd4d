"""``kser web``: the REST API."""

import contextlib
import logging
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from kser.cli.connection import Connection
from kser.cli.errors import CommandFailed
from kser.cli.options import TopicName, example, group_option, kafka_options, log_level_option, option
from kser.cli.recording import recording
from kser.cli.storage import open_sql, open_storage
from kser.loading import load
from kser.transport import Transport
from kser.worker.shutdown import obey_stdin, stopping_on_signals

if TYPE_CHECKING:
    from kser.storage import StorageBase

__all__ = ["web"]

logger = logging.getLogger(__name__)

#: Seconds between two looks whether the server is still there.
_LOOK_S = 0.5


@click.command(
    "web",
    short_help="Serve the REST API of a group.",
    epilog=example(
        "kser web --group shop --storage sqlite:///kser.db --bootstrap-servers 127.0.0.1:9092",
        "kser web shop.tasks:registry --topic shop --group shop",
        "kser web --host 0.0.0.0 --group shop  # with KSER_WEB_TOKEN set",
    ),
)
@click.argument("registry", metavar="[MODULE_OR_FILE:REGISTRY]", required=False)
@option(
    "--host",
    variable="KSER_HTTP_HOST",
    default="127.0.0.1",
    show_default=True,
    metavar="ADDRESS",
    help="Where it listens; one that others can reach takes a token.",
)
@option(
    "--port",
    variable="KSER_HTTP_PORT",
    type=click.IntRange(0, 65535),
    default=5000,
    show_default=True,
    metavar="PORT",
    help="TCP port; 0 takes a free one.",
)
@option(
    "--token",
    variable="KSER_WEB_TOKEN",
    metavar="TEXT",
    help="What callers have to send, as `Authorization: Bearer TEXT`. Others on this machine can see the options of a "
    "command: better set the variable.",
)
@option("--storage", metavar="URL", help="What happened: sqlite:///kser.db, postgresql://user:password@host/db.")
@option(
    "--recorder/--no-recorder",
    default=True,
    show_default=True,
    help="With --storage: also put into it what happens. Several recorders of a group share the work.",
)
@group_option
@option("--topic", type=TopicName(), metavar="NAME", help="Where what names no topic is launched.")
@option(
    "--threads",
    type=click.IntRange(2, 500),
    default=16,
    show_default=True,
    metavar="N",
    help="Requests that are answered at a time; up to half of them may be streams of events.",
)
@option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=10,
    show_default=True,
    metavar="SECONDS",
    help="Longest wait for an answer of the broker.",
)
@option(
    "--stop-with-stdin",
    "leashed",
    is_flag=True,
    help="Stop when stdin ends or brings a byte: for a parent that must leave no server behind.",
)
@kafka_options
@log_level_option("info")
def web(
    registry: str | None,
    host: str,
    port: int,
    token: str | None,
    storage: str | None,
    recorder: bool,
    group: str | None,
    topic: str | None,
    threads: int,
    timeout: float,
    leashed: bool,
    connection: Connection,
) -> None:
    """Serve the REST API of a group below /api/1, until SIGTERM or Ctrl-C; /api/1/openapi.json describes it.

    With a registry the operations that are launched are built here, and their parameters checked; else a worker does
    it. With --storage it has a history, and records it; without, the rest is there.
    """
    from kser.http.guard import check_listen  # here: they load Flask
    from kser.http.serving import Server
    from kser.web import WebSettings, create_app

    check_listen(host, token)
    loaded = load(registry) if registry else None
    named = connection.group(group)
    settings = WebSettings(
        group=named, token=token, timeout_s=timeout, topic=connection.topic(topic), max_streams=max(threads // 2, 1)
    )
    ended = threading.Event()
    transport = connection.transport()
    with _history(storage, transport, named, record=recorder) as history:
        app = create_app(transport, storage=history, registry=loaded, settings=settings)
        site = app.extensions["kser"]
        server = Server(app, host=host, port=port, token=token, threads=threads, on_stop=site.streams.close)
        if leashed:
            obey_stdin(lambda: int(ended.is_set()), ended.set)
        with contextlib.closing(site), server, stopping_on_signals(ended.set):
            logger.info("Web.Starting... the API of group %s on %s/api/1/openapi.json", named, server.url)
            while not ended.wait(_LOOK_S):
                if not server.alive:
                    raise CommandFailed(f"The server on {server.url} has ended; the log says why")
    logger.info("Web.Stopped")


@contextlib.contextmanager
def _history(url: str | None, transport: Transport, group: str, *, record: bool) -> Iterator["StorageBase | None"]:
    """The storage, while the block runs; with ``record`` it has its tables, and what happens is put into it."""
    if not url:
        yield None
    elif record:
        with open_sql(url) as storage:
            storage.prepare()
            with recording(transport, storage, group):
                yield storage
    else:
        with open_storage(url) as storage:
            yield storage
