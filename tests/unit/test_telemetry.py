"""What goes on in a worker is told in {group}.telemetry: of every kind of task, in limits, at no task's cost."""

import asyncio
import contextvars
import inspect
import json
import logging
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from kser import Message, Operation, OperationRegistry, Result, Retry, Task, ValidationError
from kser.context import Control
from kser.dead_letters import DeadLetters
from kser.errors import TransportError
from kser.events import EventType, schema
from kser.events import read as read_events
from kser.headers import WAITING
from kser.loghandler import JobControlLogHandler
from kser.masking import MASK
from kser.producer import BaseProducer
from kser.progress import parse_group, report_progress
from kser.telemetry import (
    Running,
    Subject,
    TaskHeartbeat,
    TaskLog,
    TaskProgress,
    TaskStarted,
    TelemetryType,
    WorkerState,
    loads,
    read,
    telemetry_topic,
)
from kser.testing import eventually
from kser.tracebacks import TracebackInfo
from kser.transport import OutRecord, Record, TopicSpec
from kser.transport.memory import MemoryTransport
from kser.worker.runner import Work
from kser.worker.telemetry import TaskReports
from tests.unit.test_worker import GROUP, TOPIC
from tests.unit.test_worker import Running as Worker

VALID = Draft202012Validator(schema())
logger = logging.getLogger("shop")


@pytest.fixture
def transport():
    made = MemoryTransport()
    made.admin().create([TopicSpec(name=TOPIC, partitions=2)])
    return made


@pytest.fixture
def registry(transport):
    return OperationRegistry(producer=BaseProducer(transport.sink()), topic=TOPIC)


@pytest.fixture
def start(registry, transport):
    running = []

    def go(**options):
        running.append(Worker(registry, transport, **options))
        return running[-1]

    yield go
    for one in running:
        one.stop()


def told(transport, kind=None, **where):
    """The telemetry so far, of one kind; of a task's records those with these fields of its Subject."""
    return [
        record
        for record in read(transport.records(telemetry_topic(GROUP)))
        if (kind is None or isinstance(record, kind))
        and all(getattr(record.task, name) == value for name, value in where.items())
    ]


def events(transport, *types):
    return [event for event in read_events(transport.records(f"{GROUP}.events")) if event.type in types]


def wait(task_run, limit=10):
    return eventually(task_run, limit)


# -- the records -----------------------------------------------------------------------------------------------------

TASK = Subject(
    uuid="u", entrypoint="shop.Step", operation="op", operation_entrypoint="shop.Order", parent="inner",
    run=2, position=3, attempt=4, began=5,
)  # fmt: skip
RECORDS = [
    TaskStarted(task=TASK, worker="w", at=9),
    TaskHeartbeat(task=TASK, worker="w", at=9, beat=8),
    TaskProgress(task=TASK, worker="w", at=9, group=("a", "b"), current=1, total=2, status_line="s", n=3),
    TaskLog(task=TASK, worker="w", at=9, level=20, logger="shop", message="m", where="f.py:1 in f", n=4),
    TaskLog(task=TASK, worker="w", at=9, level=40, message="m", trace=TracebackInfo(exception="E: x", type="E"), n=5),
    TaskLog(task=TASK, worker="w", at=9, level=30, message="5 dropped", dropped=5, n=6),
    WorkerState(
        worker="w", at=9, group="g", host="h", pid=1, version="1", python="3", life="l", started=2, interval_s=5.0,
        state="running", topics=["work"], partitions={"work": [0, 3]}, delivery="exactly_once", concurrency=16,
        running=[Running(uuid="u", entrypoint="e", seconds=1.5, heartbeat_s_ago=0.5)], running_count=1, in_flight=2,
        unsettled=3, free_executors=4, reasons=["paused"], stats={"done": 5}, dropped={"log": 1, "record": 0},
    ),
]  # fmt: skip


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.TYPE)
def test_what_is_written_is_read_and_is_as_the_schema_says(record):
    raw = record.to_bytes()
    VALID.validate(json.loads(raw))
    assert loads(raw) == record
    assert json.loads(raw)["type"] == record.TYPE


def test_the_kinds_are_a_closed_set():
    names = {value for name, value in vars(TelemetryType).items() if name.isupper()}
    names |= {value for name, value in vars(EventType).items() if name.isupper()}
    assert names == {each["$ref"].rpartition("/")[2] for each in schema()["oneOf"]}
    assert {record.TYPE for record in RECORDS} == {v for n, v in vars(TelemetryType).items() if n.isupper()}


def test_keys_are_those_of_the_events_and_the_name_of_the_worker():
    assert RECORDS[0].key == "op"
    assert TaskStarted(task=Subject(uuid="u", entrypoint="e")).key == "u"
    assert RECORDS[-1].key == "w"


@pytest.mark.parametrize("raw", [None, b"", b"{", b"[]", b"5", b"{}", b'{"type": "task.progress"}', b'{"type": []}',
                                 b'{"type": "worker.state", "group": "g", "running": 5}',
                                 b'{"type": "worker.state", "group": "g", "interval_s": "soon"}',
                                 b'{"type": "worker.state", "group": "g", "interval_s": NaN}',
                                 b'{"type": "worker.state", "group": "g", "at": 1e300}',
                                 b'{"type": "worker.state", "group": "g", "at": 99999999999999999999}',
                                 b'{"type": "worker.state", "group": "g", "partitions": {"t": 3}}',
                                 b'{"type": "worker.state", "group": "g", "stats": {"done": null}}',
                                 b'{"type": "worker.state", "group": "g", "running": [{"uuid": "u"}]}',
                                 b'{"type": "worker.state", "group": "g", "reasons": [true]}'])  # fmt: skip
def test_what_is_no_record_is_refused_and_passed_over(raw):
    with pytest.raises(ValidationError):
        loads(raw)
    good = RECORDS[0].to_bytes()
    records = [Record("g.telemetry", 0, n, b"k", value, [], 0) for n, value in enumerate((raw, good))]
    assert list(read(records)) == [RECORDS[0]]


def test_what_a_newer_release_writes_is_read_as_far_as_it_is_known():
    more = json.loads(RECORDS[0].to_bytes()) | {"v": 2, "more": 1}
    assert loads(json.dumps(more).encode()) == RECORDS[0]
    assert loads(json.dumps(more | {"type": "task.paused"}).encode()) is None


@given(st.integers(), st.integers(), st.text(), st.lists(st.text()).map(tuple))
def test_any_progress_is_written_and_read(current, total, line, group):
    report = TaskProgress(task=TASK, worker="w", at=9, group=group, current=current, total=total, status_line=line)
    assert loads(report.to_bytes()) == report


# -- a worker tells --------------------------------------------------------------------------------------------------


def test_each_record_that_a_worker_writes_is_as_the_schema_says(registry, transport, start):
    """All kinds of events and of telemetry, by tasks that end in every way there is."""
    again = []
    account = {"token": "hunter2hunter2"}

    @registry.subscribe(retry=Retry(attempts=2, backoff_s=0.01, jitter=0))
    class Flaky(Task):
        def run(self):
            again.append(self.attempt)
            report_progress(("rows", "read"), 1, 2, "half")
            logger.warning("try %s", self.attempt)
            if self.params.get("bad") or self.attempt == 1:
                self._deeper({"password": "hunter2hunter2"})

        def _deeper(self, settings):
            password = settings["password"]
            raise ValueError(f"no luck with {len(password)}")

    @registry.subscribe
    class Long(Task):
        def run(self):
            while self.heartbeat() and not released.is_set():
                released.wait(0.02)

    @registry.subscribe
    class Inner(Operation):
        def build_tasks(self, **params):
            return [Flaky(params=params)]

    @registry.subscribe
    class Outer(Operation):
        def build_tasks(self, **params):
            return [Flaky(params=account), Inner(params=params), Flaky()]

    @registry.subscribe
    class Unbuildable(Operation):
        def build_tasks(self, **params):
            raise KeyError("no plan")

    released = threading.Event()
    good, bad, long = Outer(), Outer(params={"bad": True}), Long()
    for operation in (good, bad):
        operation.build().launch()
    Unbuildable().send()
    long.send()
    aborted = Outer().build()
    sink = transport.sink()
    kmsg = Message("waits", "of.another.Release", {"password": "hunter2hunter2"})
    sink.produce(OutRecord(TOPIC, b"x", kmsg.to_bytes()))
    sink.produce(OutRecord(TOPIC, b"x", kmsg.to_bytes(), ((WAITING, b"1"),)))
    sink.produce(OutRecord(TOPIC, b"x", b"no message"))
    one = start(control=True)
    from kser.control import abort

    wait(lambda: told(transport, TaskHeartbeat))
    abort(aborted.uuid, group=GROUP, transport=transport, run=1)
    eventually(lambda: aborted.uuid in one.worker._watch.aborts)
    aborted.launch()
    released.set()
    wait(lambda: len(events(transport, EventType.OPERATION_ENDED)) == 6 and events(transport, EventType.STEP_ABORTED))
    wait(lambda: any(event.uuid == long.uuid for event in events(transport, EventType.STEP_DONE)))
    assert DeadLetters(transport, GROUP).resume(bad.uuid).status == "sent"
    one.stop()

    records = [*transport.records(f"{GROUP}.events"), *transport.records(telemetry_topic(GROUP))]
    kinds = set()
    for record in records:
        data = json.loads(record.value)
        VALID.validate(data)
        kinds.add(data["type"])
    assert kinds == {each["$ref"].rpartition("/")[2] for each in schema()["oneOf"]}
    assert [record.value for record in records if b"hunter2" in record.value] == []


def test_a_failed_step_tells_where_it_came_from_with_the_variables(registry, transport, start):
    @registry.subscribe
    class Deep(Task):
        def run(self):
            self.one(order="A7")

        def one(self, order):
            self.two({"order": order, "api_token": "t0ps3cret"})

        def two(self, settings):
            password = settings["api_token"]
            raise ValueError(f"cannot charge {settings['order']}{len(password)}")

    class Built(Task):
        def postinit(self):
            self.one()

        def one(self):
            raise KeyError("postinit")

    class Coroutine(Deep):
        async def run(self):
            await asyncio.sleep(0)
            self.one(order="A7")

    for cls in (Built, Coroutine):
        registry.subscribe(cls)
    tasks = [Deep(), Coroutine(), Built()]
    for task in tasks:
        task.send()
    start()
    found = wait(lambda: len(failed := events(transport, EventType.STEP_FAILED)) == 3 and failed)
    by_uuid = {event.uuid: event for event in found}
    for task in tasks[:2]:
        event = by_uuid[task.uuid]
        frames = [frame.function.rpartition(".")[2] for frame in event.trace.frames]
        assert frames == ["run", "one", "two"]
        assert event.trace.frames[1].locals["order"] == "'A7'"
        assert event.trace.frames[2].locals["password"] == MASK
        assert event.trace.frames[2].locals["settings"] == f"{{'order': 'A7', 'api_token': '{MASK}'}}"
        assert event.trace.exception == "ValueError: cannot charge A79"
        assert set(event.result.retval["error"]) == {"code", "name", "message", "msgid", "extra", "stack"}
        assert 0 < event.began <= event.at
    assert [frame.function.rpartition(".")[2] for frame in by_uuid[tasks[2].uuid].trace.frames] == ["postinit", "one"]


def test_what_only_kser_raised_has_no_traceback(registry, transport, start):
    @registry.subscribe
    class Needs(Task):
        REQUIRED_FIELDS = ("order",)

    Needs().send()
    start()
    [event] = wait(lambda: events(transport, EventType.STEP_FAILED))
    assert event.trace is None
    assert "Missing parameter: order" in event.result.stderr


def test_a_failure_for_good_is_told_as_kept_in_the_dead_letters(registry, transport, start):
    @registry.subscribe
    class Bad(Task):
        def run(self):
            raise ValueError

    task = Bad()
    task.send()
    start()
    [kept] = wait(lambda: events(transport, EventType.MESSAGE_DEAD_LETTERED))
    assert (kept.uuid, kept.key, kept.status, kept.note) == (task.uuid, task.uuid, "FAILED", "kept in g.dlq")
    assert len(transport.records("g.dlq")) == 1


def test_short_tasks_are_not_told_to_have_started_and_long_ones_once(registry, transport, start):
    go = threading.Event()

    @registry.subscribe
    class Short(Task):
        def run(self):
            pass

    @registry.subscribe
    class Long(Task):
        def run(self):
            go.wait(10)

    @registry.subscribe
    class Waiting(Task):
        async def run(self):
            while not go.is_set():
                await asyncio.sleep(0.01)

    long = [Long(), Waiting()]
    for task in (*(Short() for _ in range(50)), *long):
        task.send()
    start()
    wait(lambda: len(told(transport, TaskStarted)) >= 2)
    go.set()
    wait(lambda: len(events(transport, EventType.STEP_DONE)) == 52)
    started = told(transport, TaskStarted)
    assert sorted(record.task.uuid for record in started) == sorted(task.uuid for task in long)
    done = {event.uuid: event for event in events(transport, EventType.STEP_DONE)}
    for record in started:
        assert record.task.began == done[record.task.uuid].began
        assert record.at - record.task.began >= 100


def test_secrets_in_progress_are_masked_as_in_a_log_line(registry, transport, start):
    @registry.subscribe
    class Dials(Task):
        def run(self):
            report_progress(("db", "postgres://shop:hunter2@db/shop"), 1, 2, "with password=hunter2 as shop")
            self.log("with password=hunter2 as shop", logging.WARNING)

    task = Dials()
    task.send()
    start()
    eventually(lambda: told(transport, TaskLog, uuid=task.uuid) and told(transport, TaskProgress, uuid=task.uuid))
    (report,) = told(transport, TaskProgress, uuid=task.uuid)
    assert (report.group, report.status_line) == (
        ("db", "postgres://shop:********@db/shop"),
        "with password=******** as shop",
    )
    (line,) = told(transport, TaskLog, uuid=task.uuid)
    assert line.message.endswith(report.status_line)


def test_progress_comes_from_threads_and_coroutines_and_its_last_always(registry, transport, start):
    @registry.subscribe
    class Counts(Task):
        def run(self):
            for n in range(2000):
                self.report_progress("rows::read", n + 1, 2000, f"row {n}")
            copied = contextvars.copy_context()
            thread = threading.Thread(target=lambda: copied.run(report_progress, None, 1, 2, "in a thread"))
            thread.start()
            thread.join(10)

    @registry.subscribe
    class Awaits(Task):
        async def run(self):
            for n in range(2000):
                report_progress(("rows", "read"), n + 1, 2000)
            await asyncio.sleep(0)

    tasks = [Counts(), Awaits()]
    for task in tasks:
        task.send()
    start()

    def reports(task):
        return [report for report in told(transport, TaskProgress, uuid=task.uuid) if report.group]

    wait(lambda: all(found and found[-1].current == 2000 for found in map(reports, tasks)))
    for task in tasks:
        assert {report.group for report in reports(task)} == {("rows", "read")}
        assert len(reports(task)) < 20
    [other] = [record for record in told(transport, TaskProgress) if record.group == ()]
    assert (other.current, other.total, other.status_line) == (1, 2, "in a thread")


def test_a_chatty_task_is_cut_short_and_it_is_told_how_much_is_missing(registry, transport, start):
    @registry.subscribe
    class Chatty(Task):
        def run(self):
            for n in range(3000):
                logger.warning("line %s", n)

    Chatty().send()
    one = start()

    def kept():
        return [record for record in told(transport, TaskLog) if not record.dropped]

    def missing():
        return [record for record in told(transport, TaskLog) if record.dropped]

    wait(lambda: len(kept()) + sum(record.dropped for record in missing()) == 3000)
    assert 200 <= len(kept()) < 1000
    assert f"{missing()[0].dropped} log record(s) dropped" in missing()[0].message
    numbers = [record.n for record in told(transport, TaskLog)]
    assert numbers == sorted(set(numbers))
    one.stop()
    state = told(transport, WorkerState)[-1]
    assert (state.state, state.dropped["log"]) == ("stopped", 3000 - len(kept()))


def test_a_worker_tells_how_it_does(registry, transport, start):
    go = threading.Event()

    @registry.subscribe
    class Long(Task):
        def run(self):
            while self.heartbeat() and not go.is_set():
                go.wait(0.02)

    task = Long()
    task.send()
    one = start(name="w-1", concurrency=3)
    wait(lambda: told(transport, TaskStarted))
    one.worker.stop()
    wait(lambda: [state for state in told(transport, WorkerState) if state.state == "draining"])
    go.set()
    one.thread.join(10)
    states = told(transport, WorkerState)
    assert [state.state for state in states] in (
        ["starting", "running", "draining", "stopped"],
        ["running", "draining", "stopped"],
    )
    draining, last = states[-2:]
    assert (draining.worker, draining.group, draining.topics, draining.concurrency) == ("w-1", GROUP, [TOPIC], 3)
    assert [(run.uuid, run.entrypoint) for run in draining.running] == [(task.uuid, task.path)]
    assert draining.running[0].heartbeat_s_ago < 5
    assert (draining.running_count, draining.partitions) == (1, {TOPIC: [0, 1]})
    assert (last.running_count, last.partitions, last.stats) == (0, {}, {"done": 1})
    assert last.version
    assert last.life == states[0].life
    assert last.gone_at_ms == last.at + 15_000


@pytest.mark.parametrize("level", ["none", "sequence"])
def test_what_is_not_wanted_is_not_told(registry, transport, start, level):
    @registry.subscribe
    class Tells(Task):
        def run(self):
            report_progress(None, 1, 1)
            logger.error("heard?")

    Tells().send()
    one = start(events=level)
    wait(lambda: one.worker.stats["done"])
    assert not any(isinstance(handler, JobControlLogHandler) for handler in logging.getLogger().handlers)
    one.stop()
    topics = {name for name in ("g.events", "g.telemetry") if transport.admin().describe([name])}
    assert topics == (set() if level == "none" else {"g.events"})


def test_a_broker_that_takes_no_telemetry_costs_records_and_nothing_else(registry, transport, start, caplog):
    real, refused = transport.sink, []

    class Refusing:
        def __init__(self, sink):
            self.sink = sink

        def produce(self, record, on_delivery=None):
            if record.topic == telemetry_topic(GROUP):
                refused.append(record)
                raise TransportError("no such topic")
            self.sink.produce(record, on_delivery)

        def __getattr__(self, name):
            return getattr(self.sink, name)

    transport.sink = lambda *args, **kwargs: Refusing(real(*args, **kwargs))

    @registry.subscribe
    class Tells(Task):
        def run(self):
            report_progress(None, 1, 1)
            logger.error("heard?")

    tasks = [Tells() for _ in range(20)]
    for task in tasks:
        task.send()
    one = start()
    wait(lambda: len(events(transport, EventType.STEP_DONE)) == 20)
    eventually(lambda: len(refused) > 20)
    one.stop()
    assert one.worker.stats == {"done": 20}
    lines = [line for line in caplog.messages if "Telemetry of" in line]
    assert lines == [f"Telemetry of {one.worker.name} is dropped: no such topic"]


class SlowSender:
    """What TaskReports needs of a sender."""

    worker = "w"

    def __init__(self):
        self.put = [].append
        self.counted = []
        self.count = self.counted.append

    def may_log(self):
        return True


def test_what_is_told_after_the_end_is_not_of_the_execution():
    work = Work(Record("t", 0, 0, b"k", b"", [], 0), Message("u", "e", {}), None, None, None, 1)
    sender = SlowSender()
    reports = TaskReports(sender, work, Control())
    reports.progress((), 1, 2, "")
    reports.end()
    reports.progress((), 2, 2, "late")
    told = []
    sender.put = told.append
    reports.log(logging.makeLogRecord({"msg": "late"}))
    assert reports.collect(0) is False
    assert [record.current for record in told] == [1]


def test_progress_without_measure_is_cut():
    work = Work(Record("t", 0, 0, b"k", b"", [], 0), Message("u", "e", {}), None, None, None, 1)
    sender = SlowSender()
    told = []
    sender.put = told.append
    reports = TaskReports(sender, work, Control())
    reports.progress(("x" * 5000,) * 500, 1, 2, "y" * 5000)
    for n in range(3000):
        reports.progress((str(n),), 1, 2, "")
    reports.end()
    assert reports.collect(0) is False
    assert (len(told), len(sender.counted)) == (1000, 2001)
    assert (told[0].group, told[0].status_line) == (("x" * 200,) * 20, "y" * 1024)


def test_a_control_that_ends_while_its_reports_are_made_ends_them():
    ends = []

    class Made:
        def end(self):
            ends.append(1)

    def opening(control):
        control.end()  # the task ends right now
        return Made()

    assert isinstance(Control(1, opening).reports, Made)
    assert ends == [1]
    ended = Control(1, opening)
    ended.end()
    assert ended.reports is None


# -- progress --------------------------------------------------------------------------------------------------------


def test_progress_outside_of_a_task_is_refused():
    """J-37."""
    with pytest.raises(RuntimeError, match="execution context"):
        report_progress(None, 1, 2)


def test_progress_of_a_task_that_no_worker_runs_is_nothing():
    class Lone(Task):
        def run(self):
            report_progress("a::b", 1, 2, "x")
            self.report_progress(("a", "b"), 1, 2, status_line="x")
            return Result(stdout="ok")

    assert Lone().execute().stdout == "ok"


def test_a_task_tells_its_progress_by_the_same_call():
    """M-13: who has ``self`` need not learn another order."""
    own = inspect.signature(Task().report_progress)
    assert own.parameters == inspect.signature(report_progress).parameters


@pytest.mark.parametrize("given", [(1, 2), (1, 2, "storing"), (3, 10, "rows", "a::b")])
def test_progress_in_another_order_is_refused(given):
    class Lone(Task):
        def run(self):
            self.report_progress(*given)

    assert "TypeError" in Lone().execute().retval["error"]["stack"]


@pytest.mark.parametrize(("current", "total"), [(1.5, 2), ("1", 2), (1, None), (True, 2), (1, 2.0)])
def test_progress_that_is_no_whole_number_is_refused(current, total):
    class Lone(Task):
        def run(self):
            report_progress(None, current, total)

    stack = Lone().execute().retval["error"]["stack"]
    assert "TypeError" in stack
    assert "report_progress(group_name, current, total, status_line)" in stack


@pytest.mark.parametrize(("given", "path"), [
    (None, ()), ("", ()), ((), ()), ("a", ("a",)), ("a::b", ("a", "b")), (("a", "b::c"), ("a", "b::c")),
    (["a"], ("a",)),
])  # fmt: skip
def test_names_of_progress_groups(given, path):
    assert parse_group(given) == path


@pytest.mark.parametrize("given", [5, ("a", 1), {"a"}, b"a"])
def test_what_is_no_name_of_a_group_is_refused(given):
    with pytest.raises(TypeError, match="group_name="):
        parse_group(given)
