"""``kser operations watch``: an operation while it goes on: its tasks, how far each is, what they log."""

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Final, Protocol

import click

from kser.cli.connection import Connection
from kser.cli.errors import CommandFailed
from kser.cli.operations.live import LiveOperation
from kser.cli.operations.view import called
from kser.cli.options import example, format_option, group_option, kafka_options, log_level_option, option
from kser.cli.output import write_json
from kser.cli.terminal import one_line
from kser.cli.watch import Deadline, said, styled_terminal
from kser.control import complete_uuid, find_operation, is_begin
from kser.errors import ValidationError
from kser.events import Event
from kser.masking import mask
from kser.schemas import parse
from kser.status import Status
from kser.telemetry import TaskLog, TaskProgress
from kser.telemetry import loads as load_telemetry
from kser.transport import Record

if TYPE_CHECKING:
    from kser.storage.views import Execution

__all__ = ["watch"]

#: Longest wait for a sign of life of the broker, and for what was told until now, in seconds.
_ANSWERS_S: Final = 10.0
_DONE_S: Final = 60.0
_POLL_S: Final = 0.2
#: Seconds without a word of it after which it is told what may be wrong.
_HINT_AFTER_S: Final = 10.0


@click.command(
    "watch",
    short_help="One of them while it goes on: tasks, progress, log.",
    epilog=example(
        "kser operations watch 5f0c6d4e --group shop --bootstrap-servers 127.0.0.1:9092",
        "kser operations watch 5f0c6d4e-9a3b-4f0e-8a53-0d6f3f1f2b11 --group shop --format json",
    ),
)
@click.argument("uuid")
@option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help="Give up after so long; it goes on by itself.  [default: no limit]",
)
@group_option
@kafka_options
@format_option
@log_level_option("warning")
def watch(uuid: str, timeout: float | None, group: str | None, connection: Connection, output: str) -> None:
    """Show the operation UUID, or the task UUID if it belongs to none, until it has ended.

    The first 8 characters will do, when no other begins so. It reads what the workers tell, so no recorder has to run.
    Elsewhere than on a terminal a line is written for each thing that is told; with --format json as it was told.

    Exit code: 0 if it ends well, 1 if otherwise.
    """
    named, transport, deadline = connection.group(group), connection.transport(), Deadline(timeout)
    with connection.patience():
        transport.admin().cluster_id(min(_ANSWERS_S, deadline.left))
        uuid = complete_uuid(transport, named, uuid, min(_DONE_S, deadline.left))
        live = LiveOperation(transport, named, uuid, min(_DONE_S, deadline.left))
    with live:
        if live.find() is None:
            find_operation(transport, named, uuid, min(_DONE_S, deadline.left))  # says so when it is a part of one
            if is_begin(uuid):
                raise CommandFailed(f"Nothing that begins with {uuid} is told of: give the whole uuid to wait for it")
        with _view(output) as view:
            ended = _follow(live, view, named, deadline)
    if ended.status != Status.SUCCESS:
        raise CommandFailed(_failure(ended))


def _failure(ended: "Execution") -> str:
    """How it ended, in which task, and why."""
    failed = [
        task for task in ended.walk() if task is not ended and task.kind == "task" and task.status == ended.status
    ]
    where = f" in {called(failed[-1])}[{failed[-1].uuid}]" if failed else ""
    why = one_line(ended.error or ended.note)
    return f"{called(ended)}[{ended.uuid}] {ended.status}{where}{f': {why}' if why else ''}"


def _follow(live: LiveOperation, view: "_View", group: str, deadline: Deadline) -> "Execution":
    """Show it until its end, and give it as it is then. Raises CommandFailed when the deadline passes."""
    records, silent_since = live.told, time.monotonic()
    while True:
        gone = live.look()
        if records or gone:
            view.update(live, records)
        for task in gone:
            view.gone(task)
        found = live.find()
        if found is not None and found.ended is not None and Status.parse(found.status).final:
            return found
        if not deadline.left:
            status = "nothing is told of it" if found is None else found.status
            raise CommandFailed(f"{live.uuid} has not ended within {deadline.timeout_s:g} s: {status}")
        if found is None and time.monotonic() - silent_since > _HINT_AFTER_S:
            silent_since = float("inf")
            view.hint(f"Nothing is told of {live.uuid} yet: no worker of group {group} has met it, or there is no such")
        records = live.poll(min(_POLL_S, deadline.left))


@contextmanager
def _view(output: str) -> "Iterator[_View]":
    if output == "json":
        yield _JsonView()
        return
    console = styled_terminal()
    if console is None:
        yield _LineView()
        return
    from kser.cli.operations.tree import TreeView  # here: it loads rich

    with TreeView(console) as tree:
        yield tree


class _View(Protocol):
    """Shows what is told."""

    def update(self, live: LiveOperation, records: list[Record], /) -> None:
        """These records are new; ``live`` knows them."""

    def gone(self, task: "Execution", /) -> None:
        """The worker of this task is; update() was told before."""

    def hint(self, text: str) -> None:
        """Say something that is not of the data."""


class _LineView:
    """A line for each thing that was told."""

    def update(self, _live: LiveOperation, records: list[Record], /) -> None:
        """See _View."""
        for record in records:
            if line := _line(record):
                click.echo(line)

    def gone(self, task: "Execution", /) -> None:
        """See _View."""
        self.hint(f"{called(task)}[{one_line(task.uuid)}] {task.status}: {one_line(task.note)}")

    def hint(self, text: str) -> None:
        """See _View."""
        click.echo(f"kser: {text}", err=True)


class _JsonView(_LineView):
    """Each record as it was told, with what looks secret masked, on a line of its own."""

    def update(self, _live: LiveOperation, records: list[Record], /) -> None:
        """See _View."""
        for record in records:
            with suppress(ValidationError):
                write_json(mask(parse(record.value or b"")))


def _line(record: Record) -> str:
    """What a record tells; "" for nothing that people want to read."""
    try:
        event = Event.loads(record.value)
        if event.status:
            words = f"  {one_line(text)}" if (text := said(event)) else ""
            return f"{_clock(event.at)}  {event.status:8}  {one_line(event.entrypoint)}{words}"
        told = load_telemetry(record.value)
    except ValidationError:
        return ""
    if isinstance(told, TaskProgress):
        group = f"  {one_line(' / '.join(told.group))}" if told.group else ""
        line = f"  {one_line(told.status_line)}" if told.status_line else ""
        return f"{_clock(told.at)}  {told.current:>4}/{told.total:<3}  {one_line(told.task.entrypoint)}{group}{line}"
    if isinstance(told, TaskLog):
        return f"{_clock(told.at)}  log       {one_line(told.task.entrypoint)}  {one_line(told.message)}"
    return ""


def _clock(at_ms: int) -> str:
    return time.strftime("%H:%M:%S", time.localtime(at_ms / 1000))
