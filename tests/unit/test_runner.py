"""What one record becomes on a worker: the Runner, and the offsets that follow (K-79, K-80, K-90; DESIGN.md 4)."""

import asyncio
import json
import logging

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kser import (
    ConfigurationError,
    Controller,
    Entrypoint,
    Message,
    Operation,
    OperationRegistry,
    Result,
    Task,
    headers,
)
from kser.context import Control, controlling, current_delivery, derive_uuid
from kser.errors import InternalError
from kser.events import Event, EventType
from kser.sequencing.itinerary import METADATA_KEY
from kser.worker.runner import Runner
from tests.unit.fakes import Group, raw, record

U = "872c3be0-51ac-457f-a4d9-12c2f7667b80"


@pytest.fixture
def registry():
    made = OperationRegistry(topic="work")
    made.configure(producer=Group({"work": made.controller}))
    return made


@pytest.fixture
def group(registry):
    return registry.producer


@pytest.fixture
def runner(registry):
    return Runner(registry.controller, "g", "w1")


@pytest.fixture
def ran(registry):
    """The uuids of the notes that were run."""
    return []


@pytest.fixture
def note(registry, ran):
    @registry.subscribe
    class Note(Task):
        def run(self):
            ran.append(self.uuid)

    return Note


def events(outcome):
    return [Event.loads(out.value) for out in outcome.records if out.topic == "g.events"]


def messages(outcome):
    return [Message.loads(out.value) for out in outcome.records if out.topic != "g.events"]


# -- lone tasks ------------------------------------------------------------------------------------------------------


def test_a_lone_task_is_run_and_told(runner, registry):
    @registry.subscribe
    class Echo(Task):
        def run(self):
            return Result(stdout="ok", retval=self.params)

    outcome = runner.run(record(raw(U, Echo.path, params={"a": 1})))
    (out,) = outcome.records
    (event,) = events(outcome)
    assert outcome.kind == "done"
    assert (out.topic, out.key, dict(out.headers)) == ("g.events", U.encode(), {headers.GROUP: b"g"})
    assert (event.type, event.uuid, event.entrypoint, event.status) == (EventType.STEP_DONE, U, Echo.path, "SUCCESS")
    assert (event.operation, event.parent, event.worker, event.ends) == (None, None, "w1", True)
    assert (event.result.stdout, event.result.retval) == ("ok", {"a": 1})


def test_a_task_that_fails_is_told_so(runner, registry, caplog):
    registry.subscribe(name="bad")(type("Bad", (Task,), {"run": lambda self: 1 / 0}))
    outcome = runner.run(record(raw(U, "bad")))
    (event,) = events(outcome)
    assert (outcome.kind, event.type, event.status) == ("failed", EventType.STEP_FAILED, "FAILED")
    assert event.result.stderr == "division by zero"
    assert f"Controller.Failed: bad[{U}]: division by zero" in caplog.text


def test_an_entrypoint_nobody_registered_fails(runner):
    outcome = runner.run(record(raw(U, "nobody")))
    (event,) = events(outcome)
    assert (outcome.kind, event.entrypoint, event.uuid) == ("failed", "nobody", U)
    assert event.result.stderr == "Entrypoint 'nobody' not registred"


def test_a_bare_entrypoint_is_run_and_may_be_a_step(runner, registry, note):
    @registry.subscribe
    class Bare(Entrypoint):
        def run(self):
            return Result(stdout="bare")

    frame = {"uuid": "op", "entrypoint": Operation.path, "params": {}, "tasks": [note(uuid="next").to_entry(None)]}
    kmsg = raw(U, Bare.path, metadata={METADATA_KEY: {"v": 1, "ops": [frame]}})
    outcome = runner.run(record(kmsg))
    assert [m.uuid for m in messages(outcome)] == ["next"]
    assert events(outcome)[0].result.stdout == "bare"


def test_an_async_task_is_run_and_what_it_sends_joins(runner, registry, note):
    @registry.subscribe
    class Waits(Task):
        async def run(self):
            await asyncio.sleep(0)
            note().send()

    outcome = runner.run(record(raw(U, Waits.path)))
    (sent,) = messages(outcome)
    assert sent.uuid == derive_uuid(U, 0)
    assert outcome.kind == "done"


@pytest.mark.parametrize("where", ["run", "prerun", "postrun", "onsuccess"])
def test_sys_exit_in_a_task_ends_the_task_and_not_the_worker(runner, registry, where):
    def leave(self, *args):
        raise SystemExit(3)

    registry.subscribe(name="leaves")(type("Leaves", (Task,), {"run": lambda self: None, where: leave}))
    outcome = runner.run(record(raw(U, "leaves")))
    (event,) = events(outcome)
    assert (outcome.kind, event.result.stderr) == ("failed", "SystemExit: 3")


def test_sys_exit_in_a_hook_of_the_controller_reaches_the_worker_as_a_fault(caplog):
    """Not as SystemExit, which would end the thread that runs the tasks without a word."""

    class Leaves(Controller):
        @classmethod
        def onsuccess(cls, kmsg, result):
            raise SystemExit(3)

    registry = OperationRegistry(controller_class=Leaves)
    registry.task(name="quiet")(lambda: None)
    with pytest.raises(InternalError, match=r"quiet\[u\] raised SystemExit outside of its task"):
        Runner(registry.controller, "g").run(record(raw("u", "quiet")))


def test_the_hooks_of_the_registrys_controller_count(note):
    seen = []

    class Hooked(Controller):
        @classmethod
        def onmessage(cls, kmsg):
            seen.append("onmessage")
            return Message(kmsg.uuid, kmsg.entrypoint, {"replaced": True}, kmsg.result, kmsg.metadata)

        @classmethod
        def onerror(cls, kmsg, result):
            seen.append("onerror")
            return Result(uuid=kmsg.uuid, stdout="turned round")

    registry = OperationRegistry(controller_class=Hooked)

    @registry.task(name="bad")
    def bad(**params):
        raise ValueError(str(params))

    frame = {"uuid": "op", "entrypoint": Operation.path, "params": {}, "tasks": [bad(uuid="next").to_entry(None)]}
    kmsg = raw(U, "bad", metadata={METADATA_KEY: {"v": 1, "ops": [frame]}})
    outcome = Runner(registry.controller, "g").run(record(kmsg))
    assert seen == ["onmessage", "onerror"]
    assert outcome.kind == "done"
    assert [(m.uuid, m.result.stdout) for m in messages(outcome)] == [("next", "turned round")]


def test_no_events_are_emitted_when_they_are_switched_off(registry, note):
    outcome = Runner(registry.controller, "g", events=False).run(record(raw(U, note.path)))
    assert (outcome.kind, outcome.records) == ("done", [])


# -- records that are no messages of ours ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "kind"),
    [
        ([(headers.GROUP, b"other")], "foreign"),
        ([(headers.GROUP, b"g"), (headers.GROUP, b"other")], "foreign"),  # the last one counts
        ([(headers.GROUP, b"g")], "done"),
        ([], "done"),  # services write no such header
        ([("trace", b"x")], "done"),
    ],
)
def test_a_message_of_another_group_is_not_run(runner, note, ran, headers, kind):
    outcome = runner.run(record(raw(U, note.path), headers=headers))
    assert outcome.kind == kind
    assert (ran == []) is (kind == "foreign")
    assert bool(outcome.records) is (kind != "foreign")


POISON = [
    None, b"", b"\xff\xfe", b"[]", b"null", b"{", b'{"uuid": "u"}', b'{"uuid": 5, "entrypoint": "e"}',
    b"[" * 1000 + b"]" * 1000, b"[" * 100_000,
]  # fmt: skip


@pytest.mark.parametrize("value", POISON)
def test_k90_poison_is_told_with_its_coordinates(runner, value, caplog):
    outcome = runner.run(record(value, offset=42))
    (event,) = events(outcome)
    assert outcome.kind == "rejected"
    assert (event.type, event.uuid, event.status) == (EventType.MESSAGE_REJECTED, "work/0/42", "FAILED")
    assert event.note == "record work/0/42"
    assert event.result.stderr == "Failed to load message"
    assert "Controller.ImportError: Failed to load data from kafka: " in caplog.text


@pytest.mark.parametrize(
    ("itinerary", "said"),
    [
        ({"v": 2}, "Itinerary of version 2"),
        (5, "expected an object"),
        ({"v": 1, "ops": 5}, "'ops' is a int"),
        ({"v": 1, "end": {"task": {}, "status": "SUCCESS"}}, "an end without an operation"),
    ],
)
def test_k90_an_itinerary_that_cannot_be_read_is_rejected_not_run(runner, note, ran, itinerary, said):
    outcome = runner.run(record(raw(U, note.path, metadata={METADATA_KEY: itinerary})))
    (event,) = events(outcome)
    assert outcome.kind == "rejected"
    assert (event.uuid, event.entrypoint) == (U, note.path)
    assert said in event.result.stderr
    assert event.result.uuid == U
    assert ran == []


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(), max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
entries = st.fixed_dictionaries(
    {},
    optional={
        "uuid": st.sampled_from(["a", "\ud800", 5]), "entrypoint": st.sampled_from(["note", "op", "none", None]),
        "params": json_values, "tasks": st.lists(json_values, max_size=2), "topic": st.sampled_from(["work", "", 5]),
        "key": st.sampled_from(["k", "", "\ud800"]), "metadata": json_values,
    },
)  # fmt: skip
itineraries = st.fixed_dictionaries(
    {"v": st.sampled_from([1, 1, 1, 2, "1"])},
    optional={
        "ops": st.lists(st.one_of(entries, json_values), max_size=3), "new": st.booleans() | json_values,
        "position": st.integers() | json_values, "tasks": st.lists(entries, max_size=2) | json_values,
        "key": st.sampled_from(["k", "\ud800", 5]),
        "end": st.fixed_dictionaries({}, optional={"task": entries, "status": st.sampled_from(["SUCCESS", "X", 5])}),
    },
)  # fmt: skip
anything = st.fixed_dictionaries(
    {"uuid": st.sampled_from(["u", "\ud800"]), "entrypoint": st.sampled_from(["note", "op", "none", "\ud800"])},
    optional={
        "params": json_values,
        "metadata": st.fixed_dictionaries({}, optional={METADATA_KEY: itineraries, "m": json_values}),
    },
)

_known = OperationRegistry()
_known.subscribe(name="note")(type("Note", (Task,), {"run": lambda self: None}))
_known.subscribe(name="op")(type("Op", (Operation,), {}))


@given(anything)
@settings(deadline=None, max_examples=300)
def test_whatever_a_message_holds_the_runner_gives_an_outcome_and_raises_nothing(message):
    logging.disable(logging.CRITICAL)
    try:
        outcome = Runner(_known.controller, "g").run(record(json.dumps(message).encode()))
    finally:
        logging.disable(logging.NOTSET)
    assert outcome.kind in ("done", "failed", "rejected")
    for out in outcome.records:
        assert isinstance(out.key, bytes)
        assert isinstance(out.value, bytes)
        assert out.topic == "g.events" or Message.loads(out.value)
    assert events(outcome) or messages(outcome)


# -- what a task sends -----------------------------------------------------------------------------------------------


def test_what_a_task_sends_joins_its_consequences(runner, registry, note):
    seen = []

    @registry.subscribe
    class Sends(Task):
        def run(self):
            seen.append(note(params={"n": 1}).send())
            seen.append(note().send(topic="other", key="k"))
            seen.append(Operation(tasks=[note(), note()]).launch())

    outcome = runner.run(record(raw(U, Sends.path)))
    assert [r.retcode for r in seen] == [202, 202, 202]
    assert "leaves for work when the running task is settled" in seen[0].stdout
    sent = [out for out in outcome.records if out.topic != "g.events"]
    uuids = [Message.loads(out.value).uuid for out in sent]
    assert [out.topic for out in sent] == ["work", "other", "work"]
    assert uuids[:2] == [derive_uuid(U, 0), derive_uuid(U, 1)]
    assert [out.key for out in sent[:2]] == [uuids[0].encode(), b"k"]
    assert [dict(out.headers) for out in sent] == [{headers.GROUP: b"g"}] * 3
    assert Message.loads(sent[0].value).params == {"n": 1}
    assert registry.producer.messages == []  # the service's producer is not used inside a worker
    assert current_delivery() is None


@pytest.mark.parametrize("how", ["raises", "returns", "in onsuccess", "sys.exit"])
def test_nothing_of_a_failed_task_leaves(runner, registry, note, how):
    @registry.subscribe
    class Fails(Task):
        def run(self):
            note().send()
            Operation(tasks=[note()]).launch()
            if how == "raises":
                raise ValueError
            if how == "sys.exit":
                raise SystemExit
            return Result(retcode=1 if how == "returns" else 0)

        def onsuccess(self, result):
            raise ValueError

    outcome = runner.run(record(raw(U, Fails.path)))
    assert outcome.kind == "failed"
    assert messages(outcome) == []
    assert len(events(outcome)) == 1


def test_nothing_of_an_operation_that_could_not_start_leaves(runner, registry, note):
    @registry.subscribe
    class Fails(Operation):
        def prebuild(self, **kwargs):
            note().send()

    outcome = runner.run(record(raw(U, Fails.path)))
    assert outcome.kind == "failed"
    assert messages(outcome) == []
    assert [e.type for e in events(outcome)] == [EventType.OPERATION_STARTED, EventType.OPERATION_ENDED]


@pytest.mark.parametrize("fails_at", ["start", "task"])
def test_what_the_hooks_of_a_failed_operation_send_does_leave(group, registry, note, ran, fails_at):
    """A compensation, say: the operation has ended, and nothing runs it again."""

    @registry.subscribe
    class Fails(Operation):
        def prebuild(self, **kwargs):
            note(uuid="dropped").send()

        def build_tasks(self, **kwargs):
            bad = registry.task(name="bad")(lambda: 1 / 0)
            return [] if fails_at == "start" else [bad()]

    @registry.subscribe
    class Outer(Operation):
        def onerror(self, result):
            note(uuid="compensation").send()
            return result

    Outer(uuid="outer", tasks=[Fails()]).launch()
    group.run()
    assert group.end_of("outer").status == "FAILED"
    assert ran == (["compensation"] if fails_at == "start" else ["dropped", "compensation"])


def test_what_a_task_sends_goes_first_and_the_next_message_after_it(group, registry, note, ran):
    @registry.subscribe
    class Sends(Task):
        def run(self):
            note(uuid="child").send()

    Operation(tasks=[Sends(), note(uuid="next")]).launch()
    group.run()
    assert ran == ["child", "next"]


def test_a_message_that_a_task_cannot_send_is_told_to_it(registry, note):
    seen = []

    @registry.subscribe
    class Sends(Task):
        def run(self):
            seen.append(note(params={"a": "x" * 3000}).send())
            seen.append(note(params={"a": object()}).send())

    outcome = Runner(registry.controller, "g", limit=2000).run(record(raw(U, Sends.path)))
    assert [r.retcode for r in seen] == [413, 400]
    assert "the limit is 2000" in seen[0].stderr
    assert "params['a'] is of type object" in seen[1].stderr
    assert outcome.kind == "done"
    assert messages(outcome) == []


@pytest.mark.parametrize("where", ["run", "postinit"])
@pytest.mark.parametrize("copied", [False, True])
def test_metadata_handed_on_by_hand_does_not_fork_the_sequence(group, registry, note, ran, where, copied):
    def child(self):
        metadata = json.loads(json.dumps(self.metadata)) if copied else self.metadata
        return note(uuid="child", metadata=metadata)

    def postinit(self):
        self.child = child(self) if where == "postinit" else None

    def run(self):
        (self.child or child(self)).send()

    sends = registry.subscribe(name="sends")(type("Sends", (Task,), {"postinit": postinit, "run": run}))
    operation = Operation(uuid="op", tasks=[sends(metadata={"trace": "t"}), note(uuid="last")])
    operation.launch()
    group.run()
    assert ran == ["child", "last"]
    assert [e.uuid for e in group.of(EventType.OPERATION_ENDED)] == ["op"]
    sent = next(m for m in group.messages if Message.loads(m.value).uuid == "child")
    assert Message.loads(sent.value).metadata == {"trace": "t"}


def test_a_task_that_sends_itself_again_does_not_fork_the_sequence(group, registry, note, ran):
    @registry.subscribe
    class Again(Task):
        def run(self):
            if "second" not in self.params:
                Again(uuid="again", params={"second": True}, metadata=self.metadata).send()

    Operation(uuid="op", tasks=[Again(), note(uuid="last")]).launch()
    group.run()
    assert ran == ["last"]
    assert len(group.of(EventType.OPERATION_ENDED)) == 1


def test_a_task_sees_the_metadata_that_is_its_own(runner, registry):
    seen = []

    @registry.subscribe
    class Looks(Task):
        def run(self):
            seen.append(self.metadata)

    frame = {"uuid": "op", "entrypoint": Operation.path, "params": {}, "tasks": []}
    runner.run(record(raw(U, Looks.path, metadata={"m": 1, METADATA_KEY: {"v": 1, "ops": [frame]}})))
    assert seen == [{"m": 1}]


@pytest.mark.parametrize("uuid", ["\ud800", "é", "no uuid at all", "x" * 300])
def test_any_text_may_be_a_uuid(group, registry, note, ran, uuid):
    @registry.subscribe
    class Sends(Task):
        def run(self):
            note().send()

    Operation(uuid=uuid, tasks=[Sends(), note(uuid=uuid + "last")]).launch()
    group.run()
    assert len(ran) == 2
    assert group.end_of(uuid).status == "SUCCESS"


def test_the_runners_own_context_ends_with_the_record(runner, note):
    runner.run(record(raw(U, note.path)))
    assert current_delivery() is None
    with pytest.raises(ConfigurationError, match="no producer is configured"):
        Task().send()


# -- offsets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("events_", [True, False])
def test_where_an_exception_came_from_is_looked_at_only_for_somebody_who_reads_it(registry, events_):
    shown = []

    class Dear:
        def __repr__(self):
            shown.append(self)
            return "dear"

    @registry.subscribe
    class Bad(Task):
        def run(self):
            dear = Dear()
            raise ValueError(len([dear]))

    runner = Runner(registry.controller, "g", "w1", events=events_, dead_letters=True)
    with controlling(Control()):
        outcome = runner.run(record(raw(U, Bad.path)))
    assert bool(shown) is events_
    (letter,) = [out for out in outcome.records if out.topic == "g.dlq"]
    assert b"in run\n" in headers.value_of(letter.headers, headers.TRACE)
    traces = [event.trace for event in events(outcome) if event.type == EventType.STEP_FAILED]
    assert [trace.frames[-1].locals["dear"] for trace in traces] == (["dear"] if events_ else [])
