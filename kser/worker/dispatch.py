"""Which records run side by side: records of one key one after the other, those of different keys in parallel."""

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Literal

from kser.transport import Record
from kser.worker.offsets import PartitionState

__all__ = ["Dispatcher", "Item", "Ordering", "Unit"]

Ordering = Literal["key", "partition", "none"]


class Item:
    """One record on its way through the worker. ``outcome`` is None until it was run, and when it never is."""

    __slots__ = ("admitted", "control", "error", "last", "outcome", "record", "state", "work")

    def __init__(self, state: PartitionState, record: Record) -> None:
        self.state = state
        self.record = record
        self.outcome: Any = None
        #: True for the last one of its unit: with it the lane is free again.
        self.last = True
        #: What the executor has learnt of it so far: Work, Control, and the gate that let it pass.
        self.work: Any = None
        self.control: Any = None
        self.admitted: Any = None
        #: Why it is not run (any more) but failed.
        self.error: Exception | None = None


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

    def take(self, items: Iterable[Item]) -> None:
        """Run these, in order where they share a lane."""
        units: list[Unit] = []
        if self._ordering == "none":
            units.extend(items)
            self._submit(units)
            return
        by_key = self._ordering == "key"
        fresh: dict[tuple[int, bytes | None], Unit] = {}
        for item in items:
            key = item.record.key if by_key else None
            if key is None and by_key:
                units.append(item)
                continue
            lanes = item.state.lanes
            if key not in lanes:
                lanes[key] = None
                fresh[id(lanes), key] = item
                continue
            unit = fresh.get((id(lanes), key))
            if unit is not None:  # the lane's unit is being made up right here
                if type(unit) is Item:
                    fresh[id(lanes), key] = unit = deque((unit,))
                unit[-1].last = False  # type: ignore[index]
                unit.append(item)  # type: ignore[union-attr]
                continue
            waiting = lanes[key]
            if waiting is None:
                lanes[key] = deque((item,))
            else:
                waiting[-1].last = False  # type: ignore[index]
                waiting.append(item)  # type: ignore[attr-defined]
        units.extend(fresh.values())
        if units:
            self._submit(units)

    def freed(self, items: Iterable[Item]) -> None:
        """The last items of their units have come back: what waited behind them is next."""
        units: list[Unit] = []
        by_key = self._ordering == "key"
        for item in items:
            key = item.record.key if by_key else None
            lanes = item.state.lanes
            waiting: Any = lanes.get(key)
            if waiting is None:
                lanes.pop(key, None)
                continue
            lanes[key] = None
            units.append(waiting)
        if units:
            self._submit(units)
