"""One suite for what events and telemetry become in a storage: memory, sqlite, PostgreSQL. DESIGN.md 5; R-35, R-58."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import update

from kser.errors import StorageError
from kser.events import Event, read
from kser.storage import bulk, migrate
from kser.storage.projection import Heard, Projection, StaleError
from kser.storage.values import clean_text
from kser.tracebacks import TracebackInfo
from kser.transport import Partition, Record
from kser.transport.partitioner import partition_of
from tests.recording import START_MS, Tape, differences, result, snapshot


def recorder(storage, tape=None, group="shop", cluster="c"):
    projection = Projection(storage.database, cluster, group)
    if tape is not None:
        projection.positions(tape.partitions)
    return projection


def record(storage, tape, size=1000):
    projection = recorder(storage, tape)
    for at in range(0, len(tape.records), size):
        projection.apply(tape.records[at : at + size])
    return projection


def at(ms):
    return datetime.fromtimestamp(ms / 1000, UTC)


# -- what becomes of events --------------------------------------------------------------------------------------------


def test_an_operation_and_its_steps_are_a_tree_in_the_order_of_their_positions(storage):
    tape = Tape()
    tape.operation("op", 3)
    record(storage, tape)
    found = storage.history.get_operation("op")
    assert (found.kind, found.entrypoint, found.status, found.error) == ("operation", "shop.Order", "SUCCESS", None)
    assert [(task.uuid, task.position, task.status) for task in found.tasks] == [
        ("op/0", 0, "SUCCESS"),
        ("op/1", 1, "SUCCESS"),
        ("op/2", 2, "SUCCESS"),
    ]
    assert found.started == found.tasks[0].started == at(START_MS)  # with its first step
    assert found.created == found.started
    assert found.ended == at(START_MS + 7000)
    assert found.duration_s == 7.0
    assert found.params == {"of": "op"}
    assert found.result == {"uuid": "op", "retcode": 0, "stdout": "done\n", "stderr": "", "retval": {"by": "op/2"}}
    assert found.group == "shop"
    assert differences(storage, read(tape.records)) == []


def test_an_operation_whose_first_task_runs_has_its_name_before_an_event_tells_it(storage):
    tape = Tape()
    said = {"operation": "op", "parent": "op"}
    tape.telemetry("task.started", "op/0", operation_entrypoint="shop.Order", **said)
    record(storage, tape)
    (found,) = storage.history.list_operations(entrypoint="Order")
    assert (found.uuid, found.entrypoint, found.status) == ("op", "shop.Order", "RUNNING")
    tape.operation("op", 1)
    record(storage, tape)
    assert storage.history.get_operation("op").status == "SUCCESS"
    assert differences(storage, read(tape.records)) == []


@pytest.mark.parametrize("size", [1, 1000])
def test_an_operation_that_only_its_steps_tell_of_began_with_the_first_of_them(storage, size):
    tape = Tape()
    said = {"operation": "op", "parent": "op"}
    tape.telemetry("task.started", "op/0", began=START_MS + 2000, **said)  # it lost its partition
    tape.event("step.done", "op/0", began=START_MS + 500, status="SUCCESS", result=result("op/0"), **said)
    record(storage, tape, size)
    assert storage.history.get_operation("op").started == at(START_MS + 500)


def test_a_nested_operation_is_a_branch_of_the_tree(storage):
    tape = Tape()
    said = {"operation": "op", "run": 1}
    tape.event("operation.started", "op", "shop.Order", status="RUNNING", **said)
    tape.event("operation.started", "in", "shop.Inner", status="RUNNING", parent="op", **said)
    tape.event("step.done", "a", parent="in", position=0, status="SUCCESS", result=result("a"), **said)
    tape.event("operation.ended", "in", "shop.Inner", parent="op", position=0, status="SUCCESS", **said)
    tape.event("step.done", "b", parent="op", position=2, status="SUCCESS", result=result("b"), **said)
    record(storage, tape)
    found = storage.history.get_operation("op")
    assert [each.uuid for each in found.walk()] == ["op", "in", "a", "b"]
    assert [each.uuid for each in storage.history.get_operation("in").walk()] == ["in", "a"]
    assert storage.history.get_operation("a").tasks == ()
    assert [each.uuid for each in storage.history.list_operations()] == ["op"]


def test_what_is_in_an_operation_nobody_told_of_yet_is_shown_below_the_root(storage):
    tape = Tape()
    tape.telemetry("task.started", "a", operation="op", parent="in")
    record(storage, tape)
    (found,) = storage.history.list_operations()
    assert (found.uuid, found.kind, found.status, found.entrypoint) == ("op", "operation", "RUNNING", "")
    assert [each.uuid for each in storage.history.get_operation("op").walk()] == ["op", "a"]
    tape.event("operation.started", "op", "shop.Order", operation="op", status="RUNNING")
    record(storage, tape)
    assert storage.history.get_operation("op").entrypoint == "shop.Order"
    assert [build["uuid"] for build in storage.get_job_builds("shop.Order")] == ["op"]


def test_a_failed_step_fails_its_operation_and_keeps_error_and_traceback(storage):
    """R-35."""
    tape, trace = Tape(), {"exception": "ValueError: no", "type": "ValueError", "frames": []}
    tape.operation("op", 3, failed=1)
    tape.event(
        *("step.failed", "lone"),
        status="FAILED",
        result=result("lone", 500),
        trace=TracebackInfo.load(trace),
        began=START_MS + 5,
    )
    record(storage, tape)
    found = storage.history.get_operation("op")
    assert (found.status, found.error) == ("FAILED", "no luck")
    failed = found.tasks[-1]
    assert (failed.status, failed.error, failed.traceback) == ("FAILED", "no luck", "Trace")
    assert failed.exception == {
        "code": 500,
        "name": "InternalError",
        "message": "no luck",
        "msgid": "ERR-1",
        "extra": {},
    }
    lone = storage.history.get_operation("lone")
    assert lone.traceback == trace
    assert lone.started == at(START_MS + 5)
    assert storage.history.count_operations(text="NO LUCK") == 2
    build = next(storage.get_job_builds("shop.Order"))
    assert (build["finished"], build["success"], build["skipped"]) == (True, False, False)


def test_a_resumed_operation_runs_again_and_its_new_run_counts(storage):
    tape = Tape()
    tape.operation("op", 2, failed=1)
    said = {"operation": "op", "run": 2}
    tape.event("operation.started", "op", "shop.Order", position=1, status="RUNNING", **said)
    record(storage, tape)
    found = storage.history.get_operation("op")
    assert (found.status, found.run, found.error, found.ended, found.result) == ("RUNNING", 2, None, None, None)
    assert differences(storage, read(tape.records)) == []
    tape.event("step.done", "op/1", parent="op", position=1, status="SUCCESS", result=result("op/1"), **said)
    tape.event("operation.ended", "op", "shop.Order", position=1, status="SUCCESS", result=result("op"), **said)
    record(storage, tape)
    found = storage.history.get_operation("op")
    assert (found.status, found.error) == ("SUCCESS", None)
    assert [(task.run, task.position, task.status) for task in found.tasks] == [(1, 0, "SUCCESS"), (2, 1, "SUCCESS")]


def test_a_run_that_was_sent_is_there_before_a_worker_meets_it(storage):
    """Who resumes tells it of the first step; what it does not tell stays as it was."""
    tape = Tape()
    tape.operation("op", 2, failed=1)
    record(storage, tape)
    tape.event("run.sent", "op/1", operation="op", run=2, position=1, status="PENDING", note="sent again")
    record(storage, tape)
    found = storage.history.get_operation("op")
    assert (found.status, found.run, found.entrypoint, found.ended) == ("PENDING", 2, "shop.Order", None)
    step = found.tasks[1]
    assert (step.uuid, step.status, step.run, step.parent, step.note) == ("op/1", "PENDING", 2, "op", "sent again")
    assert [told.type for told in storage.history.list_events("op")][-1] == "run.sent"
    tape.telemetry("task.started", "op/1", operation="op", parent="op", run=2, position=1)
    record(storage, tape)
    found = storage.history.get_operation("op")
    assert (found.status, found.note, found.tasks[1].status) == ("RUNNING", "", "RUNNING")
    tape.event(
        *("operation.ended", "op", "shop.Order"),
        operation="op",
        run=2,
        position=2,
        status="SUCCESS",
        result=result("op"),
    )
    tape.event("run.sent", "op/1", operation="op", run=2, position=1, status="PENDING", note="told late")
    record(storage, tape)
    assert storage.history.get_operation("op").status == "SUCCESS"


def test_of_an_operation_whose_events_are_gone_a_new_run_is_known_all_the_same(storage):
    tape = Tape()
    tape.event("run.sent", "t", "shop.Charge", operation="op", run=2, position=3, status="PENDING", note="sent again")
    tape.event("run.sent", "lone", "shop.Mail", run=3, status="PENDING", note="sent again")
    record(storage, tape)
    found = storage.history.get_operation("op")
    assert (found.kind, found.entrypoint, found.status, found.run) == ("operation", "", "PENDING", 2)
    assert [(task.entrypoint, task.position) for task in found.tasks] == [("shop.Charge", 3)]
    lone = storage.history.get_operation("lone")
    assert (lone.kind, lone.entrypoint, lone.status, lone.run) == ("task", "shop.Mail", "PENDING", 3)


def test_a_retried_step_says_which_attempt_it_is_in_and_why(storage):
    tape = Tape()
    tape.telemetry("task.started", "t")
    tape.event("step.retrying", "t", status="PENDING", result=result("t", 500), note="attempt 1 failed", began=START_MS)
    record(storage, tape)
    found = storage.history.get_operation("t")
    assert (found.status, found.note, found.error, found.ended) == ("PENDING", "attempt 1 failed", "no luck", None)
    tape.telemetry("task.started", "t", attempt=2)
    record(storage, tape)
    found = storage.history.get_operation("t")
    assert (found.status, found.attempt, found.error, found.note) == ("RUNNING", 2, None, "")
    tape.event("step.done", "t", status="SUCCESS", result=result("t"), attempt=2, began=tape.now_ms - 500)
    record(storage, tape)
    found = storage.history.get_operation("t")
    assert (found.status, found.attempt, found.duration_s) == ("SUCCESS", 2, 0.5)


def test_the_timeline_has_all_that_was_told_in_order(storage):
    tape = Tape()
    tape.operation("op", 2)
    record(storage, tape)
    told = storage.history.list_events("op")
    assert [event.type for event in told] == [
        *("task.started", "operation.started", "step.done", "task.started", "step.done", "operation.ended")
    ]
    assert told[1].data["params"] == {"of": "op"}
    assert told[1].at == at(START_MS + 1000)
    newest = max(event.id for event in told)
    assert storage.history.list_events("op", after=newest) == []
    assert [event.type for event in storage.history.list_events("op/0")] == ["task.started", "step.done"]


def test_what_is_waiting_rejected_aborted_or_dead_is_told_as_such(storage):
    tape = Tape()
    tape.event("message.waiting", "waits", status="PENDING", note="not registered", result=result("waits", 400))
    tape.event("message.rejected", "orders/0/7", "", status="FAILED", note="record orders/0/7", result=result("x", 400))
    tape.event("step.aborted", "gone", status="ABORTED", result=result("gone", 409))
    tape.event("step.failed", "dead", status="FAILED", result=result("dead", 500))
    tape.event("message.dead_lettered", "dead", note="kept in shop.dlq")
    record(storage, tape)
    status = {found.uuid: (found.status, found.note) for found in storage.history.list_operations()}
    assert status == {
        "waits": ("PENDING", "not registered"),
        "orders/0/7": ("FAILED", "record orders/0/7"),
        "gone": ("ABORTED", ""),
        "dead": ("FAILED", ""),
    }
    assert [event.type for event in storage.history.list_events("dead")] == ["step.failed", "message.dead_lettered"]


def test_a_build_that_a_job_created_stays_its_own_when_a_worker_runs_it(storage):
    """M-09: the same row from two sides."""
    build_id = storage.create_build("crawl", {"args": [1]}, {})
    uuid = storage.get_build(build_id)["uuid"]
    created = storage.history.get_operation(build_id).created
    tape = Tape()
    tape.event("step.done", uuid, "kser.jobs.Job", status="SUCCESS", result=result(uuid))
    record(storage, tape)
    build = storage.get_build(build_id)
    assert (build["job_id"], build["job_config"], build["success"]) == ("crawl", {"args": [1]}, True)
    assert build["retval"] == {"by": uuid}
    assert storage.history.get_operation(build_id).created == created
    assert storage.get_latest_successful_build("crawl")["id"] == build_id


# -- telemetry ---------------------------------------------------------------------------------------------------------


def test_progress_of_a_task_is_that_told_last_and_an_operations_has_its_tasks(storage):
    tape = Tape()
    said = {"operation": "op", "parent": "op"}
    tape.event("operation.started", "op", "shop.Order", operation="op", status="RUNNING")
    began = tape.now_ms
    tape.telemetry("task.progress", "a", group=["x"], current=3, total=4, status_line="c", n=3, began=began, **said)
    tape.telemetry("task.progress", "a", group=["x"], current=2, total=4, status_line="b", n=2, began=began, **said)
    tape.telemetry("task.progress", "b", group=[], current=1, total=4, status_line="", n=1, **said)
    tape.telemetry("task.progress", "a", group=["x"], current=1, total=4, n=9, began=began - 1, **said)  # a lost one's
    record(storage, tape)
    assert storage.get_build_progress_info(storage.find_build("a")) == [(("x",), 3, 4, "c")]
    tree = storage.history.get_progress("op")
    assert tree.label == "4/8 (50%)"
    assert len(tree.children) == 2


def test_log_records_of_a_task_are_stored_once_however_often_they_are_told(storage):
    tape = Tape()
    said = {
        "level": 30,
        "logger": "shop",
        "message": "careful\x00",
        "trace": {"frames": []},
        "exception": "E",
        "began": 5,
    }
    first = tape.telemetry("task.log", "t", n=1, **said)
    tape.telemetry("task.log", "t", n=2, **said)
    again = tape.add(first.topic, "t", first.value)
    assert again.value == first.value
    record(storage, tape)
    lines = storage.history.list_logs("t")
    assert [(line.level, line.message, line.exception, line.traceback) for line in lines] == [
        (30, "careful\\x00", "E", {"frames": []})
    ] * 2
    assert lines[0].created == at(START_MS)
    assert [line["message"] for line in storage.iter_log_messages(lines[0].build_id)] == ["careful\\x00"] * 2


def test_what_workers_of_one_group_told_of_can_be_listed_alone(storage):
    for group in ("shop", "mail"):
        tape = Tape(group)
        tape.operation(f"op-{group}", 1)
        recorder(storage, tape, group=group).apply(tape.records)
    history = storage.history
    assert [found.uuid for found in history.list_operations(group="mail")] == ["op-mail"]
    assert (history.count_operations(group="shop"), history.count_operations(group="sho")) == (1, 0)
    assert history.count_operations() == 2


@pytest.mark.parametrize("by_call", [False, True])
def test_no_log_record_comes_into_sight_behind_one_that_was_stored_after_it(storage, by_call):
    """Who follows reads by growing numbers. PostgreSQL gives a number long before the row can be seen."""
    first, second = Tape(), Tape("other")
    first.telemetry("task.log", "a", n=1, level=20, message="first")
    second.telemetry("task.log", "b", n=1, level=20, message="second")
    build_id = storage.create_build("job", {}, {})
    slow, quick = recorder(storage, first), recorder(storage, second, group="other")

    def store():
        if by_call:
            storage.log_message(build_id, 20, "second")
        else:
            quick.apply(second.records)

    with ThreadPoolExecutor(1) as pool:
        with storage.database.write() as connection:
            slow._store(connection, slow.prepare(first.records))
            storing = pool.submit(store)
            time.sleep(0.3)
            assert not storing.done()
        storing.result(20)
    assert [line.message for line in storage.history.list_logs()] == ["first", "second"]


@pytest.mark.parametrize("known", [False, True])
def test_no_event_of_an_operation_comes_into_sight_behind_one_that_was_stored_after_it(storage, known):
    """Two recorders: one has the partition of its events, the other one that of its telemetry."""
    tape, said = Tape(), {"operation": "op", "parent": "op"}
    if known:
        tape.telemetry("task.started", "t", **said)
        record(storage, tape)
    tape.telemetry("task.started", "t", attempt=2, **said)
    tape.event("step.done", "t", status="SUCCESS", attempt=2, result=result("t"), **said)
    slow, quick = recorder(storage, tape), recorder(storage, tape)
    first, second = tape.records[-2:]
    assert first.of != second.of
    with ThreadPoolExecutor(1) as pool:
        with storage.database.write() as connection:
            batch = slow.prepare([first])
            slow._make_builds(connection, batch)
            storing = pool.submit(quick.apply, [second])
            time.sleep(0.3)
            assert not storing.done()  # before the slow one has numbers for its events
            slow._store(connection, slow.prepare([first]))
        storing.result(20)
    told = sorted(storage.history.list_events("op"), key=lambda event: event.id)
    assert [event.type for event in told][-2:] == ["task.started", "step.done"]


def now_ms():
    return int(time.time() * 1000)


def test_workers_are_listed_as_they_told_last_and_gone_when_they_fell_silent(storage):
    tape = Tape()
    tape.worker("alive", at=now_ms(), running=[{"uuid": "t", "entrypoint": "shop.Task", "seconds": 3}])
    tape.worker("alive", at=now_ms() - 60_000, state="starting")  # came late
    tape.worker("silent", at=now_ms() - 60_000)
    tape.worker("ended", at=now_ms() - 60_000, state="stopped")
    record(storage, tape)
    workers = {worker.name: worker for worker in storage.history.list_workers()}
    assert {name: worker.state for name, worker in workers.items()} == {
        "alive": "running",
        "ended": "stopped",
        "silent": "gone",
    }
    alive = workers["alive"]
    assert (alive.group, alive.hostname, alive.pid) == ("shop", "h", 7)
    assert alive.versions == {"kser": "1.0", "python": "3.11"}
    assert alive.running[0]["uuid"] == "t"
    assert workers["silent"].running == []
    assert alive.to_json()["started"].endswith("+00:00")


# -- what died: R-58 ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("worker", "said"),
    [
        ({"at": -60_000}, "was not heard of since"),
        ({"at": 0, "state": "stopped"}, "has stopped"),
        ({"at": 0, "started": 30_000}, "was started anew"),  # under the same name
    ],
)
def test_a_task_whose_worker_is_gone_waits_until_another_takes_it_up(storage, worker, said):
    tape = Tape()
    worker = {name: value + now_ms() if name != "state" else value for name, value in worker.items()}
    tape.worker("w1", **worker)
    tape.telemetry("task.started", "t", began=now_ms())
    tape.telemetry("task.started", "other", began=now_ms(), worker="w2")
    projection = record(storage, tape)
    assert projection.close_dead() == 1
    found = storage.history.get_operation("t")
    assert found.status == "PENDING"
    assert said in found.note
    assert storage.history.get_operation("other").status == "RUNNING"
    assert projection.close_dead() == 0
    tape.telemetry("task.started", "t", began=now_ms(), worker="w2")
    record(storage, tape)
    found = storage.history.get_operation("t")
    assert (found.status, found.worker, found.note) == ("RUNNING", "w2", "")


def test_a_worker_that_was_silent_for_a_while_still_runs_what_it_says(storage):
    tape = Tape()
    tape.worker("w1", at=now_ms() - 60_000, started=now_ms() - 90_000)
    for uuid in ("t", "dropped", "moved"):
        tape.telemetry("task.started", uuid, began=now_ms() - 50_000)
    projection = record(storage, tape)
    assert projection.close_dead() == 3
    tape.telemetry("task.started", "moved", began=now_ms(), worker="w2")
    runs = [{"uuid": "t", "entrypoint": "shop.Task", "seconds": 50}, {"uuid": "moved"}, "no entry"]
    tape.worker("w1", at=now_ms(), started=now_ms() - 90_000, running=runs)
    assert record(storage, tape).close_dead() == 0
    found = {uuid: storage.history.get_operation(uuid) for uuid in ("t", "dropped", "moved")}
    assert {uuid: one.status for uuid, one in found.items()} == {
        "t": "RUNNING",
        "dropped": "PENDING",
        "moved": "RUNNING",
    }
    assert (found["t"].worker, found["t"].note, found["moved"].worker) == ("w1", "", "w2")


def test_of_a_worker_that_runs_more_than_it_lists_what_it_ran_goes_on(storage):
    tape = Tape()
    tape.worker("w1", at=now_ms() - 60_000, started=now_ms() - 90_000)
    tape.telemetry("task.started", "t", began=now_ms() - 50_000)
    projection = record(storage, tape)
    assert projection.close_dead() == 1
    tape.worker("w1", at=now_ms(), started=now_ms() - 90_000, running=[{"uuid": "other"}], running_count=2)
    assert record(storage, tape).close_dead() == 0
    assert storage.history.get_operation("t").status == "RUNNING"


def test_what_a_broker_in_memory_held_ends_when_that_is_gone(storage):
    def tell(cluster, uuid):
        tape = Tape()
        tape.telemetry("task.started", f"{uuid}/0", operation=uuid, parent=uuid, began=now_ms())
        tape.event("operation.started", uuid, "shop.Order", status="RUNNING", operation=uuid)
        tape.operation(f"{uuid} whole")
        tape.telemetry("task.started", f"{uuid} alone", began=now_ms())
        projection = recorder(storage, tape, cluster=cluster)
        projection.apply(tape.records)
        return projection

    tell("mockCluster1", "before")
    tell("other", "real")
    new = tell("mockCluster2", "now")
    assert new.end_lost("mockCluster") == 3
    assert new.end_lost("mockCluster") == 0
    ended = storage.history.get_operation("before")
    assert (ended.status, [task.status for task in ended.tasks]) == ("ABORTED", ["ABORTED"])
    assert "lived in memory" in ended.note
    assert storage.history.get_operation("before alone").status == "ABORTED"
    assert storage.history.get_operation("before whole").status == "SUCCESS"
    for uuid in ("real", "now", "real alone", "now alone"):
        assert storage.history.get_operation(uuid).status == "RUNNING"


def test_a_deleted_operation_takes_what_is_in_it_along(storage):
    tape = Tape()
    for uuid in ("gone", "kept"):
        tape.operation(uuid, 3)
    record(storage, tape)
    storage.delete_build(storage.history.get_operation("gone").id)
    held = snapshot(storage)
    assert {row["uuid"] for row in held["build"]} == {"kept", "kept/0", "kept/1", "kept/2"}
    assert {row["root"] for row in held["event"]} == {"kept"}


def test_a_worker_is_silent_only_as_far_as_what_it_tells_is_read(storage):
    tape, told = Tape(), now_ms() - 60_000
    of = partition_of(b"w1", 6)
    tape.worker("w1", at=told, started=told)
    tape.telemetry("task.started", "t", began=told)
    projection, at = record(storage, tape), datetime.fromtimestamp(told / 1000, UTC)
    assert projection.close_dead(Heard(6, {})) == 0
    assert projection.close_dead(Heard(6, {(of + 1) % 6: datetime.now(UTC)})) == 0
    assert projection.close_dead(Heard(6, {of: at + timedelta(seconds=10)})) == 0  # it was not late by then
    assert projection.close_dead(Heard(6, {of: at + timedelta(seconds=20)})) == 1
    assert storage.history.get_operation("t").status == "PENDING"


def test_of_workers_of_another_group_nothing_is_said(storage):
    tape = Tape("other")
    tape.worker("w1", at=now_ms() - 60_000, started=now_ms() - 90_000)
    tape.telemetry("task.started", "t", began=now_ms())
    other = recorder(storage, tape, group="other")
    other.apply(tape.records)
    assert recorder(storage).close_dead() == 0
    assert other.close_dead() == 1


@pytest.mark.parametrize(
    ("row", "state"),
    [
        ({"interval_s": 1e300}, "running"),
        ({"interval_s": -5.0}, "gone"),
        ({"seen": datetime.max.replace(tzinfo=UTC)}, "running"),
    ],
)
def test_whatever_a_release_before_stored_of_a_worker_can_be_reckoned_with(storage, row, state):
    tape = Tape()
    tape.worker("w1", at=now_ms() - 60_000, started=now_ms() - 60_000)
    tape.telemetry("task.started", "t", began=now_ms())
    tape.telemetry("task.started", "late", began=253402300799999)
    projection = record(storage, tape)
    with storage.database.write() as connection:
        connection.execute(update(storage.database.tables.worker).values(row))
    assert projection.close_dead() == (2 if state == "gone" else 0)
    assert [worker.state for worker in storage.history.list_workers()] == [state]


def test_a_task_whose_worker_was_never_heard_of_does_not_run_for_ever(storage):
    """What the worker told of itself is gone: the topic forgets, or it was told to another storage."""
    tape = Tape()
    tape.telemetry("task.started", "t", began=now_ms() - 700_000, worker="ghost")
    tape.telemetry("task.started", "new", began=now_ms() - 500_000, worker="ghost")
    tape.telemetry("task.progress", "lost", current=1, total=2, at=now_ms() - 700_000, began=0, worker="ghost")
    projection = record(storage, tape)
    assert projection.close_dead() == 2
    found = storage.history.get_operation("t")
    assert (found.status, found.note) == ("PENDING", "worker ghost was never heard of: it waits for another one")
    assert storage.history.get_operation("lost").status == "PENDING"  # its start was not told
    assert storage.history.get_operation("new").status == "RUNNING"
    assert projection.close_dead() == 0
    tape.worker("ghost", at=now_ms())
    assert record(storage, tape).close_dead() == 0


def test_a_task_that_lives_is_left_alone(storage):
    tape = Tape()
    tape.worker("w1", at=now_ms(), started=now_ms() - 60_000)
    tape.telemetry("task.started", "t", began=now_ms())
    assert record(storage, tape).close_dead() == 0
    assert storage.history.get_operation("t").status == "RUNNING"


@pytest.mark.parametrize("late", [False, True])
def test_a_step_that_never_ended_does_not_outlive_its_operation(storage, late):
    tape = Tape()
    said = {"operation": "op", "parent": "op", "position": 5}
    if not late:
        tape.telemetry("task.started", "zombie", **said)
    tape.operation("op", 2)
    if late:  # telemetry may come after the events
        tape.telemetry("task.started", "zombie", **said)
    record(storage, tape, 1)
    found = storage.history.get_operation("zombie")
    assert (found.status, found.ended, found.note) == ("ABORTED", None, "its operation ended without it")
    assert next(storage.get_job_builds("shop.Task", order="desc"))["finished"]


def test_a_late_sign_of_life_does_not_wake_what_has_ended(storage):
    tape = Tape()
    tape.event("step.done", "t", status="SUCCESS", result=result("t"))
    tape.telemetry("task.started", "t")
    tape.telemetry("task.started", "t", attempt=2, worker="w2")
    record(storage, tape, 1)
    assert storage.history.get_operation("t").status == "SUCCESS"


# -- once, whoever and however often -----------------------------------------------------------------------------------


def story():
    tape = Tape()
    for number in range(6):
        tape.operation(f"op{number}", 3, failed=1 if number % 3 == 0 else None)
        tape.telemetry(
            "task.log", f"op{number}/0", operation=f"op{number}", n=1, level=20, message=f"{number}", began=1
        )
        tape.telemetry("task.progress", f"op{number}/0", operation=f"op{number}", current=number, total=9, n=number)
    tape.operation("op0", 3, run=2)
    tape.telemetry("task.started", "lost", operation="op1", parent="op1", position=1)
    tape.worker()
    return tape


@pytest.mark.parametrize("size", [1, 7])
def test_batches_of_any_size_give_the_same_rows(storage, new_storage, size):
    tape, other = story(), new_storage()
    record(storage, tape, size)
    record(other, tape)
    assert snapshot(storage) == snapshot(other)


@pytest.fixture
def new_storage():
    from kser.storage.memory import MemoryStorage

    made = []

    def make():
        made.append(MemoryStorage())
        return made[-1]

    yield make
    for storage in made:
        storage.close()


def test_records_that_come_again_change_nothing(storage):
    tape = story()
    projection = record(storage, tape)
    before = snapshot(storage)
    assert projection.apply(tape.records) == 0
    assert recorder(storage, tape).apply(tape.records) == 0
    assert snapshot(storage) == before


def test_a_redelivery_that_tells_it_again_elsewhere_in_the_topic_changes_nothing(storage):
    tape = story()
    record(storage, tape)
    before = snapshot(storage)
    for told in [told for told in tape.records if told.topic.endswith(".events")]:
        event = Event.loads(told.value)._replace(at=tape.now_ms, worker="w9")
        tape.add(told.topic, event.key, event.to_bytes(), told.partition)
    projection = recorder(storage, tape)
    assert projection.apply(tape.records) > 0
    assert snapshot(storage) == before


def test_the_offsets_are_in_the_same_transaction(storage):
    tape = story()
    projection = recorder(storage, tape)
    projection.apply(tape.records[:10])
    before, held = storage.history.list_projections(), snapshot(storage)
    with pytest.raises(RuntimeError), storage.database.write() as connection:
        projection._claim(connection, {tape.records[10].of: 99})
        projection._store(connection, projection.prepare(tape.records[10:]))
        raise RuntimeError  # killed before the commit
    assert storage.history.list_projections() == before
    assert snapshot(storage) == held
    projection.apply(tape.records)
    assert {
        (view.cluster, view.topic, view.partition): view.next_offset for view in storage.history.list_projections()
    } == {("c", *record.of): record.offset + 1 for record in tape.records}


def test_of_two_recorders_of_one_partition_the_slower_stores_nothing(storage):
    tape = story()
    first, second = recorder(storage, tape), recorder(storage, tape)
    first.apply(tape.records[:10])
    before = snapshot(storage)
    with pytest.raises(StaleError):
        second.apply(tape.records)
    assert snapshot(storage) == before
    second.positions(tape.partitions)
    second.apply(tape.records)
    with pytest.raises(StaleError):
        first.apply(tape.records)


def test_recorders_of_several_partitions_work_side_by_side_on_the_same_rows(storage, new_storage):
    """Events and telemetry of one task lie in partitions that different recorders may have."""
    tape, other = story(), new_storage()
    record(other, tape)

    def work(partition):
        projection = recorder(storage, tape)
        own = [told for told in tape.records if told.of == partition]
        for at in range(0, len(own), 3):
            projection.apply(own[at : at + 3])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, tape.partitions))
    recorder(storage, tape).close_dead()
    recorder(other, tape).close_dead()
    assert snapshot(storage) == snapshot(other)


def test_rows_that_another_recorder_made_meanwhile_are_computed_from_what_is_stored(storage, new_storage, monkeypatch):
    tape, other = story(), new_storage()
    record(other, tape)
    real = Projection._make_rows

    def raced(self, connection, batch, uuids, **options):
        real(self, connection, batch, uuids, **options)
        return real(self, connection, batch, uuids, **options)  # now they are there: whose they are is not known

    monkeypatch.setattr(Projection, "_make_rows", raced)
    record(storage, tape, 9)
    assert snapshot(storage) == snapshot(other)


def test_an_upgrade_of_the_tables_keeps_what_was_told_and_it_is_told_once_after_it(storage, new_storage):
    tape, other = story(), new_storage()
    record(other, tape)
    storage.uninstall()
    with storage.database.write() as connection:
        migrate.upgrade(connection, storage.database.tables, "0003")
    half = len(tape.records) // 2
    recorder(storage, tape).apply(tape.records[:half])
    before = snapshot(storage)
    storage.install()
    assert snapshot(storage) == before
    for told in [told for told in tape.records[:half] if told.topic.endswith(".events")]:
        tape.add(told.topic, told.key.decode(), told.value, told.partition)  # a redelivery
    recorder(storage, tape).apply(tape.records)
    assert snapshot(storage) == snapshot(other)


def test_rows_that_were_deleted_are_made_again_by_whoever_knew_them(storage, new_storage):
    tape, other = Tape(), new_storage()
    for number in range(4):
        tape.operation(f"op-{number}", 3)
    begun, rest = tape.records[:5], tape.records[5:]  # the first operation is begun, and nothing else
    knows = recorder(storage, tape)
    ahead = knows.apply(begun) and knows.prepare(rest)
    recorder(other, tape).apply(begun)
    for one in (storage, other):
        for found in one.history.list_operations():
            one.delete_build(found.id)
    assert knows.apply(rest, prepared=ahead) == len(rest)
    recorder(other, tape).apply(rest)  # this one knows of nothing
    assert snapshot(storage) == snapshot(other)
    assert storage.history.count_operations(states=["SUCCESS"]) == 4


def test_a_rebuild_gives_the_same_rows_under_the_same_numbers(storage):
    tape = story()
    record(storage, tape)
    before, ids = snapshot(storage), {found.uuid: found.id for found in storage.history.list_operations()}
    recorder(storage).forget_topics(dict.fromkeys(tape.partitions, 0))
    assert storage.history.list_projections() == []
    assert snapshot(storage)["event"] == []
    record(storage, tape)
    assert snapshot(storage) == before
    assert {found.uuid: found.id for found in storage.history.list_operations()} == ids


def test_a_rebuild_keeps_what_the_topics_do_not_prove_any_more(storage):
    tape = Tape()
    tape.operation("old", 2)
    old = len(tape.records)
    tape.operation("young", 2)
    record(storage, tape)
    before = snapshot(storage)
    kept = tape.records[old:]
    starts = {
        partition: min([r.offset for r in kept if r.of == partition], default=1000) for partition in tape.partitions
    }
    recorder(storage).forget_topics(starts)
    recorder(storage, tape).apply(kept)
    assert snapshot(storage) == before


def test_a_broker_that_began_anew_is_another_cluster(storage):
    """The embedded broker keeps nothing: its offsets begin at 0 again."""
    tape, later = Tape(), Tape()
    tape.operation("one", 2)
    record(storage, tape)
    later.operation("two", 2)
    projection = recorder(storage, later, cluster="d")
    assert projection.apply(later.records) == len(later.records)
    assert storage.history.count_operations() == 2


# -- what cannot be read -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        None,
        b"",
        b"[]",
        b"7",
        b"\xff",
        b'{"v": 2, "type": "step.done", "uuid": "t"}',
        b'{"v": 1}',
        b'{"v": 1, "type": "step.done"}',
        b'{"v": 1, "type": "step.done", "uuid": ""}',
        b'{"v": 1, "type": "step.done", "uuid": 5}',
        b'{"v": 1, "type": 5, "uuid": "t"}',
        b'{"v": 1, "type": "step.done", "uuid": "t", "run": -1}',
        b'{"v": 1, "type": "step.done", "uuid": "t", "run": 99999999999}',
        b'{"v": 1, "type": "step.done", "uuid": "t", "position": true}',
        b'{"v": 1, "type": "task.progress", "uuid": "t", "current": "1", "total": 2}',
        b'{"v": 1, "type": "task.news", "uuid": "t"}',
        b'{"v": 1, "type": "worker.state", "worker": "w", "at": 99999999999999999}',
        b'{"v": 1, "type": "worker.state", "at": 5}',
        b'{"v": 1, "type": "worker.state", "worker": "w", "at": 5, "interval_s": "soon"}',
        b'{"v": 1, "type": "worker.state", "worker": "w", "at": 5, "interval_s": 1e12}',
        b'{"v": 1, "type": "worker.state", "worker": "w", "at": 5, "interval_s": -5}',
        b'{"v": 1, "type": "worker.state", "worker": "w", "at": 5, "interval_s": true}',
        b'{"v": 1, "type": "worker.state", "worker": "w", "at": 5, "interval_s": NaN}',
        b'{"v": 1, "type": "worker.state", "worker": "w", "at": 5, "interval_s": Infinity}',
        b'{"v": 1, "type": "worker.state", "worker": "w", "at": 253402300799000}',
        b'{"v": 1, "type": "worker.state", "worker": "w", "at": 5, "started": 253402300799000}',
    ],
)
def test_what_is_no_record_of_ours_is_passed_over(storage, value):
    projection = recorder(storage)
    projection.positions([Partition("shop.events", 0)])
    assert projection.apply([Record("shop.events", 0, 0, None, value, [], 0)]) == 1
    assert snapshot(storage)["build"] == snapshot(storage)["worker"] == []
    assert storage.history.list_projections()[0].next_offset == 1


@pytest.mark.parametrize(
    "uuid",
    ["\x00\ud800é", "x" * 20_000, "ü" * 900, "a'b\"c\\d", "\\N", "\\.", "a\tb\nc\rd\\te\\", "\x0b\u2028\x85"],
)
def test_any_uuid_and_any_text_can_be_stored_and_comes_again_as_the_same(storage, uuid):
    """PostgreSQL takes no NUL, UTF-8 no lone surrogates, an index no long names."""
    tape = Tape()
    retval = {"text": uuid, "big": 10**40, "deep": [[[{}]]], "nan": None}
    told = result("x")
    told.retval, told.stdout = retval, uuid
    for _ in range(2):
        tape.event("step.done", uuid, uuid, status="SUCCESS", operation=uuid, parent=uuid, result=told, note=uuid)
        record(storage, tape)
    (row,) = snapshot(storage)["build"]
    assert len(snapshot(storage)["event"]) == 1
    found = storage.history.get_operation(row["uuid"])
    assert found.result["retval"] == retval
    assert found.result["stdout"] == found.note == clean_text(uuid)
    assert found.to_json(details=True)["status"] == "SUCCESS"


def test_numbers_at_the_ends_of_their_range_are_stored(storage):
    tape = Tape()
    told = result("t", 2**70)
    tape.event("step.failed", "t", status="FAILED", result=told, run=2**31 - 1, at=2**62)
    tape.telemetry("task.progress", "t", current=2**63 - 1, total=-(2**63 - 1), n=1)
    record(storage, tape)
    found = storage.history.get_operation("t")
    assert (found.run, found.ended, found.result["retcode"]) == (2**31 - 1, None, 1)


@pytest.mark.parametrize("retcode", [True, False, 0.0, "0", None])
def test_a_retcode_that_is_no_whole_number_is_a_failure_on_every_storage(storage, retcode):
    tape = Tape()
    tape.event("step.failed", "t", status="FAILED")
    told = json.loads(tape.records[0].value) | {"result": {"uuid": "t", "retcode": retcode}}
    tape.records[0] = tape.records[0]._replace(value=json.dumps(told).encode())
    record(storage, tape)
    found = storage.history.get_operation("t")
    assert (found.result["retcode"], type(found.result["retcode"]), found.error) == (1, int, "retcode 1")


def test_a_database_that_is_gone_is_an_error_and_nothing_is_moved(storage, monkeypatch):
    tape = story()
    projection = recorder(storage, tape)
    broken = StorageError("away")

    def fail(*args):
        raise broken

    monkeypatch.setattr(projection, "_store", fail)
    with pytest.raises(StorageError):
        projection.apply(tape.records)
    monkeypatch.undo()
    assert projection.apply(tape.records) == len(tape.records)


def test_a_connection_that_ends_while_rows_are_copied_is_an_error_like_any_other(storage, monkeypatch):
    if storage.database.engine.dialect.name != "postgresql":
        pytest.skip("only PostgreSQL has COPY, and connections")
    tape, real, ended = Tape(), bulk._Copy.execute, []
    tape.operation("op", 1)
    projection = recorder(storage, tape)

    def ends(*args):
        if not ended:
            ended.append(True)
            with storage.database.engine.connect() as other:
                other.exec_driver_sql(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE state = 'idle in transaction' "
                    "AND pid <> pg_backend_pid() AND datname = current_database()"
                )
            time.sleep(0.2)
        return real(*args)

    monkeypatch.setattr(bulk._Copy, "execute", ends)
    with pytest.raises(StorageError) as caught:
        projection.apply(tape.records)
    assert ended
    assert not caught.value.extra["refused"]
    assert storage.history.list_projections() == []
    projection.apply(tape.records)
    assert storage.history.get_operation("op").status == "SUCCESS"


def test_rows_that_copy_does_not_take_are_an_error_like_any_other(storage, monkeypatch):
    if storage.database.engine.dialect.name != "postgresql":
        pytest.skip("only PostgreSQL has COPY")
    real = bulk._copied_texts
    monkeypatch.setattr(bulk, "_copied_texts", lambda texts: [f"{text}\t" for text in real(texts)])
    tape = Tape()
    tape.operation("op", 1)
    projection = recorder(storage, tape)
    with pytest.raises(StorageError, match="extra data") as caught:
        projection.apply(tape.records)
    assert caught.value.extra["refused"]
    assert storage.history.list_projections() == []


def test_a_list_in_use_while_rows_are_written_is_whole(storage):
    """A reader sees all of a batch or nothing of it."""
    tape = story()
    done = threading.Event()
    seen = []

    def look():
        while not done.wait(0.001):
            found = storage.history.get_operation("op5") if storage.history.list_operations(text="op5") else None
            if found is not None:
                seen.append(len(found.tasks))

    reader = threading.Thread(target=look)
    reader.start()
    record(storage, tape)
    done.set()
    reader.join()
    assert set(seen) <= {3}


def test_a_worker_whose_clock_is_ahead_does_not_outlive_its_last_word(storage, monkeypatch):
    tape = Tape()
    tape.worker("w1", at=now_ms() + 86_400_000, interval_s=0.5)
    record(storage, tape)
    assert [worker.state for worker in storage.history.list_workers()] == ["running"]
    later = datetime.now(UTC) + timedelta(minutes=1)
    monkeypatch.setattr("kser.storage.history.now", lambda: later)
    assert [worker.state for worker in storage.history.list_workers()] == ["gone"]


def test_workers_clocks_and_ours_may_differ_by_seconds(storage):
    tape = Tape()
    tape.worker("w1", at=now_ms() - 3000, interval_s=0.5)
    record(storage, tape)
    (worker,) = storage.history.list_workers()
    assert worker.state == "running"
    assert worker.seen > datetime.now(UTC) - timedelta(seconds=10)
