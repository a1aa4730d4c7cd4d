"""Dead letters for people: a table that fits the terminal, one in detail, what became of a replay.

What is shown came from messages and errors, which may hold anything: what a terminal would obey is replaced.
"""

import shlex
from collections.abc import Iterator, Sequence
from datetime import datetime

import click

from kser.cli.terminal import fit, json_lines, one_line, printable, terminal_width, width_of
from kser.dead_letters import DeadLetter, Replay
from kser.errors import ValidationError
from kser.letters import decode
from kser.letters_json import header_text
from kser.masking import mask_text
from kser.redrive import remaining
from kser.schemas import Message, parse
from kser.sequencing.itinerary import METADATA_KEY
from kser.worker.dead_letters import OWN_HEADERS

__all__ = ["details", "hints", "outcome_lines", "table"]

_COLOURS = {"sent": "green", "ready": "cyan", "refused": "yellow", "failed": "red"}
_WORDS = {"ready": "would be sent"}
_HEADER = ("id", "when", "task", "operation", "tries", "error")
#: Of a uuid, where there is no room for all of it.
_SHORT = 8
#: Bytes of a value that is no JSON, and of a header, that are shown.
_RAW_BYTES = 2000
_HEADER_CHARS = 200


def table(letters: Sequence[DeadLetter], width: int | None = None) -> list[str]:
    """The letters, one a line, below a header; on a terminal no wider than that (``width`` columns, None: as it is)."""
    if not letters:
        return []
    width = width or terminal_width()
    rows = [_cells(letter) for letter in letters]
    if width is not None and _needs(rows) > width:
        rows = [[*row[:3], row[3][:_SHORT], *row[4:]] for row in rows]
    if width is not None and _needs(rows) > width:
        rows = [[*row[:2], row[2].rpartition(".")[2], *row[3:]] for row in rows]
    head = [name.upper() for name in _HEADER]
    widths = [max(width_of(row[at]) for row in [head, *rows]) for at in range(len(_HEADER) - 1)]
    lines = []
    for row in [head, *rows]:
        front = "  ".join(cell + " " * (wide - width_of(cell)) for cell, wide in zip(row, widths, strict=False))
        lines.append(fit(f"{front}  {row[-1]}".rstrip(), width))
    return [click.style(lines[0], bold=True)] + [
        click.style(line, dim=True) if letter.replayed else line
        for line, letter in zip(lines[1:], letters, strict=True)
    ]


def _cells(letter: DeadLetter) -> list[str]:
    tries = str(letter.attempt) + (f", back {letter.redrive}x" if letter.redrive else "")
    # What could not be read says why in its fields, and no more than that in its error.
    said = letter.error if letter.entrypoint else letter.unreadable or letter.error
    error = one_line(f"{letter.error_type}: {said}" if said else letter.error_type)
    return [
        letter.id,
        f"{datetime.fromtimestamp(letter.at / 1000):%m-%d %H:%M:%S}",
        one_line(letter.entrypoint) or "(unreadable)",
        one_line(letter.operation or "-"),
        tries,
        f"[replayed] {error}" if letter.replayed else error,
    ]


def _needs(rows: Sequence[Sequence[str]]) -> int:
    """Columns that the rows take with 40 of each error."""
    front = sum(max(width_of(row[at]) for row in rows) + 2 for at in range(len(_HEADER) - 1))
    return front + max(min(width_of(row[-1]), 40) for row in rows)


def details(letter: DeadLetter, group: str) -> Iterator[str]:
    """One letter: what failed, where, why; its headers, its message with secrets masked, the traceback."""
    yield click.style(f"Dead letter {letter.id} of group {group}", bold=True)
    for name, value in _facts(letter):
        yield f"  {name:10}{value}"
    yield ""
    yield click.style(one_line(f"{letter.error_type}: {letter.error}" if letter.error else letter.error_type), fg="red")
    if own := [(name, raw) for name, raw in letter.headers if name not in OWN_HEADERS]:
        yield "\nHeaders"
        for name, raw in own:
            shown = header_text(name, raw)
            yield f"  {one_line(name)}: {'(none)' if shown is None else one_line(shown)[:_HEADER_CHARS]}"
    yield from _message_lines(letter)
    if letter.trace:
        yield "\nTraceback"
        for line in letter.trace.rstrip().splitlines():
            yield f"  {printable(line)}"


def _facts(letter: DeadLetter) -> Iterator[tuple[str, str]]:
    yield "task", one_line(f"{letter.entrypoint} [{letter.uuid}]") if letter.entrypoint else "(unreadable)"
    if letter.operation is not None:
        yield "operation", f"{one_line(letter.operation)}, run {letter.run}, position {letter.position}"
    when = datetime.fromtimestamp(letter.at / 1000).astimezone()
    by = f", on worker {one_line(letter.worker)}" if letter.worker else ""
    yield "failed", f"{when:%Y-%m-%d %H:%M:%S %Z}, at attempt {letter.attempt}{by}"
    key = "none" if letter.key is None else one_line(letter.key.decode("utf-8", "backslashreplace"))
    place = f"{one_line(letter.origin_topic) or '(unknown)'}"
    if letter.origin_partition >= 0:
        place += f"[{letter.origin_partition}] at {letter.origin_offset}"
    yield "from", f"{place}, key {key}"
    back = f", came back {letter.redrive} time{'s' if letter.redrive > 1 else ''} before" if letter.redrive else ""
    yield "replayed", ("yes" if letter.replayed else "no") + back
    if letter.left_out:
        yield "not kept", f"its {letter.left_out}, too large for a dead letter"
    if letter.unreadable:
        yield "not read", one_line(letter.unreadable)


def hints(letter: DeadLetter, group: str, max_redrives: int) -> Iterator[str]:
    """What can be done about it."""
    if letter.replayed or letter.left_out == "value":
        return
    words = ["kser", "dlq", "replay", letter.id, "--group", group]
    if letter.unreadable or letter.left_out or letter.aborted or letter.redrive >= max_redrives:
        words.append("--force")
    yield f"\nTo send it back: {shlex.join(words)}"


def outcome_lines(outcomes: Sequence[Replay]) -> Iterator[str]:
    """What became of each letter, a line for each."""
    words = [_WORDS.get(outcome.status, outcome.status) for outcome in outcomes]
    word_width = max(map(len, words), default=0)
    id_width = max((len(outcome.letter.id) for outcome in outcomes), default=0)
    terminal = terminal_width()
    for outcome, word in zip(outcomes, words, strict=True):
        line = f"{outcome.letter.id:{id_width}}  {one_line(_outcome(outcome, short=terminal is not None))}"
        yield f"{click.style(f'{word:{word_width}}', fg=_COLOURS[outcome.status])}  {line}"


def _outcome(outcome: Replay, *, short: bool) -> str:
    """The task, what it is part of, where it goes, or why not. ``short``: of an operation the beginning of its uuid."""
    letter, record = outcome.letter, outcome.record
    if outcome.status in ("refused", "failed") or record is None:
        return f"{letter.name}: {outcome.reason}"
    to = f"to {record.topic}[{record.partition}]"
    if letter.operation is not None:
        operation = letter.operation[:_SHORT] if short else letter.operation
        return f"{outcome.entrypoint} {to}, run {outcome.run} of operation {operation} from position {outcome.position}"
    return f"{letter.name} {to}" + (f", run {outcome.run}" if outcome.run is not None else "")


# -- inside ------------------------------------------------------------------------------------------------------------


def _message_lines(letter: DeadLetter) -> Iterator[str]:
    """What is in the message, without its itinerary: of that the steps to come, by their positions."""
    _, kmsg, itinerary = decode(letter, Message)
    if kmsg is None or letter.unreadable:
        yield "\nMessage"
        yield from (f"  {printable(line)}" for line in _value_lines(letter))
        return
    metadata = {name: value for name, value in kmsg.metadata.items() if name != METADATA_KEY}
    for title, value in (
        ("Parameters", kmsg.params),
        ("Results until then", kmsg.result.retval),
        ("Metadata", metadata),
    ):
        if value or title == "Parameters":
            yield f"\n{title}"
            yield from (f"  {printable(line)}" for line in json_lines(value))
    if itinerary is not None and (steps := remaining(itinerary, letter.position)):
        yield "\nSteps to come"
        width = len(str(steps[-1].position))
        yield from (f"  {step.position:{width}}  {one_line(step.entrypoint)}" for step in steps)


def _value_lines(letter: DeadLetter) -> list[str]:
    if letter.value is None:
        return ["(no value)"]
    try:
        return json_lines(parse(letter.value))
    except (ValidationError, RecursionError):
        text = mask_text(letter.value[:_RAW_BYTES].decode("utf-8", "backslashreplace"))
        more = [f"... {len(letter.value)} bytes in all"] if len(letter.value) > _RAW_BYTES else []
        return [*text.splitlines(), *more] or ["(empty)"]
