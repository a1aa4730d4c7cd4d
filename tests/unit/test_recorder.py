"""The recorder on a broker in memory: what it follows, what it waits for, how it begins again. DESIGN.md 5."""

import json
import threading
import time
from contextlib import contextmanager

import pytest
from sqlalchemy.exc import DataError

from kser.errors import ConfigurationError, StorageError, TransportError
from kser.events import read
from kser.storage import get_storage_from_url
from kser.storage.database import Database
from kser.storage.memory import MemoryStorage
from kser.storage.projection import Projection
from kser.storage.recorder import Recorder, topics_of
from kser.testing import eventually
from kser.transport import OutRecord, Partition, Position
from kser.transport.memory import MemoryTransport
from tests.recording import Tape, differences, read_topic, snapshot


@pytest.fixture
def storage():
    made = MemoryStorage()
    yield made
    made.close()


@pytest.fixture
def broker():
    return MemoryTransport(default_partitions=3)


def tell(broker, tape):
    """Write what is on the tape, and take it off."""
    sink = broker.sink()
    assert sink.deliver([OutRecord(r.topic, r.key, r.value) for r in tape.records]) == []
    sink.close()
    tape.records.clear()


@contextmanager
def running(broker, storage, **options):
    """A recorder at work."""
    recorder = Recorder(broker, storage, group="shop", **{k: v for k, v in options.items() if k != "rebuild"})
    failed = []

    def work():
        try:
            recorder.run(rebuild=options.get("rebuild", False))
        except BaseException as exc:
            failed.append(exc)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield recorder
    finally:
        recorder.stop()
        thread.join(20)
    assert not thread.is_alive()
    assert failed == []


def events_of(broker):
    return list(read(read_topic(broker, "shop.events")))


def whole(broker, storage):
    """Whether everything that lies in the topics is in the storage."""
    ends = {
        (topic, number): broker.source("look").watermarks(Partition(topic, number))[1]
        for topic in topics_of("shop")
        for number in range(broker.admin().describe([topic])[topic].partitions)
    }
    stored = {(view.topic, view.partition): view.next_offset for view in storage.history.list_projections()}
    return all(stored.get(partition, 0) == end for partition, end in ends.items())


def test_what_is_told_before_and_while_it_runs_is_in_the_storage(broker, storage):
    tape = Tape()
    tape.operation("before", 3)
    tell(broker, tape)
    with running(broker, storage):
        eventually(lambda: storage.history.count_operations() == 1)
        tape.operation("while", 2, failed=1)
        tell(broker, tape)
        eventually(lambda: whole(broker, storage))
    assert differences(storage, events_of(broker)) == []
    assert {found.uuid: found.status for found in storage.history.list_operations()} == {
        "before": "SUCCESS",
        "while": "FAILED",
    }


def test_it_goes_on_where_the_storage_is_whatever_the_group_committed(broker, storage):
    tape = Tape()
    tape.operation("one", 2)
    tell(broker, tape)
    with running(broker, storage) as first:
        eventually(lambda: whole(broker, storage))
    tape.operation("two", 2)
    tell(broker, tape)
    with running(broker, storage) as second:
        eventually(lambda: whole(broker, storage))
    assert (first.recorded, second.recorded) == (6, 6)
    assert differences(storage, events_of(broker)) == []


def test_a_rebuild_reads_everything_again(broker, storage):
    tape = Tape()
    for number in range(5):
        tape.operation(f"op{number}", 2)
    tell(broker, tape)
    with running(broker, storage):
        eventually(lambda: whole(broker, storage))
    before = snapshot(storage)
    with running(broker, storage, rebuild=True) as again:
        eventually(lambda: again.recorded == 30 and whole(broker, storage))
    assert snapshot(storage) == before


def test_two_recorders_share_the_partitions_and_store_everything_once(broker, storage):
    tape = Tape()
    with running(broker, storage, batch=3) as first, running(broker, storage, batch=3) as second:
        for number in range(12):
            tape.operation(f"op{number}", 2)
            tell(broker, tape)
        eventually(lambda: whole(broker, storage), 20)
    assert first.recorded + second.recorded == 72
    assert differences(storage, events_of(broker)) == []


def test_a_recorder_that_was_taken_for_dead_looks_where_the_other_one_is(broker, storage, caplog):
    caplog.set_level("INFO")
    tape = Tape()
    tape.operation("one", 2)
    tell(broker, tape)
    with running(broker, storage) as recorder:
        eventually(lambda: whole(broker, storage))
        other = Projection(storage.database, broker.admin().cluster_id(), "shop")
        other.positions([Partition(topic, number) for topic in topics_of("shop") for number in range(4)])
        # The other one moves partitions that this one believes to have.
        moved = {place: offset + 1 for place, offset in other._next.items() if offset}
        with storage.database.write() as connection:
            other._claim(connection, moved)
        tape.operation("one", 2, run=2)
        tell(broker, tape)
        eventually(lambda: whole(broker, storage))
        # All but what the other one took.
        assert recorder.recorded == 12 - len(moved)
    assert "Another recorder of group shop is alive" in caplog.text


def test_a_database_that_is_away_is_waited_for_and_nothing_is_left_out(broker, storage, monkeypatch):
    tape, away = Tape(), threading.Event()
    real = Projection.apply

    def apply(self, records, **options):
        if away.is_set():
            raise StorageError("Storage x: connection refused", extra={"refused": False})
        return real(self, records, **options)

    monkeypatch.setattr(Projection, "apply", apply)
    with running(broker, storage) as recorder:
        away.set()
        tape.operation("op", 3)
        tell(broker, tape)
        eventually(lambda: "connection refused" in recorder.problem)
        away.clear()
        eventually(lambda: whole(broker, storage))
        eventually(lambda: recorder.problem == "")
    assert differences(storage, events_of(broker)) == []


def test_a_record_that_no_database_takes_does_not_keep_the_others_out(broker, storage, monkeypatch, caplog):
    tape = Tape()
    tape.operation("good", 2)
    tape.event("step.done", "poison", status="SUCCESS")
    tape.operation("better", 2)
    real = Projection._store

    def store(self, connection, batch):
        if any(told.uuid == "poison" for told in batch.events):
            raise DataError("INSERT", {}, ValueError("no such number"))
        real(self, connection, batch)

    monkeypatch.setattr(Projection, "_store", store)
    tell(broker, tape)
    with running(broker, storage):
        eventually(lambda: whole(broker, storage))
    assert {found.uuid for found in storage.history.list_operations()} == {"good", "better"}
    assert "is passed over" in caplog.text


def test_records_that_were_deleted_before_they_were_recorded_are_told_and_the_rest_is_recorded(broker, storage, caplog):
    tape = Tape()
    tape.event("step.done", "old", status="SUCCESS")
    tell(broker, tape)
    with running(broker, storage):
        eventually(lambda: whole(broker, storage))
    (place,) = {Partition(view.topic, view.partition): view for view in storage.history.list_projections()}
    for _ in range(3):
        tape.event("step.done", "old", status="SUCCESS")
    tell(broker, tape)
    broker.admin().delete_records([Position(*place, 3)])
    with running(broker, storage):
        eventually(lambda: whole(broker, storage))
    assert "were deleted before they were recorded" in caplog.text


def test_who_catches_up_takes_no_worker_for_dead_that_told_of_itself_later(broker, storage, monkeypatch):
    monkeypatch.setattr("kser.storage.recorder._LOOK_S", 0.02)
    real, looks = Projection.close_dead, []
    monkeypatch.setattr(Projection, "close_dead", lambda self, heard: looks.append(real(self, heard)) or looks[-1])
    tape, now_ms = Tape(), time.time_ns() // 1_000_000
    began = now_ms - 3_600_000
    tape.worker("w1", at=began, started=began)
    tape.telemetry("task.started", "long", at=began, began=began)
    for number in range(300):
        tape.telemetry("task.progress", "long", began=began, current=number, total=300, n=number)
    tape.worker("w1", at=now_ms, started=began, interval_s=60)
    tape.records = [record._replace(key=b"w1") for record in tape.records]  # one partition: in this order
    tell(broker, tape)
    with running(broker, storage, batch=10):
        eventually(lambda: len(looks) >= 3)
        # It does look: here is one whose worker was never heard of.
        tape.telemetry("task.started", "lost", at=began, began=began, worker="w2")
        tell(broker, tape)
        eventually(lambda: [found.uuid for found in storage.history.list_operations(states=["PENDING"])] == ["lost"])
    assert [found.uuid for found in storage.history.list_operations(states=["RUNNING"])] == ["long"]


def test_a_recorder_whose_database_was_away_takes_no_worker_for_dead(broker, storage, monkeypatch):
    """What came meanwhile is not read yet when the database is back."""
    monkeypatch.setattr("kser.storage.recorder._LOOK_S", 0.02)
    monkeypatch.setattr("kser.storage.recorder._AGAIN_MOST_S", 0.2)
    monkeypatch.setattr("kser.storage.history._LEAST_S", 2)
    real, looks = Projection.close_dead, []
    monkeypatch.setattr(Projection, "close_dead", lambda self, heard: looks.append(real(self, heard)) or looks[-1])
    began, away = time.time_ns() // 1_000_000, threading.Event()

    def failing(call):
        def called(self):
            if away.is_set():
                raise StorageError("connection refused")
            return call(self)

        return called

    monkeypatch.setattr(Database, "read", failing(Database.read))
    monkeypatch.setattr(Database, "write", failing(Database.write))

    def lives(seconds):
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            tape.worker("w1", at=time.time_ns() // 1_000_000, started=began, interval_s=0.2)
            tell(broker, tape)
            time.sleep(0.1)

    tape = Tape()
    tape.telemetry("task.started", "long", at=began, began=began)
    with running(broker, storage):
        lives(1.5)
        assert looks
        away.set()
        lives(3)
        away.clear()
        looks.clear()
        lives(3)
        assert looks
        assert [found.status for found in storage.history.list_operations()] == ["RUNNING"]


def test_what_a_recorder_that_hangs_has_not_read_is_no_silence_to_another(broker, storage, monkeypatch):
    """Two of them share the telemetry; one stores nothing for a while, and the workers it hears live on."""
    monkeypatch.setattr("kser.storage.recorder._LOOK_S", 0.02)
    monkeypatch.setattr("kser.storage.history._LEAST_S", 2)
    hangs, real_apply = threading.Event(), Projection.apply
    real, closed = Projection.close_dead, []
    monkeypatch.setattr(Projection, "close_dead", lambda self, heard: closed.append(real(self, heard)) or closed[-1])
    began, names = time.time_ns() // 1_000_000, [f"w{number}" for number in range(8)]

    def lives(seconds, silent=()):
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            for name in names:
                if name not in silent:
                    tape.worker(name, at=time.time_ns() // 1_000_000, started=began, interval_s=0.2)
            tell(broker, tape)
            time.sleep(0.1)

    def statuses():
        return {found.worker: found.status for found in storage.history.list_operations(limit=20)}

    tape = Tape()
    for name in names:
        tape.telemetry("task.started", f"of {name}", at=began, began=began, worker=name)
    with running(broker, storage) as a, running(broker, storage) as b, running(broker, storage) as c:
        eventually(lambda: a._projection and b._projection and c._projection)
        have = [recorder._projection for recorder in (a, b, c)]
        eventually(lambda: [len(one._next) for one in have] == [4, 4, 4])
        telemetry = topics_of("shop")[1]
        one, _ = [one for one in have if any(place.topic == telemetry for place in one._next)]
        lives(1)

        def apply(self, records, **options):
            if self is one:
                hangs.wait(20)
            return real_apply(self, records, **options)

        monkeypatch.setattr(Projection, "apply", apply)
        closed.clear()
        lives(4)
        assert len(closed) > 10
        assert set(statuses().values()) == {"RUNNING"}
        hangs.set()
        lives(4, silent={"w1", "w2"})
        gone = {name for name, status in statuses().items() if status == "PENDING"}
    assert gone == {"w1", "w2"}


def test_where_the_telemetry_ends_may_not_be_known_and_nobody_is_taken_for_dead(broker, storage, monkeypatch):
    monkeypatch.setattr("kser.storage.recorder._LOOK_S", 0.02)
    began = time.time_ns() // 1_000_000 - 3_600_000
    real, away = type(broker.admin()).describe, threading.Event()

    def describe(self, names, timeout_s=10):
        if away.is_set() and names == ["shop.telemetry"]:
            raise TransportError("no answer")
        return real(self, names, timeout_s)

    tape = Tape()
    tape.telemetry("task.started", "lost", at=began, began=began, worker="ghost")
    tell(broker, tape)
    monkeypatch.setattr(type(broker.admin()), "describe", describe)
    away.set()
    with running(broker, storage) as recorder:
        eventually(lambda: recorder.recorded == 1)
        time.sleep(0.5)
        assert storage.history.get_operation("lost").status == "RUNNING"
        away.clear()
        eventually(lambda: storage.history.get_operation("lost").status == "PENDING")


def test_what_stopped_just_before_the_recorder_does_not_run_for_ever(broker, storage):
    began = time.time_ns() // 1_000_000
    tape = Tape()
    tape.worker("w1", at=began, started=began)
    tape.telemetry("task.started", "left", at=began, began=began)
    tell(broker, tape)
    with running(broker, storage):
        eventually(lambda: whole(broker, storage))
        tape.worker("w1", at=began + 1, started=began, state="stopped")
        tell(broker, tape)
    found = storage.history.get_operation("left")
    assert (found.status, found.note) == ("PENDING", "worker w1 has stopped: it waits for another one")


def test_it_makes_the_topics_that_are_missing(broker, storage):
    with running(broker, storage):
        eventually(lambda: len(broker.admin().describe(topics_of("shop"))) == 2)


def test_tables_that_are_missing_or_of_another_version_are_told(broker, tmp_path):
    storage = get_storage_from_url(f"sqlite:///{tmp_path}/a.db")
    with pytest.raises(ConfigurationError, match="kser install"):
        Recorder(broker, storage, group="shop").run()
    storage.prepare()
    storage.prepare()
    name = storage.database.tables.version_name
    with storage.database.write() as connection:
        connection.exec_driver_sql(f"UPDATE {name} SET version_num = '9999'")
    with pytest.raises(ConfigurationError, match="version 9999, this release of kser needs 0004: run kser db upgrade"):
        storage.prepare()
    with pytest.raises(ConfigurationError, match="9999, which this release of kser does not know: upgrade kser"):
        storage.install()
    storage.close()


def test_the_judge_of_these_tests_sees_what_is_wrong(storage):
    tape = Tape()
    tape.operation("op", 2)
    projection = Projection(storage.database, "c", "shop")
    projection.positions(tape.partitions)
    projection.apply(tape.records)
    events = list(read(tape.records))
    assert differences(storage, events) == []
    assert differences(storage, [*events, events[-1]._replace(uuid="other", operation="other")]) == ["other is missing"]
    assert "told was FAILED" in differences(storage, [e._replace(status="FAILED") for e in events])[0]
    assert differences(storage, events[:-1]) == []  # told to be started, not to have ended
    assert "no event tells of" in differences(storage, events[:1])[0]
    with storage.database.write() as connection:
        connection.exec_driver_sql(f"UPDATE {storage.database.tables.build.name} SET retval = '{json.dumps(1)}'")
    assert "has the result" in differences(storage, events)[0]


def test_two_storages_of_one_group_each_get_all(broker, storage):
    other = MemoryStorage()
    tape = Tape()
    with running(broker, storage), running(broker, other):
        for number in range(40):
            tape.operation(f"operation-{number}", 3)
        tell(broker, tape)
        eventually(lambda: whole(broker, storage) and whole(broker, other))
    assert storage.id != other.id
    assert storage.history.count_operations() == other.history.count_operations() == 40
    assert snapshot(storage) == snapshot(other)
    other.close()


def test_a_rebuild_beside_an_idle_recorder_of_the_same_storage_loses_nothing(broker, storage, monkeypatch):
    monkeypatch.setattr("kser.storage.recorder._LOOK_S", 0.3)
    tape = Tape()
    for number in range(40):
        tape.operation(f"op{number}", 2)
    tell(broker, tape)
    with running(broker, storage) as idle:
        eventually(lambda: whole(broker, storage))
        before = snapshot(storage)
        with running(broker, storage, rebuild=True) as again:
            eventually(lambda: idle.recorded + again.recorded == 480 and whole(broker, storage), 10)
    assert snapshot(storage) == before
