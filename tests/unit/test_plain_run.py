"""The short way of a record through Runner, where only run() is the user's, gives what the long way gives."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kser import Message, Operation, OperationRegistry, Result, Task
from kser.context import Control, controlling
from kser.errors import TransportError
from kser.masking import MASK
from kser.retry import Retry
from kser.sequencing.itinerary import METADATA_KEY
from kser.transport import Record
from kser.worker.runner import Runner
from tests.unit.test_plain_step import itineraries, outcomes, texts

registry = OperationRegistry(topic="tasks")


@registry.subscribe(name="nothing")
class Nothing(Task):
    def run(self):
        assert METADATA_KEY not in self.metadata


@registry.subscribe(name="gives")
class Gives(Task):
    def run(self):
        return Result(uuid=self.uuid, retval={"given": self.params, "before": self.result.retval})


@registry.subscribe(name="fails")
class Fails(Task):
    def run(self):
        return Result(uuid=self.uuid, retcode=3, stderr="no")


@registry.subscribe(name="raises")
class Raises(Task):
    def run(self):
        raise ValueError("no")


@registry.subscribe(name="exits")
class Exits(Task):
    def run(self):
        raise SystemExit(2)


@registry.subscribe(name="again")
class Again(Raises):
    retry = Retry(attempts=3)


@registry.subscribe(name="needs")
class Needs(Nothing):
    REQUIRED_FIELDS = ("a",)


@registry.subscribe(name="sends")
class Sends(Task):
    def run(self):
        Nothing(params=self.params).send()
        Gives(metadata=self.metadata).send(topic="elsewhere")


@registry.subscribe(name="hooked")
class Hooked(Task):
    def postinit(self):
        self.metadata = {"set": "by postinit"}

    def run(self):
        pass

    def onsuccess(self, result):
        Nothing(params=self.params).send()
        return Result(uuid=self.uuid, stdout=self.metadata["set"])


@registry.subscribe(name="waits")
class Waits(Task):
    async def run(self):
        return Result(uuid=self.uuid, stdout="async")


@registry.task
def function(a=1):
    return {"a": a}


@registry.subscribe(name="operation")
class Several(Operation):
    def build_tasks(self, **params):
        return [Nothing(), Gives(params=params)]


names = st.sampled_from([*registry.controller.ENTRYPOINTS, "nobody's"])


def runners(*, events):
    made = [Runner(registry.controller, "g", "w", events=events, dead_letters=True) for _ in range(2)]
    made[1]._silent = False
    return made


def timeless(record):
    """The record without what depends on when, and on which line of kser, it was made."""
    if record.topic == "g.events":
        event = json.loads(record.value)
        for name in ("at", "began"):
            event.pop(name, None)
        event.pop("trace", None)
        return record._replace(value=without_stack(event))
    if record.topic == "g.dlq":
        kept = [h for h in record.headers if h[0] not in ("kser-at", "kser-first-failure", "kser-trace")]
        return record._replace(headers=tuple(kept))
    return record._replace(value=without_stack(json.loads(record.value)))


def without_stack(data):
    result = data.get("result") or {}
    if isinstance(error := (result.get("retval") or {}).get("error"), dict):
        error.pop("stack", None)
    return data


def shown(outcome):
    return outcome.kind, outcome.ahead, outcome.again_s, [timeless(record) for record in outcome.records]


@given(
    name=names,
    params=st.dictionaries(st.sampled_from("ab"), st.integers(), max_size=2),
    result=outcomes,
    metadata=st.dictionaries(texts, st.integers(), max_size=1),
    itinerary=st.none() | itineraries,
    headers=st.sampled_from([(), (("kser-redrive", b"1"),), (("kser-group", b"g"), ("kser-attempt", b"2"))]),
    events=st.booleans(),
)
def test_both_ways_give_the_same(name, params, result, metadata, itinerary, headers, events):
    if itinerary is not None:
        metadata = {**metadata, METADATA_KEY: itinerary.dump()}
    value = Message("t", name, params, result, metadata).to_bytes()
    record = Record("tasks", 0, 7, b"k", value, headers, 1)
    short, long = runners(events=events)
    given = []
    for runner in (short, long):
        with controlling(Control(2 if len(headers) == 2 else 1)):
            given.append(runner.run(record))
    assert shown(given[0]) == shown(given[1])
    if given[0].refused is not None:
        error = TransportError("no room")
        told = [[timeless(record) for record in outcome.refused(error)] for outcome in given]
        assert told[0] == told[1]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("nothing", "step.done"),
        ("hooked", "step.done"),
        ("fails", "step.failed"),
        ("nobody's", "step.failed"),
        ("again", "step.retrying"),
    ],
)
@pytest.mark.parametrize("around", ["nothing", "a task after it", "an operation"])
@pytest.mark.parametrize("short", [True, False])
def test_what_ends_or_repeats_a_task_tells_its_params_masked(name, told, around, short):
    """K-33: the history knows them from nowhere else."""
    metadata = {}
    if around != "nothing":
        after = [{"uuid": "n", "entrypoint": "nothing", "params": {}}] if around == "a task after it" else []
        frame = {"uuid": "op", "entrypoint": "operation", "params": {}, "tasks": after}
        metadata = {METADATA_KEY: {"v": 1, "run": 1, "position": 0, "ops": [frame]}}
    runner = runners(events=True)[0 if short else 1]
    for params, shown in (({"of": "A7", "password": "hunter2"}, {"of": "A7", "password": MASK}), ({}, None)):
        value = Message("t", name, params, None, metadata).to_bytes()
        record = Record("tasks", 0, 7, b"k", value, (), 1)
        with controlling(Control(1)):
            outcome = runner.run(record)
            refused = outcome.refused(TransportError("no room"))
        assert (told, shown) in params_told(outcome.records)
        assert all(found == shown for kind, found in params_told(refused) if kind == "step.failed")
        aborted = runner.abort(runner.open(record), "was aborted")
        assert ("step.aborted", shown) in params_told(aborted.records)


def params_told(records):
    events = [json.loads(record.value) for record in records if record.topic == "g.events"]
    return [(event["type"], event.get("params")) for event in events if event["uuid"] == "t"]


class TestChanged:
    """What somebody changes is seen while a worker runs: of a controller at the next chunk, of a task at once."""

    @pytest.fixture
    def mine(self):
        return OperationRegistry(topic="tasks")

    @pytest.fixture
    def seen(self, mine):
        """A task class that does nothing."""

        @mine.subscribe
        class Seen(Task):
            def run(self):
                pass

        return Seen

    def record(self, task):
        return Record("tasks", 0, 0, None, task.to_Message().to_bytes(), (), 1)

    def test_a_hook_of_the_controller(self, mine, seen):
        runner, record, uuids = Runner(mine.controller, "g", events=False), self.record(seen()), []
        assert runner._silent
        assert runner.run(record).kind == "done"
        type(mine.controller).onsuccess = classmethod(lambda cls, kmsg, result: uuids.append(kmsg.uuid))
        runner.look()
        runner.run(record)
        assert len(uuids) == 1

    def test_a_hook_of_the_class(self, mine, seen):
        runner, record, uuids = Runner(mine.controller, "g", events=False), self.record(seen()), []
        runner.run(record)
        seen.postinit = lambda self: uuids.append(self.uuid)
        runner.run(record)
        assert len(uuids) == 1

    def test_a_transport_of_its_own_is_asked(self, mine, seen):
        class Backwards(Message):
            @classmethod
            def loads(cls, json_data):
                return super().loads(json_data[::-1])

        type(mine.controller).TRANSPORT = Backwards
        record = self.record(seen())
        record = record._replace(value=record.value[::-1])
        assert Runner(mine.controller, "g", events=False).run(record).kind == "done"

    def test_messages_that_go_well_are_logged(self, mine, seen, caplog):
        runner = Runner(mine.controller, "g", events=False)
        caplog.set_level("INFO")
        runner.look()
        runner.run(self.record(seen()))
        assert ".Success: " in caplog.text
