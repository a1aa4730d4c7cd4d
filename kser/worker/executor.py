"""Runs records in threads, so that the poll thread never waits for a task.

Units of records are handed over in chunks: a queue operation for sixteen short tasks instead of one for each
(KAFKA.md finding 10). A task that takes longer than that is good for keeps nothing waiting: look_after() gives what is
left of its thread's chunk to others.

Coroutines and isolated tasks have threads of their own, which only wait: for the event loop, or for a child process.
"""

import inspect
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Final, NamedTuple

from kser import context
from kser.context import Control, Reports
from kser.entry import Entrypoint
from kser.errors import TaskTimeoutError
from kser.transport import Record
from kser.worker.control import ControlWatch
from kser.worker.dispatch import Item, Unit
from kser.worker.health import RunningTask
from kser.worker.offsets import PartitionState
from kser.worker.runner import Outcome, Runner, Work

__all__ = ["Executor"]

logger = logging.getLogger(__name__)

#: Units in a chunk while tasks are short, at least.
_CHUNK: Final = 16
#: Active threads while tasks are short; and what came together is cut into so many chunks.
_FEW: Final = 1
#: A record that takes longer than this, in seconds, is a slow one. When more of them are than this share, of about so
#: many records before now, units are handed over one by one. A busy machine makes one in ten slow all by itself.
_SHORT_S: Final = 0.0005
_SLOW_SHARE: Final = 0.25
_MEMORY: Final = 200
#: As a share of records, most.
_MOST: Final = 0.5
#: Of one processor: when this process uses less than the first, tasks wait for something and more threads may be
#: active; when it uses less than the second, the same if most tasks are slow. When it uses all of it, for tasks that
#: need little of it, threads only take the GIL from each other.
_IDLE: Final = 0.4
_NOT_BUSY: Final = 0.8
_BUSY: Final = 0.95
#: A thread that has been at one record for so long, in seconds, gives the rest of its chunk to others.
_LONG_S: Final = 0.01
#: What a task over its ``timeout`` gets to end by itself, in seconds, before its thread is given up.
_GRACE_S: Final = 2.0
#: A thread that runs dry tells the poll thread at least this often, in seconds.
_WAKE_S: Final = 0.002

#: How often it is looked whether a class that people paused may run again, in seconds.
_PAUSED_S: Final = 1.0
#: Outcomes that an abort may still turn round.
_ENDS: Final = frozenset({"done", "failed", "retry"})

_Chunk = deque[Unit]


class _Gate:
    """At most ``limit`` units of a class side by side; the others wait here without holding a thread."""

    __slots__ = ("limit", "lock", "passed", "waiting")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.lock = threading.Lock()
        self.passed = 0
        self.waiting: deque[deque[Item]] = deque()

    def admit(self, unit: deque[Item]) -> bool:
        """Whether the first item of the unit may run now; if not, the unit waits."""
        with self.lock:
            if self.passed < self.limit:
                self.passed += 1
                unit[0].admitted = self
                return True
            self.waiting.append(unit)
            return False

    def leave(self) -> deque[Item] | None:
        """One has ended. Gives the unit that may go on instead."""
        with self.lock:
            if not self.waiting:
                self.passed -= 1
                return None
            unit = self.waiting.popleft()
            unit[0].admitted = self
            return unit

    def waits(self, state: PartitionState) -> int:
        """How many records of this partition wait here."""
        with self.lock:
            return sum(len(unit) for unit in self.waiting if unit[0].state is state)

    def drop_closed(self) -> list[Item]:
        """Take out what waits of partitions that are going."""
        with self.lock:
            gone = [unit for unit in self.waiting if unit[0].state.closed]
            if gone:
                self.waiting = deque(unit for unit in self.waiting if not unit[0].state.closed)
        return [item for unit in gone for item in unit]


@dataclass(frozen=True, slots=True)
class _Kind:
    """How a class is run."""

    gate: _Gate | None
    crew: "_Crew | None"
    timeout: float | None


class _Hand:
    """One thread."""

    __slots__ = ("abandoned", "at", "chunk", "count", "item", "lock", "since", "thread", "told", "unit")

    def __init__(self) -> None:
        self.lock = threading.Lock()
        #: Records it has run.
        self.count = 0
        #: What it has at hand: from before it looks whether that may begin, until after that is in ``finished``.
        self.at: Item | None = None
        #: What it runs, and since when (time.monotonic()).
        self.item: Item | None = None
        self.since = 0.0
        self.unit: deque[Item] | None = None
        self.chunk: _Chunk | None = None
        #: When its task was told to end; 0 when it was not.
        self.told = 0.0
        #: True once somebody else has its place: when it comes back it ends.
        self.abandoned = False
        self.thread: threading.Thread | None = None


class _Load(NamedTuple):
    """What the threads of a process are at."""

    #: Tasks are short, so few threads do more than many.
    short: bool
    #: Tasks are slow, and that is not for want of the processor.
    waits: bool
    #: Tasks are slow for want of the processor.
    fights: bool


class _Crew:
    """Threads that take chunks from one queue.

    Short tasks hold the GIL: more threads than a few only take it from each other, and from the poll and settle threads
    (each waits its turn of 5 ms). So only a few are active while tasks are short, one more for each that is stuck in a
    long one, and more and more of them while tasks are slow and the processor has little to do. The others are parked.
    That tasks are slow is not enough: with many threads they all are, for want of the GIL.

    Args:
        executor: whose crew it is.
        name: for the names of the threads.
        size: most threads.
        run: runs one record.
        waits: what these run waits elsewhere, so that all may be active at any time.
    """

    def __init__(
        self, executor: "Executor", name: str, size: int, run: Callable[[Item, Work], Outcome], *, waits: bool
    ) -> None:
        self._executor = executor
        self._name = name
        self.size = size
        self.run = run
        self._waits = waits
        self.todo: queue.SimpleQueue[_Chunk | None] = queue.SimpleQueue()
        self.hands: list[_Hand] = []
        #: Threads that may be active, as of the last look.
        self.wanted = size if waits else min(size, _FEW)
        #: Threads that are not parked.
        self.active = 0
        self._parked: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._made = 0

    def put(self, chunks: Iterable[_Chunk]) -> None:
        """Run these."""
        for chunk in chunks:
            self.todo.put(chunk)
        self.grow()

    def look(self, stuck: int, load: "_Load") -> None:
        """Note how many threads are stuck in a long task, and what the others are at."""
        if not self._waits:
            if load.waits and (stuck or self.todo.qsize()):
                self.wanted = min(self.size, 2 * self.wanted)
            elif load.short:
                self.wanted //= 2
            elif load.fights:
                self.wanted -= 1
            self.wanted = max(self.wanted, min(self.size, _FEW + stuck))
        self.grow()

    def grow(self) -> None:
        """Activate threads while there is more to do than idle ones. Called again and again: what it sees is old."""
        if self.active < self.wanted and (todo := self.todo.qsize()):
            with self._executor.lock:
                idle = self.active - sum(1 for hand in self.hands if hand.chunk is not None)
                while self.active < self.wanted and idle < todo:
                    idle += 1
                    self.active += 1
                    if self.active <= len(self.hands):
                        self._parked.put(True)
                    else:
                        self._start()

    def park(self) -> bool:
        """Wait until one more thread is wanted; False when it should end. Called by a thread between two chunks."""
        with self._executor.lock:
            if self.active <= self.wanted:
                return True
            self.active -= 1
        return self._parked.get()

    def _start(self) -> None:
        hand = _Hand()
        self._made += 1
        hand.thread = threading.Thread(
            target=self._executor._work, args=[self, hand], name=f"kser-{self._name}-{self._made}", daemon=True
        )
        self.hands.append(hand)
        hand.thread.start()

    def replace(self, hand: _Hand) -> None:
        """Give up on a thread."""
        with self._executor.lock:
            self.hands.remove(hand)
            self._start()

    def end(self) -> None:
        """Let the threads end once they have nothing to do."""
        for _ in self.hands:
            self.todo.put(None)
            self._parked.put(False)

    @property
    def free(self) -> int:
        """Threads that could take something now, those not made yet included."""
        return self.size - sum(1 for hand in tuple(self.hands) if hand.item is not None)


class Executor:
    """Threads that run units of records.

    Args:
        runner: runs one record.
        concurrency: threads for plain tasks.
        coroutines: ``async def`` tasks side by side.
        isolated: runs one record in a child process and gives its Outcome; None: isolated tasks are refused.
        told: what people told this group; None: nobody listens to them.
        open_reports: makes what takes the reports of an execution; None: nobody wants to know.
        children: isolated tasks side by side.
        max_abandoned: threads that may be given up because their task ignores its timeout.
        wake: called from any thread when something is finished.

    Thread rule: everything here belongs to the poll thread.
    """

    def __init__(
        self,
        runner: Runner,
        *,
        concurrency: int,
        wake: Callable[[], None],
        coroutines: int = 256,
        isolated: Callable[[Item, Work], Outcome] | None = None,
        children: int = 1,
        max_abandoned: int = 16,
        told: ControlWatch | None = None,
        open_reports: Callable[[Work, Control], Reports] | None = None,
    ) -> None:
        self._told = told
        self._open_reports = open_reports
        self._runner = runner
        self._wake = wake
        self._max_abandoned = max_abandoned
        self.lock = threading.Lock()
        #: Items that are done with, in the order they were. Their state, outcome and ``last`` are final.
        self.finished: deque[Item] = deque()
        self._open = threading.Event()
        self._open.set()
        self._held = False
        self._crew = _Crew(self, "task", concurrency, self._run_here, waits=False)
        self._waiting = _Crew(self, "async", coroutines, self._run_here, waits=True)
        self._isolated = None if isolated is None else _Crew(self, "isolated", children, isolated, waits=True)
        self._kinds: dict[type[Entrypoint] | None, _Kind | None] = {}
        #: What may have crashed a worker is run apart, one at a time: a crash is its own then.
        alone = _Gate(1)
        self._gates: list[_Gate] = [alone]
        self._suspects = _Kind(alone, self._isolated, None)
        #: Threads whose task ignored its timeout and that were replaced.
        self.abandoned: list[_Hand] = []
        #: The share of slow records, lately.
        self._slow = 1.0
        self._looked = 0.0
        #: As of the last look: what this process has used of processors, in seconds, and the records it has run.
        self._used = 0.0
        self._ran = 0
        #: Of one processor this process uses so much, lately.
        self._share = 0.0

    # -- handing over ------------------------------------------------------------------------------------------------

    def submit(self, units: list[Unit]) -> None:
        """Run these units, each in its own order. Every item comes back in ``finished``."""
        count = len(units)
        if self._slow > _SLOW_SHARE or count == 1:
            self._crew.put([deque((unit,)) for unit in units])
        else:
            size = max(_CHUNK, -(-count // self._crew.wanted))
            self._crew.put([deque(units[i : i + size]) for i in range(0, count, size)])

    def hold(self) -> None:
        """Start nothing more until release(); what runs goes on."""
        if not self._held:
            self._held = True
            self._open.clear()

    def release(self) -> None:
        """Start again."""
        if self._held:
            self._held = False
            self._open.set()

    def drop_closed(self) -> None:
        """Give back what waits for its turn, of partitions that are going."""
        for gate in self._gates:
            for item in gate.drop_closed():
                item.outcome = None
                self.finished.append(item)
        self._wake()

    def stop(self, timeout_s: float) -> bool:
        """End the threads once they have nothing to do; False when one is still busy after ``timeout_s``."""
        end = time.monotonic() + timeout_s
        self.release()
        crews = [crew for crew in (self._crew, self._waiting, self._isolated) if crew is not None]
        for crew in crews:
            crew.end()
        for crew in crews:
            for hand in crew.hands:
                assert hand.thread is not None
                hand.thread.join(max(end - time.monotonic(), 0))
        return not any(hand.thread is not None and hand.thread.is_alive() for crew in crews for hand in crew.hands)

    # -- looking -----------------------------------------------------------------------------------------------------

    @property
    def free(self) -> int:
        """Threads, coroutines and children that have nothing to do, of the kinds that the classes met so far need."""
        kinds = [kind for cls, kind in tuple(self._kinds.items()) if cls is not None]
        crews = {self._crew if kind is None or kind.crew is None else kind.crew for kind in kinds} or {self._crew}
        return sum(crew.free for crew in crews)

    @property
    def exhausted(self) -> bool:
        """More threads were given up than may be: the worker should end."""
        return len(self.abandoned) > self._max_abandoned

    def _hands(self) -> list[_Hand]:
        crews = (self._crew, self._waiting, self._isolated)
        return [hand for crew in crews if crew is not None for hand in tuple(crew.hands)]

    def running_of(self, closing: Collection[PartitionState]) -> bool:
        """Whether a record of these runs; false only once what ran of them is in ``finished``.

        For partitions that are closed: a thread notes what it has at hand before it looks whether that may begin.
        """
        return any(item is not None and item.state in closing for item in (h.at for h in self._hands()))

    def apart(self, state: PartitionState) -> int:
        """How many records of this partition have begun, are behind such a one, or wait for others of their class."""
        count = sum(gate.waits(state) for gate in tuple(self._gates))
        for hand in self._hands():
            item, unit = hand.item, hand.unit
            if item is not None and item.state is state:
                count += 1 + (0 if unit is None else len(unit))
        return count

    @property
    def doing(self) -> str:
        """One of what is being run, ``entrypoint[uuid]``, or ""."""
        for hand in self._hands():
            item = hand.item
            if item is not None and item.work is not None:
                return str(item.work.name)
        return ""

    def executions(self) -> list[tuple[Item, float]]:
        """What is being run, each with when it began (time.monotonic())."""
        found = []
        for hand in self._hands():
            since, item = hand.since, hand.item
            if item is not None and item.work is not None:
                found.append((item, since))
        return found

    def running(self) -> list[RunningTask]:
        """What is being run."""
        now = time.monotonic()
        found = []
        for item, since in self.executions():
            alive = item.control.alive if item.control is not None else 0.0
            found.append(
                RunningTask(item.work.kmsg.entrypoint, item.work.kmsg.uuid, now - since, now - alive if alive else None)
            )
        return found

    def abort(self, reason: str, closing: Collection[PartitionState] | None = None) -> None:
        """Tell what runs, of these, that it should end."""
        for hand in self._hands():
            with hand.lock:
                item = hand.item
                if item is None or item.control is None or (closing is not None and item.state not in closing):
                    continue
                if item.control.aborted is None:
                    item.control.aborted = reason

    def abort_those(self, meant: Callable[[Work], bool]) -> None:
        """Tell what runs, of that which is meant, that somebody aborted it."""
        for hand in self._hands():
            with hand.lock:
                item = hand.item
                if item is None or item.control is None or item.work is None or not meant(item.work):
                    continue
                if item.control.aborted is None:
                    item.control.aborted = "aborted"
                    if item.control.cancel is not None:
                        item.control.cancel()

    def look_after(self) -> None:
        """Call it often: free what waits behind long tasks, tell those over their timeout, replace those that stay."""
        now = time.monotonic()
        if now - self._looked < _LONG_S:
            return
        load = self._weigh(now)
        self._looked = now
        for crew in (self._crew, self._waiting, self._isolated):
            if crew is None:
                continue
            stuck = 0
            for hand in tuple(crew.hands):
                item = hand.item
                if item is None:
                    continue
                long = now - hand.since >= _LONG_S
                if (long or load.waits) and (chunk := hand.chunk):
                    self._spread(crew, chunk)
                if not long:
                    continue
                stuck += 1
                kind = self._kinds.get(item.work.cls) if item.work is not None else None
                if kind is not None and kind.timeout is not None and crew is not self._isolated:
                    self._deadline(crew, hand, item, kind.timeout, now)
            crew.look(stuck, load)

    def _weigh(self, now: float) -> _Load:
        """What the threads were at since the last look."""
        used, ran = time.process_time(), sum(hand.count for hand in tuple(self._crew.hands))
        seconds, count = used - self._used, ran - self._ran  # count: none or less when a thread was given up
        share = min(seconds / (now - self._looked), 1)
        self._share = max(share, (self._share + share) / 2)  # that it began to work is known at once
        self._used, self._ran = used, ran
        return _Load(
            short=self._slow <= _SLOW_SHARE,
            waits=self._share < _IDLE or (self._share < _NOT_BUSY and self._slow > _MOST),
            fights=self._share >= _BUSY and count > 0 and seconds / count < _SHORT_S,
        )

    def _spread(self, crew: _Crew, chunk: _Chunk) -> None:
        units: list[_Chunk] = []
        while True:
            try:
                units.append(deque((chunk.popleft(),)))
            except IndexError:
                break
        crew.put(units)

    def _deadline(self, crew: _Crew, hand: _Hand, item: Item, timeout: float, now: float) -> None:
        with hand.lock:
            if hand.item is not item or now - hand.since < timeout:
                return
            if not hand.told:
                hand.told = now
                control = item.control
                control.aborted = control.aborted or "timeout"
                if control.cancel is not None:
                    control.cancel()
                return
            if now - hand.told < _GRACE_S:
                return
            hand.abandoned = True
            rest = hand.unit
            item.control.end()
        logger.error("%s ignores its timeout of %g s: its thread is given up and replaced", item.work.name, timeout)
        self.abandoned.append(hand)
        crew.replace(hand)
        item.error = TaskTimeoutError(
            f"{item.work.name} took longer than its timeout of {timeout:g} s, and did not end when it was told",
            extra={"uuid": item.work.kmsg.uuid, "entrypoint": item.work.kmsg.entrypoint, "timeout": timeout},
        )
        unit: deque[Item] = deque((item,))
        while rest:
            unit.append(rest.popleft())
        self._crew.put([deque((unit,))])

    # -- in the threads ----------------------------------------------------------------------------------------------

    def _work(self, crew: _Crew, hand: _Hand) -> None:
        todo, finished, monotonic = crew.todo, self.finished, time.monotonic
        while True:
            if crew.active > crew.wanted and not crew.park():
                return
            chunk = todo.get()
            if chunk is None:
                return
            hand.chunk = chunk
            self._runner.look()
            before = woke = monotonic()
            count = slow = 0
            while True:
                try:
                    unit = chunk.popleft()
                except IndexError:
                    break
                rest: deque[Item] | None = None
                if type(unit) is Item:
                    item = unit
                else:
                    rest = unit  # type: ignore[assignment]  # type() and not isinstance(), which costs more
                    item = rest.popleft()  # type: ignore[union-attr]
                hand.unit = rest
                while True:
                    count += 1
                    if self._held:
                        hand.at = None
                        self._open.wait()
                        before = monotonic()
                    hand.at = item
                    if item.state.closed and item.error is None:  # what ignored its timeout fails all the same
                        self._refuse(item, rest)
                        break
                    whole = self._one(crew, hand, item, rest, before)
                    now = monotonic()
                    if now - before > _SHORT_S:
                        slow += 1
                    before = now
                    if not whole:
                        if hand.abandoned:
                            return
                        break
                    outcome = item.outcome
                    if outcome.again_s is not None or outcome.kind == "broken":
                        item.rest = rest  # what becomes of these is not for this thread to say
                        finished.append(item)
                        break
                    finished.append(item)
                    if now - woke > _WAKE_S:
                        woke = now
                        self._wake()
                    if not rest:
                        break
                    item = rest.popleft()
            hand.at = hand.chunk = hand.unit = None
            if count:
                # Not the seconds they took: one wait for the GIL weighs as much as a hundred short tasks.
                self._slow += (slow / count - self._slow) * min(count / _MEMORY, 1)
                hand.count += count
            self._wake()

    def _refuse(self, item: Item, unit: deque[Item] | None) -> None:
        """Give back a unit of a partition that is going."""
        if item.admitted is not None:
            self._leave(item)
        while True:
            item.outcome = None
            self.finished.append(item)
            if not unit:
                return
            item = unit.popleft()

    def _one(self, crew: _Crew, hand: _Hand, item: Item, unit: deque[Item] | None, now: float) -> bool:
        """Run one record; ``now`` it begins. False when another thread has it now, and what follows it in the unit."""
        try:
            work = item.work
            told = self._told
            if work is None:
                opened = self._runner.open(item.record)
                if isinstance(opened, Outcome):
                    item.outcome = self._unless_aborted(opened, item.record)
                    return True
                work = item.work = opened
                cls = work.cls
                kind = self._kinds[cls] if cls in self._kinds else self._learn(cls)
                if item.suspect and work.runs:
                    kind = self._suspects
                if told is not None and told.version and self._stopped(told, item, work):
                    return True
                if kind is not None and not self._pass(kind, crew, item, unit):
                    return False
            opening = self._open_reports
            item.control = control = Control(work.attempt, partial(opening, work) if opening is not None else None)
            context._control.set(control)
            if item.error is not None:
                item.outcome = self._runner.fail(work, item.error)
            else:
                hand.told = 0.0
                hand.since = now
                hand.item = item
                outcome = crew.run(item, work)
                with hand.lock:
                    hand.item = None
                    if hand.abandoned:
                        return False
                item.outcome = outcome
                if (
                    told is not None
                    and told.aborts
                    # One that was ended because of an abort is not just discarded, as one whose partition went is.
                    and (outcome.kind in _ENDS or (outcome.kind == "aborted" and control.aborted == "aborted"))
                ):
                    self._stopped(told, item, work)
        except Exception:
            with hand.lock:
                hand.item = None
                if hand.abandoned:
                    return False
            # A fault of kser itself, not of the task. Unsettled, so that a worker with the cure runs it again.
            record = item.record
            logger.exception("Record %s/%s/%s broke the worker", record.topic, record.partition, record.offset)
            item.outcome = Outcome("broken")
        if item.control is not None:
            item.control.end()
        if item.admitted is not None:
            self._leave(item)
        return True

    def _unless_aborted(self, outcome: Outcome, record: Record) -> Outcome:
        """The outcome of a record that is not run now, or its end: what was aborted waits no longer."""
        told = self._told
        if outcome.kind == "delayed" and told is not None and told.aborts:
            work = self._runner.open(record, early=True)
            if isinstance(work, Work) and (abort := told.aborted(*work.subject)) is not None:
                return self._runner.abort(work, f"was {abort.reason}")
        return outcome

    def _stopped(self, told: ControlWatch, item: Item, work: Work) -> bool:
        """Whether people do not want this to be run, or to count; its outcome is then made."""
        if told.aborts and (abort := told.aborted(*work.subject)) is not None:
            item.outcome = self._runner.abort(work, f"was {abort.reason}")
            return True
        if item.control is None and told.paused_tasks and self._is_paused(told, work):
            item.outcome = Outcome("delayed", again_s=_PAUSED_S)
            return True
        return False

    def _is_paused(self, told: ControlWatch, work: Work) -> bool:
        """Whether people paused the class of this, by whatever name it answers to."""
        if work.kmsg.entrypoint in told.paused_tasks:
            return True
        find = self._runner.controller.find
        return work.cls is not None and any(find(name) is work.cls for name in told.paused_tasks)

    def _run_here(self, item: Item, work: Work) -> Outcome:  # noqa: ARG002 - as for an isolated one
        return self._runner.execute(work)

    def _learn(self, cls: type[Entrypoint] | None) -> _Kind | None:
        """How a class is run; None for one that any thread runs at once."""
        kind = None
        if cls is not None:
            crew = None
            if cls.isolate:
                crew = self._isolated
            elif inspect.iscoroutinefunction(cls.run):
                crew = self._waiting
            with self.lock:
                if cls in self._kinds:
                    return self._kinds[cls]
                gate = None
                if cls.limit:
                    gate = _Gate(cls.limit)
                    self._gates.append(gate)
                if gate is not None or crew is not None or cls.timeout is not None:
                    kind = _Kind(gate, crew, cls.timeout)
                self._kinds[cls] = kind
        else:
            self._kinds[cls] = None
        return kind

    def _pass(self, kind: _Kind, crew: _Crew, item: Item, unit: deque[Item] | None) -> bool:
        """Whether the item may run in this thread now; else it waits, or goes to the threads of its kind."""
        if unit is None:
            unit = deque()
        if kind.gate is not None and item.admitted is None:
            unit.appendleft(item)
            if not kind.gate.admit(unit):
                return False
            unit.popleft()
        if kind.crew is None or kind.crew is crew:
            return True
        unit.appendleft(item)
        kind.crew.put([deque((unit,))])
        return False

    def _leave(self, item: Item) -> None:
        gate, item.admitted = item.admitted, None
        following = gate.leave()
        if following is not None:
            first = following[0]
            kind = self._suspects if first.suspect and first.work.runs else self._kinds[first.work.cls]
            assert kind is not None
            (kind.crew or self._crew).put([deque((following,))])
