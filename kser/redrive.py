"""What is sent when a dead letter is replayed, or an operation resumed. Pure, no I/O.

All that replay or resume one letter send to the partition that its message came from, with one claim: there the first
one wins.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple

from kser import headers as names
from kser.errors import Error, ValidationError
from kser.events import Event, EventType
from kser.headers import Headers
from kser.letters import DeadLetter, ReadLetter, decode, is_called, message_in
from kser.schemas import Message, parse
from kser.sequencing.itinerary import METADATA_KEY, End, Itinerary
from kser.status import Status
from kser.transport import OutRecord, Record
from kser.transport.partitioner import partition_of
from kser.worker.dead_letters import OWN_HEADERS
from kser.worker.tiers import tier_of

__all__ = ["Redrive", "RefusedError", "Replay", "Step", "remaining"]

#: Of kser's own headers a message keeps only these when it goes back.
_KEPT: Final = frozenset({names.FIRST_FAILURE})


class RefusedError(Error):
    """Why a letter is not sent back."""

    CODE = 409


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """What became of one letter that was to be sent back."""

    letter: DeadLetter
    #: "sent", "ready" (a dry run: it would be sent), "refused" or "failed" (the broker did not confirm it).
    status: Literal["sent", "ready", "refused", "failed"]
    #: Why it was refused, or failed.
    reason: str = ""
    #: The record that was, or would be, sent.
    record: OutRecord | None = None
    #: Run of the operation that it begins; None for a message of no operation.
    run: int | None = None
    #: What is run first: the failed task, unless another step was chosen.
    entrypoint: str = ""
    #: How many tasks of the operation count as ended before it.
    position: int = 0

    def event(self, by: str) -> Event | None:
        """What the events say of it; None when nothing is known of its message. ``by``: who sent it."""
        letter = self.letter
        if not letter.uuid:
            return None
        return Event(
            type=EventType.RUN_SENT,
            uuid=letter.uuid,
            entrypoint=self.entrypoint,
            operation=letter.operation,
            run=letter.run + 1,
            position=self.position,
            status=Status.PENDING,
            note=f"sent again from dead letter {letter.id}, by {by}",
        )


class Step(NamedTuple):
    """A step still to come of an operation that failed."""

    position: int
    entrypoint: str
    #: Which frame has it, and which of its tasks it is.
    depth: int
    at: int

    def is_(self, wanted: str | int) -> bool:
        """Whether this is the step of that name or position."""
        return self.position == wanted if isinstance(wanted, int) else is_called(self.entrypoint, wanted)


def remaining(itinerary: Itinerary, position: int) -> list[Step]:
    """The steps after the one at ``position``. A nested operation among them counts as one: it is not built yet."""
    steps: list[Step] = []
    for depth in range(len(itinerary.frames) - 1, -1, -1):
        for at, entry in enumerate(itinerary.frames[depth].tasks):
            name = str(entry.get("entrypoint", "")) if isinstance(entry, Mapping) else ""
            steps.append(Step(position + 1 + len(steps), name, depth, at))
    return steps


class Redrive:
    """Makes what is sent.

    Args:
        group: of the workers.
        message: class of the messages.
        max_redrives: what came back so often is refused unless it is forced.
        partitions: how many each origin topic has that exists.
    """

    def __init__(self, group: str, message: type[Message], max_redrives: int, partitions: Mapping[str, int]) -> None:
        self.group = group
        self.message = message
        self.max_redrives = max_redrives
        self.partitions = partitions

    def again(
        self,
        letter: DeadLetter,
        *,
        force: bool,
        params: Mapping[str, Any] | None = None,
        found: ReadLetter | None = None,
    ) -> Replay:
        """The letter's own message as it goes back. Raises RefusedError, ValidationError for parameters that cannot be.

        ``found``: the letter with its message, when it was read already.
        """
        self.check(letter, force=force)
        _, kmsg, itinerary = found or decode(letter, self.message)
        value, run = letter.value, None
        if kmsg is None or letter.unreadable:
            if params:
                raise RefusedError(f"parameters cannot be put into what cannot be read: {letter.unreadable}")
        else:
            value = self._changed(kmsg, letter.value, itinerary, letter.run + 1, params)
            run = letter.run + 1 if itinerary is not None else None
        record = self._record(letter, letter.key, value, letter.headers)
        return _ready(letter, record, run, letter.entrypoint, letter.position)

    def check(self, letter: DeadLetter, *, force: bool) -> None:
        """Raise RefusedError when the letter cannot go back, or without ``force`` should not."""
        origin = letter.origin_topic
        if letter.replayed:
            raise RefusedError("it was replayed already: workers drop it when it comes again")
        if letter.left_out == "value":
            place = f"{origin}[{letter.origin_partition}] at {letter.origin_offset}"
            raise RefusedError(f"its value was too large to be kept: it is in {place}, as long as that is kept")
        if not origin or tier_of(self.group, origin) is not None:
            raise RefusedError("it got lost on its way through the delays, and nothing tells which topic it was for")
        if origin not in self.partitions:
            raise RefusedError(f"its topic {origin} does not exist any more")
        if force:
            return
        if letter.aborted:
            raise RefusedError("somebody aborted it: forced, or by kser operations resume, it runs from there")
        if letter.unreadable:
            raise RefusedError(f"it cannot be read ({letter.unreadable}): forced, it is sent as it is")
        if letter.left_out:
            raise RefusedError("its own headers were too large to be kept: forced, it is sent without")
        if letter.redrive >= self.max_redrives:
            raise RefusedError(
                f"it came back {letter.redrive} times and failed each time: forced, it is sent once more"
            )

    # -- from another step ---------------------------------------------------------------------------------------------

    def skip_to(self, found: ReadLetter, target: Step, params: Mapping[str, Any] | None) -> Replay:
        """An end message, as if the step before ``target`` had just ended well, with what the failed one was given.

        The worker that gets it sends the step on to its own topic.
        """
        letter, kmsg, itinerary = found
        assert kmsg is not None
        assert itinerary is not None
        frame = itinerary.frames[target.depth]
        tasks = list(frame.tasks[target.at :])
        if params:
            tasks[0] = {**tasks[0], "params": {**(tasks[0].get("params") or {}), **params}}
        frame = frame._replace(tasks=tasks)
        failed = {"uuid": kmsg.uuid, "entrypoint": kmsg.entrypoint, "params": kmsg.params}
        travels = itinerary._replace(
            frames=(*itinerary.frames[: target.depth], frame),
            position=target.position,
            run=letter.run + 1,
            new=True,
            key=None,
            children=None,
            end=End(failed, Status.SUCCESS),
        )
        metadata = {**frame.metadata, METADATA_KEY: travels.dump()}
        ended = self.message(frame.uuid, frame.entrypoint, None, kmsg.result, metadata)
        record = self._record(letter, letter.key, ended.to_bytes(), letter.headers)
        return _ready(letter, record, letter.run + 1, target.entrypoint, target.position)

    def earlier(self, letter: DeadLetter, records: Iterable[Record], wanted: str | int) -> dict[int, Record]:
        """Position -> message of the steps of this name or position that the letter's operation ran before.

        Those among ``records``; of a position the one of the last run that had it.
        """
        found: dict[int, tuple[int, int, Record]] = {}
        for record in records:
            kmsg, travels, _ = message_in(record.value, self.message)
            if kmsg is None or travels is None or not travels.frames or travels.end is not None:
                continue
            at = travels.position
            named = at == wanted if isinstance(wanted, int) else is_called(kmsg.entrypoint, wanted)
            if named and at < letter.position and travels.root.uuid == letter.operation:
                found[at] = max(
                    found.get(at, (0, -1, record)), (travels.run, record.offset, record), key=lambda it: it[:2]
                )
        return {at: record for at, (_, _, record) in sorted(found.items())}

    def back_to(self, letter: DeadLetter, earlier: Record, params: Mapping[str, Any] | None) -> Replay:
        """The message of an earlier step, one that earlier() gave."""
        kmsg, travels, _ = message_in(earlier.value, self.message)
        assert kmsg is not None
        assert travels is not None
        value = self._changed(kmsg, earlier.value, travels, letter.run + 1, params)
        record = self._record(letter, earlier.key, value, earlier.headers)
        return _ready(letter, record, letter.run + 1, kmsg.entrypoint, travels.position)

    # -- inside --------------------------------------------------------------------------------------------------------

    def _record(
        self, letter: DeadLetter, key: bytes | None, value: bytes | None, headers: Iterable[tuple[str, bytes | None]]
    ) -> OutRecord:
        """A record that takes the letter's place: in the partition that it came from, where its claim is judged."""
        count = self.partitions[letter.origin_topic]
        number = letter.origin_partition
        if not 0 <= number < count:
            # One without a key has to come into the same partition, too, whoever sends it.
            number = partition_of(key if key is not None else letter.subject.encode("utf-8", "replace"), count)
        ours: Headers = (
            (names.GROUP, self.group.encode()),
            (names.REDRIVE, b"%d" % (letter.redrive + 1)),
            (names.CLAIM, letter.claim.encode("utf-8", "backslashreplace")),
        )
        kept = [header for header in headers if header[0] in _KEPT or header[0] not in OWN_HEADERS]
        return OutRecord(letter.origin_topic, key, value, (*kept, *ours), number)

    def _changed(
        self,
        kmsg: Message,
        value: bytes | None,
        itinerary: Itinerary | None,
        run: int,
        params: Mapping[str, Any] | None,
    ) -> bytes | None:
        """The bytes of a message that begins this run, with these parameters; as they were when nothing changes."""
        if itinerary is None and not params:
            return value
        # "new": whoever runs it tells that the operation started, as it does in this run.
        marks = {"run": run} | ({"new": True} if itinerary is not None and itinerary.frames else {})
        travels = itinerary.dump() | marks if itinerary is not None else None
        if self.message is not Message:
            kmsg.params = {**kmsg.params, **(params or {})}
            if travels is not None:
                kmsg.metadata = {**kmsg.metadata, METADATA_KEY: travels}
            return kmsg.to_bytes()
        # Not by way of Message, which would drop what a newer release has put beside its fields.
        data = parse(value or b"")
        if params:
            data["params"] = {**(data.get("params") or {}), **params}
        if travels is not None:
            metadata = data.get("metadata") or {}
            there = metadata.get(METADATA_KEY)
            data["metadata"] = {**metadata, METADATA_KEY: there | marks if isinstance(there, dict) else travels}
        return _dumped(data, kmsg)


def _ready(letter: DeadLetter, record: OutRecord, run: int | None, entrypoint: str, position: int) -> Replay:
    return Replay(letter=letter, status="ready", record=record, run=run, entrypoint=entrypoint, position=position)


def _dumped(data: Any, kmsg: Message) -> bytes:
    """``data``, which parse() gave, as JSON: whatever was read can be written, numbers of any size and NaN too."""
    try:
        try:
            return json.dumps(data, separators=(",", ":"), ensure_ascii=False).encode()
        except UnicodeEncodeError:  # a lone surrogate has a form in JSON, and none in UTF-8
            return json.dumps(data, separators=(",", ":")).encode()
    except (TypeError, ValueError, RecursionError) as exc:
        raise ValidationError(
            f"Message {kmsg.entrypoint}[{kmsg.uuid}] cannot be written as JSON with these parameters: {exc}",
            extra={"uuid": kmsg.uuid, "entrypoint": kmsg.entrypoint},
        ) from None
