"""Which records run side by side: records of one key one after the other, those of different keys in parallel."""

from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from kser.transport import Record
from kser.worker.offsets import PartitionState

if TYPE_CHECKING:
    from kser.worker.state import Claim

__all__ = ["Dispatcher", "Item", "Ordering", "Unit"]

Ordering = Literal["key", "partition", "none"]


class Item:
    """One record on its way through the worker. ``outcome`` is None until it was run, and when it never is.

    What few records need is an attribute of the class until one of them does: there is one of these for each record.
    """

    outcome: Any = None
    #: True for the last one of its unit: with it the lane is free again.
    last = True
    #: What the executor has learnt of it so far: Work, Control, and the gate that let it pass.
    work: Any = None
    control: Any = None
    admitted: Any = None
    #: Why it is not run (any more) but failed.
    error: Exception | None = None
    #: What is behind it in its unit, when it is to be run again later.
    rest: "deque[Item] | None" = None
    #: What it won by coming first, when its message asks for that; written when it is settled.
    claim: "Claim | None" = None
    #: What an abort has to name to mean it, once that is known: see Work.subject.
    subject: tuple[str, int] | None = None
    #: It may be what crashed a worker: run apart from everything else.
    suspect = False
    #: Even so a worker ended: what follows from its crash must not be anybody's code either.
    deadly = False
    #: Where the dispatcher put it, and when: only for its own bookkeeping.
    turn = 0
    place = 0

    def __init__(self, state: PartitionState, record: Record) -> None:
        self.state = state
        self.record = record

    def claimed(self) -> None:
        """Have the claim written before anything else that follows from the record; again if it is settled again."""
        assert self.claim is not None
        self.outcome.records[:0] = self.claim.records
        self.outcome.ahead += len(self.claim.records)


#: Records that are run one after the other by one thread: a lone one, or those of a key that came together.
Unit = Item | deque[Item]


class Dispatcher:
    """Puts records into lanes, and hands units of them to the executor.

    A lane is the records of one key in one partition (ordering "key"; records without a key have none), or the whole
    partition ("partition"), or there is none ("none"). A lane has at most one unit under way.

    Thread rule: belongs to the poll thread.
    """

    def __init__(self, ordering: Ordering, submit: Callable[[list[Unit]], None]) -> None:
        self._ordering = ordering
        self._submit = submit
        self._turn = 0

    def take(self, items: Sequence[Item]) -> None:
        """Run these, in order where they share a lane."""
        if self._ordering == "none":
            self._submit(list(items))
            return
        by_key = self._ordering == "key"
        self._turn = turn = self._turn + 1
        units: list[Unit] = []
        for item in items:
            key = item.record.key if by_key else _WHOLE
            if key is None:
                units.append(item)
                continue
            lanes = item.state.lanes
            before: Any = lanes.get(key)
            if before is None:
                # What is in a lane that has nothing waiting: the first record of the unit that is under way.
                lanes[key] = item
                item.turn, item.place = turn, len(units)
                units.append(item)
            elif type(before) is Item:
                if before.turn != turn:
                    lanes[key] = deque((item,))
                    continue
                unit = units[before.place]  # it is being made up right here
                if type(unit) is Item:
                    units[before.place] = unit = deque((unit,))
                unit[-1].last = False  # type: ignore[index]
                unit.append(item)  # type: ignore[union-attr]
            else:
                before[-1].last = False
                before.append(item)
        if units:
            self._submit(units)

    def freed(self, items: Iterable[Item]) -> None:
        """The last items of their units have come back: what waited behind them is next."""
        units: list[Unit] = []
        by_key = self._ordering == "key"
        for item in items:
            key = item.record.key if by_key else _WHOLE
            if key is None:
                continue
            lanes = item.state.lanes
            waiting: Any = lanes.pop(key, None)
            if type(waiting) is deque:
                lanes[key] = waiting[0]
                units.append(waiting)
        if units:
            self._submit(units)

    def behind(self, item: Item) -> Collection[Item]:
        """What waits in the lane of the unit that this one is the first of."""
        waiting: Any = item.state.lanes.get(item.record.key if self._ordering == "key" else _WHOLE)
        return waiting if type(waiting) is deque else ()

    def waiting(self, state: PartitionState) -> list[deque[Item]]:
        """What waits in each lane of a partition, behind the unit that is under way."""
        return [waiting for waiting in state.lanes.values() if type(waiting) is deque]

    def drop(self, state: PartitionState) -> list[Item]:
        """Take out what waits in the lanes of a partition that is going: nobody frees the lane of what is refused."""
        dropped = [item for waiting in self.waiting(state) for item in waiting]
        state.lanes.clear()
        return dropped


#: The lane that is a whole partition.
_WHOLE = b""
