"""Which records of a partition are unfinished, and so which offset may be committed."""

from kser.transport import Partition, Position

__all__ = ["PartitionState"]


class PartitionState:
    """One partition during one assignment.

    A result that belongs to an assignment that is over finds its state closed, and is dropped. Thread rule: belongs to
    the poll thread; others only read ``closed``.
    """

    __slots__ = ("closed", "committed", "of", "position", "unfinished")

    def __init__(self, of: Partition) -> None:
        self.of = of
        #: The offset after the last record taken; -1 before the first.
        self.position = -1
        #: Offsets taken and not settled, in the order they were taken.
        self.unfinished: dict[int, None] = {}
        #: The offset committed last; -1 when none was in this assignment.
        self.committed = -1
        #: True once the partition is going, or gone: nothing of it is started any more.
        self.closed = False

    def take(self, offset: int) -> bool:
        """Note a record; False when it was taken before (a client may rewind without a word, KAFKA.md finding 12)."""
        if offset < self.position:
            return False
        self.position = offset + 1
        self.unfinished[offset] = None
        return True

    def settled(self, offset: int) -> None:
        """Note that everything that follows from this record is confirmed."""
        self.unfinished.pop(offset, None)

    def committable(self) -> Position | None:
        """What to commit: the lowest unfinished offset, else the position; None when that is committed already.

        Offsets are never counted on from the last finished one: transaction markers and compaction leave gaps.
        """
        offset = next(iter(self.unfinished), self.position)
        if offset <= self.committed or offset < 0 or self.position < 0:
            return None
        return Position(self.of.topic, self.of.partition, offset)
