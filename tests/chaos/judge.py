"""The verdict on a run, from what is in the topics and nothing else.

What the judge demands of operations of tests/chaos/app.py, read under read_committed:

1. Nothing lost: each operation that was launched has all of its messages, all of its step.done events, what its tasks
   sent by themselves, and an operation.ended; every one of these is a *role*, and each role is filled.
2. Nothing doubled: each role is filled once. A hand-off that came twice under two uuids fills its role twice.
3. Nothing else: no message and no event that is nobody's, no failed step, no rejected message; all ended SUCCESS.
4. Order. Records of one key in one partition form a lane. For two records of a lane, a before b:
   a was run to its end before b was begun (by the times in their step.done events); and what followed from a (its
   hand-off and what it sent, which go into the same lane here) stands before all that followed from b.
5. Nothing is committed before it is settled: of each moment at which somebody looked at what the group had committed,
   what followed from the records that were finished by that was written by then. And what was finished once stays so.
6. Committed offsets cover every record: no record at or above the committed offset but those that the metadata calls
   finished, and none that it calls unfinished.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from kser.worker import offsets

__all__ = ["EVENT", "MESSAGE", "Committed", "Facts", "Observed", "Verdict", "judge"]

#: Where the steps of Outer are, as (position, depth): four tasks and an operation with one task in it.
STEPS = ((0, 1), (1, 1), (2, 1), (3, 1), (3, 2), (4, 1))
SENDS, INNER, INSIDE = (2, 1), (3, 1), (3, 2)
#: The two topics.
MESSAGE, EVENT = "message", "event"
#: How many of a kind of fault are shown.
SHOWN = 8


class Readable(Protocol):
    """What is needed of a record."""

    partition: int
    offset: int
    key: bytes | None
    value: bytes | None


class Message(NamedTuple):
    """A record of the task topic."""

    partition: int
    offset: int
    key: bytes | None
    uuid: str
    #: uuid of the root operation; None for a lone message.
    operation: str | None
    #: (position, depth), see STEPS.
    step: tuple[int, int]
    #: For a lone message: uuid of the task that sent it.
    of: str | None
    #: For the first message of an operation: the uuids of all its tasks.
    plan: tuple[str, ...]

    @property
    def place(self) -> str:
        """For people."""
        return f"{self.partition}/{self.offset}"


class Told(NamedTuple):
    """A record of the events topic."""

    partition: int
    offset: int
    type: str
    uuid: str
    operation: str | None
    position: int
    status: str
    #: When the task of this event was run, where it says so.
    began: float
    ended: float
    worker: str


class Committed(NamedTuple):
    """What a group has committed of a partition of the task topic; offset -1 when nothing."""

    partition: int
    offset: int
    metadata: str = ""


class Observed(NamedTuple):
    """What a group had committed at one moment, and where the topics ended after that."""

    positions: Sequence[Committed]
    #: (MESSAGE or EVENT, partition) -> the offset that the next record gets, open transactions counted.
    ends: Mapping[tuple[str, int], int]


@dataclass(slots=True)
class Facts:
    """What was read from the topics, as little as the verdict needs. Feed it each record once."""

    messages: list[Message] = field(default_factory=list)
    events: list[Told] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    #: Root operations that ended, for whoever waits.
    ended: set[str] = field(default_factory=set)

    def message(self, record: Readable) -> None:
        """Take in a record of the task topic."""
        try:
            data = json.loads(record.value or b"")
            route = data["metadata"].get("kser")
            frames = route["ops"] if route else []
            plan: tuple[str, ...] = ()
            if route and route.get("new"):
                plan = (data["uuid"], *(entry["uuid"] for entry in frames[0]["tasks"]))
            self.messages.append(
                Message(
                    record.partition,
                    record.offset,
                    record.key,
                    data["uuid"],
                    frames[0]["uuid"] if frames else None,
                    (route["position"], len(frames)) if route else (0, 0),
                    data["params"].get("of"),
                    plan,
                )
            )
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as exc:
            self.unreadable.append(f"message {record.partition}/{record.offset}: {exc!r}")

    def event(self, record: Readable) -> None:
        """Take in a record of the events topic."""
        try:
            data = json.loads(record.value or b"")
            times: Mapping[str, Any] = (data.get("result") or {}).get("retval") or {}
            began, ended = times.get(data["uuid"]) or (0.0, 0.0)
            told = Told(
                record.partition,
                record.offset,
                data["type"],
                data["uuid"],
                data["operation"],
                data["position"],
                data["status"],
                began,
                ended,
                data["worker"],
            )
        except (ValueError, KeyError, TypeError, AttributeError) as exc:
            self.unreadable.append(f"event {record.partition}/{record.offset}: {exc!r}")
            return
        self.events.append(told)
        if told.type == "operation.ended" and told.uuid == told.operation:
            self.ended.add(told.uuid)


@dataclass(slots=True)
class Verdict:
    """What is wrong, in words; all lists empty: nothing is."""

    operations: int = 0
    lost: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)
    strays: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    disordered: list[str] = field(default_factory=list)
    unfinished: list[str] = field(default_factory=list)
    #: Committed before it was settled, and finished once but not later.
    early: list[str] = field(default_factory=list)
    set_back: list[str] = field(default_factory=list)
    #: What the harness saw of processes: a worker that ended by itself, or ignored SIGTERM.
    processes: list[str] = field(default_factory=list)

    def faults(self, delivery: str) -> dict[str, list[str]]:
        """The kinds of fault that count for this delivery, with what was found. {} is what is wanted.

        At least once may repeat: what is doubled or to be run again, and the order of what was repeated, is no fault
        there.
        """
        kinds = ["lost", "strays", "failed", "unfinished", "early", "processes"]
        if delivery == "exactly_once":
            kinds += ["doubled", "disordered", "set_back"]
        return {kind: found for kind in kinds if (found := getattr(self, kind))}

    def told(self, delivery: str) -> str:
        """For people: the counts, and the first of each kind of fault."""
        head = (
            f"{self.operations} operations: {len(self.lost)} lost, {len(self.doubled)} doubled, "
            f"{len(self.disordered)} out of order, {len(self.strays)} strays, {len(self.failed)} failed, "
            f"{len(self.unfinished)} unfinished, {len(self.early)} committed before they were settled, "
            f"{len(self.set_back)} set back, {len(self.processes)} faults of processes"
        )
        lines = [head]
        for kind, found in self.faults(delivery).items():
            lines += [f"  {kind}: {text}" for text in found[:SHOWN]]
            if len(found) > SHOWN:
                lines.append(f"  {kind}: ... and {len(found) - SHOWN} more")
        return "\n".join(lines)


#: Something that must be in the topics once: what, of which operation or task.
Role = tuple[str, ...]


def judge(
    facts: Facts,
    launched: Sequence[str],
    committed: Iterable[Committed] | None = None,
    observed: Iterable[Observed] = (),
) -> Verdict:
    """The verdict on these operations.

    Args:
        facts: all of the task topic and of the events topic.
        launched: uuids of the operations whose first message the broker has confirmed.
        committed: what the group has committed at the end; None: not looked at.
        observed: what it had committed meanwhile, from first to last.
    """
    verdict = Verdict(operations=len(launched), strays=list(facts.unreadable))
    index = _Index(facts)
    _roles(index, launched, verdict)
    _order(facts, verdict)
    _failures(facts, verdict)
    if committed is not None:
        _unfinished(facts, committed, verdict)
    _early(facts, index, observed, verdict)
    return verdict


# -- 1 to 3 ----------------------------------------------------------------------------------------------------------


class _Place(NamedTuple):
    """Where a role is filled."""

    kind: str
    partition: int
    offset: int
    #: For people.
    text: str


class _Index:
    """What fills which role."""

    def __init__(self, facts: Facts) -> None:
        self.filled: dict[Role, list[_Place]] = defaultdict(list)
        #: uuids of the messages of a role.
        self.names: dict[Role, set[str]] = defaultdict(set)
        #: Operation -> the uuids of its tasks.
        self.plans: dict[str, tuple[str, ...]] = {}
        #: Lone message -> the task that sent it; task of the operation inside -> the root operation.
        self._of: dict[str, str] = {}
        self._inside: dict[str, str] = {}
        for message in facts.messages:
            self._message(message)
        for event in facts.events:
            self._event(event)

    def _message(self, message: Message) -> None:
        role: Role
        if message.operation is None:
            self._of[message.uuid] = message.of or message.uuid
            role = ("lone message", self._of[message.uuid])
        else:
            role = _message_role(message.operation, message.step)
            if message.plan:
                self.plans.setdefault(message.operation, message.plan)
            if message.step == INSIDE:
                self._inside.setdefault(message.uuid, message.operation)
        text = f"message {message.uuid} at {message.place}"
        self.filled[role].append(_Place(MESSAGE, message.partition, message.offset, text))
        self.names[role].add(message.uuid)

    def _event(self, event: Told) -> None:
        role: Role = (event.type, event.uuid)
        if event.operation is None:
            role = (event.type, "of", self._of.get(event.uuid, event.uuid))
        elif event.uuid in self._inside:
            role = (event.type, "in", self._inside[event.uuid])
        text = f"event {event.type} at {event.partition}/{event.offset} by {event.worker}"
        self.filled[role].append(_Place(EVENT, event.partition, event.offset, text))


def _message_role(operation: str, step: tuple[int, int]) -> Role:
    return ("message", operation, *map(str, step))


def _roles(index: _Index, launched: Sequence[str], verdict: Verdict) -> None:
    due: set[Role] = set()
    for operation in launched:
        plan = index.plans.get(operation)
        if plan is None:
            verdict.lost.append(f"operation {operation}: its first message is not in the topic")
            continue
        due.update(_due(operation, plan))
        for step, uuid in zip([step for step in STEPS if step != INSIDE], plan, strict=True):
            found = index.names.get(_message_role(operation, step), set())
            verdict.strays += [f"operation {operation} step {step}: message {other}" for other in found - {uuid}]
    verdict.lost += [" ".join(role) for role in sorted(due - index.filled.keys())]
    for role, places in index.filled.items():
        if role not in due:
            verdict.strays += [f"{' '.join(role)}: {place.text}" for place in places]
        elif len(places) > 1:
            verdict.doubled.append(
                f"{' '.join(role)}: {len(places)} times: {'; '.join(place.text for place in places)}"
            )


def _due(operation: str, plan: tuple[str, ...]) -> Iterable[Role]:
    for step in STEPS:
        yield _message_role(operation, step)
    first, later, sends, inner, last = plan
    yield "lone message", sends
    yield "step.done", "of", sends
    yield "step.done", "in", operation
    for uuid in (first, later, sends, last):
        yield "step.done", uuid
    for uuid in (operation, inner):
        yield "operation.started", uuid
        yield "operation.ended", uuid


def _failures(facts: Facts, verdict: Verdict) -> None:
    for event in facts.events:
        good = event.status == ("RUNNING" if event.type == "operation.started" else "SUCCESS")
        if not good or event.type not in ("operation.started", "step.done", "operation.ended"):
            verdict.failed.append(f"{event.type} of {event.uuid} says {event.status}")


# -- 4 ---------------------------------------------------------------------------------------------------------------


def _order(facts: Facts, verdict: Verdict) -> None:
    """Of what came twice, the first counts: the repetition is told elsewhere."""
    lanes: dict[tuple[int, bytes | None], list[Message]] = defaultdict(list)
    steps: dict[tuple[str, tuple[int, int]], Message] = {}
    lone: dict[str, Message] = {}
    times: dict[str, tuple[float, float]] = {}
    seen: set[str] = set()
    for message in sorted(facts.messages, key=lambda m: (m.partition, m.offset)):
        if message.uuid in seen:
            continue
        seen.add(message.uuid)
        lanes[message.partition, message.key].append(message)
        if message.operation is not None:
            steps.setdefault((message.operation, message.step), message)
        elif message.of is not None:
            lone.setdefault(message.of, message)
    for event in facts.events:
        if event.ended:
            times.setdefault(event.uuid, (event.began, event.ended))
    for lane in lanes.values():
        _lane_run(lane, times, verdict)
        _lane_followed(lane, steps, lone, verdict)


def _lane_run(lane: list[Message], times: Mapping[str, tuple[float, float]], verdict: Verdict) -> None:
    before: Message | None = None
    for message in lane:
        if message.uuid not in times:
            continue  # an operation, which is not run; or not ended, which is told elsewhere
        if before is not None and times[message.uuid][0] < times[before.uuid][1]:
            early = times[before.uuid][1] - times[message.uuid][0]
            verdict.disordered.append(
                f"{message.place} was begun {early:.3f} s before the end of {before.place} of the same key"
            )
        before = message


def _lane_followed(
    lane: list[Message],
    steps: Mapping[tuple[str, tuple[int, int]], Message],
    lone: Mapping[str, Message],
    verdict: Verdict,
) -> None:
    before: Message | None = None
    highest = -1
    for message in lane:
        following = []
        if message.operation is not None and message.step in STEPS[:-1]:
            following.append(steps.get((message.operation, STEPS[STEPS.index(message.step) + 1])))
        following.append(lone.get(message.uuid))
        there = [
            m.offset for m in following if m is not None and (m.partition, m.key) == (message.partition, message.key)
        ]
        if there and min(there) < highest and before is not None:
            verdict.disordered.append(
                f"what followed from {message.place} stands at {min(there)}, before what followed from {before.place} "
                f"of the same key, at {highest}"
            )
        if there and max(there) > highest:
            before, highest = message, max(there)


# -- 5 ---------------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Watched:
    """A partition of the task topic, as the moments pass."""

    #: Its records, from the last to the first, of which none was below a committed end yet.
    ahead: list[Message] = field(default_factory=list)
    #: Those that were, and were unfinished.
    unfinished: dict[int, Message] = field(default_factory=dict)
    finished: set[int] = field(default_factory=set)
    highest: int = -1

    def finish(self, end: int, listed: Iterable[int]) -> list[Message]:
        """Those that are finished now and were not before."""
        while self.ahead and self.ahead[-1].offset < end:
            message = self.ahead.pop()
            self.unfinished[message.offset] = message
        unsettled = set(listed)
        news = [offset for offset in self.unfinished if offset < end and offset not in unsettled]
        self.finished.update(news)
        self.highest = max(self.highest, *news, -1)
        return [self.unfinished.pop(offset) for offset in news]

    def lost(self, end: int, listed: Iterable[int]) -> list[int]:
        """Those that are finished no more."""
        return sorted({*self.finished.intersection(listed), *([self.highest] if self.highest >= end else [])})


def _early(facts: Facts, index: _Index, observed: Iterable[Observed], verdict: Verdict) -> None:
    partitions: dict[int, _Watched] = defaultdict(_Watched)
    for message in sorted(facts.messages, key=lambda m: m.offset, reverse=True):
        partitions[message.partition].ahead.append(message)
    for moment in observed:
        for position in moment.positions:
            _, end, listed, *_ = offsets.decode(position.offset, position.metadata)
            partition = partitions[position.partition]
            verdict.set_back += [
                f"{position.partition}/{offset} was finished, is not by {position.offset} with {position.metadata!r}"
                for offset in partition.lost(end, listed)
            ]
            for message in partition.finish(end, listed):
                missing = [" ".join(role) for role in _follows(message) if not _is_there(index, role, moment)]
                if missing:
                    verdict.early.append(
                        f"{message.place} was committed before it was settled: {', '.join(missing)} did not exist when "
                        f"{position.offset} with {position.metadata!r} was committed"
                    )


def _follows(message: Message) -> list[Role]:
    """What a record is handed off with."""
    if message.operation is None:
        return [("step.done", "of", message.of or message.uuid)]
    if message.step not in STEPS:
        return []
    kind = "operation.started" if message.step == INNER else "step.done"
    roles: list[Role] = [(kind, "in", message.operation) if message.step == INSIDE else (kind, message.uuid)]
    if message.step == SENDS:
        roles.append(("lone message", message.uuid))
    if message.step == STEPS[-1]:
        return [*roles, ("operation.ended", message.operation)]
    return [*roles, _message_role(message.operation, STEPS[STEPS.index(message.step) + 1])]


def _is_there(index: _Index, role: Role, moment: Observed) -> bool:
    return any(place.offset < moment.ends[place.kind, place.partition] for place in index.filled.get(role, ()))


# -- 6 ---------------------------------------------------------------------------------------------------------------


def _unfinished(facts: Facts, committed: Iterable[Committed], verdict: Verdict) -> None:
    there: dict[int, list[int]] = defaultdict(list)
    for message in facts.messages:
        there[message.partition].append(message.offset)
    stored = {position.partition: position for position in committed}
    for partition, found in sorted(there.items()):
        position = stored.get(partition, Committed(partition, -1))
        _, end, listed, *_ = offsets.decode(position.offset, position.metadata)
        unsettled = set(listed)
        left = sorted(offset for offset in found if offset >= end or offset in unsettled) or listed
        if left:
            verdict.unfinished.append(
                f"partition {partition}: {len(left)} records are not settled, the first at {left[0]}; "
                f"committed is {position.offset} with {position.metadata!r}"
            )
