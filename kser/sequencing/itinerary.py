"""The itinerary: what a message carries of the operation it belongs to. Pure data, no I/O.

It lies in ``metadata["kser"]`` of a message::

    {"v": 1,                      version of this format
     "run": 1,                    run of the operation: resuming makes a new one
     "position": 3,               how many tasks ended before this one
     "new": true,                 only on the first message of an operation that a service launched
     "ops": [FRAME, ...],         operations under way: the root first, then the nested ones around this task
     "tasks": [ENTRY, ...],       only on the message of an Operation: the children it was composed of by hand
     "end": {...}}                only on an end message: the task that ended, and how

    FRAME = {"uuid", "entrypoint", "params", "topic"?, "key"?, "metadata"?, "hooks"?: true, "tasks": [ENTRY, ...]}
    ENTRY = {"uuid", "entrypoint", "params", "topic"?, "key"?, "metadata"?, "tasks"?: [ENTRY, ...], "result"?: {...}}

``tasks`` of a frame are those still to run after this message; done ones leave it. A nested operation is one entry: the
worker that reaches it builds its tasks and puts a frame of its own on top. An entry has ``tasks`` only when the
operation was composed by hand, and its Result when it is SUCCESS already and is not run again. A frame has ``hooks``
when the end of the operation is for a worker that knows its class.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self

from kser.errors import ItineraryError
from kser.results import Result
from kser.schemas import Message

__all__ = ["MAX_DEPTH", "METADATA_KEY", "VERSION", "End", "Entry", "Frame", "Itinerary", "key_bytes", "message_key"]

METADATA_KEY = "kser"
VERSION = 1
#: What this release reads: its own version and the one before (there is none before the first).
READS = (1,)
#: Operations around one task. A class that builds itself as its own child would nest without end.
MAX_DEPTH = 64

#: The default of an optional object; nobody writes into it.
_NONE: dict[str, Any] = {}


class Entry(NamedTuple):
    """One task still to run, read from its form on the wire. Task.to_entry() writes that form."""

    uuid: str
    entrypoint: str
    params: dict[str, Any]
    #: Topic of its message; None: that of its operation.
    topic: str | None = None
    #: Key of its message; None: that of its operation.
    key: str | None = None
    metadata: dict[str, Any] = _NONE
    #: Children of an operation composed by hand, as they travel; None: whoever reaches it builds them.
    tasks: Sequence[Mapping[str, Any]] | None = None
    #: What it gave, when it is SUCCESS already.
    result: Mapping[str, Any] | None = None

    @classmethod
    def load(cls, data: Any) -> Self:
        """The entry in ``data``. Raises ItineraryError."""
        return cls._make((*_fields(data, None), _get(data, "result", dict, None)))


class Frame(NamedTuple):
    """One operation under way. ``tasks`` are entries as they travel: only the first is ever looked into."""

    uuid: str
    entrypoint: str
    params: dict[str, Any]
    topic: str | None = None
    key: str | None = None
    metadata: dict[str, Any] = _NONE
    tasks: Sequence[Mapping[str, Any]] = ()
    #: Whether its class has a say in its end: hooks, next(), set_status().
    hooks: bool = False

    def dump(self) -> dict[str, Any]:
        """The frame as it travels."""
        data: dict[str, Any] = {"uuid": self.uuid, "entrypoint": self.entrypoint, "params": self.params}
        if self.topic:
            data["topic"] = self.topic
        if self.key:
            data["key"] = self.key
        if self.metadata:
            data["metadata"] = self.metadata
        if self.hooks:
            data["hooks"] = True
        data["tasks"] = self.tasks
        return data

    @classmethod
    def load(cls, data: Any) -> Self:
        """The frame in ``data``. Raises ItineraryError."""
        return cls._make((*_fields(data, []), _get(data, "hooks", bool, False)))


class End(NamedTuple):
    """That an operation ended, told to a worker that knows its class."""

    #: The task that ended last, as an entry on the wire.
    task: Mapping[str, Any]
    #: Its status: SUCCESS or FAILED.
    status: str


class Itinerary(NamedTuple):
    """The operations around a message and what is still to run of them. Immutable: every step gives a new one."""

    frames: tuple[Frame, ...] = ()
    position: int = 0
    run: int = 1
    #: True on the first message of an operation that a service launched: whoever runs it tells that it started.
    new: bool = False
    #: Children that came with the message of an Operation: entries as they travel.
    children: Sequence[Mapping[str, Any]] | None = None
    #: Key of the message's own task, when it has one: an Operation hands it on to its tasks.
    key: str | None = None
    end: End | None = None

    @property
    def root(self) -> Frame:
        """The outermost operation."""
        return self.frames[0]

    @property
    def innermost(self) -> Frame:
        """The operation that the message's task is a task of."""
        return self.frames[-1]

    # -- steps -------------------------------------------------------------------------------------------------------

    def enter(self, frame: Frame) -> Self:
        """Within one more operation. Raises ItineraryError beyond MAX_DEPTH."""
        if len(self.frames) >= MAX_DEPTH:
            raise ItineraryError(
                f"Operation {frame.entrypoint}[{frame.uuid}] is nested in {len(self.frames)} others, the limit is "
                f"{MAX_DEPTH}: does an operation build itself as its own task?",
                extra={"uuid": frame.uuid, "entrypoint": frame.entrypoint},
            )
        return self._replace(frames=(*self.frames, frame), children=None, key=None, end=None)

    def leave(self) -> Self:
        """Without the innermost operation."""
        return self._replace(frames=self.frames[:-1], end=None)

    def step(self) -> "tuple[Entry, Itinerary] | None":
        """The next task of the innermost operation and the itinerary of its message; None when all are done."""
        frame = self.innermost
        if not frame.tasks:
            return None
        entry = Entry.load(frame.tasks[0])
        rest = frame._replace(tasks=frame.tasks[1:])
        return entry, self._replace(frames=(*self.frames[:-1], rest), children=entry.tasks, key=entry.key, end=None)

    def passed(self) -> Self:
        """One task further."""
        return self._replace(position=self.position + 1, new=False)

    # -- where a message goes ----------------------------------------------------------------------------------------

    def topic_of(self, entry: Entry) -> str | None:
        """Topic of the entry's message; None: the one that the message being handled came from."""
        return entry.topic or next((f.topic for f in reversed(self.frames) if f.topic), None)

    def key_of(self, entry: Entry | None = None) -> str | None:
        """Key of the entry's message: its own, else that of the operations around it, else the root's uuid."""
        candidates = [entry.key if entry is not None else self.key, *(f.key for f in reversed(self.frames))]
        return next((key for key in candidates if key), self.frames[0].uuid if self.frames else None)

    def message(self, entry: Entry, result: Result) -> Message:
        """The message of ``entry``, with this itinerary (the one that step() gave with the entry)."""
        return Message(
            entry.uuid,
            entry.entrypoint,
            entry.params,
            result,
            {**entry.metadata, METADATA_KEY: self.dump()},
        )

    # -- on the wire -------------------------------------------------------------------------------------------------

    def dump(self) -> dict[str, Any]:
        """The itinerary as it travels."""
        data: dict[str, Any] = {
            "v": VERSION,
            "run": self.run,
            "position": self.position,
            "ops": [frame.dump() for frame in self.frames],
        }
        if self.new:
            data["new"] = True
        if self.key:
            data["key"] = self.key
        if self.children is not None:
            data["tasks"] = self.children
        if self.end is not None:
            data["end"] = {"task": self.end.task, "status": self.end.status}
        return data

    @classmethod
    def of(cls, kmsg: Message) -> "Itinerary | None":
        """The itinerary in the message; None when it belongs to no operation.

        Raises ItineraryError when there is one that cannot be read, or of a version this release does not know.
        """
        data = kmsg.metadata.get(METADATA_KEY)
        if data is None:
            return None
        try:
            return cls.load(data)
        except ItineraryError as exc:
            exc.extra = {"uuid": kmsg.uuid, "entrypoint": kmsg.entrypoint, **exc.extra}
            raise

    @classmethod
    def load(cls, data: Any) -> Self:
        """The itinerary in ``data``. Raises ItineraryError."""
        version = _get(data, "v", int)
        if version not in READS:
            raise ItineraryError(
                f"Itinerary of version {version}: this release of kser reads {', '.join(map(str, READS))}; "
                "update the worker",
                extra={"version": version, "reads": list(READS)},
            )
        end = _get(data, "end", dict, None)
        if end is not None and not data.get("ops"):
            raise ItineraryError("Itinerary cannot be read: an end without an operation", extra={"field": "end"})
        return cls(
            frames=tuple(Frame.load(frame) for frame in _get(data, "ops", list, [])),
            position=_get(data, "position", int, 0),
            run=_get(data, "run", int, 1),
            new=_get(data, "new", bool, False),
            key=_get(data, "key", str, None),
            children=_get(data, "tasks", list, None),
            end=None if end is None else End(_get(end, "task", dict), _get(end, "status", str)),
        )


def message_key(kmsg: Message) -> str:
    """Key of a message that is sent without one: its operation's, else its own uuid. Never raises."""
    data = kmsg.metadata.get(METADATA_KEY)
    if data is None:
        return kmsg.uuid
    try:
        key = data.get("key") or next((f["key"] for f in reversed(data["ops"]) if f.get("key")), None)
        return str(key or (data["ops"][0]["uuid"] if data["ops"] else kmsg.uuid))
    except (AttributeError, IndexError, KeyError, TypeError):
        return kmsg.uuid  # an itinerary that cannot be read: whoever consumes the message says so


def key_bytes(key: str) -> bytes:
    """A key as Kafka takes it. Any text will do: JSON may bring lone surrogates, which UTF-8 has no form for."""
    return key.encode("utf-8", "surrogatepass")


_REQUIRED: Any = object()


def _fields(data: Any, tasks: list[Any] | None) -> tuple[Any, ...]:
    """The fields of an Entry or a Frame in their order, ``tasks`` where there are none. Raises ItineraryError."""
    return (
        _get(data, "uuid", str),
        _get(data, "entrypoint", str),
        _get(data, "params", dict, {}),
        _get(data, "topic", str, None),
        _get(data, "key", str, None),
        _get(data, "metadata", dict, {}),
        _get(data, "tasks", list, tasks),
    )


def _get(data: Any, name: str, kind: type, default: Any = _REQUIRED) -> Any:
    if type(data) is dict:
        value = data.get(name)
        if type(value) is kind:  # as it nearly always is; what follows is for what is not
            return value
    elif not isinstance(data, Mapping):
        raise ItineraryError(
            f"Itinerary cannot be read: expected an object, found {type(data).__name__}", extra={"field": name}
        )
    value = data.get(name)
    if value is None:
        if default is _REQUIRED:
            raise ItineraryError(f"Itinerary cannot be read: {name!r} is missing", extra={"field": name})
        return default
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ItineraryError(
            f"Itinerary cannot be read: {name!r} is a {type(value).__name__}, expected {kind.__name__}",
            extra={"field": name},
        )
    return value
