"""kser operations list, show and watch, kser logs: on a memory transport and a storage in a file. DESIGN.md 5; R-35."""

import io
import json
import logging
import sqlite3
import threading
import time
from datetime import UTC, datetime

import pytest
from click.testing import CliRunner
from rich.console import Console

from kser import Operation, OperationRegistry, Result, Task, results
from kser.cli.connection import Drivers
from kser.cli.main import cli
from kser.cli.operations.live import LiveOperation
from kser.cli.operations.tree import TreeView, render
from kser.cli.operations.view import duration, table
from kser.errors import AbortedError
from kser.events import Event
from kser.masking import MASK
from kser.producer import BaseProducer
from kser.storage import get_storage_from_url
from kser.storage.history import History
from kser.storage.projection import Projection
from kser.testing import eventually
from kser.transport import OutRecord, Partition, TopicSpec
from kser.transport.memory import MemoryTransport
from kser.web import WebSettings, create_app
from kser.worker import Worker
from tests.recording import START_MS, Tape, result

SECRET = "hunter2-hunter2"
SERVERS = ("--group", "shop", "--bootstrap-servers", "127.0.0.1:1")


@pytest.fixture
def broker():
    made = MemoryTransport(default_partitions=3)
    made.admin().create([TopicSpec(name="work", partitions=2)])
    return made


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path}/kser.db"


@pytest.fixture
def storage(url):
    opened = get_storage_from_url(url)
    opened.install()
    yield opened
    opened.close()


@pytest.fixture
def run(broker, url):
    def invoke(*args, **options):
        drivers = Drivers(lambda config: broker, lambda config: None)
        return CliRunner().invoke(cli, [str(arg) for arg in args], obj=drivers, env={"KSER_STORAGE": url}, **options)

    return invoke


def record(storage, tape):
    """Put what is on the tape into the storage."""
    projection = Projection(storage.database, "c", "shop")
    projection.positions(tape.partitions)
    projection.apply(tape.records)


def record_topics(storage, broker):
    """Put what is in the topics of the group into the storage."""
    projection = Projection(storage.database, "m", "shop")
    for topic in ("shop.events", "shop.telemetry"):
        partitions = [Partition(topic, number) for number in range(broker.admin().describe([topic])[topic].partitions)]
        projection.positions(partitions)
        for batch in broker.read(partitions):
            projection.apply(batch)


def tell(broker, tape):
    """Write what is on the tape into the topics, and take it off."""
    sink = broker.sink()
    assert sink.deliver([OutRecord(each.topic, each.key, each.value) for each in tape.records]) == []
    sink.close()
    tape.records.clear()


def three(storage):
    """An operation that went well, one that failed, and a task of none that runs."""
    tape = Tape()
    tape.operation("good-0000", 2)
    tape.operation("bad-00000", 2, failed=1)
    tape.telemetry("task.started", "lone-0000", entrypoint="shop.Mail")
    record(storage, tape)


# -- list --------------------------------------------------------------------------------------------------------------


def test_operations_are_listed_newest_first_with_what_became_of_them(run, storage):
    three(storage)
    done = run("operations", "list")
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert lines[0].split() == ["STARTED", "TOOK", "STATUS", "NAME", "UUID", "ERROR"]
    assert [line.split()[-2:] for line in lines[1:4]] == [
        ["shop.Mail", "lone-0000"],
        ["no", "luck"],
        ["shop.Order", "good-0000"],
    ]
    assert lines[-1] == "3 in all"


def test_a_task_is_found_by_its_params_and_shown_with_them(run, storage, broker):
    """K-33: those of steps, and of tasks of no operation, too."""
    registry = OperationRegistry(producer=BaseProducer(broker.sink()), topic="work")
    registry.configure(storage=storage)

    @registry.subscribe
    class Mail(Task):
        def run(self):
            pass

    @registry.subscribe
    class Both(Operation):
        def build_tasks(self, **params):
            return [Mail(params={"to": "anna"}), Mail(params={"to": "berta"})]

    lone, both = Mail(params={"to": "carla", "password": SECRET}), Both().build()
    lone.send()
    both.launch()
    Worker(registry, topics=["work"], group="shop", transport=broker).run(until_idle=True)
    record_topics(storage, broker)
    assert lone.uuid in run("operations", "list", "--text", "carla").output
    found = Mail.init_by_id(lone.uuid)
    assert found.params == {"to": "carla", "password": MASK}
    shown = json.loads(run("operations", "show", both.uuid, "--format", "json").output)
    assert [task["params"] for task in shown["tasks"]] == [{"to": "anna"}, {"to": "berta"}]


def test_what_began_in_another_year_is_shown_with_it(run, storage):
    tape = Tape()
    for uuid, year in (("then-0000", 2001), ("now-00000", datetime.now().astimezone().year)):
        began = int(datetime(year, 6, 15, 12, tzinfo=UTC).timestamp() * 1000)
        tape.event("step.done", uuid, status="SUCCESS", result=result(uuid), began=began, at=began)
    record(storage, tape)
    assert [line.split()[0] for line in run("operations", "list").output.splitlines()[1:3]] == ["06-15", "2001-06-15"]


def test_programs_get_a_list_of_objects(run, storage):
    three(storage)
    found = json.loads(run("operations", "list", "--format", "json").output)
    assert [each["uuid"] for each in found] == ["lone-0000", "bad-00000", "good-0000"]
    good = found[2]
    assert {"uuid", "entrypoint", "status", "started", "ended", "duration_s", "error"} <= good.keys()
    assert (good["entrypoint"], good["status"], good["error"]) == ("shop.Order", "SUCCESS", None)
    listed = storage.history.list_operations(kind="operation")[0]
    assert "tasks" not in listed.to_json()  # they were not read: none is not what there is
    ended = datetime.fromisoformat(good["ended"])
    assert good["duration_s"] == (ended - datetime.fromisoformat(good["started"])).total_seconds()


def test_what_orjson_refuses_is_printed_as_json_all_the_same(run, storage):
    tape = Tape()
    given = {"text": "\ud800", "large": 1 << 80, "wrong": float("nan")}
    tape.event("step.done", "odd-00000", status="SUCCESS", result=Result(uuid="odd-00000", retval=given))
    record(storage, tape)
    done = run("operations", "show", "odd-00000", "--format", "json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["result"]["retval"] == given | {"wrong": None}


@pytest.mark.parametrize(
    ("args", "uuids"),
    [
        (["--state", "failed"], ["bad-00000"]),
        (["--state", "FAILED", "--state", "running"], ["lone-0000", "bad-00000"]),
        (["--entrypoint", "Order"], ["bad-00000", "good-0000"]),
        (["--group", "mail"], []),
        (["--group", "shop", "--limit", 1], ["lone-0000"]),
        (["--text", "NO LUCK"], ["bad-00000"]),
        (["--until", datetime.fromtimestamp(START_MS / 1000, UTC).isoformat()], []),
        (["--since", datetime.fromtimestamp(START_MS / 1000, UTC).isoformat(), "--limit", 1], ["lone-0000"]),
        (["--limit", 1, "--offset", 1], ["bad-00000"]),
    ],
)
def test_filters_limit_and_offset(run, storage, args, uuids):
    three(storage)
    done = run("operations", "list", *args, "--format", "json")
    assert done.exit_code == 0, done.output
    assert [each["uuid"] for each in json.loads(done.output)] == uuids


def test_what_is_left_out_is_said(run, storage):
    assert run("operations", "list").output.startswith("None is known that matches")
    three(storage)
    assert run("operations", "list", "--limit", 1).output.splitlines()[-1] == "1 of 3; --offset 1 goes on"
    assert run("operations", "list", "--limit", 2, "--offset", 2).output.splitlines()[-1] == "1 of 3"


def test_on_a_narrow_terminal_the_uuid_is_shortened_and_then_the_name(storage):
    tape = Tape()
    tape.operation("5f0c6d4e-9a3b-4f0e-8a53-0d6f3f1f2b11", 2, failed=0)
    record(storage, tape)
    found = storage.history.list_operations()
    assert "shop.Order  5f0c6d4e-9a3b-4f0e-8a53-0d6f3f1f2b11  no luck" in table(found, 200)[1]
    assert "shop.Order  5f0c6d4e  no luck" in table(found, 70)[1]
    assert "  Order  5f0c6d4e  no luck" in table(found, 55)[1]
    assert table([], 70) == []


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, ""),
        (0.0123, "0.012 s"),
        (1, "1.0 s"),
        (59.94, "59.9 s"),
        (125, "2m 05s"),
        (3725, "1h 02m"),
        (9e4, "1d 01h"),
    ],
)
def test_durations_for_people(seconds, text):
    assert duration(seconds) == text


# -- show --------------------------------------------------------------------------------------------------------------


def test_one_operation_is_shown_with_its_tasks_and_how_to_go_on(run, storage):
    three(storage)
    assert run("operations", "show", "lone-000").output.startswith("shop.Mail [lone-0000]  RUNNING\n")  # its beginning
    done = run("operations", "show", "bad-00000")
    assert done.exit_code == 0, done.output
    assert done.output.startswith("shop.Order [bad-00000]  FAILED\n")
    for text in ("  error     no luck\n", "\nParameters\n", "   0  SUCCESS  shop.Task [bad-00000/0]", "Traceback of"):
        assert text in done.output
    assert done.output.endswith("To run it again from there: kser operations resume bad-00000 --group shop\n")
    assert "Traceback" not in run("operations", "show", "bad-00000", "--traceback", "none").output
    shown = json.loads(run("operations", "show", "bad-00000", "--format", "json").output)
    assert shown["params"] == {"of": "bad-00000"}
    assert [(task["uuid"], task["status"], task["error"]) for task in shown["tasks"]] == [
        ("bad-00000/0", "SUCCESS", None),
        ("bad-00000/1", "FAILED", "no luck"),
    ]
    task = run("operations", "show", "bad-00000/1").output
    assert "  operation bad-00000\n" in task
    assert "run it again" not in task


def test_what_was_aborted_before_it_ran_has_no_traceback(run, storage):
    tape = Tape()
    aborted = results.from_exception(AbortedError("shop.Task[lone-0000]: was aborted:\nnot wanted"), "lone-0000")
    tape.event("step.aborted", "lone-0000", status="ABORTED", result=aborted)
    record(storage, tape)
    shown = run("operations", "show", "lone-0000").output
    assert "  error     shop.Task[lone-0000]: was aborted:\n" in shown
    assert "Traceback" not in shown


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["operations", "show", "nope"], "Nothing is known of nope"),
        (["logs", "nope"], "Nothing is known of nope"),
        (["operations", "show", "same-uuid"], "2 uuids begin with same-uuid"),
        (["operations", "list", "--state", "lost"], "'lost' is not one of"),
        (["operations", "list", "--storage", "nosuch://"], "Unknown storage"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(run, storage, args, said):
    tape = Tape()
    for end in "ab":
        tape.event("step.done", f"same-uuid-{end}", status="SUCCESS", result=result("t"))
    record(storage, tape)
    done = run(*args)
    assert done.exit_code in (1, 2)
    assert done.stderr.count("\n") == 1
    assert said in done.stderr


# -- what is secret ----------------------------------------------------------------------------------------------------


def test_the_password_of_a_task_that_fails_three_frames_deep_is_masked_everywhere(run, broker, storage, url):
    """In the topics, the storage, the API, the logs, and in what the commands show; the traceback has its locals."""
    registry = OperationRegistry(producer=BaseProducer(broker.sink()), topic="work")
    log = logging.getLogger("shop.pay")

    @registry.subscribe(name="shop.Charge")
    class Charge(Task):
        def run(self):
            order = self.params["order"]
            self.prepare(order, {"password": SECRET})

        def prepare(self, order, settings):
            password = settings["password"]
            log.warning("paying %s, password=%s", order, password)
            self.pay(order, password)

        def pay(self, order, password):
            try:
                raise KeyError(order)
            except KeyError:
                log.exception("no such card")
                raise ValueError(f"card refused, password={password}") from None

    @registry.subscribe(name="shop.Order")
    class Order(Operation):
        def build_tasks(self, **params):
            return [Charge(params=params)]

    order = Order(params={"order": "A7", "password": SECRET}).build()
    order.launch()
    Worker(registry, topics=["work"], group="shop", transport=broker).run(until_idle=True)
    record_topics(storage, broker)

    shown = run("operations", "show", order.uuid).output
    for text in (
        "in test_the_password",
        ".prepare",
        ".pay",
        "order = 'A7'",
        f"password = {MASK}",
        "> ",
        "ValueError: card",
    ):
        assert text in shown
    assert "      password" not in run("operations", "show", order.uuid, "--traceback", "short").output
    logged = run("logs", order.uuid).output
    assert "WARNING   shop.Charge" in logged
    assert f"paying A7, password={MASK}" in logged
    assert "KeyError: 'A7'" in logged

    everywhere = [shown, logged]
    for args in (
        ("operations", "show", order.uuid),
        ("operations", "list"),
        ("logs", order.uuid),
        ("operations", "watch", order.uuid, *SERVERS),
    ):
        everywhere.append(run(*args, "--format", "json").output)
    app = create_app(broker, storage=storage, registry=registry, settings=WebSettings(group="shop", topic="work"))
    try:
        client = app.test_client()
        for path in ("", "/{}", "/{}/events", "/{}/logs", "/{}/progress"):
            answer = client.get(f"/api/1/operations{path.format(order.uuid)}")
            assert answer.status_code == 200
            everywhere.append(answer.get_data(as_text=True))
    finally:
        app.extensions["kser"].close()
    with sqlite3.connect(url.removeprefix("sqlite:///")) as rows:
        everywhere += rows.iterdump()
    everywhere += [str(each.value) for topic in ("shop.events", "shop.telemetry") for each in broker.records(topic)]
    assert not [text for text in everywhere if SECRET in text]


# -- logs --------------------------------------------------------------------------------------------------------------


def test_logs_are_shown_from_a_level_on(run, storage):
    tape = Tape()
    tape.operation("op-000000", 2)
    said = {"operation": "op-000000", "parent": "op-000000"}
    for n, (level, message) in enumerate([(20, "one\nmore"), (30, "two"), (10, "\x1b[2Jthree")]):
        tape.telemetry("task.log", "op-000000/0", n=n, level=level, message=message, logger="l", **said)
    record(storage, tape)
    lines = run("logs", "op-000000").output.splitlines()
    assert [line[21:].rstrip() for line in lines] == [
        *("INFO      shop.Task [op-00000]  one", "", "WARNING   shop.Task [op-00000]  two"),
        "DEBUG     shop.Task [op-00000]  \ufffd[2Jthree",
    ]
    assert lines[1] == "  more"
    assert len(run("logs", "op-000000", "--level", "warning").output.splitlines()) == 1
    [one] = [
        json.loads(line)
        for line in run("logs", "op-000000", "--level", "WARNING", "--format", "json").output.splitlines()
    ]
    assert (one["message"], one["level_name"], one["uuid"]) == ("two", "WARNING", "op-000000/0")


def test_logs_are_followed_until_it_has_ended(run, storage, monkeypatch):
    monkeypatch.setattr("kser.cli.task_logs._POLL_S", 0.01)
    monkeypatch.setattr("kser.cli.task_logs._AFTER_S", 0.05)
    found, asked, real = [], threading.Event(), History.get_operation

    def get_operation(self, uuid):
        try:
            return real(self, uuid)
        finally:
            asked.set()

    monkeypatch.setattr(History, "get_operation", get_operation)
    follower = threading.Thread(target=lambda: found.append(run("logs", "lone-0000", "--follow")))
    follower.start()
    assert asked.wait(20)  # before anything is told of it
    tape = Tape()
    tape.telemetry("task.log", "lone-0000", n=1, level=20, message="first", logger="l")
    record(storage, tape)
    tape.telemetry("task.log", "lone-0000", n=2, level=20, message="second", logger="l")
    tape.event("step.done", "lone-0000", status="SUCCESS", result=result("lone-0000"))
    record(storage, tape)
    follower.join(20)
    assert not follower.is_alive()
    assert [line.split()[-1] for line in found[0].stdout.splitlines()] == ["first", "second"]
    assert found[0].stderr == "kser: Nothing is known of lone-0000 yet: it is waited for\n"


# -- watch -------------------------------------------------------------------------------------------------------------


def begun(broker, uuid="5f0c6d4e-9a3b-4f0e-8a53-0d6f3f1f2b11"):
    """The operation's first task has ended, and its second one runs."""
    tape, said = Tape(), {"operation": uuid, "parent": uuid}
    tape.event("operation.started", uuid, "shop.Order", status="RUNNING", operation=uuid)
    tape.event("step.done", "s0", "shop.Charge", status="SUCCESS", result=result("s0"), began=START_MS, **said)
    tape.telemetry("task.started", "s1", **said, position=1)
    tape.telemetry(
        "task.progress", "s1", **said, position=1, group=["boxes"], current=3, total=4, status_line="box 3", n=1
    )
    tape.telemetry("task.log", "s1", **said, position=1, level=30, message="late", logger="l", n=2)
    tell(broker, tape)
    return uuid


def end(broker, uuid, status="SUCCESS"):
    tape, said = Tape(), {"operation": uuid}
    given = result("s1", 0 if status == "SUCCESS" else 500)
    kind = "step.done" if status == "SUCCESS" else "step.failed"
    tape.event(kind, "s1", status=status, result=given, parent=uuid, position=1, **said)
    tape.event("operation.ended", uuid, "shop.Order", status=status, result=given, position=1, **said)
    tell(broker, tape)


def test_an_operation_is_watched_line_by_line_from_its_beginning_to_its_end(run, broker):
    uuid = begun(broker)
    found = []
    lives = Tape()
    lives.worker("w1", at=int(time.time() * 1000), interval_s=60)
    tell(broker, lives)
    watcher = threading.Thread(target=lambda: found.append(run("operations", "watch", uuid[:8], *SERVERS)))
    watcher.start()
    watcher.join(1.5)
    assert watcher.is_alive()
    end(broker, uuid)
    watcher.join(20)
    assert not watcher.is_alive()
    assert found[0].exit_code == 0, found[0].output
    lines = [" ".join(line.split()[1:]) for line in found[0].output.splitlines()]
    told = [
        "RUNNING shop.Order started",
        "SUCCESS shop.Charge done",
        "SUCCESS shop.Task done",
        "SUCCESS shop.Order ended",
    ]
    assert [line for line in lines if line in told] == told
    assert sorted(line for line in lines if line not in told) == ["3/4 shop.Task boxes box 3", "log shop.Task late"]


def test_one_that_has_ended_is_shown_at_once_and_how_it_ended_is_the_exit_code(run, broker):
    uuid = begun(broker)
    end(broker, uuid, "FAILED")
    done = run("operations", "watch", uuid, *SERVERS, "--format", "json")
    assert done.exit_code == 1
    assert done.stderr == f"kser: error: shop.Order[{uuid}] FAILED in shop.Task[s1]: no luck\n"
    kinds = {json.loads(line)["type"] for line in done.stdout.splitlines()}
    assert {"operation.started", "task.progress", "step.failed", "operation.ended"} <= kinds


def test_programs_get_the_records_with_what_looks_secret_masked(run, broker):
    tape = Tape()
    tape.event("step.done", "lone", status="SUCCESS", result=Result(uuid="lone", retval={"token": SECRET}))
    tell(broker, tape)
    done = run("operations", "watch", "lone", *SERVERS, "--format", "json")
    assert done.exit_code == 0
    assert json.loads(done.stdout)["result"]["retval"] == {"token": MASK}


@pytest.mark.parametrize(
    ("uuid", "said"),
    [
        ("nobody", "nobody has not ended within 0.1 s: nothing is told of it"),
        ("5f0c6d4e-9a3b", "5f0c6d4e-9a3b-4f0e-8a53-0d6f3f1f2b11 has not ended within 0.1 s: RUNNING"),
        ("0000aaaa", "Nothing that begins with 0000aaaa is told of: give the whole uuid to wait for it"),
        ("s0", "shop.Charge[s0] is part of operation 5f0c6d4e-9a3b-4f0e-8a53-0d6f3f1f2b11"),
    ],
)
def test_what_cannot_be_watched_to_its_end_is_told_in_one_line(run, broker, uuid, said):
    begun(broker)
    done = run("operations", "watch", uuid, *SERVERS, "--timeout", 0.1)
    assert done.exit_code in (1, 2)
    assert done.stderr.count("\n") == 1
    assert said in done.stderr


def test_topics_that_come_later_are_read_from_their_beginning(broker, monkeypatch):
    monkeypatch.setattr("kser.cli.operations.live._LOOK_S", 0.0)
    with LiveOperation(broker, "shop", "5f0c6d4e-9a3b-4f0e-8a53-0d6f3f1f2b11") as live:
        assert live.poll(0) == []
        begun(broker)
        eventually(lambda: live.poll(0.1) and live.find())
        assert live.find().tasks[0].status == "SUCCESS"


def test_a_task_whose_worker_fell_silent_is_not_shown_as_running(broker, monkeypatch):
    monkeypatch.setattr("kser.cli.operations.live._LOOK_S", 0.0)
    tape, now = Tape(), int(time.time() * 1000)
    tape.telemetry("task.started", "t", operation="op", parent="op", operation_entrypoint="shop.Order", began=now)
    tape.worker("w1", at=now - 30_000, interval_s=3600)
    tell(broker, tape)
    with LiveOperation(broker, "shop", "op") as live:
        assert (live.find().entrypoint, live.find().tasks[0].status) == ("shop.Order", "RUNNING")
        assert not live.look()  # it has told, before it was listened to, that it says little
        tape.worker("w1", at=now - 20_000, interval_s=5)
        tape.worker("w2", at=now)
        tell(broker, tape)
        (task,) = eventually(lambda: live.poll(0.1) or live.look())
        assert live.find().tasks == (task,)
        assert not live.look()  # told once
    assert task.status == "PENDING"
    assert "worker w1 was not heard of since" in task.note


@pytest.mark.parametrize("output", [[], ["--format", "json"]])
def test_a_task_whose_worker_died_before_the_watch_began_is_told_of(run, broker, monkeypatch, output):
    monkeypatch.setattr("kser.cli.operations.live._LOOK_S", 0.0)
    uuid = begun(broker)
    tape = Tape()
    tape.worker("w1", at=int(time.time() * 1000) - 3_600_000)
    tell(broker, tape)
    done = run("operations", "watch", uuid, *SERVERS, "--timeout", 0.3, *output)
    (hint,) = [line for line in done.stderr.splitlines() if "w1" in line]
    assert hint.startswith("kser: shop.Task[s1] PENDING: worker w1 was not heard of since ")


def test_where_no_worker_has_run_it_is_waited_for_the_first_word(run):
    done = run(
        "operations", "watch", "nobody", "--group", "none", "--bootstrap-servers", "127.0.0.1:1", "--timeout", 0.1
    )
    assert "nothing is told of it" in done.stderr


def test_what_was_told_before_partitions_were_added_is_found(broker):
    uuid = begun(broker)
    for topic in ("shop.events", "shop.telemetry"):
        broker.add_partitions(topic, 64)
    with LiveOperation(broker, "shop", uuid) as live:
        assert live.find().tasks[1].status == "RUNNING"
        end(broker, uuid)
        eventually(lambda: live.poll(0.1) and live.find().status == "SUCCESS")
        assert live.poll(0) == []


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [
        ("utf-8", ["├── ✓ shop.Charge", "━━━━━━━━━━━━━━━───── 3/4 (75%)  box 3", "WARNING shop.Task: late"]),
        ("ascii", ["+-- + shop.Charge", "###############----- 3/4 (75%)  box 3", "WARNING shop.Task: late"]),
    ],
)
def test_on_a_terminal_the_tasks_are_a_tree_with_bars_and_the_last_lines_of_the_log(broker, encoding, expected):
    uuid = begun(broker)
    written = io.BytesIO()
    out = io.TextIOWrapper(written, encoding=encoding, write_through=True)
    console = Console(file=out, force_terminal=True, width=100, height=30)
    with LiveOperation(broker, "shop", uuid) as live, TreeView(console) as view:
        view.update(live, live.told)
    out.flush()
    text = written.getvalue().decode(encoding)
    for part in (f"shop.Order  {uuid}  RUNNING", *expected):
        assert part in plain(text)


def plain(text):
    """Without colours."""
    import re

    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def test_of_very_many_tasks_the_last_are_shown(storage):
    tape = Tape()
    tape.operation("op", 200, failed=199)
    record(storage, tape)
    console = Console(file=io.StringIO(), width=80, height=20, force_terminal=True)
    console.print(render(storage.history.get_operation("op"), storage.history.get_progress("op"), [], console))
    lines = plain(console.file.getvalue()).splitlines()
    assert len(lines) <= 18
    assert "185 more: 185 SUCCESS" in lines[1]
    assert "FAILED" in lines[-1]


def test_an_event_of_a_kind_that_is_not_known_is_a_line_all_the_same(run, broker):
    sink = broker.sink()
    for event in (
        Event(type="step.weighed", uuid="lone", entrypoint="shop.Mail", status="RUNNING", note="12 kg"),
        Event(type="step.done", uuid="lone", entrypoint="shop.Mail", status="SUCCESS", result=result("lone")),
    ):
        sink.produce(OutRecord("shop.events", b"lone", event.to_bytes()))
    assert sink.flush(5) == 0
    done = run("operations", "watch", "lone", *SERVERS)
    assert done.exit_code == 0, done.output
    assert "RUNNING   shop.Mail  12 kg" in done.output
