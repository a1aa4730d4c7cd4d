"""Which records of a partition are unfinished: what is committed beside an offset, and what a new owner makes of it.

The committed offset is the lowest unfinished one. Records above it may be finished already, so its metadata says which
are not::

    k1;{settle id};{body}

The settle id names the batch that was committed: when the answer to a commit got lost, it tells whether there was one.
The body holds the position, and the unfinished offsets between the committed one and that position. It lists those
and not the finished ones, because transaction markers and compaction leave gaps that would break runs of finished ones.
Source: KAFKA.md findings 6 and 9; Confluent's parallel consumer stores the same knowledge in the same place.
"""

import base64
import binascii
import zlib
from collections.abc import Collection, Iterable
from typing import Final

from kser.errors import ConfigurationError, ValidationError
from kser.transport import Partition, Position

__all__ = ["METADATA_BYTES", "PartitionState", "decode", "encode"]

#: Longest metadata a broker stores (offset.metadata.max.bytes), less the zero byte that the client adds.
METADATA_BYTES: Final = 4095
_VERSION: Final = "k1"
#: A body this long is deflated.
_SHORT: Final = 64


def encode(settle_id: str, base: int, end: int, unfinished: Iterable[int]) -> str:
    """The metadata for the committed offset ``base``.

    Args:
        settle_id: of the batch; has no semicolon.
        base: the offset that is committed.
        end: below it all is finished but ``unfinished``; not below ``base``.
        unfinished: offsets in [base, end), ascending.

    Raises ValidationError when it does not fit into METADATA_BYTES.
    """
    parts, before = [f"{end - base:x}"], base
    for offset in unfinished:
        parts.append(f"{offset - before:x}")
        before = offset
    body = ",".join(parts)
    if len(body) > _SHORT:
        body = "z" + base64.b85encode(zlib.compress(body.encode(), 6)).decode()
    text = f"{_VERSION};{settle_id};{body}"
    if len(text) > METADATA_BYTES:
        raise ValidationError(
            f"{len(parts) - 1} unfinished offsets take {len(text)} bytes; {METADATA_BYTES} fit beside an offset",
            extra={"size": len(text), "limit": METADATA_BYTES},
        )
    return text


def decode(base: int, metadata: str) -> tuple[str, int, list[int]]:
    """Settle id, end and unfinished offsets, ascending, of what encode() gave for the offset ``base``.

    What another program has stored there means nothing: "", ``base`` and no offset. Raises ConfigurationError for
    metadata of a newer release, whose finished records would be run again.
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
        return "", base, []
    try:
        text = zlib.decompress(base64.b85decode(body[1:])).decode() if body[:1] == "z" else body
        length, *deltas = (int(part, 16) for part in text.split(","))
    except (ValueError, zlib.error, binascii.Error):
        return "", base, []
    unfinished, offset = [], base
    for delta in deltas:
        offset += delta
        unfinished.append(offset)
    return settle_id, base + length, unfinished


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
        "base",
        "closed",
        "gone",
        "lanes",
        "met",
        "of",
        "position",
        "running",
        "seen",
    )

    def __init__(self, of: Partition, committed: Position | None = None) -> None:
        self.of = of
        #: The offset after the last record taken; -1 before the first.
        self.position = -1
        #: Offsets taken and not finished, ascending.
        self.running: dict[int, None] = {}
        #: Keys that are being run, each with the units that wait behind (see Dispatcher).
        self.lanes: dict[bytes | None, object] = {}
        #: True once the partition is going, or gone: nothing of it is started any more.
        self.closed = False
        #: True once it is let go of: nothing of it is settled any more.
        self.gone = False
        #: Position and end of the partition when it was quiet: as seen last, and as fetched anew for.
        self.seen: tuple[int, int] | None = None
        self.met: tuple[int, int] | None = None
        #: Where this assignment began; -1 when nothing was committed.
        self.base = committed.offset if committed is not None else -1
        self._inherited: set[int] = set()
        self._inherited_end = -1
        #: Below it all that was taken is finished, but for ``running`` and what is held.
        self._high = -1
        if committed is not None and committed.offset >= 0:
            _, end, unfinished = decode(committed.offset, committed.metadata)
            self.position = committed.offset
            if end > committed.offset:
                self._inherited, self._inherited_end = set(unfinished), end

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

    def finished(self, offset: int) -> None:
        """Note that a record was run; from now on commit_point() counts it as finished, unless it is held."""
        del self.running[offset]
        if offset >= self._high:
            self._high = offset + 1

    def commit_point(self, settle_id: str, held: Collection[int] = ()) -> Position:
        """What to commit when all that is finished is settled, but for the offsets ``held``.

        Offsets are never counted on from the last finished one: transaction markers and compaction leave gaps. Raises
        ValidationError when the unfinished ones do not fit beside the offset.
        """
        high = max(self._high, self._inherited_end)
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
        return Position(self.of.topic, self.of.partition, base, encode(settle_id, base, max(high, base), unfinished))
