"""Rows never depend on the order in which things are told, on batches, or on repetitions: for any history."""

import random
from collections.abc import Sequence

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from kser.storage.folding import fold
from kser.storage.memory import MemoryStorage
from kser.storage.projection import Projection
from kser.storage.records import Told, parse
from kser.transport import Record
from tests.recording import START_MS, Tape, result, snapshot

#: Each example makes two databases: to look for a smaller one takes minutes.
GENERATE = [Phase.explicit, Phase.reuse, Phase.generate]
UUIDS = ["op", "op/0", "op/1", "in"]
KINDS = [
    *("operation.started", "step.done", "step.failed", "step.aborted", "step.retrying", "operation.ended"),
    *("message.waiting", "message.rejected", "message.dead_lettered", "run.sent"),
]
STATUS = {
    "step.done": "SUCCESS",
    "step.aborted": "ABORTED",
    "step.retrying": "PENDING",
    "message.waiting": "PENDING",
    "run.sent": "PENDING",
}


@st.composite
def tapes(draw):
    tape = Tape()
    for _ in range(draw(st.integers(1, 14))):
        uuid, run = draw(st.sampled_from(UUIDS)), draw(st.integers(1, 3))
        said = {"run": run, "position": UUIDS.index(uuid), "operation": "op", "attempt": draw(st.integers(1, 2))}
        said |= {"parent": None if uuid == "op" else "op", "worker": draw(st.sampled_from(["w1", "w2"]))}
        if draw(st.booleans()):
            kind = draw(st.sampled_from(["task.started", "task.log", "task.progress"]))
            more = {"task.log": {"level": 20, "message": "m"}, "task.progress": {"current": 1, "total": 2}}.get(
                kind, {}
            )
            tape.telemetry(kind, uuid, n=draw(st.integers(0, 3)), began=START_MS, **more, **said)
        else:
            kind = draw(st.sampled_from(KINDS))
            status = STATUS.get(kind, "RUNNING" if kind == "operation.started" else "FAILED")
            given = (
                result(uuid, 0 if status == "SUCCESS" else 500)
                if kind not in ("operation.started", "run.sent")
                else None
            )
            params = {"run": run} if kind == "operation.started" else {}
            tape.event(
                kind, uuid, status=status, result=given, params=params, note=draw(st.sampled_from(["", "n"])), **said
            )
    # Somewhere, maybe last of all, is what every operation's history has.
    tape.event("operation.started", "op", status="RUNNING", operation="op", run=draw(st.integers(1, 3)))
    return tape


def told(records: Sequence[Record]) -> list[Told]:
    found = [parse(record, "c") for record in records]
    return [each for each in found if isinstance(each, Told)]


@given(tapes(), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=200)
def test_what_events_of_one_uuid_say_does_not_depend_on_their_order(tape, order: random.Random):
    for uuid in UUIDS:
        events = [event for event in told(tape.records) if event.uuid == uuid]
        shuffled = list(events)
        order.shuffle(shuffled)
        assert fold(events) == fold(shuffled)


@given(tapes())
@settings(deadline=None, max_examples=200)
def test_the_newest_run_and_the_first_end_in_it_decide_the_status(tape):
    """Said once more, in other words than the code's."""
    for uuid in UUIDS:
        events = [event for event in told(tape.records) if event.uuid == uuid and event.type != "message.dead_lettered"]
        folded = fold(events)
        if not events:
            assert folded is None
            continue
        run = max(event.run for event in events)
        ends = [
            event
            for event in events
            if (event.run == run and event.type in ("step.done", "step.failed", "step.aborted", "operation.ended"))
            or (event.run == run and event.type == "message.rejected")
        ]
        assert folded["run"] == run
        assert folded["finished"] == bool(ends)
        if ends:
            assert folded["status"] == ends[0].data["status"]
        else:
            assert folded["status"] in ("RUNNING", "PENDING")


@given(tapes(), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.too_slow], phases=GENERATE)
def test_any_interleaving_of_partitions_in_any_batches_gives_the_same_rows(tape, order: random.Random):
    """What lies in one partition comes in its order; nothing else is known. Some records come twice."""
    lanes = {place: [record for record in tape.records if record.of == place] for place in tape.partitions}
    mixed = []
    while any(lanes.values()):
        place = order.choice([place for place, lane in lanes.items() if lane])
        mixed.append(lanes[place].pop(0))
    one, other = recorded(tape, mixed, lambda: order.randint(1, 4)), recorded(tape, tape.records, lambda: 1000)
    # Of what only telemetry tells, and no event, a row shows what came first.
    decided = {event.uuid for event in told(tape.records) if event.type != "message.dead_lettered"}
    for held in (one, other):
        held["build"] = [row for row in held["build"] if row["uuid"] in decided]
    for a, b in zip(one["build"], other["build"], strict=True):
        assert a == b
    assert one == other


def recorded(tape, records, size):
    storage = MemoryStorage()
    try:
        projection = Projection(storage.database, "c", "shop")
        projection.positions(tape.partitions)
        at = 0
        while at < len(records):
            step = size()
            projection.apply(records[at : at + step])
            projection.apply(records[max(at - 3, 0) : at + step])
            at += step
        projection.close_dead()
        return snapshot(storage)
    finally:
        storage.close()
