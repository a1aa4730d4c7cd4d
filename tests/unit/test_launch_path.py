"""The short way of a launch inside a batch gives what the general way gives, byte for byte, or leaves it to that."""

import contextlib
import logging
import re
from contextlib import contextmanager
from datetime import UTC, datetime
from decimal import Decimal
from enum import Enum
from unittest import mock
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kser import Message, Operation, OperationRegistry, Result, Task, TransportError
from kser.batches import Batch
from kser.errors import ValidationError
from kser.launching import build
from kser.sequencing import operation as operation_module
from tests.unit.fakes import HOLD, FakeSink, Producer

UUID4 = re.compile("[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
registry = OperationRegistry(topic="home")
elsewhere = OperationRegistry(topic="elsewhere")


@pytest.fixture(autouse=True)
def _quiet(caplog):
    caplog.set_level(logging.CRITICAL, logger="kser")


# -- tasks and operations: those that are as kser made them, and those that somebody tuned -----------------------------


@registry.subscribe
class Step(Task):
    """As kser made it."""


@registry.subscribe(name='a name " of its own \u2028')
class Named(Task):
    """Plain too: its name is not its class's."""


@registry.subscribe
class Initialised(Task):
    def postinit(self):
        self.seen = dict(self.params)


@registry.subscribe
class Constructed(Task):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.extra = 1


@registry.subscribe(topic="special")
class WithTopic(Task):
    pass


@registry.subscribe
class WithKey(Task):
    key = "class key"


@registry.subscribe
class WithProperty(Task):
    @property
    def topic(self):
        return "by-property"


@registry.subscribe
class OwnEntry(Task):
    def to_entry(self, topic):
        return {**super().to_entry(topic), "metadata": {"own": "entry"}}


@registry.subscribe
class OwnMessage(Task):
    def to_Message(self, result=None):
        kmsg = super().to_Message(result)
        return Message(kmsg.uuid, kmsg.entrypoint, {"own": "message"}, kmsg.result, kmsg.metadata)


@registry.subscribe
class OwnSend(Task):
    def send(self, result=None, **kwargs):
        return super().send(result, topic="own-send", key="own send")


@registry.subscribe
class OwnAttribute(Task):
    def __getattribute__(self, name):
        return {"from": "getattribute"} if name == "params" else super().__getattribute__(name)


@registry.subscribe
class Broken(Task):
    def postinit(self):
        raise ValueError("broken")


class Mixin:
    """Of another kind: nobody notices when it is changed."""

    def own_topic(self):
        return "mixin"


@registry.subscribe
class Mixed(Mixin, Task):
    pass


@elsewhere.subscribe
class Foreign(Task):
    pass


class Homeless(Task):
    pass


@registry.task
def function(a=1):
    return {"a": a}


@registry.subscribe
class Inner(Operation):
    def build_tasks(self, **params):
        return [Step(), Step()]


@registry.subscribe
class Plain(Operation):
    pass


@registry.subscribe
class Subclass(Plain):
    """Plain too."""


@registry.subscribe(topic="op-topic")
class OpTopic(Operation):
    pass


@registry.subscribe
class OpStatus(Operation):
    def set_status(self, status, result=None):
        super().set_status(status, result)
        self.metadata = {**self.metadata, "told": str(status)}


@registry.subscribe
class OpFrame(Operation):
    def frame(self, topic, tasks):
        return super().frame(topic, tasks)._replace(params={"own": "frame"})


@registry.subscribe
class OpNext(Operation):
    def launch_next(self, task=None, result=None):
        return super().launch_next(task, Result(uuid="own next", stdout="from before"))


@registry.subscribe
class OpRefusing(Operation):
    def set_status(self, status, result=None):
        raise TransportError("set_status() refused")


class OpHomeless(Operation):
    pass


#: Those whose entries and messages kser writes.
PLAIN_TASKS = [Step, Named, function, Initialised, Constructed, WithTopic, WithKey, WithProperty]
TASKS = [*PLAIN_TASKS, OwnEntry, OwnMessage, OwnSend, OwnAttribute, Broken, Mixed, Foreign, Homeless, Inner, Plain]
PLAIN_OPERATIONS = [Plain, Subclass, OpTopic]
OPERATIONS = [*PLAIN_OPERATIONS, OpStatus, OpFrame, OpNext, OpRefusing, OpHomeless, Operation]


class Colour(Enum):
    RED = "red"


texts = st.text(st.characters(exclude_categories=[]), max_size=6)  # lone surrogates too
plain_texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=6).filter(lambda t: "null" not in t)
numbers = st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)
plain_json = st.recursive(
    st.booleans() | numbers | plain_texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(plain_texts, inner, max_size=3),
    max_leaves=6,
)
#: What orjson takes, what only the standard library takes, and what nothing takes.
odd = st.sampled_from(
    [None, "null", 2**70, -(2**63) - 1, float("nan"), float("inf"), (1, 2), {1: 2}, {None: 1}, {(1, 2): 3}, "\ud800",
     UUID(int=7), Colour.RED, b"bytes", {1, 2}, object(), Decimal("1.5"), datetime(2026, 1, 1, tzinfo=UTC), Result]
)  # fmt: skip
values = plain_json | odd | st.lists(odd, max_size=2) | texts
params = st.none() | st.dictionaries(texts, values, max_size=3)
plain_params = st.none() | st.dictionaries(plain_texts, plain_json, max_size=3)
metadata = st.none() | st.dictionaries(texts | st.just("kser"), values, max_size=2)
plain_metadata = st.none() | st.dictionaries(st.sampled_from(["user", "kser", "trace"]), plain_json, max_size=2)
results = st.none() | st.builds(
    Result,
    retcode=st.integers(0, 3),
    stdout=texts,
    retval=st.dictionaries(texts, values, max_size=2),
    uuid=st.just("r"),
)
own_attributes = st.dictionaries(
    st.sampled_from(["topic", "key", "status", "note", "uuid", "params", "metadata", "send", "to_entry",
                     "carried", "own_topic", "to_Message", "_result"]),
    st.sampled_from(["", None, "text", "SUCCESS", "other-topic", "no topic!", 5, b"bytes", [], {}, {"a": 1},
                     UUID(int=9), Result(uuid="own")]),
    max_size=2,
)  # fmt: skip
plain_attributes = st.fixed_dictionaries(
    {}, optional={"topic": st.sampled_from(["home", "other", ""]), "key": plain_texts, "note": st.just(1)}
)


def one_task(classes, params, metadata, results, attributes):
    return st.fixed_dictionaries(
        {"cls": st.sampled_from(classes), "params": params, "metadata": metadata, "result": results, "own": attributes,
         "status": st.sampled_from(["PENDING", "PENDING", "SUCCESS", "FAILED"]),
         "children": st.integers(0, 2)}
    )  # fmt: skip


def one_operation(classes, tasks, params, metadata, attributes):
    return st.fixed_dictionaries(
        {"cls": st.sampled_from(classes), "tasks": tasks, "params": params, "metadata": metadata, "own": attributes,
         "key": st.none() | plain_texts}
    )  # fmt: skip


any_task = one_task(TASKS, params, metadata, results, own_attributes)
any_operation = one_operation(OPERATIONS, st.lists(any_task, max_size=4), params, metadata, own_attributes)
plain_task = one_task(PLAIN_TASKS, plain_params, plain_metadata, st.none(), plain_attributes)
#: The first is sent, the others are entries: those may be anything that can be written.
plain_operation = one_operation(
    PLAIN_OPERATIONS,
    st.tuples(plain_task, st.lists(plain_task | plain_task.map(lambda t: {**t, "cls": OwnEntry}), max_size=3)).map(
        lambda both: [both[0], *both[1]]
    ),
    plain_params,
    plain_metadata,
    plain_attributes,
)


def make(spec):
    """The operation of a spec: two calls make two that are alike, and share nothing that a launch changes."""
    tasks = []
    for at, one in enumerate(spec["tasks"]):
        more = {"tasks": [Step(uuid=f"child-{at}-{n}") for n in range(one["children"])]} if one["cls"] is Plain else {}
        task = one["cls"](
            uuid=f"task-{at}",
            params=None if one["params"] is None else dict(one["params"]),
            metadata=None if one["metadata"] is None else dict(one["metadata"]),
            status=one["status"] if at else "PENDING",
            result=one["result"],
            **more,
        )
        for name, value in one["own"].items():
            object.__setattr__(task, name, value) if name != "topic" or one["cls"] is not WithProperty else None
        tasks.append(task)
    made = spec["cls"](
        uuid="op",
        params=None if spec["params"] is None else dict(spec["params"]),
        metadata=None if spec["metadata"] is None else dict(spec["metadata"]),
        key=spec["key"],
    )
    made.tasks = tasks
    for name, value in spec["own"].items():
        setattr(made, name, value)
    return made


@contextmanager
def no_short_way():
    with mock.patch.object(operation_module, "send_first", return_value=None):
        yield


def state(operation):
    """What a launch may change."""
    return [
        (type(one), str(vars(one).get("status")), vars(one).get("topic"), repr(vars(one).get("metadata")))
        for one in (operation, *operation.tasks)
    ]


def told(result):
    retval = {name: value for name, value in result.retval.items() if name != "error"}
    error = result.retval.get("error")
    said = None if error is None else (error["code"], error["name"], error["message"], repr(error["extra"]))
    return result.retcode, result.stdout, result.stderr, given_uuid(result.uuid), repr(retval), said


def given_uuid(uuid):
    """None for a random one, which a Result gets that was given none."""
    return None if isinstance(uuid, str) and UUID4.fullmatch(uuid) else uuid


def launch(spec, answer=lambda record: None):
    """What a launch inside a batch hands over, gives and leaves behind, and how often the short way was taken."""
    sink, taken, short = FakeSink(answer), [], Batch.send_plain
    producer = Producer(sink)

    def counted(batch, *args):
        result = short(batch, *args)
        taken.append(result is not None)
        return result

    registry.producer = elsewhere.producer = producer
    made, raised, outcome, inside = make(spec), None, None, None
    with mock.patch.object(Batch, "send_plain", counted):
        try:
            with producer.batch(timeout=0.01):
                try:
                    outcome = made.launch()
                    inside = told(outcome)
                except Exception as exc:
                    raised = (type(exc), str(exc))
        except TransportError as exc:
            raised = (type(exc), [given_uuid(uuid) for uuid in exc.extra["uuids"]])
    given = (sink.records, raised, inside, None if outcome is None else told(outcome), state(made))
    return given, sum(taken)


# -- the properties ----------------------------------------------------------------------------------------------------


@given(spec=any_operation)
def test_both_ways_hand_over_the_same_and_leave_the_same(spec):
    short, _ = launch(spec)
    with no_short_way():
        general, taken = launch(spec)
    assert taken == 0
    assert short == general


@given(spec=plain_operation)
def test_what_nobody_tuned_takes_the_short_way_and_gives_the_same(spec):
    short, taken = launch(spec)
    with no_short_way():
        general, _ = launch(spec)
    assert taken == 1
    assert short == general
    assert len(short[0]) == 1
    assert short[2][0] == 202
    assert short[3][0] == 0


@given(spec=plain_operation, answer=st.sampled_from([HOLD, TransportError("refused by the broker")]))
def test_both_ways_tell_the_same_of_what_the_broker_does_not_take(spec, answer):
    short, taken = launch(spec, answer=lambda record: answer)
    with no_short_way():
        general, _ = launch(spec, answer=lambda record: answer)
    assert taken == 1
    assert short == general
    assert short[3][0] in (503, 504)


# -- what makes a launch take the general way --------------------------------------------------------------------------

SPEC = {
    "cls": Plain, "params": {"a": 1}, "metadata": None, "key": None, "own": {},
    "tasks": [{"cls": Step, "params": {}, "metadata": None, "result": None, "own": {}, "status": "PENDING",
               "children": 0}] * 3,
}  # fmt: skip


def way(spec=SPEC):
    return "short" if launch(spec)[1] else "general"


def test_a_method_that_somebody_puts_into_a_class_counts_from_then_on(monkeypatch):
    assert way() == "short"
    with monkeypatch.context() as patched:
        patched.setattr(Step, "to_Message", lambda self, result=None: Message(self.uuid, "patched"), raising=False)
        assert way() == "general"
        assert Message.loads(launch(SPEC)[0][0][0].value).entrypoint == "patched"
    assert way() == "short"
    with monkeypatch.context() as patched:
        patched.setattr(Operation, "frame", Operation.frame.__get__)
        assert way() == "general"
    assert way() == "short"


@pytest.mark.parametrize("change", ["to_bytes", "transport", "info"])
def test_whoever_writes_messages_another_way_or_wants_to_see_them_does(monkeypatch, change, caplog):
    if change == "to_bytes":
        monkeypatch.setattr(Message, "to_bytes", lambda self: b"patched")
    elif change == "transport":
        monkeypatch.setattr(registry.controller, "TRANSPORT", type("Own", (Message,), {}))
    else:
        caplog.set_level(logging.INFO, logger="kser")
    assert way() == "general"


@pytest.mark.parametrize("hook", ["onmessage", "onsuccess", "onerror", "send"])
def test_launches_in_a_batch_pass_through_the_hooks_and_the_send_of_their_producer(hook):
    seen = []
    if hook == "send":

        def overridden(self, topic, kmsg, timeout=60, *, key=None):
            seen.append(kmsg.uuid)
            return Producer.send(self, topic, kmsg, timeout, key=key)

    else:

        @classmethod
        def overridden(cls, kmsg, *rest):
            seen.append(kmsg.uuid)
            return rest[0] if rest else kmsg

    producer = type("Hooked", (Producer,), {hook: overridden})(
        FakeSink(lambda record: TransportError("no") if hook == "onerror" else None)
    )
    registry.producer = producer
    operations = [make(SPEC), make(SPEC)]
    with pytest.raises(TransportError) if hook == "onerror" else contextlib.nullcontext(), producer.batch(timeout=5):
        for operation in operations:
            operation.launch()
    assert seen == ["task-0", "task-0"]


def test_a_batch_of_another_producer_takes_no_part():
    registry.producer = mine = Producer()
    other, operation = Producer(), make(SPEC)
    with other.batch():
        assert operation.launch().retcode == 0
    assert (len(mine.sink.records), other.sink.records) == (1, [])


def test_what_is_no_task_is_left_to_the_general_way():
    operation = make(SPEC)
    operation.tasks.append("no task")
    registry.producer = Producer()
    with pytest.raises(AttributeError, match="'str' object has no attribute 'status'"), registry.producer.batch():
        operation.launch()


def with_second(**changes):
    """The spec whose second task is changed."""
    return {**SPEC, "tasks": [SPEC["tasks"][0], {**SPEC["tasks"][1], **changes}, SPEC["tasks"][2]]}


@pytest.mark.parametrize(
    "spec",
    [
        SPEC,
        {**SPEC, "cls": OpTopic},
        {**SPEC, "own": {"topic": "other"}},
        {**SPEC, "own": {"key": "k"}},
        {**SPEC, "metadata": {"a": 1, "kser": 5}},
        with_second(metadata={"a": 1}),
        with_second(status="SUCCESS"),
        with_second(own={"topic": "other"}),
        with_second(own={"key": "k"}),
        with_second(own={"note": 1}),
        with_second(cls=Foreign),
        with_second(cls=Homeless),
        with_second(cls=WithProperty),
        with_second(cls=Mixed),
        with_second(cls=Plain, children=2),
        with_second(cls=Inner),
    ],
)
def test_entries_of_each_kind_are_written_alike_on_the_short_way(spec):
    short, taken = launch(spec)
    with no_short_way():
        general, _ = launch(spec)
    assert (taken, short) == (1, general)


def test_a_launch_that_is_too_large_is_refused_with_the_limit():
    spec = {**SPEC, "params": {"a": "x" * 1_000_000}}
    given, taken = launch(spec)
    assert (given[0], given[3][0], taken) == ([], 413, 0)


@pytest.mark.parametrize("first", [Foreign, Homeless, OwnMessage, OwnSend, Mixed, Inner, Plain])
def test_a_first_task_of_another_kind_is_left_to_the_general_way(first):
    spec = {**SPEC, "tasks": [{**SPEC["tasks"][0], "cls": first}, *SPEC["tasks"][1:]]}
    short, taken = launch(spec)
    with no_short_way():
        general, _ = launch(spec)
    assert (taken, short) == (0, general)


def test_an_empty_idempotency_key_is_refused():
    """A script whose variable is not set must not start a new operation each time."""
    with pytest.raises(ValidationError):
        build(Operation, {}, idempotency_key="")
    with pytest.raises(ValidationError, match="is a task"):
        build(Task, {}, idempotency_key="")
