"""``kser abort``, ``pause``, ``resume`` and ``paused``: what workers are told."""

import difflib
import shlex
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Final

import click

from kser.cli.connection import Connection
from kser.cli.errors import CommandFailed
from kser.cli.options import (
    Decorator,
    Function,
    TopicName,
    example,
    format_option,
    group_option,
    kafka_options,
    log_level_option,
    option,
)
from kser.cli.output import columns, write_json
from kser.cli.terminal import one_line
from kser.cli.watch import Deadline
from kser.cli.workers import notes_of
from kser.control import (
    AbortAnswer,
    Pause,
    PauseKind,
    Progress,
    WorkerNote,
    complete_uuid,
    find_operation,
    is_begin,
    read_control,
)
from kser.control import abort as abort_operation
from kser.control import pause as pause_group
from kser.control import resume as resume_group
from kser.events import events_topic, read
from kser.letters import is_called
from kser.status import Status
from kser.transport import Reader, Transport

__all__ = ["abort", "pause", "paused", "resume"]

#: Longest wait for a sign of life of the broker, and for all that a command asks of it.
_ANSWERS_S = 10.0
_DONE_S = 60.0
#: Seconds between two looks while an end is awaited; without a word after so many, a person is told what may be wrong.
_POLL_S = 0.2
_HINT_AFTER_S = 10.0
#: How much alike a name has to be for one to be offered in its place.
_CLOSE: Final = 0.8


def _stacked(*decorators: Decorator) -> Decorator:
    def decorate(command: Function) -> Function:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return decorate


_common = _stacked(group_option, kafka_options, format_option, log_level_option("warning"))
_why = option("--why", metavar="TEXT", default="", help="The reason, for people.")


def _target(verb: str) -> Decorator:
    """--topic, --task and --worker, each with a variable of its own: KSER_TOPIC is where messages are sent."""
    return _stacked(
        option(
            "--topic",
            variable="KSER_PAUSE_TOPIC",
            type=TopicName(),
            metavar="NAME",
            help=f"{verb} what comes from this topic.",
        ),
        option(
            "--task",
            variable="KSER_PAUSE_TASK",
            metavar="PATH",
            help=f"{verb} this class, by its name in messages (`kser tasks`).",
        ),
        option(
            "--worker", variable="KSER_PAUSE_WORKER", metavar="NAME", help=f"{verb} the worker of this name (its slot)."
        ),
    )


# -- abort -------------------------------------------------------------------------------------------------------------


@click.command(
    "abort",
    short_help="Abort an operation, wherever it is.",
    epilog=example(
        "kser abort 3f2a1c9e-6b1d-4c55-9d0e-2f1d6a7b8c90 --group shop --why 'wrong prices' --wait",
        "kser abort 3f2a1c9e-6b1d-4c55-9d0e-2f1d6a7b8c90 --group shop --run 2",
    ),
)
@click.argument("uuid")
@option(
    "--run",
    type=click.IntRange(min=1),
    metavar="N",
    help="Up to this run.  [default: the newest that the events tell of]",
)
@_why
@option("--wait", is_flag=True, help="End when it has ended: exit code 0 if ABORTED, 1 if otherwise.")
@option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help="Give up after so long; what was told to the workers stays told.  [default: 60, with --wait no limit]",
)
@_common
def abort(
    uuid: str,
    run: int | None,
    why: str,
    wait: bool,
    timeout: float | None,
    group: str | None,
    connection: Connection,
    output: str,
) -> None:
    """Tell the workers to end the operation UUID, or the task UUID if it belongs to none.

    The first 8 characters will do, when no other begins so.

    What runs of it is told to end, and nothing more of it is run, wherever its next message waits. Resuming makes a new
    run, which an abort from before does not stop.
    """
    named, transport, deadline = connection.group(group), connection.transport(), Deadline(timeout)
    with connection.patience():
        transport.admin().cluster_id(min(_ANSWERS_S, deadline.left))
        reader = transport.reader([events_topic(named)], start="end") if wait else None  # before it can end
    try:
        with connection.patience():
            uuid = complete_uuid(transport, named, uuid, min(_DONE_S, deadline.left))
            left = min(_DONE_S, deadline.left)
            # A uuid that users gave may look so too: one that is known by just that name is meant.
            if is_begin(uuid) and find_operation(transport, named, uuid, left) is None:
                raise CommandFailed(f"Nothing that begins with {uuid} is told of: give the whole uuid to abort it")
            answer = abort_operation(uuid, group=named, transport=transport, run=run, why=why, timeout_s=left)
            if run is not None and wait:  # else it was looked at
                answer = answer._replace(progress=find_operation(transport, named, uuid, min(_DONE_S, deadline.left)))
        status = _ended(answer)
        if status is None and reader is not None:
            if output != "json":
                _show(uuid, answer, None, output)
            status = _await_end(reader, uuid, answer, named, deadline)
            if output != "json":
                click.echo(f"{_called(uuid, answer.progress)} {status}")
                _judge(uuid, answer, status)
                return
        _show(uuid, answer, status, output)
        if status is not None:
            _judge(uuid, answer, status)
    finally:
        if reader is not None:
            reader.close()


def _ended(answer: AbortAnswer) -> str | None:
    """How it has ended already; None when it has not, as far as it is known."""
    told, progress = answer.abort, answer.progress
    if progress is None or not progress.ended or (told is not None and progress.run > told.run):
        return None
    return progress.status


def _show(uuid: str, answer: AbortAnswer, status: str | None, output: str) -> None:
    told, progress = answer.abort, answer.progress
    if output == "json":
        write_json(
            {
                "uuid": uuid,
                "entrypoint": progress.entrypoint if progress is not None else None,
                "run": told.run if told is not None else progress.run if progress is not None else None,
                "told": told is not None,
                "by": told.by if told is not None else None,
                "at": told.at_ms if told is not None else None,
                "why": told.why if told is not None else None,
                "status": status or (progress.status if progress is not None else None),
                "note": answer.note,
            }
        )
    elif told is not None:
        click.echo(f"The workers are told: {_called(uuid, progress)} is aborted, up to its run {told.run}")
    elif status == Status.ABORTED:
        click.echo(f"{_called(uuid, progress)} is ABORTED already")
    if answer.note and told is not None:
        click.echo(f"kser: {answer.note}", err=True)


def _judge(uuid: str, answer: AbortAnswer, status: str) -> None:
    if status != Status.ABORTED:
        raise CommandFailed(f"{_called(uuid, answer.progress)} ended before it could be aborted: {status}")


def _called(uuid: str, progress: Progress | None) -> str:
    return f"{progress.entrypoint}[{uuid}]" if progress is not None and progress.entrypoint else uuid


def _await_end(reader: Reader, uuid: str, answer: AbortAnswer, group: str, deadline: Deadline) -> str:
    """How it ends."""
    assert answer.abort is not None
    began, hinted = time.monotonic(), False
    while deadline.left:
        for event in read(reader.poll(min(_POLL_S, deadline.left))):
            if event.key == uuid and event.ends and event.run <= answer.abort.run:
                return event.status
        if not hinted and time.monotonic() - began > _HINT_AFTER_S:
            hinted = True
            click.echo(
                f"kser: It has not ended for {_HINT_AFTER_S:g} s: its task does not look whether it is aborted, its "
                "message is in a paused topic or deep in a tier (then it takes an hour at most), no worker of group "
                f"{group} runs, or there is no such operation",
                err=True,
            )
    raise CommandFailed(
        f"{_called(uuid, answer.progress)} has not ended within {deadline.timeout_s:g} s. The workers are told: it is "
        "ended when one meets it"
    )


# -- pause and resume --------------------------------------------------------------------------------------------------


@click.command(
    "pause",
    short_help="Let the workers of a group take nothing more.",
    epilog=example(
        "kser pause --group shop --why 'database is moved'",
        "kser pause --group shop --topic mails",
        "kser pause --group shop --task shop.tasks.Charge",
        "kser pause --group shop --worker shop-0",
    ),
)
@_target("Only")
@_why
@_common
def pause(
    topic: str | None,
    task: str | None,
    worker: str | None,
    why: str,
    group: str | None,
    connection: Connection,
    output: str,
) -> None:
    """Let the workers take nothing more until `kser resume`: the whole group, or one topic, class or worker of it.

    What runs goes on to its end. It holds for workers that start later, too.
    """
    named, transport = connection.group(group), connection.transport()
    entry = _asked(
        connection,
        transport,
        lambda: pause_group(
            group=named, transport=transport, topic=topic, task=task, worker=worker, why=why, timeout_s=_DONE_S
        ),
    )
    if topic is not None and topic not in transport.admin().describe([topic]):
        click.echo(f"kser: there is no topic {topic} yet", err=True)
    if task is not None and (doubt := _unknown_task(task, notes_of(transport, named))):
        click.echo(f"kser: {doubt}", err=True)
    if output == "json":
        write_json({"group": named, **_shown(entry)})
    else:
        click.echo(f"{_what(entry, named)} is paused. It goes on with: {_resume_command(entry, named)}")


@click.command(
    "resume",
    short_help="Let go on what `kser pause` has paused.",
    epilog=example("kser resume --group shop", "kser resume --group shop --topic mails"),
)
@_target("Only")
@_common
def resume(
    topic: str | None,
    task: str | None,
    worker: str | None,
    group: str | None,
    connection: Connection,
    output: str,
) -> None:
    """End the pause of the whole group, or of one topic, class or worker. Others stay: `kser paused` lists them."""
    named, transport = connection.group(group), connection.transport()
    entry = _asked(
        connection,
        transport,
        lambda: resume_group(
            group=named, transport=transport, topic=topic, task=task, worker=worker, timeout_s=_DONE_S
        ),
    )
    left = _sorted(read_control(transport, named).pauses)
    if output == "json":
        write_json(
            {
                "group": named,
                "resumed": _shown(entry) if entry is not None else None,
                "paused": [_shown(other) for other in left],
            }
        )
        return
    if entry is not None:
        by = one_line(entry.by) or "somebody"
        click.echo(f"{_what(entry, named)} goes on. It was paused {_since(entry)} by {by}")
    else:
        click.echo("Nothing of the kind was paused")
    if left:
        click.echo(f"kser: still paused: {', '.join(_name(other, named) for other in left)}", err=True)


@click.command(
    "paused",
    short_help="List what is paused, and by whom.",
    epilog=example("kser paused --group shop --bootstrap-servers 127.0.0.1:9092"),
)
@_common
def paused(group: str | None, connection: Connection, output: str) -> None:
    """List what is paused in a group, since when, by whom and why."""
    named, transport = connection.group(group), connection.transport()
    found = _sorted(_asked(connection, transport, lambda: read_control(transport, named, _DONE_S)).pauses)
    if output == "json":
        write_json({"group": named, "paused": [_shown(entry) for entry in found]})
    elif not found:
        click.echo(f"Nothing of group {named} is paused")
    else:
        rows = [
            (entry.kind, one_line(entry.name) or named, _since(entry), one_line(entry.by), one_line(entry.why))
            for entry in found
        ]
        for line in columns(("what", "name", "since", "by", "why"), rows):
            click.echo(line)


def _unknown_task(task: str, found: list[WorkerNote]) -> str:
    """What may be wrong with the name of a task; "" when nothing is, as far as the workers tell."""
    known = {name for note in found for name in note.entrypoints}
    if not found or task in known or not all(note.complete for note in found):
        return ""
    close = sorted(name for name in known if is_called(name, task))
    close = close or difflib.get_close_matches(task, sorted(known), 3, _CLOSE)
    meant = f" Is {' or '.join(map(one_line, close))} meant?" if close else " `kser workers` lists what they know"
    return f"no worker knows a class {one_line(task)}.{meant}"


def _asked(connection: Connection, transport: Transport, ask: Callable[[], Any]) -> Any:
    """What ``ask`` gives, once it is known that a broker answers."""
    with connection.patience():
        transport.admin().cluster_id(_ANSWERS_S)
        return ask()


def _sorted(pauses: dict[str, Pause]) -> list[Pause]:
    order = list(PauseKind)
    return sorted(pauses.values(), key=lambda entry: (order.index(entry.kind), entry.name))


def _shown(entry: Pause) -> dict[str, Any]:
    return {"kind": entry.kind, "name": entry.name, "by": entry.by, "at": entry.at_ms, "why": entry.why}


def _name(entry: Pause, group: str) -> str:
    return f"{entry.kind} {one_line(entry.name) or group}"


def _what(entry: Pause, group: str) -> str:
    text = _name(entry, group)
    return text[0].upper() + text[1:] + (f" of group {group}" if entry.name else "")


def _resume_command(entry: Pause, group: str) -> str:
    return shlex.join(["kser", "resume", "--group", group, *([f"--{entry.kind}", entry.name] if entry.name else [])])


def _since(entry: Pause) -> str:
    try:
        return datetime.fromtimestamp(entry.at_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%SZ")
    except (ValueError, OverflowError, OSError):
        return "?"
