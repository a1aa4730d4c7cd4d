"""DeadLetters: what failed for good in a group, from Python: list, look at, send back, resume an operation, delete.

The dead letters of a group lie in ``{group}.dlq``; `kser.worker.dead_letters` makes them. A letter stays there until it
is purged, whatever became of it: `DeadLetter.replayed` tells whether its message has been run again.

Replaying sends the message of a letter back to the partition it came from, with a claim that all who replay or resume
the same letter share: the first one runs, the others are dropped (`kser.worker.state`).
"""

import heapq
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Final, NamedTuple

from kser.control import complete_uuid, only_one, whoami
from kser.errors import ConfigurationError, DeliveryError, Error, NotFound, StatusError, ValidationError
from kser.events import Event, EventType, events_topic, read
from kser.letters import DeadLetter, ReadLetter, is_called, matcher, place_of, read_letter
from kser.redrive import Redrive, RefusedError, Replay, remaining
from kser.schemas import Message
from kser.sequencing.itinerary import Itinerary, key_bytes
from kser.status import Status
from kser.transport import OutRecord, Partition, Position, Record, Sink, Transport
from kser.transport.partitioner import partition_of
from kser.worker.state import StateStore
from kser.worker.tiers import dead_letter_topic

logger = logging.getLogger(__name__)

__all__ = ["MAX_REDRIVES", "DeadLetter", "DeadLetters", "Found", "Purge", "Replay"]

#: A name this long may be the beginning of a uuid.
_BEGIN: Final = 8
#: Events that say nothing of how far a run has come.
_NO_PROGRESS: Final = frozenset({EventType.MESSAGE_REJECTED, EventType.MESSAGE_DEAD_LETTERED, EventType.RUN_SENT})
#: A message that came back from the dead letters so often is not sent back again unless it is forced.
MAX_REDRIVES: Final = 3
#: Longest wait for one answer about topics, in seconds.
_ANSWER_S: Final = 10.0

# The class below has a method called list.
_Letters = list[DeadLetter]
_Replays = list[Replay]
_Events = list[Event]


class Found(NamedTuple):
    """What a search gave."""

    #: The newest first, no more than asked for.
    letters: list[DeadLetter]
    #: How many match.
    total: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Purge:
    """What became of letters that were to be deleted; oldest first."""

    #: Those that are gone, or would be.
    deleted: list[DeadLetter]
    #: Those chosen that stay: an older one in the same partition was not chosen.
    kept: list[DeadLetter]
    #: How many of ``deleted`` were not chosen and went along.
    others: int = 0


class DeadLetters:
    """The dead letters of a group. May be shared by threads.

    Every method reads the topic when it is called. It raises NotFound when the group has no such topic, and
    TransportError when the broker does not answer in time.

    Args:
        transport: the broker.
        group: the consumer group of the workers.
        message: class of the messages, when the controller of the workers has a TRANSPORT of its own.
        timeout_s: longest time to read a topic to its end, and to have records confirmed; each.
        max_redrives: what came back so often already is refused unless it is forced.
    """

    def __init__(
        self,
        transport: Transport,
        group: str,
        *,
        message: type[Message] = Message,
        timeout_s: float = 60,
        max_redrives: int = MAX_REDRIVES,
    ) -> None:
        if timeout_s <= 0 or max_redrives < 0:
            raise ConfigurationError(
                f"timeout_s={timeout_s}, max_redrives={max_redrives}: give more than 0 s, and 0 or more"
            )
        self._transport = transport
        self._message = message
        self._timeout_s = timeout_s
        self.group = group
        self.max_redrives = max_redrives
        #: The topic they lie in.
        self.topic = dead_letter_topic(group)

    # -- looking -------------------------------------------------------------------------------------------------------

    def list(
        self,
        *,
        task: str | None = None,
        error: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        operation: str | None = None,
        replayed: bool | None = None,
        limit: int | None = None,
    ) -> _Letters:
        """The letters that match all that is given, the newest first. See search()."""
        return self.search(
            task=task, error=error, since=since, until=until, operation=operation, replayed=replayed, limit=limit
        ).letters

    def search(
        self,
        *,
        task: str | None = None,
        error: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        operation: str | None = None,
        replayed: bool | None = None,
        limit: int | None = None,
    ) -> Found:
        """The letters that match all that is given, the newest first, and how many there are.

        Args:
            task: name of the task, or of its class alone, or a pattern (``shop.*``).
            error: a part of ``type: text`` of the error, in any case.
            since: failed then or later. One without a time zone is of this machine's.
            until: failed before that.
            operation: uuid of an operation, or of a message of none; or, when there is no such, its beginning.
            replayed: whether its message was run again.
            limit: keep no more than so many, the newest.

        All that match are held in memory, with their values; with ``limit``, and no ``replayed``, only so many.
        """
        if limit is not None and limit < 1:
            raise ValidationError(f"limit={limit}: give 1 or more, or None")
        selection = _Selection(operation, None if replayed is not None else limit)
        matches = matcher(task, error, _ms(since), _ms(until))
        newest = _Newest()
        for letter, _, _ in self._all():
            newest.see(letter)
            if matches(letter):
                selection.offer(letter)
        letters, total = self._with_fate(selection.letters, newest), selection.total
        if replayed is not None:
            letters = [letter for letter in letters if letter.replayed == replayed]
            total = len(letters)
        return Found(letters[:limit], total)

    def show(self, name: str) -> DeadLetter:
        """The letter with this id, ``partition:offset``; or the last one of an operation, or of a message of none.

        Args:
            name: the id; or the uuid, or its beginning of at least 8 characters.

        Raises as several() does, and ValidationError when several uuids begin so.
        """
        if ":" in name or len(name) < _BEGIN:
            return self.several([name])[0]
        uuid = only_one(name, (subject for letter in self.list(operation=name) if (subject := letter.subject)))
        letters = self.list(operation=uuid)
        if not letters:
            raise NotFound(f"There is no dead letter of {name} in {self.topic}: give an id, or a uuid", extra={})
        return max(letters, key=lambda letter: letter.generation)

    def several(self, ids: Iterable[str]) -> _Letters:
        """The letters of these ids, in that order, each once.

        Raises NotFound when one of them is not there, ValidationError when one is no id.
        """
        wanted = {place_of(name): name for name in ids}
        found: dict[tuple[int, int], DeadLetter] = {}
        newest = _Newest()
        for letter, _, _ in self._all():
            newest.see(letter)
            if (letter.partition, letter.offset) in wanted:
                found[letter.partition, letter.offset] = letter
        missing = [name for place, name in wanted.items() if place not in found]
        if missing:
            raise NotFound(
                f"There is no dead letter {', '.join(missing)} in {self.topic}: it was purged, or never there",
                extra={"ids": missing},
            )
        return self._with_fate([found[place] for place in wanted], newest)

    # -- sending back --------------------------------------------------------------------------------------------------

    def replay(
        self,
        letters: Iterable[DeadLetter],
        *,
        dry_run: bool = False,
        force: bool = False,
        params: Mapping[str, Any] | None = None,
    ) -> _Replays:
        """Send the messages of these letters back to where they came from, those that failed first ahead.

        Key, bytes and partition are as they were, and so are the message's own headers. The task of an operation
        begins a new run of it, and the operation goes on after it. What was replayed already is refused, as is what
        came back ``max_redrives`` times, what was aborted, what is not whole, and what cannot be read.

        Args:
            letters: as list() or show() gave them.
            dry_run: say what would be done, and do nothing.
            force: send also what came back too often, was aborted, lacks its headers, or cannot be read; the latter
                byte for byte.
            params: these take the place of the message's parameters of the same names.

        Gives one Replay for each letter, in the order in which they are sent. What the broker does not confirm is one
        that "failed".
        """
        ordered = sorted(letters, key=lambda letter: letter.age)
        redrive = self._redrive(letter.origin_topic for letter in ordered)
        outcomes: list[Replay] = []
        first: dict[str, str] = {}
        for letter in ordered:
            if letter.claim in first:
                outcomes.append(_refused(letter, f"it is the same message as {first[letter.claim]}"))
                continue
            try:
                outcomes.append(redrive.again(letter, force=force, params=params))
                first[letter.claim] = letter.id
            except (RefusedError, ValidationError) as exc:
                outcomes.append(_refused(letter, str(exc.message)))
        return outcomes if dry_run else self._deliver(outcomes)

    def resume(
        self,
        uuid: str,
        *,
        params: Mapping[str, Any] | None = None,
        step: str | int | None = None,
        dry_run: bool = False,
    ) -> Replay:
        """Begin a new run of an operation at the step that failed it, or at which it was aborted, with its results.

        Args:
            uuid: of the root operation, or of a task of no operation.
            params: these take the place of that step's parameters of the same names.
            step: begin at another step: its name, that of its class alone, or its position (0 is the first). What lies
                between the failed one and a later one is left out. An earlier one is run with the message that it had,
                which is looked for in the partition that the failed one came from.
            dry_run: say what would be done, and do nothing.

        Resumed several times at once, by whomever, it is run once.

        Raises:
            NotFound: nothing is known of it, or its dead letter is gone.
            StatusError: it has not ended, or not in failure, or its letter cannot be replayed.
            ValidationError: there is no such step, or more than one.
            DeliveryError: the broker did not confirm the message.
        """
        run = self._failed_run(uuid)
        found = self._newest_of(uuid, run)
        letter = found.letter
        redrive = self._redrive([letter.origin_topic])
        try:
            if step is None:
                outcome = redrive.again(letter, force=True, params=params, found=found)
            else:
                outcome = self._from_step(redrive, found, step, params)
        except RefusedError as exc:
            raise StatusError(
                f"{letter.name} cannot be resumed from dead letter {letter.id}: {exc.message}",
                extra={"uuid": uuid, "letter": letter.id},
            ) from None
        if not dry_run:
            (outcome,) = self._deliver([outcome])
            if outcome.status == "failed":
                raise DeliveryError(f"The message that resumes {uuid} was not confirmed: {outcome.reason}")
        return outcome

    def complete(self, begin: str) -> str:
        """The uuid that begins so, of what the events or the dead letters tell of; ``begin`` when there is none.

        Raises ValidationError when several begin so.
        """
        found = complete_uuid(self._transport, self.group, begin, self._timeout_s)
        if found != begin or len(begin) < _BEGIN:
            return found
        try:
            return only_one(begin, (letter.subject for letter in self.list(operation=begin)))
        except NotFound:  # no dead letters at all
            return begin

    # -- deleting ------------------------------------------------------------------------------------------------------

    def purge(self, letters: Iterable[DeadLetter | str], *, force: bool = False, dry_run: bool = False) -> Purge:
        """Delete letters, or those of these ids, for good.

        Kafka deletes the oldest records of a partition, up to one of them. So a letter stays when an older one in its
        partition is not to be deleted.

        Args:
            letters: what to delete; what is not there is passed over.
            force: delete all up to the youngest that is given in each partition, the others between them, too.
            dry_run: say what would be done, and do nothing.

        Raises TransportError when the broker refuses, as the embedded one does, which cannot delete records.
        """
        wanted = {(it.partition, it.offset) if isinstance(it, DeadLetter) else place_of(it) for it in letters}
        last = dict(sorted(wanted))  # the largest offset of each partition
        deleted: list[DeadLetter] = []
        kept: list[DeadLetter] = []
        stopped: set[int] = set()
        others = 0
        for letter, _, _ in self._all():
            chosen = (letter.partition, letter.offset) in wanted
            if not chosen and not force:
                stopped.add(letter.partition)
            if letter.partition in stopped:
                kept += [letter] if chosen else []
            elif letter.offset <= last.get(letter.partition, -1):
                deleted.append(letter)
                others += not chosen
        ends: dict[int, int] = {}
        for letter in deleted:
            ends[letter.partition] = max(ends.get(letter.partition, 0), letter.offset + 1)
        if ends and not dry_run:
            positions = [Position(self.topic, partition, offset) for partition, offset in sorted(ends.items())]
            self._transport.admin().delete_records(positions, self._timeout_s)
        deleted.sort(key=lambda letter: letter.age)
        kept.sort(key=lambda letter: letter.age)
        return Purge(deleted=deleted, kept=kept, others=others)

    # -- reading -------------------------------------------------------------------------------------------------------

    def _all(self) -> Iterator[ReadLetter]:
        """All letters, those of a partition in its order."""
        count = self._partitions_of([self.topic]).get(self.topic)
        if count is None:
            raise NotFound(
                f"Group {self.group} has no dead letters: there is no topic {self.topic}. Is that the group's name?",
                extra={"topic": self.topic},
            )
        for record in self._read(self.topic, range(count)):
            yield read_letter(record, self._message)

    def _read(self, topic: str, partitions: Iterable[int]) -> Iterator[Record]:
        of = [Partition(topic, number) for number in partitions]
        for batch in self._transport.read(of, self._timeout_s):
            yield from batch

    def _partitions_of(self, topics: Iterable[str]) -> dict[str, int]:
        """How many partitions each of those topics has that exist."""
        asked = [topic for topic in dict.fromkeys(topics) if topic]
        return {
            name: info.partitions
            for name, info in self._transport.admin().describe(asked, min(self._timeout_s, _ANSWER_S)).items()
        }

    def _with_fate(self, letters: Sequence[DeadLetter], newest: "_Newest") -> _Letters:
        """These letters, each with whether it was replayed."""
        claimed = self._claimed(letters)
        return [replace(letter, replayed=newest.knows_later(letter) or letter.claim in claimed) for letter in letters]

    def _claimed(self, letters: Iterable[DeadLetter]) -> set[str]:
        """The claims of these letters that are taken. What cannot be asked counts as free: the workers decide."""
        by_topic: dict[str, dict[Partition, set[str]]] = {}
        for letter in letters:
            of = Partition(letter.origin_topic, letter.origin_partition)
            by_topic.setdefault(of.topic, {}).setdefault(of, set()).add(letter.claim)
        there = self._partitions_of(by_topic)
        taken: set[str] = set()
        for topic, wanted in by_topic.items():
            known = {of: claims for of, claims in wanted.items() if 0 <= of.partition < there.get(topic, 0)}
            store = StateStore(self._transport, self.group, create=False)
            try:
                store.load(list(known), self._timeout_s)
            except Error:
                continue
            taken |= {claim for of, claims in known.items() for claim in claims if store.get(of, claim) is not None}
        return taken

    # -- sending -------------------------------------------------------------------------------------------------------

    def _redrive(self, topics: Iterable[str]) -> Redrive:
        return Redrive(self.group, self._message, self.max_redrives, self._partitions_of(topics))

    def _deliver(self, outcomes: Sequence[Replay]) -> _Replays:
        """Send those that are ready, and tell of the runs that they begin."""
        ready = [(at, outcome.record) for at, outcome in enumerate(outcomes) if outcome.record is not None]
        told = list(outcomes)
        if ready:
            sink = self._transport.sink(failures_only=True)
            try:
                failures = dict(sink.deliver([record for _, record in ready], self._timeout_s))
                for index, (at, _) in enumerate(ready):
                    if index in failures:
                        told[at] = replace(told[at], status="failed", reason=str(failures[index].message))
                    else:
                        told[at] = replace(told[at], status="sent")
                self._tell([outcome for outcome in told if outcome.status == "sent"], sink)
            finally:
                sink.close()
        return told

    def _tell(self, sent: Sequence[Replay], sink: Sink) -> None:
        """Have the events say which runs were sent, so that one that no worker has met yet can be aborted.

        Afterwards: what is told of a run that was never sent would never end.
        """
        topic, by = events_topic(self.group), whoami()
        events = [event for outcome in sent if (event := outcome.event(by)) is not None]
        if not events or not self._partitions_of([topic]):
            return
        records = [OutRecord(topic, key_bytes(event.key), event.to_bytes()) for event in events]
        if failures := sink.deliver(records, self._timeout_s):
            logger.warning(
                "%d of %d runs that were sent are in no event until they begin: %s",
                len(failures),
                len(records),
                failures[0][1].message,
            )

    # -- resuming ------------------------------------------------------------------------------------------------------

    def _failed_run(self, uuid: str) -> "_Run":
        """The last run of an operation, or lone task, which failed. Raises StatusError when it did not."""
        events = self._events_of(uuid)
        if not events:
            return _Run(1, "", lone=False)
        run = max(event.run for event in events)
        name = next((event.entrypoint for event in events if event.uuid == uuid), "operation")
        ends = [event for event in events if event.run == run and event.ends]
        if not ends:
            raise StatusError(
                f"Run {run} of {name}[{uuid}] has not ended, and goes on by itself. If nothing happens, look whether a "
                "worker of its group runs on its topic",
                extra={"uuid": uuid, "run": run},
            )
        if ends[-1].status == Status.SUCCESS:
            raise StatusError(
                f"Run {run} of {name}[{uuid}] ended SUCCESS: there is nothing to resume",
                extra={"uuid": uuid, "run": run},
            )
        return _Run(run, ends[-1].status, lone=all(event.operation is None for event in events))

    def _events_of(self, uuid: str) -> _Events:
        """The newest events of this operation, or lone task, those of a run in order."""
        topic, key = events_topic(self.group), key_bytes(uuid)
        count = self._partitions_of([topic]).get(topic, 0)
        if not count:
            return []
        home = partition_of(key, count)
        # The newest are in their key's partition, unless partitions were added after the last of them.
        for numbers in ([home], [number for number in range(count) if number != home]):
            records = [record for record in self._read(topic, numbers) if record.key == key]
            events = [event for event in read(records) if event.type not in _NO_PROGRESS]
            if events:
                return events
        return []

    def _newest_of(self, uuid: str, run: "_Run") -> ReadLetter:
        """The letter that the last run left. Raises NotFound, StatusError when it cannot be that one."""
        candidate: ReadLetter | None = None
        outer = ""
        newest = _Newest()
        for found in self._all():
            newest.see(found.letter)
            if found.letter.subject == uuid:
                if candidate is None or found.letter.generation >= candidate.letter.generation:
                    candidate = found
            elif found.itinerary is not None and any(frame.uuid == uuid for frame in found.itinerary.frames):
                outer = found.itinerary.root.uuid
        if candidate is None and outer:
            raise NotFound(f"Operation {uuid} is a part of {outer}: resume that one", extra={"operation": outer})
        if candidate is None and not run.status:
            raise NotFound(
                f"Nothing is known of {uuid} in group {self.group}: there are no events of it and no dead letter",
                extra={"uuid": uuid},
            )
        if candidate is None or (candidate.letter.run < run.number and not run.lone):
            raise NotFound(
                f"Run {run.number} of {uuid} ended {run.status} and left no dead letter in {self.topic}: it was "
                "purged, or no task failed, but what came after the last one",
                extra={"uuid": uuid, "run": run.number},
            )
        letter = candidate.letter
        if not run.status:
            raise StatusError(
                f"No events tell how {uuid} ended: they are kept for 30 days, and workers with --events none tell none."
                f" Its dead letter can be replayed without them: kser dlq replay {letter.id} --group {self.group}",
                extra={"uuid": uuid, "letter": letter.id},
            )
        if letter.run > run.number and not run.lone:
            raise StatusError(
                f"Run {letter.run} of {uuid} failed and has not ended yet: try again in a moment", extra={"uuid": uuid}
            )
        itinerary = candidate.itinerary
        if itinerary is None and not run.lone and not letter.unreadable:
            # The message of an operation itself, as services send it: with an itinerary it can say which run it is.
            itinerary = Itinerary(run=letter.run)
        return candidate._replace(letter=self._with_fate([letter], newest)[0], itinerary=itinerary)

    def _from_step(
        self, redrive: Redrive, found: ReadLetter, step: str | int, params: Mapping[str, Any] | None
    ) -> Replay:
        """What begins a new run at another step than the failed one."""
        letter, kmsg, itinerary = found
        redrive.check(letter, force=True)
        if kmsg is None or letter.unreadable:
            raise RefusedError(f"it cannot be read: {letter.unreadable}")
        if itinerary is None or not itinerary.frames or itinerary.end is not None:
            raise ValidationError(f"{letter.name} has no steps to choose from: resume it without", extra={"step": step})
        wanted = int(step) if isinstance(step, int) or (step.isascii() and step.isdecimal()) else step
        if wanted == letter.position or (isinstance(wanted, str) and is_called(letter.entrypoint, wanted)):
            return redrive.again(letter, force=True, params=params, found=found)
        steps = remaining(itinerary, letter.position)
        later = [it for it in steps if it.is_(wanted)]
        if later:
            _only_one([it.position for it in later], "steps to come", wanted)
            return redrive.skip_to(found, later[0], params)
        earlier: dict[int, Record] = {}
        if not isinstance(wanted, int) or wanted < letter.position:
            origin = Partition(letter.origin_topic, letter.origin_partition)
            if 0 <= origin.partition < redrive.partitions[origin.topic]:
                earlier = redrive.earlier(letter, self._read(origin.topic, [origin.partition]), wanted)
        if not earlier:
            there = [(letter.position, letter.entrypoint), *((it.position, it.entrypoint) for it in steps)]
            known = ", ".join(f"{at} {name}" for at, name in there)
            before = (
                f". Of those before it no message of this name or position is in {letter.origin_topic}"
                f"[{letter.origin_partition}]: they are of another topic or key, or too old to be kept"
            )
            if isinstance(wanted, int) and wanted > letter.position:
                before = ""
            raise ValidationError(
                f"There is no step {wanted} to begin at. From the failed one on there are: {known}{before}",
                extra={"step": wanted},
            )
        _only_one(list(earlier), "earlier steps", wanted)
        return redrive.back_to(letter, next(iter(earlier.values())), params)


# -- inside ------------------------------------------------------------------------------------------------------------


class _Run(NamedTuple):
    """The last run of an operation that ended in failure, or of which nothing is known."""

    number: int
    #: How it ended; "" when no event tells of it.
    status: str
    #: True for a task of no operation.
    lone: bool


class _Newest:
    """Which letter of each subject is the last, of all that were seen."""

    def __init__(self) -> None:
        self._generations: dict[str, tuple[int, int]] = {}

    def see(self, letter: DeadLetter) -> None:
        """Take one more into account."""
        known = self._generations.get(letter.subject)
        if known is None or known < letter.generation:
            self._generations[letter.subject] = letter.generation

    def knows_later(self, letter: DeadLetter) -> bool:
        """Whether there is a letter that the replay of this one left."""
        return self._generations[letter.subject] > letter.generation


class _Selection:
    """The newest of the letters offered; of an operation only its own, when one is named."""

    def __init__(self, operation: str | None, limit: int | None) -> None:
        self._operation = operation
        self._limit = limit
        #: One of exactly the name was there: those whose name merely begins so are not meant.
        self._exact = False
        self._kept: list[tuple[tuple[int, int, int], DeadLetter]] = []
        self.total = 0

    def offer(self, letter: DeadLetter) -> None:
        """Take it, unless it is of another operation, or older than as many as are wanted."""
        if self._operation is not None:
            if self._operation in (letter.operation, letter.uuid):
                if not self._exact:
                    self._exact, self.total = True, 0
                    self._kept.clear()
            elif self._exact or not letter.subject.startswith(self._operation):
                return
        self.total += 1
        if self._limit is not None and len(self._kept) >= self._limit:
            heapq.heappushpop(self._kept, (letter.age, letter))
        else:
            heapq.heappush(self._kept, (letter.age, letter))

    @property
    def letters(self) -> list[DeadLetter]:
        """Those taken, the newest first."""
        return [letter for _, letter in sorted(self._kept, key=lambda it: it[0], reverse=True)]


def _refused(letter: DeadLetter, reason: str) -> Replay:
    return Replay(
        letter=letter, status="refused", reason=reason, entrypoint=letter.entrypoint, position=letter.position
    )


def _only_one(positions: list[int], what: str, wanted: str | int) -> None:
    """Raise ValidationError when a name stands for several steps."""
    if len(positions) > 1:
        raise ValidationError(
            f"{len(positions)} {what} are called {wanted}: give the position of the one you mean, "
            f"{', '.join(map(str, positions))}",
            extra={"step": wanted},
        )


def _ms(moment: datetime | None) -> int | None:
    return None if moment is None else int(moment.timestamp() * 1000)
