"""DeadLetter: what a record of ``{group}.dlq`` tells. Pure, no I/O."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from kser import headers as names
from kser.errors import AbortedError, Error, ValidationError
from kser.headers import Headers
from kser.schemas import Message, parse
from kser.sequencing.itinerary import Itinerary
from kser.transport import Record
from kser.worker.dead_letters import LEFT_OUT, TOO_LARGE
from kser.worker.state import FOR_EVER

__all__ = ["DeadLetter", "ReadLetter", "decode", "is_called", "matcher", "message_in", "place_of", "read_letter"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadLetter:
    """One dead letter. Where something is not known, texts are empty and numbers -1."""

    #: Where it lies in ``{group}.dlq``.
    partition: int
    offset: int
    #: Name of the task, or operation, in the message.
    entrypoint: str
    #: Its uuid.
    uuid: str
    #: uuid of the root operation; None for a message of no operation.
    operation: str | None = None
    #: Run of the operation; of a message without an itinerary 1 and how often it came back.
    run: int = 1
    #: How many tasks of the operation ended before this one.
    position: int = 0
    #: Class of the error, and its text.
    error_type: str = ""
    error: str = ""
    #: Its traceback, maybe shortened.
    trace: str = ""
    #: When it failed, milliseconds since the epoch, by the worker's clock.
    at: int = 0
    #: Its last attempt, from 1.
    attempt: int = 1
    #: How often it came back from the dead letters before.
    redrive: int = 0
    #: Who gave it up.
    worker: str = ""
    #: Where the message was.
    origin_topic: str = ""
    origin_partition: int = -1
    origin_offset: int = -1
    #: Key, bytes and headers of the record, those of the failure among the headers.
    key: bytes | None = None
    value: bytes | None = None
    headers: Headers = ()
    #: What is not in it: "value", "headers" (those of the message itself) or "" when it is whole.
    left_out: str = ""
    #: Why its message cannot be read here; "" when it can.
    unreadable: str = ""
    #: True when its message was run again: the claim of a replay is taken, or a later letter of it is there.
    replayed: bool = False

    @property
    def aborted(self) -> bool:
        """True when it did not fail, but somebody aborted its operation."""
        return self.error_type == AbortedError.__name__

    @property
    def id(self) -> str:
        """``partition:offset``."""
        return f"{self.partition}:{self.offset}"

    @property
    def name(self) -> str:
        """``entrypoint[uuid]``, or where the message was when it could not be read; for people."""
        if self.entrypoint or self.uuid:
            return f"{self.entrypoint}[{self.uuid}]"
        return f"{self.origin_topic}[{self.origin_partition}] at {self.origin_offset}"

    @property
    def subject(self) -> str:
        """What failed: the root operation, else the message, else the place it was at."""
        return self.operation or self.uuid or f"{self.origin_topic}/{self.origin_partition}/{self.origin_offset}"

    @property
    def claim(self) -> str:
        """The key of which the first writer runs: the same for all who replay this letter, or resume its operation.

        It is taken for ever, as the letter may be kept for ever.
        """
        return f"{FOR_EVER}{self.subject}:{self.run}:{self.position}:{self.redrive}"

    @property
    def generation(self) -> tuple[int, int]:
        """Of the letters of one subject a later one has more."""
        return self.run, self.redrive

    @property
    def age(self) -> tuple[int, int, int]:
        """By this they are sorted, the one that failed first ahead."""
        return self.at, self.partition, self.offset


class ReadLetter(NamedTuple):
    """A letter and what is in its message; both are None when that cannot be read."""

    letter: DeadLetter
    kmsg: Message | None
    itinerary: Itinerary | None


def read_letter(record: Record, message: type[Message]) -> ReadLetter:
    """The letter in a record of the topic. Never raises because of what is in it."""
    headers = tuple(record.headers)
    left_out = names.text(headers, LEFT_OUT)
    if record.value is None and names.value_of(headers, names.REASON) is not None:
        left_out = "value"  # the relay leaves no more than where the record is
    letter = DeadLetter(
        partition=record.partition,
        offset=record.offset,
        entrypoint="",
        uuid="",
        error_type=names.text(headers, names.ERROR_TYPE),
        error=names.text(headers, names.ERROR),
        trace=names.text(headers, names.TRACE),
        at=names.number(headers, names.AT, record.timestamp_ms),
        attempt=names.number(headers, names.ATTEMPT, 1),
        redrive=max(names.number(headers, names.REDRIVE), 0),
        worker=names.text(headers, names.WORKER),
        origin_topic=names.text(headers, names.ORIGIN_TOPIC),
        origin_partition=names.number(headers, names.ORIGIN_PARTITION, -1),
        origin_offset=names.number(headers, names.ORIGIN_OFFSET, -1),
        key=record.key,
        value=record.value,
        headers=headers,
        left_out=left_out,
    )
    return decode(letter, message)


def decode(letter: DeadLetter, message: type[Message]) -> ReadLetter:
    """The letter, with what its message tells."""
    if letter.left_out == "value":
        return ReadLetter(replace(letter, **_coordinates(letter.value)), None, None)
    kmsg, itinerary, problem = message_in(letter.value, message)
    if kmsg is None:
        return ReadLetter(replace(letter, unreadable=problem), None, None)
    letter = replace(letter, entrypoint=str(kmsg.entrypoint), uuid=kmsg.uuid, unreadable=problem)
    if itinerary is not None:
        operation = itinerary.root.uuid if itinerary.frames else None
        return ReadLetter(
            replace(letter, operation=operation, run=itinerary.run, position=itinerary.position), kmsg, itinerary
        )
    if not problem:
        letter = replace(letter, run=1 + letter.redrive)
    return ReadLetter(letter, kmsg, itinerary)


def message_in(value: bytes | None, message: type[Message]) -> tuple[Message | None, Itinerary | None, str]:
    """The message in a record and its itinerary, each None where it cannot be read, and why."""
    try:
        kmsg = message.loads(value if value is not None else b"")
    except Exception as exc:  # noqa: BLE001 - data that is no message; a class of the user's may raise anything
        return None, None, _why_not(exc)
    try:
        return kmsg, Itinerary.of(kmsg), ""
    except Error as exc:
        return kmsg, None, str(exc.message)


def _why_not(exc: Exception) -> str:
    """Why there is no message, for people: what is wrong with which field."""
    if not isinstance(exc, ValidationError) or not exc.extra:
        return str(exc) or type(exc).__name__
    told = []
    for name, found in exc.extra.items():
        wrong = " ".join(map(str, found)) if isinstance(found, list) else str(found)
        told.append(wrong if name == "_schema" else f"{name}: {wrong}")
    return "; ".join(told)


def _coordinates(value: bytes | None) -> dict[str, Any]:
    """What is known of the message of a letter without its value."""
    try:
        data = parse(value or b"")
        if data["kser"] != TOO_LARGE:
            return {}
    except (ValidationError, TypeError, KeyError):
        return {}
    kinds = {"uuid": str, "entrypoint": str, "operation": str, "run": int, "position": int}
    return {name: data[name] for name, kind in kinds.items() if isinstance(data.get(name), kind)}


def matcher(
    task: str | None, error: str | None, since_ms: int | None, until_ms: int | None
) -> Callable[[DeadLetter], bool]:
    """Whether a letter is one of those asked for: see DeadLetters.search()."""
    pattern = task is not None and any(sign in task for sign in "*?[")
    part = error.lower() if error is not None else None

    def matches(letter: DeadLetter) -> bool:
        if since_ms is not None and letter.at < since_ms:
            return False
        if until_ms is not None and letter.at >= until_ms:
            return False
        if task is not None and not (
            fnmatchcase(letter.entrypoint, task) if pattern else is_called(letter.entrypoint, task)
        ):
            return False
        return part is None or part in f"{letter.error_type}: {letter.error}".lower()

    return matches


def is_called(entrypoint: str, name: str) -> bool:
    """Whether that is the name of the task, or of its class alone."""
    return name in (entrypoint, entrypoint.rpartition(".")[2])


def place_of(name: str) -> tuple[int, int]:
    """Partition and offset of the letter with this id. Raises ValidationError."""
    partition, colon, offset = name.partition(":")
    if not colon or not _is_number(partition) or not _is_number(offset):
        raise ValidationError(f"{name!r} is no dead letter: write partition:offset, as in 0:12")
    return int(partition), int(offset)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= 19
