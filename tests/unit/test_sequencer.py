"""Operations by messages (K-47, K-48, K-54 to K-56, K-66 to K-68, K-99; DESIGN.md "The end of an operation").

Groups of workers without a broker: each topic has one worker with a controller of its own, and nothing is shared.
"""

import logging
import sys
from types import SimpleNamespace

import pytest

from kser import Controller, Message, Operation, OperationRegistry, Result, Status, Task
from kser.events import Event, EventType
from kser.results import is_success
from kser.sequencing.itinerary import MAX_DEPTH, METADATA_KEY, Itinerary
from tests.unit.fakes import Group, raw, record
from tests.unit.test_contracts_messages import Reversed

STARTED, DONE, FAILED, ENDED = (
    EventType.OPERATION_STARTED,
    EventType.STEP_DONE,
    EventType.STEP_FAILED,
    EventType.OPERATION_ENDED,
)


@pytest.fixture
def registry():
    made = OperationRegistry(topic="work")
    made.configure(producer=Group({"work": made.controller}))
    return made


@pytest.fixture
def group(registry):
    return registry.producer


@pytest.fixture
def step(registry):
    """A task that notes its number, and fails where it is told to."""

    @registry.subscribe
    class Step(Task):
        def run(self):
            n = self.params["n"]
            if n == self.params.get("fails"):
                raise ValueError(f"step {n}")
            return Result(uuid=self.uuid, stdout=f"step {n}", retval={f"s{n}": True})

    return Step


@pytest.fixture
def three(registry, step):
    """An operation of three steps that notes what is done with it."""

    @registry.subscribe
    class Three(Operation):
        noted = []  # noqa: RUF012

        def build_tasks(self, **kwargs):
            return [step(params={"n": n, "fails": kwargs.get("fails")}) for n in range(3)]

        def set_status(self, status, result=None):
            self.noted.append(("set_status", f"{self.status}->{status}", None if result is None else result.retcode))
            super().set_status(status, result)

        def onsuccess(self, result):
            self.noted.append(("onsuccess", [str(t.status) for t in self.tasks], result.stdout))
            return result

        def onerror(self, result):
            self.noted.append(("onerror", [str(t.status) for t in self.tasks], result.stderr))
            return result

    return Three


def told(group):
    return [(e.type, e.status) for e in group.events]


# -- from the start to the end ---------------------------------------------------------------------------------------


def test_k47_k48_a_launched_operation_goes_on_by_messages_to_its_end(group, three):
    operation = three().build()
    tasks = [task.uuid for task in operation.tasks]
    operation.launch()
    assert len(group.messages) == 1  # nothing but the first task leaves the service
    three.noted.clear()
    for n in range(3):
        assert [Message.loads(m.value).uuid for m in group.messages] == tasks[: n + 1]
        group.run_one()
    assert not group.queue
    assert told(group) == [
        (STARTED, "RUNNING"), (DONE, "SUCCESS"), (DONE, "SUCCESS"), (DONE, "SUCCESS"), (ENDED, "SUCCESS"),
    ]  # fmt: skip
    end = group.end_of(operation.uuid)
    assert (end.result.stdout, end.result.retval) == ("step 2", {"s0": True, "s1": True, "s2": True})
    assert (end.entrypoint, end.operation, end.parent, end.note) == (three.path, operation.uuid, None, "")
    assert three.noted == [("set_status", "RUNNING->SUCCESS", 0), ("onsuccess", ["SUCCESS"], "step 2")]


def test_k66_the_message_of_an_operation_launches_it_and_its_onsuccess_runs_at_the_end(group, three):
    three(uuid="op", params={"x": 1}).send()
    three.noted.clear()
    group.run_one()
    assert [event.type for event in group.events] == [STARTED]
    assert group.events[0].params == {"x": 1}
    assert three.noted == [("set_status", "PENDING->RUNNING", None)]
    group.run()
    assert [note[0] for note in three.noted] == ["set_status", "set_status", "onsuccess"]
    assert group.end_of("op").status == "SUCCESS"
    assert [e.position for e in group.events] == [0, 0, 1, 2, 3]


def test_k56_k68_a_failed_task_ends_the_operation_and_is_named(group, three, step):
    operation = three(params={"fails": 1}).build(fails=1)
    operation.launch()
    three.noted.clear()
    group.run()
    end = group.end_of(operation.uuid)
    assert told(group)[-2:] == [(FAILED, "FAILED"), (ENDED, "FAILED")]
    assert len(group.steps) == 2
    assert (end.result.uuid, end.result.stderr) == (operation.uuid, "step 1")
    assert end.result.retval["failed_task"] == {"uuid": operation.tasks[1].uuid, "path": step.path}
    assert three.noted == [
        ("set_status", "RUNNING->FAILED", 500), ("onerror", ["FAILED", "PENDING"], "step 1"),
    ]  # fmt: skip


def test_k22_what_each_task_gives_is_forwarded(group, registry):
    @registry.task
    def add(to):
        from kser.context import current_task

        return {"sum": current_task().result.retval.get("sum", 0) + to}

    operation = Operation(tasks=[add(params={"to": n}) for n in (1, 10, 100)], result=Result(retval={"given": 1}))
    operation.launch()
    group.run()
    assert group.end_of(operation.uuid).result.retval["sum"] == 111


def test_k99_every_message_of_an_operation_has_its_key_and_the_groups_header(group, three, registry):
    for key in (None, "customer 7"):
        group.messages.clear()
        group.events.clear()
        operation = Operation(tasks=[three(), three().build()], key=key)
        operation.launch()
        group.run()
        assert len(group.messages) == 8
        assert {m.key for m in group.messages} == {(key or operation.uuid).encode()}
        assert {bytes(m.header("kser-group") or b"") for m in group.messages[1:]} == {b"g"}
        assert {e.key for e in group.events} == {operation.uuid}


def test_the_own_topics_and_keys_of_tasks_are_kept():
    registry = OperationRegistry(topic="work")
    group = Group({"work": registry.controller, "slow": registry.controller})
    registry.configure(producer=group)

    @registry.subscribe
    class Quick(Task):
        def run(self):
            return None

    @registry.subscribe(topic="slow")
    class Slow(Quick):
        key = "own key"

    Operation(uuid="op", tasks=[Quick(), Slow(), Quick()]).launch()
    group.run()
    assert [(m.topic, m.key) for m in group.messages] == [("work", b"op"), ("slow", b"own key"), ("work", b"op")]
    assert group.end_of("op").status == "SUCCESS"


def test_an_operation_composed_by_hand_needs_no_class_of_its_own(group, step):
    operation = Operation(uuid="op", tasks=[step(params={"n": n}) for n in range(2)])
    operation.launch()
    group.run()
    assert group.end_of("op").status == "SUCCESS"
    assert group.end_of("op").note == ""


# -- nested ----------------------------------------------------------------------------------------------------------


def test_a_nested_operation_is_one_entry_until_it_is_reached(group, three, step):
    """DESIGN.md 3: expanded by the worker that reaches it."""
    outer = Operation(uuid="outer", tasks=[step(params={"n": "a"}), three(uuid="inner"), step(params={"n": "z"})])
    outer.launch()
    assert [e["uuid"] for e in group.itinerary(0).root.tasks] == ["inner", outer.tasks[2].uuid]
    assert "tasks" not in group.itinerary(0).root.tasks[0]
    group.run()
    assert [e.result.stdout for e in group.steps] == ["step a", "step 0", "step 1", "step 2", "step z"]
    assert [e.parent for e in group.steps] == ["outer", "inner", "inner", "inner", "outer"]
    assert {e.operation for e in group.steps} == {"outer"}
    inner, end = group.end_of("inner"), group.end_of("outer")
    assert (inner.status, inner.parent, inner.operation) == ("SUCCESS", "outer", "outer")
    assert group.events.index(inner) < group.events.index(end)
    assert end.result.retval == {f"s{n}": True for n in ("a", 0, 1, 2, "z")}
    assert [e.uuid for e in group.of(STARTED)] == ["outer", "inner"]


def test_an_operation_built_before_nesting_carries_its_children(group, three, step):
    inner = three(uuid="inner").build()
    inner.add_task(step(params={"n": "extra"}))
    outer = Operation(uuid="outer", tasks=[inner])
    outer.launch()
    group.run()
    assert [e.uuid for e in group.steps] == [task.uuid for task in inner.tasks]
    assert group.end_of("outer").result.retval["sextra"] is True


def test_k68_a_failure_inside_ends_every_operation_around_it(group, three, step):
    inner = three(uuid="inner", params={"fails": 1})
    outer = Operation(uuid="outer", tasks=[Operation(uuid="middle", tasks=[inner]), step(params={"n": "never"})])
    outer.launch()
    group.run()
    failing = group.steps[-1]
    assert [(e.uuid, e.status) for e in group.of(ENDED)] == [
        ("inner", "FAILED"),
        ("middle", "FAILED"),
        ("outer", "FAILED"),
    ]
    for event in group.of(ENDED):
        assert event.result.retval["failed_task"] == {"uuid": failing.uuid, "path": step.path}
        assert event.result.uuid == event.uuid


def test_an_operation_that_builds_itself_is_bounded(group, registry):
    @registry.subscribe
    class Selfish(Operation):
        def build_tasks(self, **kwargs):
            return [Selfish()]

    Selfish(uuid="root").send()
    group.run(at_most=MAX_DEPTH + 1)
    ended = group.of(ENDED)
    assert len(ended) == MAX_DEPTH + 1
    assert {e.status for e in ended} == {"FAILED"}
    assert ended[-1].uuid == "root"
    assert "does an operation build itself as its own task?" in ended[-1].result.stderr


def test_an_operation_of_10000_tasks_stays_under_64_kib_a_message(registry, group, caplog):
    """Issue 3: 100 operations of 100 tasks, all of them driven to the end."""
    caplog.set_level(logging.ERROR, logger="kser")

    @registry.subscribe
    class Leaf(Task):
        def run(self):
            return None

    @registry.subscribe
    class Hundred(Operation):
        def build_tasks(self, **kwargs):
            kind = Hundred if kwargs["depth"] else Leaf
            return [kind(params={"depth": 0, "n": n}) for n in range(100)]

    Hundred(uuid="root", params={"depth": 1}).send()
    group.run()
    assert len(group.of(DONE)) == 10_000
    assert len({e.uuid for e in group.of(DONE)}) == 10_000
    assert [e.position for e in group.of(DONE)] == list(range(10_000))
    assert len(group.of(ENDED)) == 101
    assert group.end_of("root").status == "SUCCESS"
    assert len(group.messages) == 10_101
    assert max(len(m.value) for m in group.messages) < 64 * 1024


# -- ids -------------------------------------------------------------------------------------------------------------


def test_a_redelivered_message_makes_the_same_records_again():
    """Ids of children that a worker builds are derived; so is what tasks, operations and hooks send."""

    class Hooked(Controller):
        @classmethod
        def onsuccess(cls, kmsg, result):
            if kmsg.entrypoint == Sends.path:
                note(params={"n": "by the controller"}).send()
            return result

    registry = OperationRegistry(controller_class=Hooked, topic="work")
    group = Group({"work": registry.controller})
    registry.configure(producer=group)

    @registry.task
    def note(n):
        return {"n": n}

    @registry.subscribe
    class Two(Operation):
        def build_tasks(self, **kwargs):
            return [note(params={"n": "one"}), note(params={"n": "two"})]

    @registry.subscribe
    class Sends(Task):
        def postinit(self):
            self.early = note(params={"n": "made in postinit"})

        def run(self):
            self.early.send()
            note(params={"n": "sent"}).send()
            Two().send()
            Operation(tasks=[note(params={"n": "launched"}), Two().build()]).launch()

        def onsuccess(self, result):
            note(params={"n": "by a hook"}).send()
            return result

    @registry.subscribe
    class Grows(Two):
        def postinit(self):
            self.early = note(params={"n": "made in postinit"})

        def prebuild(self, **kwargs):
            note(params={"n": "by prebuild"}).send()

        def next(self, task):
            return super().next(task) or (note(params={"n": "more"}) if task.params["n"] == "two" else None)

        def onsuccess(self, result):
            self.early.send()
            note(params={"n": "at the end"}).send()
            return result

    Operation(uuid="op", tasks=[Sends(uuid="sends"), Grows(uuid="grows")]).launch()
    runner = group.runners["work"]
    while group.queue:
        once, again = (runner.run(group.queue[0]) for _ in range(2))
        assert [r for r in once.records if r.topic != "g.events"] == [r for r in again.records if r.topic != "g.events"]
        group.run_one()
    notes = [Message.loads(m.value).params.get("n") for m in group.messages]
    assert {"by the controller", "made in postinit", "sent", "launched", "by a hook", "by prebuild", "more"} < set(
        notes
    )
    uuids = [Message.loads(m.value).uuid for m in group.messages]
    assert len(set(uuids)) == len(uuids)
    assert {e.status for e in group.of(ENDED)} == {"SUCCESS"}


def test_two_hooks_never_make_the_same_id(registry, group, step):
    """Ids made in postinit(), run() and at the end differ, also where the counts start anew."""

    @registry.subscribe
    class Op(Operation):
        def postinit(self):
            self.early = [step(params={"n": "p"}) for _ in range(3)]

        def build_tasks(self, **kwargs):
            return [*self.early, *(step(params={"n": "b"}) for _ in range(3))]

    Op().send()
    group.run()
    assert len({e.uuid for e in group.steps}) == 6


# -- how the end is handled ------------------------------------------------------------------------------------------


@pytest.fixture
def split():
    """Two topics: "ops", where everything is known, and "steps", where only the step is."""
    everything, only_steps = OperationRegistry(topic="ops"), OperationRegistry()
    group = Group({"ops": everything.controller, "steps": only_steps.controller})
    everything.configure(producer=group)

    @everything.subscribe(topic="steps")
    class FarStep(Task):
        def run(self):
            if self.params.get("fails"):
                raise ValueError("far")
            return Result(stdout="far", retval={"x": self.params.get("x")})

    noted = []

    @everything.subscribe
    class Noted(Operation):
        def build_tasks(self, **kwargs):
            return [FarStep(params=kwargs)]

        def set_status(self, status, result=None):
            noted.append((f"{self.status}->{status}", [t.uuid for t in self.tasks]))
            super().set_status(status, result)

        def onsuccess(self, result):
            noted.append(("onsuccess", result.stdout))
            return result

        def onerror(self, result):
            noted.append(("onerror", result.stderr))
            return result

    only_steps.controller.register(FarStep.path, FarStep)
    return SimpleNamespace(group=group, kind=Noted, far_step=FarStep, noted=noted, everything=everything)


def test_an_end_seen_where_the_class_is_unknown_is_handled_on_the_operations_topic(split):
    group, kind, noted = split.group, split.kind, split.noted
    operation = kind(params={"x": 1}).build()
    operation.launch()
    noted.clear()
    group.run_one()
    assert noted == []
    assert [e.type for e in group.events] == [STARTED, DONE]
    assert [m.topic for m in group.messages] == ["steps", "ops"]
    assert group.messages[1].key == operation.uuid.encode()
    group.run()
    task = operation.tasks[0].uuid
    assert noted == [("RUNNING->SUCCESS", [task]), ("onsuccess", "far")]
    end = group.end_of(operation.uuid)
    assert (end.status, end.result.retval, end.note, end.position) == ("SUCCESS", {"x": 1}, "", 1)


@pytest.mark.parametrize("fails", [False, True])
def test_an_operation_whose_class_has_no_say_in_its_end_ends_wherever_its_last_task_does(split, registry, fails):
    class Plain(Operation):
        def build_tasks(self, **kwargs):
            return [split.far_step(params=kwargs)]

    split.everything.subscribe(Plain)
    operation = Plain(params={"fails": fails}).build()
    operation.launch()
    split.group.run()
    assert [m.topic for m in split.group.messages] == ["steps"]
    end = split.group.end_of(operation.uuid)
    assert (end.status, end.note) == ("FAILED" if fails else "SUCCESS", "")
    assert ("failed_task" in end.result.retval) is fails


def test_an_end_whose_class_nobody_here_knows_waits_for_a_worker_of_the_topic_that_does(split):
    """While a new release is rolled out one worker of a topic knows it, and another one not yet."""
    group, kind, noted = split.group, split.kind, split.noted
    operation = kind(params={"x": 1}).build()
    operation.topic = "steps"
    operation.launch()
    group.run_one()
    (end,) = group.queue
    assert end.topic == "steps"
    noted.clear()
    group.runners["steps"].wait_s = 60
    outcome = group.runners["steps"].run(end)
    assert (outcome.kind, outcome.again_s) == ("waiting", 10)
    told = Event.loads(outcome.records[0].value)
    assert (told.type, told.uuid, told.operation, told.parent) == (
        *(EventType.MESSAGE_WAITING, operation.uuid),
        *(operation.uuid, None),
    )
    assert kind.path in told.note
    group.runners["steps"] = group.runners["ops"]  # the new release
    group.run()
    assert [name for name, _ in noted] == ["RUNNING->SUCCESS", "onsuccess"]
    assert group.end_of(operation.uuid).note == ""


def test_a_failed_end_is_handed_over_too_and_names_the_task(split):
    group, kind, far_step, noted = split.group, split.kind, split.far_step, split.noted
    operation = kind(params={"fails": True}).build()
    operation.launch()
    noted.clear()
    group.run()
    end = group.end_of(operation.uuid)
    assert noted == [("RUNNING->FAILED", [operation.tasks[0].uuid]), ("onerror", "far")]
    assert end.result.retval["failed_task"] == {"uuid": operation.tasks[0].uuid, "path": far_step.path}


def test_nested_ends_are_handed_over_and_the_sequence_goes_on(split):
    group, kind = split.group, split.kind
    outer = kind(uuid="outer", tasks=[kind(uuid="a", params={"x": 1}), kind(uuid="b", params={"x": 2}).build()])
    outer.launch()
    group.run()
    assert [e.uuid for e in group.of(ENDED)] == ["a", "b", "outer"]
    assert {e.status for e in group.events if e.type == ENDED} == {"SUCCESS"}
    assert group.end_of("outer").result.retval == {"x": 2}


def test_an_end_message_that_is_redelivered_gives_the_same(split):
    group, kind = split.group, split.kind
    kind(uuid="outer", tasks=[kind(uuid="a"), kind(uuid="b")]).launch()
    group.run()
    for message in group.messages:
        once, again = (group.runners[message.topic].run(message) for _ in range(2))
        assert [r for r in once.records if r.topic != "g.events"] == [r for r in again.records if r.topic != "g.events"]


@pytest.mark.parametrize("fails", [False, True])
def test_an_end_that_no_worker_of_the_topic_knows_is_told_with_a_note(split, fails, caplog):
    group, kind, noted = split.group, split.kind, split.noted
    group.runners["ops"] = group.runners["steps"]  # a deployment without the operation's class
    operation = kind(params={"fails": fails}).build()
    operation.launch()
    noted.clear()
    group.run()
    end = group.end_of(operation.uuid)
    assert end.note == f"hooks not run: {kind.path} is not registered on the worker that saw the end"
    assert end.status == ("FAILED" if fails else "SUCCESS")
    assert ("failed_task" in end.result.retval) is fails
    assert noted == []
    assert f"Operation {kind.path}[{operation.uuid}] ended {end.status} without its hooks" in caplog.text


def test_an_operation_around_one_that_is_not_known_goes_on(split, registry):
    """The unknown one is a step of it, whatever its hooks would have said."""
    group, kind, far_step = split.group, split.kind, split.far_step
    outer = Operation(uuid="outer", tasks=[kind(uuid="inner").build(), far_step(params={"x": "last"})])
    outer.topic = "steps"  # both are on a topic whose worker knows only the step
    outer.tasks[0].topic = "steps"
    outer.launch()
    group.run_one()  # the message of the nested operation: not registered here, it fails
    assert group.end_of("outer").status == "FAILED"
    assert "not registred" in group.end_of("outer").result.stderr


def test_an_end_that_does_not_fit_with_its_result_is_told_with_the_reason(split):
    group, kind, noted = split.group, split.kind, split.noted
    operation = kind(params={"x": "y" * 30_000}).build()
    operation.launch()
    for runner in group.runners.values():
        runner.sequencer.limit = len(group.messages[0].value) + 500
    noted.clear()
    group.run()
    end = group.end_of(operation.uuid)
    assert end.status == "FAILED"
    assert "put what is large somewhere else" in end.result.stderr
    assert [name for name, _ in noted] == ["RUNNING->FAILED", "onerror"]


def test_an_end_that_no_message_can_tell_is_told_where_it_was_seen(split, caplog):
    group, kind = split.group, split.kind
    operation = kind(params={"x": "y" * 30_000}).build()
    operation.launch()
    group.runners["steps"].sequencer.limit = 1000
    group.run()
    end = group.end_of(operation.uuid)
    assert end.status == "SUCCESS"
    assert "its end message cannot be sent" in end.note
    assert "without its hooks" in caplog.text


def test_an_onsuccess_that_raises_at_the_end_fails_the_operation(group, three, registry):
    class Raises(three):
        def onsuccess(self, result):
            raise ValueError("at the end")

    registry.subscribe(Raises)
    outer = Operation(uuid="outer", tasks=[Raises(uuid="op")])
    outer.launch()
    three.noted.clear()
    group.run()
    assert (group.end_of("op").status, group.end_of("op").result.stderr) == ("FAILED", "at the end")
    assert group.end_of("outer").status == "FAILED"
    assert [n[1] for n in three.noted if n[0] == "set_status"] == [
        "PENDING->RUNNING", "RUNNING->SUCCESS", "RUNNING->FAILED",
    ]  # fmt: skip


def test_an_onerror_may_turn_the_end_round(group, three, registry):
    class Compensates(three):
        def onerror(self, result):
            return Result(stdout=f"compensated {result.retval['failed_task']['path']}")

    registry.subscribe(Compensates)
    outer = Operation(uuid="outer", tasks=[Compensates(uuid="op", params={"fails": 0})])
    outer.launch()
    group.run()
    assert group.end_of("op").status == "SUCCESS"
    assert group.end_of("outer").result.stdout.startswith("compensated ")


@pytest.mark.parametrize("when", ["RUNNING", "SUCCESS", "FAILED"])
@pytest.mark.parametrize("exc", [OSError("no database"), SystemExit(3)])
def test_a_set_status_that_raises_never_stops_the_worker_and_the_operation_ends(group, three, registry, when, exc):
    class Unnoted(three):
        def set_status(self, status, result=None):
            if status == when:
                raise exc
            super().set_status(status, result)

    registry.subscribe(Unnoted)
    Unnoted(uuid="op", params={"fails": 1 if when == "FAILED" else None}).send()
    group.run()
    end = group.end_of("op")
    assert end.status == "FAILED"
    assert end.result.stderr


@pytest.mark.parametrize("hook", ["prebuild", "build_tasks", "prerun", "postinit", "__init__"])
@pytest.mark.parametrize("exc", [ValueError("broken"), SystemExit(3)])
def test_a_hook_that_raises_before_the_first_task_fails_the_operation(group, three, registry, hook, exc):
    def broken(self, *args, **kwargs):
        raise exc

    made = registry.subscribe(type("Made", (three,), {hook: broken}))
    send = Message("op", made.path)
    group.send("work", send)
    group.run()
    told_end = [e for e in group.events if e.uuid == "op"][-1]
    assert told_end.status == "FAILED"
    assert "broken" in told_end.result.stderr or "SystemExit: 3" in told_end.result.stderr
    assert group.queue == type(group.queue)()


@pytest.mark.parametrize("hook", ["next", "onsuccess", "postinit", "__init__"])
@pytest.mark.parametrize("exc", [ValueError("broken"), SystemExit(3)])
def test_a_hook_that_raises_at_the_end_ends_the_operation_and_not_the_worker(group, step, registry, hook, exc):
    """At the end the operation is made again, on whichever worker it is: its constructor may fail there only."""
    ready = []

    def broken(self, *args, **kwargs):
        if ready:
            raise exc
        return Operation.__init__(self, *args, **kwargs) if hook == "__init__" else None

    made = registry.subscribe(type("Made", (Operation,), {hook: broken}))
    operation = made(uuid="op", tasks=[step(params={"n": 1})])
    operation.launch()
    ready.append(True)
    group.run()
    end = group.end_of("op")
    assert end.status == "FAILED"
    assert "broken" in end.result.stderr or "SystemExit: 3" in end.result.stderr
    if hook == "__init__":
        assert end.note == f"hooks not run: {made.path} cannot be made on the worker that saw the end"


def test_k67_an_operation_without_tasks_fails(group, registry):
    registry.subscribe(type("Empty", (Operation,), {}))
    (kind,) = registry.tasks().values()
    kind(uuid="op").send()
    group.run()
    assert told(group) == [(STARTED, "RUNNING"), (ENDED, "FAILED")]
    assert (group.end_of("op").result.retcode, group.end_of("op").result.stderr) == (
        1, "Nothing to do, empty operation !",
    )  # fmt: skip


def test_k18_a_missing_parameter_of_a_nested_operation_fails_both(group, three, registry):
    needs = registry.subscribe(type("Needs", (three,), {"REQUIRED_FIELDS": ("order",)}))
    Operation(uuid="outer", tasks=[needs(uuid="inner")]).launch()
    group.run()
    assert group.end_of("inner").result.stderr == f"Missing parameter: order for {needs.path}"
    assert group.end_of("outer").status == "FAILED"
    assert group.end_of("outer").result.retval["failed_task"] == {"uuid": "inner", "path": needs.path}


# -- next() ----------------------------------------------------------------------------------------------------------


def test_k54_next_may_add_tasks_as_the_operation_goes(group, step, registry):
    """The worker that finishes the last task asks next(): a loop until something is good enough, say."""

    @registry.subscribe
    class Loop(Operation):
        def build_tasks(self, **kwargs):
            return [step(params={"n": 0})]

        def next(self, task):
            n = task.params["n"]
            if n == 2:
                self.add_task(step(params={"n": "a"}))
                self.add_task(step(params={"n": "b"}))
                return super().next(task)
            return step(params={"n": n + 1}) if n in (0, 1) else None

    outer = Operation(uuid="outer", tasks=[Loop(uuid="loop"), step(params={"n": "z"})])
    outer.launch()
    group.run()
    assert [e.result.stdout for e in group.steps] == [f"step {n}" for n in (0, 1, 2, "a", "b", "z")]
    assert group.end_of("loop").status == group.end_of("outer").status == "SUCCESS"


@pytest.mark.parametrize("odd", ["text", 5])
def test_a_next_that_gives_no_task_fails_the_operation(group, step, registry, odd):
    made = registry.subscribe(type("Odd", (Operation,), {"next": lambda self, task: odd}))
    made(uuid="op", tasks=[step(params={"n": 1})]).launch()
    group.run()
    assert group.end_of("op").status == "FAILED"


def test_a_next_that_names_a_task_that_is_success_already_ends_it(group, step, registry):
    made = registry.subscribe(type("Done", (Operation,), {"next": lambda self, task: task}))
    made(uuid="op", tasks=[step(params={"n": 1})]).launch()
    group.run()
    assert group.end_of("op").status == "SUCCESS"


def test_k65_tasks_that_are_success_already_are_not_sent(group, step, registry):
    """Resume by hand: what they gave is forwarded."""

    @registry.subscribe
    class Resumed(Operation):
        def build_tasks(self, **kwargs):
            done = step(params={"n": 0}, status="SUCCESS", result=Result(stdout="stored", retval={"stored": True}))
            return (
                [done] if kwargs.get("all") else [done, step(params={"n": 1}), step(params={"n": 2}, status="SUCCESS")]
            )

    Resumed(uuid="op").send()
    Resumed(uuid="all", params={"all": True}).send()
    group.run()
    assert [e.result.stdout for e in group.steps] == ["step 1"]
    assert group.end_of("op").result.retval == {"stored": True, "s1": True}
    assert (group.end_of("all").status, group.end_of("all").result.stdout) == ("SUCCESS", "stored")


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("how", ["launch", "send"])
def test_k65_what_is_success_already_in_an_operation_composed_by_hand_is_not_run_again(group, step, how, nested):
    done = step(params={"n": 0}, status="SUCCESS", result=Result(stdout="stored", retval={"stored": True}))
    later = step(params={"n": 2}, status="SUCCESS", result=Result(stdout="later"))
    operation = Operation(uuid="op", tasks=[done, step(params={"n": 1}), later, step(params={"n": 3})])
    if nested:
        operation = Operation(uuid="outer", tasks=[operation])
    getattr(operation, how)()
    group.run()
    assert [e.result.stdout for e in group.steps] == ["step 1", "step 3"]
    assert group.end_of("op").result.retval == {"stored": True, "s1": True, "s3": True}
    assert {e.status for e in group.of(ENDED)} == {"SUCCESS"}


def test_an_operation_that_is_done_already_ends_when_it_is_launched(group, step):
    operation = Operation(tasks=[step(status="SUCCESS", result=Result(stdout="stored"))])
    assert operation.launch().stdout == "stored"
    assert operation.status == "SUCCESS"
    assert not group.messages


# -- messages that cannot be sent ------------------------------------------------------------------------------------


def test_a_next_message_that_grew_over_the_limit_ends_the_operation_with_size_limit_and_cure(registry):
    group = Group({"work": registry.controller}, limit=5000)
    registry.configure(producer=group)

    @registry.subscribe
    class Grows(Task):
        def run(self):
            return Result(retval={self.uuid: "x" * 3000})

    operation = Operation(uuid="op", tasks=[Grows() for _ in range(4)])
    operation.launch()
    group.run()
    end = group.end_of("op")
    assert [e.status for e in group.steps] == ["SUCCESS", "SUCCESS"]
    assert (end.status, end.result.retcode) == ("FAILED", 413)
    error = end.result.retval["error"]
    assert error["extra"]["limit"] == 5000
    assert error["extra"]["size"] > 5000
    for words in (f"has {error['extra']['size']} bytes, the limit is 5000", "pass a reference", "nest operations"):
        assert words in end.result.stderr
    assert end.result.retval["failed_task"]["uuid"] == operation.tasks[1].uuid


def test_a_result_that_is_no_json_ends_the_operation_and_names_the_field(group, registry, step):
    @registry.subscribe
    class Odd(Task):
        def run(self):
            return Result(retval={"when": {1, 2}})

    Operation(uuid="op", tasks=[Odd(), step(params={"n": 1})]).launch()
    group.run()
    end = group.end_of("op")
    assert (end.status, end.result.retcode) == ("FAILED", 400)
    assert "result.retval['when'] is of type set" in end.result.stderr


def test_params_that_are_no_json_fail_the_operation_where_they_are_built(group, registry, step):
    @registry.subscribe
    class Odd(Operation):
        def build_tasks(self, **kwargs):
            return [step(params={"n": 1}), step(params={"n": object()})]

    Odd(uuid="op").send()
    group.run()
    end = group.end_of("op")
    assert (end.status, end.result.retcode) == ("FAILED", 400)
    assert "['n'] is of type object" in end.result.stderr
    assert group.steps == []


def test_what_a_task_gives_at_the_end_is_told_whatever_it_is(group, registry):
    """An event is written for anything: odd objects, large numbers, lone surrogates, circles."""

    @registry.subscribe
    class Odd(Task):
        def run(self):
            circle = [1]
            circle.append(circle)
            return Result(
                stdout="lone \udcff",
                retval={"object": object(), "big": 2**80, "circle": circle, (1, 2): "key", "nan": float("nan")},
            )

    Operation(uuid="op", tasks=[Odd()]).launch()
    group.run()
    for event in (*group.of(DONE), group.end_of("op")):
        assert (event.status, event.result.stdout, event.result.retval["big"]) == ("SUCCESS", "lone \udcff", 2**80)


# -- itineraries that others wrote -----------------------------------------------------------------------------------


@pytest.mark.parametrize("rest", [[5], [{}], [None], [{"uuid": "x"}], [{"uuid": "x", "entrypoint": "e", "params": 5}]])
@pytest.mark.parametrize("fails", [None, 1])
def test_an_entry_that_cannot_be_read_fails_the_operation_and_not_the_worker(group, registry, step, rest, fails):
    made = registry.subscribe(type("Op", (Operation,), {}))
    frame = {"uuid": "op", "entrypoint": made.path, "params": {}, "tasks": rest}
    metadata = {METADATA_KEY: {"v": 1, "ops": [frame]}}
    group.send("work", Message("u", step.path, {"n": 1, "fails": fails}, metadata=metadata))
    group.run()
    end = group.end_of("op")
    assert end.status == "FAILED"
    assert "step 1" in end.result.stderr if fails else "Itinerary cannot be read" in end.result.stderr


def test_an_end_message_with_an_odd_task_still_ends_its_operation(group, registry):
    made = registry.subscribe(type("Op", (Operation,), {}))
    frame = {"uuid": "op", "entrypoint": made.path, "params": {}, "tasks": []}
    metadata = {METADATA_KEY: {"v": 1, "ops": [frame], "end": {"task": {"uuid": 5}, "status": "BANANA"}}}
    group.send("work", Message("op", made.path, metadata=metadata))
    group.run()
    assert group.end_of("op").status == "SUCCESS"


def test_a_task_class_where_an_operation_was_expected_is_told_with_a_note(group, step):
    frame = {"uuid": "op", "entrypoint": step.path, "params": {}, "tasks": []}
    group.send("work", Message("u", step.path, {"n": 1}, metadata={METADATA_KEY: {"v": 1, "ops": [frame]}}))
    group.run()
    assert "registered as something else than an Operation" in group.end_of("op").note


# -- TRANSPORT -------------------------------------------------------------------------------------------------------


def test_k102_what_a_worker_emits_is_written_by_the_controllers_transport():
    secret = type("Secret", (Controller,), {"TRANSPORT": Reversed})
    registry = OperationRegistry(controller_class=secret, topic="work")
    group = Group({"work": registry.controller})
    registry.configure(producer=group)

    @registry.subscribe
    class Sends(Task):
        def run(self):
            if "more" in self.params:
                Sends().send()

    @registry.subscribe
    class Op(Operation):
        def build_tasks(self, **kwargs):
            return [Sends(params={"more": 1}), Sends()]

    Operation(uuid="op", tasks=[Op()]).launch()
    group.run()
    assert group.end_of("op").status == "SUCCESS"
    assert len(group.messages) == 4
    assert all(m.value.startswith(b"}") for m in group.messages)


def test_k102_a_transport_that_cannot_write_fails_the_operation():
    class Locked(Message):
        locked = False

        def dumps(self):
            if Locked.locked:
                raise RuntimeError("no key")
            return super().dumps()

    made = type("Locks", (Controller,), {"TRANSPORT": Locked})
    registry = OperationRegistry(controller_class=made, topic="work")
    group = Group({"work": registry.controller})
    registry.configure(producer=group)

    @registry.task
    def quiet():
        pass

    Operation(uuid="op", tasks=[quiet(), quiet()]).launch()
    Locked.locked = True
    group.run()
    assert group.end_of("op").status == "FAILED"
    assert "Locked.dumps() raised RuntimeError('no key')" in group.end_of("op").result.stderr


# -- refused by the broker -------------------------------------------------------------------------------------------


def refused(outcome, group):
    """What is sent instead when the broker refuses for good what an outcome asks to send."""
    from kser.errors import TransportError

    for out in outcome.refused(TransportError("topic authorization failed")):
        group.put(out)


def test_a_next_message_that_is_refused_ends_the_operation(group, three):
    operation = three(uuid="op").build()
    operation.launch()
    outcome = group.runners["work"].run(group.queue.popleft())
    refused(outcome, group)
    end = group.end_of("op")
    assert (end.status, end.result.stderr) == ("FAILED", "topic authorization failed")
    assert end.result.retval["failed_task"]["uuid"] == operation.tasks[0].uuid


def test_the_first_message_of_an_operation_that_is_refused_ends_it_and_those_around_it(group, three):
    """It must not be lost without a word: nothing else would ever tell its end."""
    Operation(uuid="outer", tasks=[three(uuid="inner")]).launch()
    outcome = group.runners["work"].run(group.queue.popleft())
    three.noted.clear()
    refused(outcome, group)
    assert [(e.uuid, e.status) for e in group.of(ENDED)] == [("inner", "FAILED"), ("outer", "FAILED")]
    assert "topic authorization failed" in group.end_of("outer").result.stderr
    assert three.noted[0] == ("set_status", "RUNNING->FAILED", 503)


def test_what_follows_an_end_message_that_is_refused_fails_the_operation(split):
    group, kind = split.group, split.kind
    kind(uuid="outer", tasks=[kind(uuid="a"), kind(uuid="b")]).launch()
    while Itinerary.of(Message.loads(group.queue[0].value)).end is None:
        group.run_one()
    outcome = group.runners["ops"].run(group.queue.popleft())
    group.events.clear()
    refused(outcome, group)
    assert group.end_of("outer").status == "FAILED"
    assert "topic authorization failed" in group.end_of("outer").result.stderr


def test_the_event_of_a_lone_task_that_is_refused_is_told_as_failed(group, step):
    step(uuid="u", params={"n": 1}).send()
    outcome = group.runners["work"].run(group.queue.popleft())
    refused(outcome, group)
    (event,) = group.events
    assert (event.type, event.uuid, event.status) == (FAILED, "u", "FAILED")


def test_the_status_of_the_operation_is_seen_as_an_enum(group, registry, step):
    seen = []

    @registry.subscribe
    class Op(Operation):
        def onsuccess(self, result):
            seen.append((self.status is Status.SUCCESS, is_success(self.result)))
            return result

    Op(tasks=[step(params={"n": 1})]).launch()
    group.run()
    assert seen == [(True, True)]


def test_operations_ended_with_python_optimised_too():
    """Nothing on the way depends on assert being executed."""
    import subprocess

    code = (
        "import logging; logging.disable(logging.CRITICAL)\n"
        "from kser import Operation, OperationRegistry\n"
        "from tests.unit.fakes import Group\n"
        "r = OperationRegistry(topic='work'); g = Group({'work': r.controller}); r.configure(producer=g)\n"
        "t = r.task(name='t')(lambda: None)\n"
        "Operation(uuid='op', tasks=[t(), Operation(tasks=[t()])]).launch()\n"
        "g.run()\n"
        "print(g.end_of('op').status)\n"
    )
    done = subprocess.run([sys.executable, "-O", "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "SUCCESS"


def test_a_record_is_what_the_helpers_say():
    """Guards the fakes: a message made by hand is read as one."""
    assert Message.loads(record(raw("u", "e", params={"a": 1})).value).params == {"a": 1}
