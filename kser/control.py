"""Control: what people tell the workers of a group while they run. Abort this operation; pause that topic.

Records of the topic `{group}.control`, which is compacted, so that the newest record of a key is what holds::

    abort:{uuid}           an operation, or a task that belongs to none
    pause:group            every worker of the group
    pause:worker:{name}    one worker, by the name of its slot
    pause:topic:{name}     what comes from one topic
    pause:task:{path}      one class, by its name in messages
    worker:{name}          a worker is there, and knows these names: written by itself

    value = {"v": 1, "run": 2, "by": "ann@build1", "at": 1700000000000, "why": "wrong prices"}     run: of an abort only
    value = {"v": 1, "at": 1700000000000, "entrypoints": ["shop.Charge"], "itinerary": 1}          of a worker
    no value = it does not hold any more

An abort counts up to its ``run``, so what resume makes later, which is a run of its own, is not stopped by it. A record
that cannot be read is of a newer release and says nothing. All records are written outside of transactions.
"""

import getpass
import re
import socket
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from typing import Any, Final, NamedTuple

import orjson

from kser import headers
from kser.errors import ConfigurationError, TransportError, ValidationError
from kser.events import Event, OperationView, events_topic
from kser.status import Status
from kser.transport import OutRecord, Partition, Record, Sink, Transport
from kser.transport.names import TOPIC_NAME_RULE, is_topic_name
from kser.transport.partitioner import partition_of

__all__ = [
    "KEEP_S",
    "Abort",
    "AbortAnswer",
    "Change",
    "ControlSet",
    "Pause",
    "PauseKind",
    "Progress",
    "WorkerNote",
    "abort",
    "complete_uuid",
    "control_topic",
    "decode",
    "find_operation",
    "only_one",
    "pause",
    "read_control",
    "resume",
    "send_control",
    "unabort",
    "whoami",
]

#: Version of the values.
VERSION: Final = 1
#: How long an abort holds, in seconds: as long as messages stay in task topics. What is delayed for longer comes into
#: the hands of a relay every hour, which takes out what was aborted.
KEEP_S: Final = 30 * 24 * 3600.0
#: How long it is believed that a worker is there after it said so, in seconds; it says so every 6 hours.
NOTE_KEEP_S: Final = 24 * 3600.0
#: Bytes of the names that a worker tells of itself: what is more is left out.
NOTE_BYTES: Final = 16 * 1024
#: Longest wait for one answer about topics, in seconds.
_ANSWER_S: Final = 10.0


def control_topic(group: str) -> str:
    """Name of the topic that the workers of this group are told by."""
    return f"{group}.control"


class PauseKind(StrEnum):
    """What can be paused."""

    GROUP = "group"
    WORKER = "worker"
    TOPIC = "topic"
    TASK = "task"


class Abort(NamedTuple):
    """That an operation, or a task that belongs to none, is to end."""

    #: Of the root operation, or of the task.
    uuid: str
    #: The last run that is meant; those before it are meant too.
    run: int = 1
    #: Who said so, for people.
    by: str = ""
    #: When, milliseconds since the epoch, by the clock of whoever said so.
    at_ms: int = 0
    why: str = ""

    @property
    def key(self) -> str:
        """Record key."""
        return f"abort:{self.uuid}"

    @property
    def reason(self) -> str:
        """Who and why, as one phrase: ``aborted by ann@build1: wrong prices``."""
        return _phrase("aborted", self.by, self.why)


class Pause(NamedTuple):
    """That workers are to take nothing more: none of them, or nothing of this kind."""

    kind: PauseKind
    #: Of the topic, task or worker; "" for the group.
    name: str = ""
    by: str = ""
    at_ms: int = 0
    why: str = ""

    @property
    def key(self) -> str:
        """Record key."""
        return f"pause:{self.kind}:{self.name}" if self.name else f"pause:{self.kind}"

    @property
    def reason(self) -> str:
        """Who and why, as one phrase: ``paused by ann@build1: wrong prices``."""
        return _phrase("paused", self.by, self.why)


class WorkerNote(NamedTuple):
    """What a worker tells of itself, so that others can say who could run a message which they cannot."""

    #: Of its slot.
    name: str
    #: The names in messages that it knows, or the first of them.
    entrypoints: frozenset[str] = frozenset()
    #: False: there were more of them than are told.
    complete: bool = True
    #: The newest version of itineraries that it reads.
    itinerary: int = 1
    #: When, milliseconds since the epoch, by its clock.
    at_ms: int = 0

    @property
    def key(self) -> str:
        """Record key."""
        return f"worker:{self.name}"

    @classmethod
    def of(cls, name: str, entrypoints: Collection[str], itinerary: int, at_ms: int) -> "WorkerNote":
        """The note of a worker that knows these names."""
        told, size = [], 0
        for entrypoint in sorted(entrypoints):
            size += len(entrypoint.encode("utf-8", "backslashreplace")) + 3
            if size > NOTE_BYTES:
                break
            told.append(entrypoint)
        return cls(name, frozenset(told), len(told) == len(entrypoints), itinerary, at_ms)


class Change(NamedTuple):
    """What one record says."""

    #: The record key.
    key: str
    #: What holds from now on; None: nothing does any more.
    entry: Abort | Pause | WorkerNote | None
    #: Of what is taken out because of its age: the ``at_ms`` it has. A younger one stays.
    upto_ms: int | None = None

    def to_record(self, group: str) -> OutRecord:
        """The record."""
        more = () if self.upto_ms is None else ((headers.AT, str(self.upto_ms).encode()),)
        value = None if self.entry is None else _value(self.entry)
        return OutRecord(control_topic(group), _key_bytes(self.key), value, more)


# -- reading -----------------------------------------------------------------------------------------------------------


def decode(record: Record) -> Change | None:
    """What a record of the control topic says; None for one of no known form.

    One whose key is known and whose value is not takes away what held: so all who read the topic agree, whether they
    have met what was there before or not.
    """
    found = _parse_key(record.key)
    if found is None:
        return None
    key, kind, name = found
    if record.value is None:
        at = record.header(headers.AT)
        return Change(key, None, headers.number(record.headers, headers.AT) if at is not None else None)
    data = _parse_value(record.value)
    if data is None:
        return Change(key, None)
    if kind == _WORKER:
        return Change(key, _worker_note(name, data, record.timestamp_ms))
    by, why, at_ms = str(data.get("by", "")), str(data.get("why", "")), _number(data.get("at"), record.timestamp_ms)
    if kind == _ABORT:
        return Change(key, Abort(name, max(_number(data.get("run"), 1), 1), by, at_ms, why))
    return Change(key, Pause(PauseKind(kind), name, by, at_ms, why))


class ControlSet:
    """What holds after the records that were applied. One thread owns it; others may look things up in ``aborts``."""

    def __init__(self) -> None:
        #: By uuid.
        self.aborts: dict[str, Abort] = {}
        #: By record key.
        self.pauses: dict[str, Pause] = {}
        #: Aborts that expire() put away, by uuid, until they are taken out of the topic.
        self.expired: dict[str, Abort] = {}
        #: Aborts, by uuid, whose newest record takes out an older one of the same uuid: they hold, and have to be
        #: written again.
        self.wronged: dict[str, Abort] = {}
        #: By name. Replaced, and not changed.
        self.workers: dict[str, WorkerNote] = {}

    def apply(self, record: Record) -> Change | None:
        """Take in a record of the topic, in the order of its partition. What it changed; None when it was nothing."""
        change = decode(record)
        if change is None:
            return None
        entry = change.entry
        if isinstance(entry, Pause):
            changed = self.pauses.get(change.key) != entry
            self.pauses[change.key] = entry
        elif isinstance(entry, WorkerNote):
            changed = True
            self.workers = self.workers | {entry.name: entry}
        elif entry is not None:
            self.wronged.pop(entry.uuid, None)
            self.expired.pop(entry.uuid, None)
            known = self.aborts.get(entry.uuid)
            # An older run that is aborted once more gives the newer one no new life.
            changed = known is None or (known.run <= entry.run and known != entry)
            if changed:
                self.aborts[entry.uuid] = entry
        elif change.key.startswith(_ABORT):
            changed = self._lift(change.key.removeprefix(_ABORT), change.upto_ms)
        elif change.key.startswith(_WORKER):
            changed = self._leave(change.key.removeprefix(_WORKER), change.upto_ms)
        else:
            changed = self.pauses.pop(change.key, None) is not None
        return change if changed else None

    def workers_at(self, now_ms: int) -> list[WorkerNote]:
        """The workers that are there, as far as they tell, by name."""
        oldest_ms = now_ms - NOTE_KEEP_S * 1000
        return sorted(note for note in self.workers.values() if note.at_ms > oldest_ms)

    def expire(self, oldest_ms: int) -> None:
        """Put away the aborts that were told then, or before."""
        for told in [told for told in self.aborts.values() if told.at_ms <= oldest_ms]:
            self.expired[told.uuid] = self.aborts.pop(told.uuid)

    def _leave(self, name: str, upto_ms: int | None) -> bool:
        known = self.workers.get(name)
        if known is None or (upto_ms is not None and known.at_ms > upto_ms):
            return False
        self.workers = {other: note for other, note in self.workers.items() if other != name}
        return True

    def _lift(self, uuid: str, upto_ms: int | None) -> bool:
        self.expired.pop(uuid, None)
        known = self.aborts.get(uuid)
        if known is not None and upto_ms is not None and known.at_ms > upto_ms:
            self.wronged[uuid] = known  # it came while somebody took out an old one
            return False
        self.wronged.pop(uuid, None)
        return self.aborts.pop(uuid, None) is not None


def read_control(transport: Transport, group: str, timeout_s: float = 60) -> ControlSet:
    """What holds in this group now; nothing where there is no control topic.

    Raises TransportError when it was not read to its end within ``timeout_s``.
    """
    end, topic, found = time.monotonic() + timeout_s, control_topic(group), ControlSet()
    info = transport.admin().describe([topic], _left(end, _ANSWER_S)).get(topic)
    if info is not None:
        for batch in transport.read([Partition(topic, number) for number in range(info.partitions)], _left(end)):
            for record in batch:
                found.apply(record)
    return found


class Progress(NamedTuple):
    """How far an operation, or a task that belongs to none, has come in its newest run, as its events tell."""

    uuid: str
    entrypoint: str
    run: int
    #: PENDING, RUNNING, or how it ended.
    status: str

    @property
    def ended(self) -> bool:
        """True once its end has been told."""
        return self.status in _FINAL


def find_operation(transport: Transport, group: str, uuid: str, timeout_s: float = 60) -> Progress | None:
    """What `{group}.events` says of the newest run of an operation, or a task that belongs to none; None: nothing.

    Reads one partition of the topic, and the others only if it is not in there: partitions may have been added.

    Raises:
        ValidationError: it is a step of an operation, or nested in one; the text has the uuid of that.
        TransportError: the topic was not read within ``timeout_s``.
    """
    end, topic = time.monotonic() + timeout_s, events_topic(group)
    info = transport.admin().describe([topic], _left(end, _ANSWER_S)).get(topic)
    if info is None or not info.partitions:
        return None
    home = partition_of(_key_bytes(uuid), info.partitions)
    around: Event | None = None
    for numbers in ([home], [number for number in range(info.partitions) if number != home]):
        own: list[Event] = []
        for event in _events_naming(transport, [Partition(topic, number) for number in numbers], uuid, end):
            if event.key == uuid:
                own.append(event)
            elif event.uuid == uuid:
                around = event
        if own:
            return _progress(uuid, own)
    if around is not None:
        raise ValidationError(
            f"{around.entrypoint}[{uuid}] is part of operation {around.operation}: name that one, which is the whole",
            extra={"uuid": uuid, "operation": around.operation},
        )
    return None


def _refuse_part(transport: Transport, group: str, uuid: str, timeout_s: float) -> str:
    """Raise ValidationError for what is part of an operation. What is to be told when that could not be looked up."""
    try:
        find_operation(transport, group, uuid, timeout_s)
    except TransportError as exc:
        return f"if it is part of an operation, this does nothing, and that could not be looked up: {exc.message}"
    return ""


def complete_uuid(transport: Transport, group: str, begin: str, timeout_s: float = 60) -> str:
    """The uuid that begins so, of the operations and tasks of none that `{group}.events` tells of.

    ``begin`` itself when it is not 8 to 35 digits and dashes of a uuid, or no uuid there begins so. Reads the topic.

    Raises:
        ValidationError: several begin so; the text has them.
        TransportError: the topic was not read within ``timeout_s``.
    """
    end, topic = time.monotonic() + timeout_s, events_topic(group)
    if not is_begin(begin):
        return begin
    info = transport.admin().describe([topic], _left(end, _ANSWER_S)).get(topic)
    if info is None:
        return begin
    start = _key_bytes(begin.lower())
    found: set[bytes] = set()
    for batch in transport.read([Partition(topic, number) for number in range(info.partitions)], _left(end)):
        found.update(record.key for record in batch if record.key is not None and record.key.startswith(start))
    return only_one(begin, [key.decode("utf-8", "replace") for key in found])


def is_begin(text: str) -> bool:
    """True for what may be the beginning of a uuid, and is not a whole one."""
    return _BEGIN.fullmatch(text) is not None


def only_one(begin: str, found: Iterable[str]) -> str:
    """The one that was found, ``begin`` when there is none, or it is among them. Raises ValidationError for several."""
    uuids = sorted(set(found))
    if not uuids or begin in uuids:
        return begin
    if len(uuids) > 1:
        more = f" and {len(uuids) - _CANDIDATES} more" if len(uuids) > _CANDIDATES else ""
        raise ValidationError(
            f"{len(uuids)} uuids begin with {begin}: {', '.join(uuids[:_CANDIDATES])}{more}. Give more of the one you "
            "mean",
            extra={"uuids": uuids},
        )
    return uuids[0]


def _progress(uuid: str, events: Sequence[Event]) -> Progress:
    newest = max(event.run for event in events)
    view = OperationView(uuid)
    for event in events:
        if event.run == newest:
            view.apply(event)
    name = view.entrypoint or next((event.entrypoint for event in events if event.uuid == uuid), "")
    return Progress(uuid, name, newest, view.status)


def _events_naming(transport: Transport, partitions: Sequence[Partition], uuid: str, end: float) -> Iterator[Event]:
    """The events of these partitions that have the uuid as their key, or anywhere in them."""
    if not partitions:
        return
    key = _key_bytes(uuid)
    try:
        for batch in transport.read(partitions, _left(end)):
            for record in batch:
                if record.key == key or (record.value is not None and key in record.value):
                    try:
                        yield Event.loads(record.value)
                    except ValidationError:
                        continue
    except TransportError as exc:
        raise TransportError(
            f"The newest run of {uuid} is not known: {exc.message}. Say which run is meant (run=, --run): then the "
            "events need not be read",
            retriable=exc.retriable,
            extra=exc.extra,
        ) from exc


# -- writing -----------------------------------------------------------------------------------------------------------


def send_control(sink: Sink, group: str, changes: Iterable[Change], timeout_s: float = 30) -> None:
    """Write these, and return once the broker has confirmed all of them. The sink must have no transactional id.

    Raises TransportError when one was not confirmed within ``timeout_s``; it may have been stored even so.
    """
    failures = sink.deliver([change.to_record(group) for change in changes], timeout_s)
    if failures:
        raise failures[0][1]


class AbortAnswer(NamedTuple):
    """What became of an abort."""

    #: What was written; None: nothing, because it has ended already.
    abort: Abort | None
    #: What the events say of it; None when they were not asked, or say nothing.
    progress: Progress | None
    #: What else there is to know, in words; may be "".
    note: str = ""


def abort(
    uuid: str,
    *,
    group: str,
    transport: Transport,
    sink: Sink | None = None,
    run: int | None = None,
    why: str = "",
    by: str = "",
    timeout_s: float = 60,
) -> AbortAnswer:
    """Tell all workers of a group that an operation is to end, and return once that is durable.

    They end what runs of it as soon as it looks, and run nothing more of it; the events tell its end, ABORTED. What has
    ended is left alone. Doing it again changes nothing.

    Args:
        uuid: of the root operation, or of a task that belongs to none.
        group: the workers' group.
        transport: its broker.
        sink: writes the record; None: one is made of the transport for this.
        run: the last run that is meant. None: the newest that the events tell of.
        why: for people.
        by: who; "": this user and host.
        timeout_s: for all of it, in seconds.

    Raises:
        ConfigurationError: there is no control topic; the text says what to do.
        ValidationError: it is part of an operation, or the uuid or run cannot be.
        TransportError: it is not known whether the workers will hear of it. Try again.
    """
    end = time.monotonic() + timeout_s
    _check_name("uuid", uuid)
    if run is not None and (not isinstance(run, int) or run < 1):
        raise ValidationError(f"run={run!r}: runs are whole numbers from 1")
    _check_topic(transport, group, end)
    note, progress = "", None
    if run is None:
        progress = find_operation(transport, group, uuid, _left(end))
    else:
        note = _refuse_part(transport, group, uuid, _left(end, _ANSWER_S))
    if progress is not None and progress.ended:
        return AbortAnswer(None, progress, f"it has ended before: {progress.status}")
    if run is None and progress is None:
        note = f"nothing of it is in {events_topic(group)} yet, so it is taken to be in its first run"
    entry = Abort(uuid, run or (progress.run if progress is not None else 1), by or whoami(), _now_ms(), why)
    with _sink_of(transport, sink) as own:
        send_control(own, group, [Change(entry.key, entry)], _left(end))
    return AbortAnswer(entry, progress, note)


def unabort(uuid: str, *, group: str, transport: Transport, sink: Sink | None = None, timeout_s: float = 60) -> None:
    """Take an abort back. What has been aborted already stays so; what has not been met yet runs.

    Raises ConfigurationError, ValidationError and TransportError as abort() does.
    """
    end = time.monotonic() + timeout_s
    _check_name("uuid", uuid)
    _check_topic(transport, group, end)
    with _sink_of(transport, sink) as own:
        send_control(own, group, [Change(Abort(uuid).key, None)], _left(end))


def pause(
    *,
    group: str,
    transport: Transport,
    sink: Sink | None = None,
    topic: str | None = None,
    task: str | None = None,
    worker: str | None = None,
    why: str = "",
    by: str = "",
    timeout_s: float = 60,
) -> Pause:
    """Tell the workers of a group to take nothing more until resume(), and return once that is durable.

    What runs goes on. It holds for workers that start later, too.

    Args:
        group: the workers' group.
        transport: its broker.
        sink: writes the record; None: one is made of the transport for this.
        topic: only what comes from this topic.
        task: only this class, by its name in messages.
        worker: only the worker of this name. None of these three: the whole group; at most one of them.
        why: for people.
        by: who; "": this user and host.
        timeout_s: for all of it, in seconds.

    Raises ConfigurationError, ValidationError and TransportError as abort() does.
    """
    end = time.monotonic() + timeout_s
    kind, name = _target(topic, task, worker)
    _check_topic(transport, group, end)
    entry = Pause(kind, name, by or whoami(), _now_ms(), why)
    with _sink_of(transport, sink) as own:
        send_control(own, group, [Change(entry.key, entry)], _left(end))
    return entry


def resume(
    *,
    group: str,
    transport: Transport,
    sink: Sink | None = None,
    topic: str | None = None,
    task: str | None = None,
    worker: str | None = None,
    timeout_s: float = 60,
) -> Pause | None:
    """End the pause() with the same arguments, and give it; None, and nothing is written, when there is none.

    Other pauses stay: what is paused by itself and with its group waits for both. Raises as pause() does.
    """
    end = time.monotonic() + timeout_s
    kind, name = _target(topic, task, worker)
    key = Pause(kind, name).key
    found = read_control(transport, group, _left(end)).pauses.get(key)
    if found is not None:
        with _sink_of(transport, sink) as own:
            send_control(own, group, [Change(key, None)], _left(end))
    return found


def whoami() -> str:
    """This user and host, as ``ann@build1``."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError, ImportError):  # a user id without a name
        user = "unknown"
    return f"{user}@{socket.gethostname()}"


# -- inside ------------------------------------------------------------------------------------------------------------

_FINAL: Final = frozenset(status for status in Status if status.final)
_ABORT: Final = "abort:"
_PAUSE: Final = "pause:"
#: A part of a uuid that a list may show in place of it; and how many that begin so are told.
_BEGIN: Final = re.compile(r"[0-9a-fA-F-]{8,35}")
_CANDIDATES: Final = 5
_WORKER: Final = "worker:"


def _phrase(done: str, by: str, why: str) -> str:
    text = f"{done} by {by}" if by else done
    return f"{text}: {why}" if why else text


def _value(entry: Abort | Pause | WorkerNote) -> bytes:
    if isinstance(entry, WorkerNote):
        known = sorted(map(_text, entry.entrypoints))
        return orjson.dumps(
            {
                "v": VERSION,
                "at": entry.at_ms,
                "entrypoints": known,
                "complete": entry.complete,
                "itinerary": entry.itinerary,
            }
        )
    data: dict[str, Any] = {"v": VERSION, "by": _text(entry.by), "at": entry.at_ms, "why": _text(entry.why)}
    if isinstance(entry, Abort):
        data["run"] = entry.run
    return orjson.dumps(data)


def _text(text: str) -> str:
    """As it is, but with backslashes for what has no UTF-8: arguments of commands may be any bytes."""
    return text.encode("utf-8", "backslashreplace").decode()


def _worker_note(name: str, data: dict[str, Any], at_ms: int) -> WorkerNote:
    names = data.get("entrypoints")
    known = frozenset(each for each in names if isinstance(each, str)) if isinstance(names, list) else frozenset()
    itinerary = _number(data.get("itinerary"), 1)
    return WorkerNote(name, known, data.get("complete") is not False, itinerary, _number(data.get("at"), at_ms))


def _parse_key(raw: bytes | None) -> tuple[str, str, str] | None:
    """The key as text, what it is about (_ABORT, _WORKER or a PauseKind), and the name in it; None: none of these."""
    try:
        key = (raw or b"").decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        return None
    for prefix in (_ABORT, _WORKER):
        if key.startswith(prefix) and key != prefix:
            return key, prefix, key.removeprefix(prefix)
    kind, _, name = key.removeprefix(_PAUSE).partition(":")
    if not key.startswith(_PAUSE) or kind not in _KINDS or bool(name) == (kind == PauseKind.GROUP):
        return None
    return key, kind, name


_KINDS: Final = frozenset(PauseKind)


def _parse_value(raw: bytes) -> dict[str, Any] | None:
    try:
        data = orjson.loads(raw)
    except orjson.JSONDecodeError:
        return None
    return data if isinstance(data, dict) and data.get("v") == VERSION else None


def _number(value: Any, default: int) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else default


def _target(topic: str | None, task: str | None, worker: str | None) -> tuple[PauseKind, str]:
    given = [
        (kind, name)
        for kind, name in ((PauseKind.TOPIC, topic), (PauseKind.TASK, task), (PauseKind.WORKER, worker))
        if name is not None
    ]
    if len(given) > 1:
        raise ValidationError(f"{' and '.join(f'{kind}={name!r}' for kind, name in given)}: one of them at a time")
    if not given:
        return PauseKind.GROUP, ""
    kind, name = given[0]
    _check_name(kind, name)
    if kind == PauseKind.TOPIC and not is_topic_name(name):
        raise ValidationError(f"{name!r} {TOPIC_NAME_RULE}")
    return kind, name


def _check_name(what: str, name: object) -> None:
    if not isinstance(name, str) or not name.strip() or name != name.strip():
        raise ValidationError(f"{what}={name!r}: give a text without blanks around it")


def _check_topic(transport: Transport, group: str, end: float) -> None:
    """See that there is a control topic: one that the first record makes is not compacted, and forgets."""
    admin, topic = transport.admin(), control_topic(group)
    if admin.describe([topic], _left(end, _ANSWER_S)) or not admin.can_create(_left(end, _ANSWER_S)):
        return
    raise ConfigurationError(
        f"Topic {topic} does not exist, so no worker of group {group} would hear of it: is the group named otherwise? "
        f"Workers make the topic when they start, and so does: kser topics create --group {group} --topics A,B"
    )


@contextmanager
def _sink_of(transport: Transport, sink: Sink | None) -> Iterator[Sink]:
    if sink is not None:
        yield sink
        return
    own = transport.sink()
    try:
        yield own
    finally:
        own.close()


def _key_bytes(text: str) -> bytes:
    """As the keys of messages and events are written: any text will do."""
    return text.encode("utf-8", "surrogatepass")


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _left(end: float, most: float = float("inf")) -> float:
    """Seconds left for one call, at least a little: 0 is no limit to some calls."""
    return min(max(end - time.monotonic(), 0.1), most)
