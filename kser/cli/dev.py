"""``kser dev``: everything on one machine, with nothing installed: broker, worker, recorder, API; reload on change.

This process has the broker (a child of its own) and the recorder; worker and API are children, started anew when a file
has changed. Their standard input is a pipe that ends with this process, however it ends: nothing is left behind.
"""

import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import click

from kser.cli.broker import group_topics
from kser.cli.errors import FAILED, MISUSE, CommandFailed
from kser.cli.options import TopicWithPartitions, example, log_level_option, option, registry_argument
from kser.cli.recording import recording
from kser.cli.storage import open_sql
from kser.errors import ConfigurationError
from kser.loading import file_of
from kser.storage.urls import STORAGE_VARIABLE, safe_url
from kser.transport import EMBEDDED_CLUSTERS, Transport
from kser.worker.shutdown import stopping_on_signals
from kser.worker.topic_findings import count

__all__ = ["dev"]

#: Partitions of a topic that nobody gave a number.
_PARTITIONS: Final = 6
#: The topic of a registry that names none.
_TOPIC: Final = "tasks"
#: What running tasks get to end when the worker is started anew, and what a child gets beyond that, in seconds.
_DRAIN_S: Final = 5.0
_MARGIN_S: Final = 10.0
#: How often is looked what became of the children, in milliseconds.
_LOOK_MS: Final = 300
#: Changes within this time count as one, in milliseconds.
_TOGETHER_MS: Final = 300
#: Longest wait for the registry to be looked at, in seconds.
_LOADED_S: Final = 60.0
#: For the new broker to answer, in seconds.
_ANSWER_S: Final = 10.0
#: What belongs to other brokers and workers, and would get in the way here.
_FOREIGN: Final = (
    *("KSER_KAFKA_", "KSER_BOOTSTRAP_SERVERS", "KSER_CONFIG_FILE", "KSER_TOPIC", "KSER_GROUP", "KSER_DELIVERY"),
    *("KSER_NAME", "KSER_PROCESSES", "KSER_HEALTH", "KSER_HTTP_HOST", "KSER_WEB_TOKEN", "LOCK_", "RUNNING_FILE"),
    "TERMINATE_FILE",
)


@click.command(
    "dev",
    short_help="Run everything on this machine: broker, worker, history, API.",
    epilog=example("kser dev app.py", "kser dev shop.tasks:registry --topics shop:6 --port 5001"),
)
@registry_argument
@option(
    "--topics",
    variable="KSER_DEV_TOPICS",
    type=TopicWithPartitions(many=True),
    metavar="A:6,B",
    help=f"Topics to take messages from.  [default: those the registry names, else {_TOPIC}]",
)
@option("--group", variable="KSER_DEV_GROUP", default="dev", show_default=True, metavar="NAME", help="Consumer group.")
@option(
    "--port",
    variable="KSER_HTTP_PORT",
    type=click.IntRange(1, 65535),
    default=5000,
    show_default=True,
    metavar="PORT",
    help="Port of the API, on 127.0.0.1.",
)
@option(
    "--storage",
    variable="KSER_DEV_STORAGE",
    default="sqlite:///kser-dev.db",
    show_default=True,
    metavar="URL",
    help="Where what happened is kept.",
)
@option("--reload/--no-reload", default=True, show_default=True, help="Start worker and API anew when a file changes.")
@log_level_option("info")
def dev(
    registry: str,
    topics: list[tuple[str, int | None]] | None,
    group: str,
    port: int,
    storage: str,
    reload: bool,
) -> None:
    """Run a broker in memory, a worker, the recorder of what happens and the REST API, until Ctrl-C or SIGTERM.

    When a Python file changes beside the registry's, worker and API are started anew; what runs gets 5 s to end. The
    broker forgets everything at the end, what happened stays in --storage.
    """
    from kser.confluent.embedded import EmbeddedBroker  # here: its package loads the Kafka client
    from kser.confluent.transport import ConfluentTransport

    if storage.partition(":")[0] == "memory":
        raise ConfigurationError("--storage memory: is of one process alone, and here are several: give sqlite:///FILE")
    _check_port(port)
    registered = _look(registry)
    tasks = _topics(registered, topics)
    ended = threading.Event()
    with stopping_on_signals(ended.set), _hanging_up(ended.set), EmbeddedBroker(group_topics(group, tasks)) as broker:
        address = broker.bootstrap_servers
        common = ["--group", group, "--bootstrap-servers", address, "--stop-with-stdin"]
        worker = [registry, "--topics", ",".join(tasks), "--drain", f"{_DRAIN_S:g}", "--name", f"{group}-1"]
        web = [registry, "--port", str(port), "--topic", next(iter(tasks)), "--no-recorder"]
        with (
            _recording(ConfluentTransport({"bootstrap.servers": address}), storage, group),
            _Crew(
                [["worker", *worker, *common, *_levels()], ["web", *web, *common, *_levels(logging.WARNING)]],
                # Not an option: others on this machine can see those, and a URL may have a password.
                {STORAGE_VARIABLE: storage},
            ) as crew,
        ):
            _introduce(registry, address, tasks, group, port, storage, reload=reload)
            _show_launch(registry, registered, address, group, tasks, storage)
            for changed in _turns(registry, ended, reload=reload):
                if not broker.alive:
                    raise CommandFailed(f"The broker on {address} has ended; its topics are lost", code=FAILED)
                if changed:
                    click.echo(f"{_named(changed)} changed: worker and API start anew")
                    crew.restart()
                crew.look()
        click.echo("Stopped")


@contextlib.contextmanager
def _hanging_up(stop: Callable[[], None]) -> Iterator[None]:
    """Within the block ``stop`` is called when the terminal is closed: the children are ended, and not just left."""
    if not hasattr(signal, "SIGHUP") or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGHUP, lambda _number, _frame: stop())
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)


@contextlib.contextmanager
def _recording(transport: Transport, storage: str, group: str) -> Iterator[None]:
    from kser.storage.projection import Projection  # here: it loads SQL

    with open_sql(storage) as history:
        history.prepare()
        projection = Projection(history.database, transport.admin().cluster_id(_ANSWER_S), group)
        projection.end_lost(EMBEDDED_CLUSTERS)  # what went on when it was ended last
        with recording(transport, history, group):
            yield


def _look(registry: str) -> list[dict[str, Any]]:
    """What is registered, as `kser tasks` tells it. Raises CommandFailed.

    In a process of its own: this one has to stay as it is when files change.
    """
    command = [sys.executable, "-m", "kser", "tasks", registry, "--format", "json"]
    try:
        done = subprocess.run(  # noqa: S603 - our own program
            command, capture_output=True, text=True, timeout=_LOADED_S, check=False, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        raise CommandFailed(f"{registry} was not loaded within {_LOADED_S:g} s") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"{registry} cannot be loaded"]
        raise CommandFailed(lines[-1].removeprefix("kser: error: "), code=MISUSE)
    rows: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return rows


def _topics(registered: Sequence[Mapping[str, Any]], given: Sequence[tuple[str, int | None]] | None) -> dict[str, int]:
    """Topics and their partitions: those given, else those that the registry names."""
    if given:
        return {name: partitions or _PARTITIONS for name, partitions in given}
    named = {str(row["topic"]) for row in registered if row["topic"]}
    return dict.fromkeys(sorted(named) or [_TOPIC], _PARTITIONS)


def _check_port(port: int) -> None:
    """Raise CommandFailed when somebody has it: told now, and not by a child among others."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as exc:
            raise CommandFailed(f"Port {port} cannot be had: {exc.strerror}; give another --port", code=MISUSE) from exc


def _introduce(
    registry: str, address: str, tasks: Mapping[str, int], group: str, port: int, storage: str, *, reload: bool
) -> None:
    topics = ", ".join(f"{name} ({count(partitions, 'partition')})" for name, partitions in tasks.items())
    rows = [
        ("broker", f"{address}, in memory, gone with Ctrl-C"),
        ("worker", f"{registry}, group {group}, topics {topics}"),
        ("history", safe_url(storage)),
        ("API", f"http://127.0.0.1:{port}/api/1/openapi.json"),
    ]
    if reload:
        rows.append(("reload", f"when a Python file changes in {_watched(registry)}"))
    for name, told in rows:
        click.echo(f"{click.style(name.ljust(8), bold=True)} {told}")


def _show_launch(
    registry: str, registered: Sequence[Mapping[str, Any]], address: str, group: str, tasks: Iterable[str], storage: str
) -> None:
    """What to type to see something happen: with an operation that needs no parameters, if there is one."""
    first = min(registered, key=lambda row: (row["kind"] != "operation", bool(row["required"])), default=None)
    click.echo("In another terminal:")
    where = f"KSER_BOOTSTRAP_SERVERS={address} KSER_GROUP={group} KSER_TOPICS={','.join(tasks)}"
    click.echo(f"  export {where} KSER_STORAGE={safe_url(storage)}")
    if first is not None:
        name, params = first["name"].rpartition(".")[2], " --params '{...}'" if first["required"] else ""
        click.echo(f"  kser launch {registry} {name} --topic {first['topic'] or next(iter(tasks))}{params} --watch")
    click.echo("  kser operations list")


def _watched(registry: str) -> Path:
    """The directory whose files count: that of the registry's file, else this one."""
    file = file_of(registry)
    return file.parent if file is not None else Path.cwd()


def _turns(registry: str, ended: threading.Event, *, reload: bool) -> Iterator[set[str]]:
    """The files that have changed, again and again; mostly none. Ends with ``ended``."""
    if reload:
        from watchfiles import PythonFilter, watch  # here: nobody else needs it

        for changes in watch(
            _watched(registry),
            watch_filter=PythonFilter(),
            debounce=_TOGETHER_MS,
            rust_timeout=_LOOK_MS,
            yield_on_timeout=True,
            stop_event=ended,
            raise_interrupt=False,
        ):
            yield {path for _, path in changes}
    while not ended.wait(_LOOK_MS / 1000):
        yield set()


def _levels(least: int = 0) -> list[str]:
    """The log level of a child: that of this process, or ``least``; with debug nothing is left out."""
    own = logging.getLogger().level
    level = own if own <= logging.DEBUG else max(own, least)
    return ["--log-level", logging.getLevelName(level).lower()]


def _named(changed: set[str]) -> str:
    names = sorted({Path(path).name for path in changed})
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


# -- processes -------------------------------------------------------------------------------------------------------


#: Command of a child -> what it is to people.
_NAMES: Final = {"worker": "worker", "web": "API"}


class _Crew:
    """Worker and API, each a process of `kser`.

    Args:
        commands: what follows `kser` of each.
        variables: of their environment, beside those of this process.
    """

    def __init__(self, commands: Sequence[Sequence[str]], variables: Mapping[str, str]) -> None:
        self._commands = commands
        self._variables = variables
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        #: Those whose end was told.
        self._told: set[str] = set()

    def __enter__(self) -> "_Crew":
        try:
            self._start()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._end()

    def restart(self) -> None:
        """End them, and start them anew."""
        self._end()
        self._start()

    def look(self) -> None:
        """Tell of those that have ended by themselves."""
        for name, process in self._processes.items():
            if process.poll() is not None and name not in self._told:
                self._told.add(name)
                click.echo(
                    f"The {_NAMES[name]} has ended with exit code {process.returncode}; it starts anew when a file "
                    "changes",
                    err=True,
                )

    def _start(self) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith(_FOREIGN)}
        environment |= self._variables
        for command in self._commands:
            self._processes[command[0]] = subprocess.Popen(  # noqa: S603 - our own program
                [sys.executable, "-m", "kser", *command],
                env=environment,
                stdin=subprocess.PIPE,
                start_new_session=True,  # Ctrl-C is for this process, which ends them when it is done with them
            )

    def _end(self) -> None:
        for process in self._processes.values():
            if process.stdin is not None:
                with contextlib.suppress(OSError):
                    process.stdin.close()
        end = time.monotonic() + _DRAIN_S + _MARGIN_S
        for process in self._processes.values():
            try:
                process.wait(max(end - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._processes.clear()
        self._told.clear()
