"""What is committed beside an offset: which records of a partition are unfinished, and what is known of them.

The committed offset is the lowest unfinished one. Records above it may be finished already, so its metadata says which
are not::

    k1;{settle id};{body}

The settle id names the batch that was committed: when the answer to a commit got lost, it tells whether there was one.
The body has sections with ``|`` between them, numbers are hexadecimal, offsets count from the committed one:

    {position},{unfinished offset less the one before},...
    p{offset}.{attempt}.{due, tenths of a second since the epoch},...     parked: waits for its next attempt
    c{end}.{crashes},...      what is unfinished below ``end`` was being run so often when a worker crashed
    s{reach}                  of what the next crash makes suspects, nothing from here on was started
    o                         open: an owner that ends as it should takes this away

It lists the unfinished and not the finished ones, because transaction markers and compaction leave gaps that would
break runs of finished ones. Source: KAFKA.md findings 6 and 9; Confluent's parallel consumer stores the same knowledge
in the same place.
"""

import base64
import binascii
import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Final, NamedTuple

from kser.errors import ConfigurationError, ValidationError
from kser.transport import Partition, Position

__all__ = ["METADATA_BYTES", "SUSPECT_AFTER", "Committed", "Parked", "PartitionState", "decode", "encode"]

#: Longest metadata a broker stores (offset.metadata.max.bytes), less the zero byte that the client adds.
METADATA_BYTES: Final = 4095
_VERSION: Final = "k1"
#: A body this long is deflated.
_SHORT: Final = 64
#: Crashes after which what was being run each time is run apart from everything else.
SUSPECT_AFTER: Final = 3
#: Of the records above what is committed, so many may have been in the hands of a worker that crashed.
WINDOW: Final = 5000
#: So many of those that the next crash makes suspects are taken at a time. Else three workers that were killed soon one
#: after the other, by whatever, make suspects of all that was waiting, which then runs one by one.
SLICE: Final = 64


class Parked(NamedTuple):
    """A record that waits for its next attempt."""

    #: Which attempt comes next.
    attempt: int
    #: When, in milliseconds since the epoch by the clock of the worker that parked it; rounded up to tenths of seconds.
    due_ms: int


class Committed(NamedTuple):
    """What was stored beside an offset."""

    settle_id: str
    #: Below it all is finished but ``unfinished``.
    end: int
    #: Offsets, ascending.
    unfinished: Sequence[int] = ()
    parked: Mapping[int, Parked] = {}
    #: (end, crashes), ascending.
    crashes: Sequence[tuple[int, int]] = ()
    #: The owner that committed this has not let go of the partition as it should.
    open: bool = False
    #: Of what had all crashes but the last, only what is below it was started; None when there was no such thing.
    reach: int | None = None


def encode(
    settle_id: str,
    base: int,
    end: int,
    unfinished: Iterable[int],
    parked: Mapping[int, Parked] | None = None,
    crashes: Iterable[tuple[int, int]] = (),
    *,
    open_: bool = False,
    reach: int | None = None,
) -> str:
    """The metadata for the committed offset ``base``.

    Args:
        settle_id: of the batch; has no semicolon.
        base: the offset that is committed.
        end: below it all is finished but ``unfinished``; not below ``base``.
        unfinished: offsets in [base, end), ascending.
        parked: which of them wait for an attempt.
        crashes: (end, crashes), ascending, above ``base``.
        open_: the partition is being worked on.
        reach: see Committed.

    Raises ValidationError when it does not fit into METADATA_BYTES.
    """
    parts, before = [f"{end - base:x}"], base
    for offset in unfinished:
        parts.append(f"{offset - before:x}")
        before = offset
    body = ",".join(parts)
    if parked:
        body += "|p" + ",".join(f"{o - base:x}.{p.attempt:x}.{-(-p.due_ms // 100):x}" for o, p in parked.items())
    if counted := ",".join(f"{upto - base:x}.{count:x}" for upto, count in crashes):
        body += "|c" + counted
    if open_:
        body += "|o"
    if reach is not None:
        body += f"|s{reach - base:x}"
    if len(body) > _SHORT:
        body = "z" + base64.b85encode(zlib.compress(body.encode(), 6)).decode()
    text = f"{_VERSION};{settle_id};{body}"
    if len(text) > METADATA_BYTES:
        raise ValidationError(
            f"{len(parts) - 1} unfinished offsets take {len(text)} bytes; {METADATA_BYTES} fit beside an offset",
            extra={"size": len(text), "limit": METADATA_BYTES},
        )
    return text


def decode(base: int, metadata: str) -> Committed:
    """What encode() was given for the offset ``base``.

    What another program has stored there means nothing: an empty settle id, ``base`` and no offset. Raises
    ConfigurationError for metadata of a newer release, whose finished records would be run again.
    """
    version, _, rest = metadata.partition(";")
    settle_id, separator, body = rest.partition(";")
    if version != _VERSION or not separator:
        if version[:1] == "k" and version[1:].isdecimal() and separator:
            raise ConfigurationError(
                f"The committed offsets were written by a newer kser (format {version}; this reads {_VERSION}): run "
                "that release, or what it has finished would run again",
                extra={"format": version},
            )
        return Committed("", base)
    parked: dict[int, Parked] = {}
    crashes: list[tuple[int, int]] = []
    open_ = False
    reach: int | None = None
    try:
        text = zlib.decompress(base64.b85decode(body[1:])).decode() if body[:1] == "z" else body
        first, *sections = text.split("|")
        length, *deltas = (int(part, 16) for part in first.split(","))
        for section in sections:
            if section == "o":
                open_ = True
                continue
            for entry in section[1:].split(","):
                numbers = [int(part, 16) for part in entry.split(".")]
                if section[0] == "p":
                    at, attempt, due = numbers
                    parked[base + at] = Parked(attempt, due * 100)
                elif section[0] == "c":
                    upto, count = numbers
                    crashes.append((base + upto, count))
                elif section[0] == "s":
                    reach = base + numbers[0]
    except (ValueError, IndexError, zlib.error, binascii.Error):
        return Committed("", base)
    unfinished, offset = [], base
    for delta in deltas:
        offset += delta
        unfinished.append(offset)
    return Committed(settle_id, base + length, unfinished, parked, crashes, open_, reach)


class PartitionState:
    """One partition during one assignment.

    A result that belongs to an assignment that is over finds its state closed, and is dropped. Thread rule: belongs to
    the poll thread; others only read ``closed``.

    Args:
        of: the partition.
        committed: what the group has committed of it, None or offset -1 when nothing.

    Raises ConfigurationError as decode() does.
    """

    __slots__ = (
        "_high",
        "_inherited",
        "_inherited_end",
        "_reach",
        "apart",
        "asked",
        "base",
        "closed",
        "crashes",
        "gone",
        "known",
        "lanes",
        "marked",
        "met",
        "of",
        "parked",
        "position",
        "reach",
        "round",
        "running",
        "seen",
        "was_open",
    )

    def __init__(self, of: Partition, committed: Position | None = None) -> None:
        self.of = of
        #: The offset after the last record taken; -1 before the first.
        self.position = -1
        #: Offsets taken and not finished, ascending.
        self.running: dict[int, None] = {}
        #: Those of them, or of what an earlier owner left, that wait for their next attempt.
        self.parked: dict[int, Parked] = {}
        #: Keys that are being run, each with the units that wait behind (see Dispatcher).
        self.lanes: dict[bytes | None, object] = {}
        #: True once the partition is going, or gone: nothing of it is started any more.
        self.closed = False
        #: True once it is let go of: nothing of it is settled any more.
        self.gone = False
        #: True once the broker knows that this owner works on it: what is committed says so until clean_point().
        self.marked = False
        #: Position and end of the partition when it was quiet: as seen last, and as fetched anew for.
        self.seen: tuple[int, int] | None = None
        self.met: tuple[int, int] | None = None
        #: The settle id of what is committed of it, as far as this owner knows, and in which round that was looked at.
        self.known = ""
        self.round: object = None
        #: Where this assignment began; -1 when nothing was committed.
        self.base = committed.offset if committed is not None else -1
        self._inherited: set[int] = set()
        self._inherited_end = -1
        #: Below it all that was taken is finished, but for ``running`` and what is held.
        self._high = -1
        #: (end, crashes): what is unfinished below ``end``, and not below an earlier one, was run when so many crashed.
        self.crashes: list[tuple[int, int]] = []
        #: True when the owner before did not let go as it should.
        self.was_open = False
        #: Of what the next crash makes suspects only what is below it may be started; in what was asked to be committed
        #: last, and in what is known to be committed.
        self.asked = self.reach = 0
        #: How many of ``running`` have begun, or wait behind another one: they are not next. Known while it is guarded.
        self.apart = 0
        #: The one of the owner before.
        self._reach: int | None = None
        if committed is not None and committed.offset >= 0:
            found = decode(committed.offset, committed.metadata)
            self.known = found.settle_id
            self.position = committed.offset
            if found.end > committed.offset:
                self._inherited, self._inherited_end = set(found.unfinished), found.end
            self.parked = dict(found.parked)
            self.crashes = list(found.crashes)
            self.was_open = found.open
            self._reach = found.reach

    def crashed(self, end: int) -> None:
        """The owner before crashed (``was_open``): what it may have been running is noted.

        ``end``: of the partition when that was found out; what came later it cannot have had.
        """
        end = min(end, max(self.base, self._inherited_end) + WINDOW)
        counted: list[tuple[int, int]] = []

        def note(upto: int, count: int) -> None:
            if (counted[-1][0] if counted else self.base) < upto:
                if counted and counted[-1][1] == count:
                    counted.pop()
                counted.append((upto, count))

        for upto, count in [*self.crashes, (end, 0)]:
            if count == SUSPECT_AFTER - 1 and self._reach is not None:
                note(min(upto, end, self._reach), count + 1)
                note(min(upto, end), count)
            else:
                note(min(upto, end), count + 1)
        self.crashes = counted

    def confirm(self, reach: int) -> None:
        """Note that it is committed that what is below this offset may be started."""
        self.reach = max(self.reach, reach)

    def beyond(self, offset: int) -> bool:
        """Whether this record has to wait: the next crash makes suspects of all that may have been started."""
        return offset >= self.reach and self.crashes_of(offset) == SUSPECT_AFTER - 1

    def pass_gap(self, offset: int) -> None:
        """Note that this record comes next: before it was nothing but markers and aborted records."""
        self.position = max(self.position, offset)

    def crashes_of(self, offset: int) -> int:
        """How many workers crashed while they may have been running this record."""
        return next((count for upto, count in self.crashes if offset < upto), 0)

    def take(self, offset: int) -> bool | None:
        """Note a record that came.

        True: run it. None: an earlier owner of the partition has finished it. False: it was taken before in this
        assignment (a client may rewind without a word, KAFKA.md finding 12).
        """
        if offset < self.position:
            return False
        self.position = offset + 1
        if offset < self._inherited_end:
            if offset not in self._inherited:
                return None
            self._inherited.discard(offset)
        self.running[offset] = None
        return True

    def restart(self, offset: int) -> None:
        """Go on at this offset: what was below it does not exist any more."""
        self.position = offset
        self._inherited, self._inherited_end = set(), -1
        self.parked = {at: parked for at, parked in self.parked.items() if at >= offset}

    def park(self, offset: int, parked: Parked) -> None:
        """Note that a record that was taken waits for its next attempt; what is committed from now on says so."""
        self.parked[offset] = parked

    def finished(self, offset: int) -> None:
        """Note that a record was run; from now on commit_point() counts it as finished, unless it is held."""
        del self.running[offset]
        self.parked.pop(offset, None)
        if offset >= self._high:
            self._high = offset + 1

    def commit_point(self, settle_id: str, held: Collection[int] = (), *, clean: bool = False) -> Position:
        """What to commit when all that is finished is settled, but for the offsets ``held``.

        Offsets are never counted on from the last finished one: transaction markers and compaction leave gaps. Raises
        ValidationError when the unfinished ones do not fit beside the offset.

        ``clean``: the owner lets go as it should; whoever comes next need not wonder whether it crashed.
        """
        high = max(self._high, self._inherited_end)
        if self.parked:
            high = max(high, max(self.parked) + 1)
        unfinished: list[int] = []
        for offset in self.running:
            if offset >= high:
                break
            unfinished.append(offset)
        above = (
            next((offset for offset in self.running if offset >= high), None)
            if len(unfinished) < len(self.running)
            else None
        )
        if held or self._inherited:
            unfinished = sorted({*unfinished, *held, *self._inherited})
        if unfinished:
            base = unfinished[0]
        else:
            base = max(self.position, high) if above is None else above
            high = base
        crashes = self.crashes
        if crashes and crashes[0][0] <= base:
            crashes = self.crashes = [(upto, count) for upto, count in crashes if upto > base]
        reach = None
        if crashes and any(count == SUSPECT_AFTER - 1 for _, count in crashes):
            if len(self.running) - self.apart <= SLICE // 4:
                self.asked = max(self.position, base) + SLICE
            reach = max(self.asked, base)
        return Position(
            self.of.topic,
            self.of.partition,
            base,
            encode(
                settle_id,
                base,
                max(high, base),
                unfinished,
                self.parked,
                crashes,
                open_=self.marked and not clean,
                reach=reach,
            ),
        )
