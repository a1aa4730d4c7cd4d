"""``kser workers``: the workers of a group, what each runs, and what it can run."""

import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any, Final, NamedTuple

import click

from kser.cli.connection import Connection
from kser.cli.options import (
    Decorator,
    example,
    format_option,
    group_option,
    kafka_options,
    log_level_option,
    option,
)
from kser.cli.output import columns, write_json
from kser.cli.terminal import one_line
from kser.control import WorkerNote, read_control
from kser.telemetry import WorkerState, read, telemetry_topic
from kser.transport import Partition, Transport

__all__ = ["fleet", "notes_of", "workers"]

#: Longest wait for the broker, in seconds.
_READ_S: Final = 30.0
#: Names that are shown of what a worker knows; --format json has all.
_NAMES: Final = 5


class _Known(NamedTuple):
    """What is known of one worker: what it tells of itself all the time, and what it told that it can run."""

    name: str
    state: WorkerState | None
    note: WorkerNote | None


def _within(function: Any) -> Any:
    decorate: Decorator = option(
        "--within",
        type=click.FloatRange(min=0, min_open=True),
        default=60,
        show_default=True,
        metavar="SECONDS",
        help="Show those that have told of themselves within so many seconds; they do so every 5.",
    )
    return decorate(function)


@click.command(
    "workers",
    short_help="The workers of a group, what each runs and can run.",
    epilog=example("kser workers --group shop --bootstrap-servers 127.0.0.1:9092"),
)
@_within
@group_option
@kafka_options
@format_option
@log_level_option("warning")
def workers(within: float, group: str | None, connection: Connection, output: str) -> None:
    """Show the workers of a group as they have told last: release, host, partitions, what runs, what each can run.

    One that ended says so; one that has said nothing for 15 seconds is shown as gone. One with --events none or
    sequence tells no more than what it can run, and is shown as silent; so is, for a day, one that was killed.
    """
    named, transport = connection.group(group), connection.transport()
    with connection.patience():
        found = _join(fleet(transport, named, within), notes_of(transport, named))
    now_ms = time.time() * 1000
    if output == "json":
        write_json([_as_json(one, now_ms) for one in found])
        return
    if not found:
        click.echo(f"No worker of group {named} has told of itself within {within:g} s")
        return
    header = ("worker", "state", "seen", "kser", "host", "pid", "partitions", "running", "done", "failed")
    first, *lines = columns(header, [_row(one, now_ms) for one in found])
    click.echo(first)
    for one, line in zip(found, lines, strict=True):
        click.echo(line)
        if one.state is not None:
            for running in _running(one.state, now_ms):
                click.echo(running)
        if one.note is not None:
            click.echo(f"  knows {_knows(one.note)}")


def notes_of(transport: Transport, group: str) -> list[WorkerNote]:
    """What the workers of a group told that they can run, by name."""
    return read_control(transport, group, _READ_S).workers_at(time.time_ns() // 1_000_000)


def fleet(transport: Transport, group: str, within_s: float) -> list[WorkerState]:
    """The last word of each worker that has told of itself within so many seconds, by name."""
    topic, since_ms = telemetry_topic(group), int((time.time() - within_s) * 1000)
    admin = transport.admin()
    info = admin.describe([topic]).get(topic)
    if info is None:
        return []
    partitions = [Partition(topic, number) for number in range(info.partitions)]
    starts = admin.offsets_at(partitions, since_ms)
    last: dict[str, WorkerState] = {}
    for batch in transport.read(partitions, _READ_S, starts=starts):
        for state in read(batch):
            if isinstance(state, WorkerState) and state.at >= since_ms:
                last[state.worker] = max(last.get(state.worker, state), state, key=lambda each: each.at)
    return sorted(last.values(), key=lambda state: state.worker)


def _state(state: WorkerState, now_ms: float) -> str:
    return "gone" if state.state != "stopped" and now_ms > state.gone_at_ms else state.state


def _join(states: Iterable[WorkerState], notes: Iterable[WorkerNote]) -> list[_Known]:
    told, known = {state.worker: state for state in states}, {note.name: note for note in notes}
    return [_Known(name, told.get(name), known.get(name)) for name in sorted(told.keys() | known.keys())]


def _as_json(one: _Known, now_ms: float) -> dict[str, Any]:
    names = sorted(one.note.entrypoints) if one.note is not None else None
    knows = {"entrypoints": names, "complete": one.note.complete if one.note is not None else None}
    if one.state is None:
        return {"worker": one.name, "state": "silent", "seen_s_ago": _seen_s(one, now_ms), **knows}
    return {**asdict(one.state), "state": _state(one.state, now_ms), "seen_s_ago": _seen_s(one, now_ms), **knows}


def _seen_s(one: _Known, now_ms: float) -> float:
    at = one.state.at if one.state is not None else one.note.at_ms if one.note is not None else 0
    return round(max(now_ms - at, 0) / 1000, 3)


def _row(one: _Known, now_ms: float) -> tuple[str, ...]:
    state, seen = one.state, f"{_seen_s(one, now_ms):.0f} s ago"
    if state is None:
        return (one_line(one.name), "silent", seen, *["-"] * 7)
    word = _state(state, now_ms)
    if word == "running" and state.reasons:
        word = ", ".join(state.reasons)
    owned = "; ".join(f"{topic} {_numbers(numbers)}" for topic, numbers in sorted(state.partitions.items()))
    return (
        one_line(one.name),
        one_line(word),
        seen,
        one_line(state.version),
        one_line(state.host),
        str(state.pid),
        one_line(owned) or "-",
        str(state.running_count),
        str(state.stats.get("done", 0)),
        str(state.stats.get("failed", 0)),
    )


def _knows(note: WorkerNote) -> str:
    # What a script calls its own is known by another name, too, as a rule.
    names = sorted(note.entrypoints, key=lambda name: (name.startswith("__main__."), name))
    more = len(names) - _NAMES
    told = f" and {more}{'' if note.complete else ' or'} more" if more > 0 else ""
    return one_line(", ".join(names[:_NAMES])) + told


def _running(state: WorkerState, now_ms: float) -> Iterator[str]:
    """A line for each task that it runs."""
    if state.state == "stopped":
        return
    since = max(now_ms - state.at, 0) / 1000
    for task in state.running:
        beat = "" if task.heartbeat_s_ago is None else f", heartbeat {task.heartbeat_s_ago + since:.0f} s ago"
        yield f"  {one_line(task.entrypoint)}[{one_line(task.uuid)}] {task.seconds + since:.0f} s{beat}"
    if state.running_count > len(state.running):
        yield f"  ... {state.running_count - len(state.running)} more"


def _numbers(numbers: Iterable[int]) -> str:
    """``0-3,5`` for 0, 1, 2, 3 and 5."""
    ranges: list[list[int]] = []
    for number in sorted(numbers):
        if ranges and ranges[-1][1] == number - 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)
