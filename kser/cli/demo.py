"""``kser demo``: the dice game on an embedded broker, run by worker processes, shown as it goes."""

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, Self

import click

import kser
from kser.cli.broker import group_topics
from kser.cli.demo_view import DemoView, JsonView
from kser.cli.dice import DiceLaunch, DiceRoll, registry
from kser.cli.errors import CommandFailed
from kser.cli.options import example, format_option, log_level_option, option
from kser.cli.watch import Deadline, describe_failure, styled_terminal
from kser.entry import wire_name
from kser.events import OperationView, events_topic, read
from kser.producer import BaseProducer
from kser.schemas import Message
from kser.status import Status
from kser.transport import Reader
from kser.transport.partitioner import partition_of

__all__ = ["demo"]

GROUP = "demo"
TOPIC = "dice"
#: Partitions of the topic: what the workers share.
PARTITIONS = 6
#: Everything, from the start of the broker to the end of the last operation.
TIMEOUT_S = 60.0
#: The rolls are made quicker when there are so many that they would take longer than this.
PLEASANT_S = 20.0
#: What a worker may take to end when it is asked to.
_STOP_S = 8.0
_ROLL_S = 0.25
#: As much of the workers' log is looked at when one of them has ended.
_LOG_BYTES = 64 * 1024
_TERMINATED = 128 + signal.SIGTERM


@click.command(
    "demo",
    short_help="See operations run: two workers, a broker, nothing to install.",
    epilog=example("kser demo", "kser demo --operations 12 --workers 3"),
)
@option("--operations", type=click.IntRange(1, 500), default=5, show_default=True, metavar="N", help="Games to play.")
@option(
    "--workers",
    type=click.IntRange(1, PARTITIONS),
    default=2,
    show_default=True,
    metavar="N",
    help="Worker processes.",
)
@format_option
@log_level_option("warning")
def demo(operations: int, workers: int, output: str) -> None:
    """Play dice: operations of three rolls each, sent by this process and run by worker processes.

    It starts a Kafka broker in memory and the workers, launches the operations, shows them advance as the workers tell
    it in the events topic, and ends everything again. Exit code 0 when all operations succeeded.
    """
    from kser.confluent.embedded import EmbeddedBroker  # here: its package loads the Kafka client

    deadline = Deadline(TIMEOUT_S)
    names = [f"worker-{number}" for number in range(1, workers + 1)]
    view = _choose_view(output, operations, names)
    with (
        _terminable(),
        EmbeddedBroker(group_topics(GROUP, {TOPIC: PARTITIONS})) as broker,
        _Crew(broker.bootstrap_servers, names) as crew,
    ):
        with view.playing(broker.bootstrap_servers):
            _play(broker.bootstrap_servers, crew, view, deadline)
        failed = [game for game in view.games if game.status != Status.SUCCESS]
        if failed:
            raise CommandFailed(
                f"{len(failed)} of {operations} operations failed, the first: {describe_failure(failed[0])}"
            )
        view.summary()


def _choose_view(output: str, operations: int, workers: Sequence[str]) -> DemoView:
    if output == "json":
        return JsonView(operations, workers)
    console = styled_terminal()
    if console is None:
        return DemoView(operations, workers)
    from kser.cli.demo_table import TableView  # here: it loads rich

    return TableView(operations, workers, console)


def _play(bootstrap_servers: str, crew: "_Crew", view: DemoView, deadline: Deadline) -> None:
    """Launch the operations and follow them to their ends."""
    from kser.confluent.producer import Producer  # here: they load the Kafka client
    from kser.confluent.transport import ConfluentTransport

    config = {"bootstrap.servers": bootstrap_servers}
    reader = ConfluentTransport(config).reader([events_topic(GROUP)])
    try:
        with Producer(config) as producer:
            _await_workers(producer, reader, crew, deadline)
            view.workers_ready()
            games = _launch(producer, view.operations, len(crew.names))
        view.launched(list(games.values()))
        while not all(game.ended for game in games.values()):
            for event in read(reader.poll(0.1)):
                game = games.get(event.key)
                if game is not None and game.apply(event):
                    view.event(game, event)
            crew.check()
            if not deadline.left:
                done = sum(game.ended for game in games.values())
                raise CommandFailed(f"{done} of {len(games)} operations had ended after {TIMEOUT_S:g} s")
        view.ended()
    finally:
        reader.close()


def _launch(producer: BaseProducer, operations: int, workers: int) -> dict[str, OperationView]:
    """Launch all, spread over the partitions, so that every worker has a share; a view of each by its uuid."""
    registry.configure(producer=producer, topic=TOPIC)
    pace = min(1.0, PLEASANT_S * workers / (operations * 3 * _ROLL_S))
    keys = _spread_keys()
    made = []
    with producer.batch():
        for _ in range(operations):
            operation = DiceLaunch(params={"pace": round(pace, 3)}, key=next(keys)).build()
            operation.launch()
            made.append(operation)
    return {operation.uuid: OperationView(operation.uuid, operation.path) for operation in made}


def _spread_keys() -> Iterator[str]:
    """Keys for the partitions 0, 3, 1, 4, 2, 5, again and again: alternating, whichever way two workers share them."""
    half = PARTITIONS // 2
    order = [number for pair in zip(range(half), range(half, PARTITIONS), strict=True) for number in pair]
    names = (f"table {number}" for number in itertools.count(1))
    for wanted in itertools.cycle(order):
        yield next(name for name in names if partition_of(name.encode(), PARTITIONS) == wanted)


def _await_workers(producer: BaseProducer, reader: Reader, crew: "_Crew", deadline: Deadline) -> None:
    """Wait until each worker has rolled once: then the partitions are shared, and all take part from the beginning."""
    keys = list(itertools.islice(_spread_keys(), PARTITIONS))
    seen: set[str] = set()
    while not seen.issuperset(crew.names):
        with producer.batch():
            for key in keys:
                producer.send(TOPIC, Message(str(uuid.uuid4()), wire_name(DiceRoll), {"pace": 0}), key=key)
        end = time.monotonic() + 0.3
        while time.monotonic() < end and not seen.issuperset(crew.names):
            seen.update(event.worker for event in read(reader.poll(0.05)))
            crew.check()
        if not deadline.left:
            missing = ", ".join(name for name in crew.names if name not in seen)
            raise CommandFailed(f"{missing} did not start within {TIMEOUT_S:g} s")


# -- processes -------------------------------------------------------------------------------------------------------


class _Crew:
    """The worker processes. They end at the end of the block, and by themselves when this process is gone."""

    def __init__(self, bootstrap_servers: str, names: Sequence[str]) -> None:
        self.names = names
        self._bootstrap_servers = bootstrap_servers
        self._processes: list[subprocess.Popen[bytes]] = []
        #: What each of them writes.
        self._logs: list[IO[bytes]] = []

    def __enter__(self) -> Self:
        try:
            for name in self.names:
                self._logs.append(tempfile.TemporaryFile("w+b"))
                self._processes.append(_start_worker(name, self._bootstrap_servers, self._logs[-1]))
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def check(self) -> None:
        """Raise CommandFailed when a worker has ended."""
        for name, process, log in zip(self.names, self._processes, self._logs, strict=True):
            if process.poll() is not None:
                raise CommandFailed(f"{name} has ended with exit code {process.returncode}{_last_words(log)}")

    def _end(self) -> None:
        for process in self._processes:
            process.terminate()
        end = time.monotonic() + _STOP_S
        for process in self._processes:
            try:
                process.wait(max(end - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.stdin is not None:
                process.stdin.close()
        for log in self._logs:
            log.close()


def _last_words(log: IO[bytes]) -> str:
    written = os.pread(log.fileno(), _LOG_BYTES, max(os.fstat(log.fileno()).st_size - _LOG_BYTES, 0))
    lines = written.decode(errors="replace").strip().splitlines()
    errors = [line for line in lines if line.startswith("kser: error: ")] or lines
    return f": {errors[-1].removeprefix('kser: error: ')}" if errors else ""


def _start_worker(name: str, bootstrap_servers: str, log: IO[bytes]) -> "subprocess.Popen[bytes]":
    # What the user has set for other brokers and workers is none of the demo's business.
    ours = ("KSER_", "LOCK_", "RUNNING_FILE", "TERMINATE_FILE")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
    command = [
        *(sys.executable, "-m", "kser", "worker", "kser.cli.dice:registry", "--bootstrap-servers", bootstrap_servers),
        *("--topics", TOPIC, "--group", GROUP, "--name", name, "--drain", "1", "--stop-with-stdin"),
    ]
    return subprocess.Popen(  # noqa: S603 - our own program
        command,
        cwd=Path(kser.__file__).parent.parent,  # where -m finds this kser, installed or not
        env=environment,
        stdin=subprocess.PIPE,
        stdout=log,
        stderr=log,
        # Ctrl-C is for this process, which ends the workers when it is done with them.
        start_new_session=True,
    )


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Within the block SIGTERM ends the program by an exception, so that what it started is ended too."""
    asked = False

    def end(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - the interface of signal handlers
        nonlocal asked
        asked = True
        raise SystemExit(_TERMINATED)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    except Exception:
        if asked:  # the exception was lost on its way: see kser.cli.errors.interrupt()
            raise SystemExit(_TERMINATED) from None
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
