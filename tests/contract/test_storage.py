"""One suite for every storage: memory, sqlite, PostgreSQL. J-56 to J-69; DESIGN.md 5."""

import logging
import pickle
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta, timezone

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import inspect, text

from kser.errors import ConfigurationError, NotFound, SerializationError, StatusError, ValidationError
from kser.progress import ProgressReport
from kser.storage import StorageBase, get_storage_from_url
from kser.storage.sql import SqlStorage

KEYS = [
    *("id", "uuid", "job_id", "start_time", "end_time", "started", "finished", "success", "skipped"),
    *("job_config", "build_config", "retval", "exception", "exception_tb"),
]


def ended(storage, job_id="job", **how):
    build_id = storage.create_build(job_id, {}, {})
    storage.start_build(build_id)
    storage.finish_build(build_id, **how)
    return build_id


def ids(builds):
    return [build["id"] for build in builds]


# -- builds: J-52, J-53, J-56 to J-59, J-62 ----------------------------------------------------------------------------


def test_a_new_build_has_all_keys_and_has_not_started(storage):
    build = storage.get_build(storage.create_build("job", {"function": "m:f"}, {"dependency_builds": {"a": 1}}))
    assert list(build) == KEYS
    assert build["job_config"] == {"function": "m:f"}
    assert build["build_config"] == {"dependency_builds": {"a": 1}}
    assert (build["started"], build["finished"], build["start_time"], build["end_time"]) == (False, False, None, None)
    assert (build["success"], build["skipped"], build["retval"]) == (None, None, None)


def test_the_configuration_of_a_build_is_a_copy_that_nobody_changes(storage):
    config = {"args": [1]}
    build_id = storage.create_build("job", config, {})
    config["args"].append(2)
    storage.get_build(build_id)["job_config"]["args"].append(3)
    assert storage.get_build(build_id)["job_config"] == {"args": [1]}


def test_a_build_starts_and_ends_with_what_it_gave(storage):
    before = datetime.now(UTC)
    build_id = ended(storage, success=True, retval={"rows": (1, 2.5, None, "é\x00\ud800")})
    build = storage.get_build(build_id)
    assert (build["started"], build["finished"], build["success"], build["skipped"]) == (True, True, True, None)
    assert build["retval"] == {"rows": [1, 2.5, None, "é\x00\ud800"]}  # tuples become lists
    assert before <= build["start_time"] <= build["end_time"] <= datetime.now(UTC)
    assert build["start_time"].utcoffset() == timedelta(0)


def test_a_failed_build_keeps_its_error_and_traceback(storage):
    trace = {"frames": [{"filename": "a.py", "lineno": 1}]}
    build_id = ended(storage, success=False, exception={"message": "no\nreally"}, exception_tb=trace)
    build = storage.get_build(build_id)
    assert (build["exception"], build["exception_tb"]) == ({"message": "no\nreally"}, trace)
    assert storage.history.get_operation(build_id).error == "no"


@pytest.mark.parametrize(
    ("how", "status"),
    [
        ({"success": True}, "SUCCESS"),
        ({"success": False}, "FAILED"),
        ({}, "FAILED"),  # what is not said to be a success is none
        ({"skipped": True}, "SKIPPED"),
        ({"skipped": True, "success": True}, "SKIPPED"),  # J-53: whatever success holds
    ],
)
def test_how_a_build_ended_is_its_status(storage, how, status):
    assert storage.history.get_operation(ended(storage, **how)).status == status


def test_what_has_ended_neither_starts_nor_ends_again(storage):
    build_id = ended(storage, success=True, retval=1)
    for again in (storage.start_build, storage.finish_build):
        with pytest.raises(StatusError, match=f"Build {build_id} has ended, SUCCESS"):
            again(build_id)
    assert storage.get_build(build_id)["retval"] == 1


def test_of_two_that_end_a_build_at_once_one_is_told_no(storage):
    build_id = storage.create_build("job", {}, {})

    def end(number):
        try:
            storage.finish_build(build_id, success=True, retval=number)
        except StatusError:
            return None
        return number

    with ThreadPoolExecutor(4) as pool:
        done = [number for number in pool.map(end, range(4)) if number is not None]
    assert [storage.get_build(build_id)["retval"]] == done


@pytest.mark.parametrize("build_id", [77, -1, 1 << 70, "1", None, True])
def test_a_build_that_does_not_exist_is_not_found_by_any_method(storage, build_id):
    for call in (
        storage.get_build,
        storage.start_build,
        storage.finish_build,
        storage.delete_build,
        storage.get_build_progress_info,
        lambda number: storage.report_build_progress(number, 1, 2),
        lambda number: storage.log_message(number, 20, "x"),
    ):
        with pytest.raises(NotFound, match="No such build"):
            call(build_id)


def test_a_deleted_build_takes_its_progress_and_logs_along(storage):
    kept, gone = storage.create_build("job", {}, {}), storage.create_build("job", {}, {})
    for build_id in (kept, gone):
        storage.report_build_progress(build_id, 1, 2)
        storage.log_message(build_id, logging.INFO, "x")
    storage.delete_build(gone)
    with pytest.raises(NotFound):
        storage.get_build(gone)
    assert [line["build_id"] for line in storage.iter_log_messages()] == [kept]
    assert ids(storage.get_job_builds("job")) == [kept]


def test_a_build_is_found_by_its_uuid(storage):
    build_id = storage.create_build("job", {}, {})
    assert storage.find_build(storage.get_build(build_id)["uuid"]) == build_id
    with pytest.raises(NotFound, match="No build has uuid 'nobody'"):
        storage.find_build("nobody")


def test_builds_of_a_job_are_filtered_by_what_is_a_boolean(storage):
    created = storage.create_build("job", {}, {})
    running = storage.create_build("job", {}, {})
    storage.start_build(running)
    good, bad, skipped = ended(storage, success=True), ended(storage, success=False), ended(storage, skipped=True)
    ended(storage, "other", success=True)

    def found(**filters):
        return set(ids(storage.get_job_builds("job", **filters)))

    assert found() == {created, running, good, bad, skipped}
    assert found(started=False) == {created}
    assert found(started=True, finished=False) == {running}
    assert found(finished=True) == {good, bad, skipped}
    assert found(success=True) == {good}
    assert found(finished=True, success=False) == {bad, skipped}
    assert found(skipped=True) == {skipped}
    assert found(finished=True, skipped=False) == {good, bad}
    assert found(success="yes", skipped=0) == found()  # neither is a boolean


def test_builds_come_by_date_in_both_orders_and_up_to_a_limit(storage):
    first, second, third = (storage.create_build("job", {}, {}) for _ in range(3))
    storage.start_build(second)
    storage.start_build(first)  # started after the second: the date is that of the start
    assert ids(storage.get_job_builds("job")) == [third, second, first]
    assert ids(storage.get_job_builds("job", order="desc")) == [first, second, third]
    assert ids(storage.get_job_builds("job", order="desc", limit=1)) == [first]
    assert ids(storage.get_job_builds("job", limit=0)) == []
    with pytest.raises(ValueError, match="order='up'"):
        storage.get_job_builds("job", order="up")
    with pytest.raises(ValueError, match="limit=-1"):
        storage.get_job_builds("job", limit=-1)


def test_the_limit_is_100_unless_there_is_none(storage):
    for _ in range(101):
        storage.create_build("job", {}, {})
    assert len(list(storage.get_job_builds("job"))) == 100
    assert len(list(storage.get_job_builds("job", limit=None))) == 101


def test_the_latest_successful_build_is_that_or_none(storage):
    assert storage.get_latest_successful_build("job") is None
    ended(storage, success=True, retval="old")
    newest = ended(storage, success=True, retval=None)
    ended(storage, success=False)
    ended(storage, skipped=True, success=True)
    assert storage.get_latest_successful_build("job") == storage.get_build(newest)


# -- JSON only: J-68, J-69 ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"a": [1, object()]}, r"retval\.a\[1\] is a object"),
        ({1: "x"}, "retval has the key 1, a int"),
        (float("nan"), "retval is nan"),
        (b"bytes", "retval is a bytes"),
        (datetime.now(UTC), "retval is a datetime"),  # it would come back as a text
        ({1, 2}, "retval is a set"),
    ],
)
def test_what_json_has_no_form_for_is_refused_by_name_and_type(storage, value, said):
    build_id = storage.create_build("job", {}, {})
    storage.start_build(build_id)
    with pytest.raises(SerializationError, match=said):
        storage.finish_build(build_id, True, retval=value)
    assert storage.get_build(build_id)["finished"] is False


def test_nesting_without_an_end_is_refused(storage):
    value = []
    value.append(value)
    with pytest.raises(SerializationError, match="nested deeper"):
        storage.create_build("job", {"value": value}, {})


def test_a_pickle_in_the_database_stays_the_text_it_is(storage):
    """T-51: whoever writes into the database does not run code here."""
    evil = pickle.dumps(print).hex()
    build_id = ended(storage, success=True, retval=evil)
    assert storage.get_build(build_id)["retval"] == evil


# -- progress: J-60, J-61 ----------------------------------------------------------------------------------------------


def test_progress_of_a_group_is_replaced_by_the_next_report(storage):
    build_id = storage.create_build("job", {}, {})
    for current in (1, 2):
        storage.report_build_progress(build_id, current, 10, ("a", "b"), f"step {current}")
    assert storage.get_build_progress_info(build_id) == [(("a", "b"), 2, 10, "step 2")]


@pytest.mark.parametrize("group", [("a", "b"), ["a", "b"], "a::b"])
def test_a_group_is_a_path_in_any_of_its_forms(storage, group):
    build_id = storage.create_build("job", {}, {})
    storage.report_build_progress(build_id, 1, 2, "a::b")
    storage.report_build_progress(build_id, 2, 2, group)
    assert storage.get_build_progress_info(build_id) == [(("a", "b"), 2, 2, "")]


@pytest.mark.parametrize("group", [(), [], "", None])
def test_no_group_is_the_whole_build(storage, group):
    build_id = storage.create_build("job", {}, {})
    storage.report_build_progress(build_id, 3, 4, group)
    assert storage.get_build_progress_info(build_id) == [((), 3, 4, "")]


@pytest.mark.parametrize(("current", "total"), [("1", 2), (1, 2.0), (None, 2), (True, 2)])
def test_progress_is_counted_in_whole_numbers(storage, current, total):
    build_id = storage.create_build("job", {}, {})
    with pytest.raises(TypeError, match="give a whole number"):
        storage.report_build_progress(build_id, current, total)


@pytest.mark.parametrize("number", [1 << 63, -(1 << 70)])
def test_progress_that_no_database_can_count_is_refused(storage, number):
    build_id = storage.create_build("job", {}, {})
    with pytest.raises(ValidationError, match="64 bits"):
        storage.report_build_progress(build_id, 1, number)
    storage.report_build_progress(build_id, (1 << 63) - 1, 1 - (1 << 63))
    assert storage.get_build_progress_info(build_id) == [((), (1 << 63) - 1, 1 - (1 << 63), "")]


@pytest.mark.parametrize("build_id", ["x", True, 1.5])
def test_a_build_that_is_no_number_has_no_log(storage, build_id):
    with pytest.raises(ValidationError, match="give the number of a build"):
        storage.iter_log_messages(build_id=build_id)
    with pytest.raises(ValidationError, match="give the number of a build"):
        storage.prune_log_messages(build_id=build_id)


def test_a_group_that_is_no_path_is_refused(storage):
    build_id = storage.create_build("job", {}, {})
    with pytest.raises(TypeError, match="group_name=5"):
        storage.report_build_progress(build_id, 1, 2, 5)


def test_progress_rows_make_a_tree(storage):
    build_id = storage.create_build("job", {}, {})
    storage.report_build_progress(build_id, 1, 4, "a::x")
    storage.report_build_progress(build_id, 2, 6, "a::y")
    tree = ProgressReport.from_table(storage.get_build_progress_info(build_id))
    assert tree.label == "3/10 (30%)"
    assert storage.history.get_progress(storage.get_build(build_id)["uuid"]).label == "3/10 (30%)"


# -- logs: J-45, J-63, J-64 --------------------------------------------------------------------------------------------

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


def test_log_records_come_back_with_everything(storage):
    build_id = storage.create_build("job", {}, {})
    kathmandu = NOON.astimezone(timezone(timedelta(hours=5, minutes=45)))
    storage.log_message(
        build_id, logging.ERROR, "broke", logger="shop", created=kathmandu, exception="E: no", exception_tb={"f": 1}
    )
    (line,) = storage.iter_log_messages(build_id)
    assert line.pop("id") > 0
    assert line == {
        "build_id": build_id,
        "job_id": "job",
        "created": NOON,
        "level": 40,
        "logger": "shop",
        "message": "broke",
        "exception": "E: no",
        "exception_tb": {"f": 1},
    }
    assert line["created"].utcoffset() == timedelta(0)


def messages(storage, *args, **filters):
    return [line["message"] for line in storage.iter_log_messages(*args, **filters)]


def test_log_records_are_filtered_by_build_time_and_level(storage):
    one, other = storage.create_build("one", {}, {}), storage.create_build("other", {}, {})
    storage.log_message(one, logging.DEBUG, "early", created=NOON - timedelta(seconds=1))
    storage.log_message(other, logging.INFO, "noon", created=NOON)
    storage.log_message(one, logging.ERROR, "late", created=NOON + timedelta(seconds=1))
    assert messages(storage) == ["early", "noon", "late"]  # None: of all builds
    assert messages(storage, one) == ["early", "late"]
    assert messages(storage, 999) == []
    assert messages(storage, min_date=NOON) == ["noon", "late"]  # from it on
    assert messages(storage, max_date=NOON) == ["early"]  # before it
    assert messages(storage, min_level=logging.INFO) == ["noon", "late"]  # inclusive
    assert messages(storage, one, min_date=NOON, min_level=logging.INFO) == ["late"]
    with pytest.raises(ValidationError, match="min_date"):
        list(storage.iter_log_messages(min_date=datetime(2026, 1, 1)))


def test_many_log_records_come_in_order_of_time_each_once(storage):
    build_id = storage.create_build("job", {}, {})
    for number in range(1100):
        storage.log_message(build_id, 20, str(number), created=NOON + timedelta(seconds=number // 3))
    assert messages(storage) == [str(number) for number in range(1100)]


def test_who_iterates_slowly_holds_no_connection(storage):
    build_id = storage.create_build("job", {}, {})
    storage.log_message(build_id, 20, "x")
    lines = storage.iter_log_messages()
    assert next(lines)["message"] == "x"
    storage.log_message(build_id, 20, "y")  # in memory there is one connection
    lines.close()


def logged(storage):
    one, other = storage.create_build("one", {}, {}), storage.create_build("other", {}, {})
    now = datetime.now(UTC)
    for build_id, level, name, age in [
        (one, 10, "old debug", 100),
        (one, 20, "new info", 1),
        (other, 20, "old info", 100),
        (other, 40, "new error", 1),
    ]:
        storage.log_message(build_id, level, name, created=now - timedelta(seconds=age))
    return one, other


@pytest.mark.parametrize(
    ("filters", "left"),
    [
        ({}, []),  # none given: all are deleted
        ({"job_id": "one"}, ["new error", "old info"]),
        ({"max_age": 50}, ["new error", "new info"]),
        ({"level": 20}, ["new error"]),  # equal or lower
        ({"level": 10}, ["new error", "new info", "old info"]),
        ({"job_id": "other", "max_age": 50, "level": 20}, ["new error", "new info", "old debug"]),  # all of them
        ({"job_id": "nobody"}, ["new error", "new info", "old debug", "old info"]),
        ({"max_age": 0}, []),  # 0 is an age, not "no filter"
    ],
)
def test_log_records_that_all_filters_meet_are_pruned(storage, filters, left):
    logged(storage)
    deleted = storage.prune_log_messages(**filters)
    assert sorted(messages(storage)) == left
    assert deleted == 4 - len(left)


def test_log_records_of_one_build_are_pruned(storage):
    one, _ = logged(storage)
    assert storage.prune_log_messages(build_id=one) == 2
    assert sorted(messages(storage)) == ["new error", "old info"]


# -- tables: J-23, J-65 to J-67 ----------------------------------------------------------------------------------------


def tables(storage):
    with storage.database.read() as connection:
        return set(inspect(connection).get_table_names())


def test_the_tables_are_those_of_the_code(storage):
    """The migrations have a copy of their own: it must not drift away."""
    with storage.database.read() as connection:
        names = {table.name for table in storage.database.tables.metadata.tables.values()}
        context = MigrationContext.configure(
            connection,
            opts={"include_name": lambda name, kind, _: kind != "table" or name in names, "compare_type": False},
        )
        assert compare_metadata(context, storage.database.tables.metadata) == []


def test_installing_again_changes_nothing(storage):
    build_id = storage.create_build("job", {}, {})
    storage.install()
    assert storage.get_build(build_id)["job_id"] == "job"
    current, newest = storage.version()
    assert current == newest


def test_several_may_install_at_once(shared_url):
    storages = [get_storage_from_url(shared_url) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda storage: storage.install(), storages))
    assert storages[0].create_build("job", {}, {}) == 1
    storages[0].uninstall()
    for storage in storages:
        storage.close()


def test_uninstalling_drops_our_tables_and_no_others(storage):
    with storage.database.write() as connection:
        connection.execute(text("CREATE TABLE IF NOT EXISTS somebody_elses (x INTEGER)"))
    ours = {name for name in tables(storage) if name.startswith(storage.database.tables.prefix)}
    assert len(ours) == 8
    storage.uninstall()
    storage.uninstall()  # nothing left to do is no error
    assert not tables(storage) & ours
    assert "somebody_elses" in tables(storage)
    with pytest.raises(ConfigurationError, match="kser install"):
        storage.create_build("job", {}, {})
    assert storage.version()[0] is None
    storage.install()
    assert storage.create_build("job", {}, {}) == 1


def test_two_prefixes_are_two_storages(shared_url):
    base, _, own = shared_url.partition("?table_prefix=")
    first, second = (get_storage_from_url(f"{base}?table_prefix={own}{prefix}") for prefix in ("a_", "b_"))
    for storage in (first, second):
        storage.install()
    first.create_build("job", {}, {})
    assert list(second.get_job_builds("job")) == []
    first.uninstall()
    assert second.create_build("job", {}, {}) == 1
    second.uninstall()
    for storage in (first, second):
        storage.close()


def test_the_default_prefix_is_jobcontrols(tmp_path):
    storage = get_storage_from_url(f"sqlite:///{tmp_path}/a.db")
    storage.install()
    assert "jobcontrol_build" in tables(storage)
    storage.close()


# -- connections: J-67 -------------------------------------------------------------------------------------------------


def test_threads_share_a_storage_and_each_call_has_a_connection_of_its_own(storage):
    build_id = storage.create_build("job", {}, {})

    def work(number):
        for step in range(5):
            storage.report_build_progress(build_id, step, 5, f"group {number}")
            storage.log_message(build_id, 20, f"{number}.{step}")
            list(storage.get_job_builds("job"))

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(work, range(12)))
    assert len(storage.get_build_progress_info(build_id)) == 12
    assert len(list(storage.iter_log_messages())) == 60


def test_a_failed_call_leaves_nothing_behind(storage):
    with pytest.raises(RuntimeError), storage.database.write() as connection:
        connection.execute(storage.database.tables.worker.delete())
        raise RuntimeError
    assert storage.create_build("job", {}, {}) == 1


# -- through the read API ----------------------------------------------------------------------------------------------


def test_builds_of_jobs_are_listed_like_tasks(storage):
    """M-09: the same rows, seen from the other side."""
    ended(storage, "crawl", success=True)
    failed = ended(storage, "process", success=False, exception={"message": "Disk 100% full"})
    history = storage.history
    assert [found.entrypoint for found in history.list_operations()] == ["process", "crawl"]
    assert [found.id for found in history.list_operations(states=["FAILED"])] == [failed]
    assert [found.id for found in history.list_operations(text="100% FULL")] == [failed]
    assert history.list_operations(text="100_ full") == []  # not a pattern
    assert [found.entrypoint for found in history.list_operations(limit=1, offset=1)] == ["crawl"]
    assert history.count_operations(entrypoint="crawl") == 1
    assert history.count_operations(kind="operation") == 0
    assert history.list_operations(group="shop") == []  # no worker told of them
    assert history.count_operations(since=datetime.now(UTC) - timedelta(seconds=60)) == 2
    assert history.count_operations(until=datetime.now(UTC) - timedelta(seconds=60)) == 0
    data = history.get_operation(failed).to_json()
    assert (data["status"], data["error"]) == ("FAILED", "Disk 100% full")
    assert data["duration_s"] >= 0
    assert "tasks" not in data


@pytest.mark.parametrize("filters", [{"states": ["DONE"]}, {"kind": "job"}, {"limit": -1}, {"offset": -1}])
def test_filters_that_cannot_be_are_refused(storage, filters):
    with pytest.raises(ValidationError):
        storage.history.list_operations(**filters)


def test_what_is_not_there_is_not_found(storage):
    for unknown in ("nobody", 12345, -1, 1 << 80):
        with pytest.raises(NotFound, match="Nothing is known of"):
            storage.history.get_operation(unknown)


def test_logs_are_followed_by_the_id_of_the_last_one(storage):
    build_id = storage.create_build("job", {}, {})
    uuid = storage.get_build(build_id)["uuid"]
    storage.log_message(build_id, 20, "one")
    (first,) = storage.history.list_logs(uuid)
    assert (first.message, first.level_name, first.uuid) == ("one", "INFO", uuid)
    storage.log_message(build_id, 40, "two")
    assert [line.message for line in storage.history.list_logs(uuid, after=first.id)] == ["two"]
    assert [line.message for line in storage.history.list_logs(min_level=30)] == ["two"]
    assert storage.history.list_logs("nobody") == []


# -- URLs: J-02, J-66, J-67 --------------------------------------------------------------------------------------------


class OwnStorage(SqlStorage):
    """What a user brings along."""

    @classmethod
    def from_url(cls, url):
        assert url == "proto://host/x+y:z"
        return cls("memory:")


def test_a_class_in_front_of_the_url_is_loaded_and_given_the_rest():
    own = get_storage_from_url(f"{__name__}:OwnStorage+proto://host/x+y:z")
    assert type(own) is OwnStorage
    own.close()


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("mysql://h/d", r"Unknown storage 'mysql://h/d': use one of memory:, sqlite:, postgresql:"),
        ("mysql://u:secret@h/d", r"mysql://u:\*+@h/d"),
        ("", "is no URL"),
        (5, "is no URL"),
        (None, "is no URL"),
        ("sqlite", "Unknown storage"),
        ("postgresql://h:port/d", "is no URL that can be read"),
        ("postgresql://h:port/d?user=u&password=secret", r"h:port/d\?user=u&password=\*+' is no URL"),
        ("sqlite://kser.db", "three slashes stand before a relative path"),
        ("sqlite://u:secret@h/d", "three slashes"),
        ("sqlite:///x.db?timout=5", "no option 'timout'; sqlite has table_prefix, cached_statements"),
        ("sqlite:///x.db?timeout=soon", "'sqlite:///x.db\\?timeout=soon' cannot be opened"),
        ("sqlite:///x.db?table_prefix=a;b", "table_prefix='a;b'"),
        ("sqlite:///x.db?table_prefix=a&table_prefix=b", "more than once"),
        ("no.such.module:Class+x://", "Storage class no.such.module:Class cannot be loaded"),
        ("kser.errors:Error+x://", "is no class derived from"),
        ("kser.errors:+x://", "cannot be loaded"),
    ],
)
def test_a_url_that_cannot_be_is_refused_with_what_to_write(url, said):
    with pytest.raises(ConfigurationError, match=said) as caught:
        get_storage_from_url(url)
    assert "secret" not in str(caught.value.message)


def test_a_storage_that_keeps_builds_only_says_so():
    class Builds(OwnStorage):
        history = StorageBase.history

    with pytest.raises(ConfigurationError, match="Builds keeps builds only"):
        Builds("memory:").history  # noqa: B018


def test_a_database_that_is_away_is_told_without_its_password(postgresql):
    storage = get_storage_from_url("postgresql://u:geheim@127.0.0.1:1/d")
    began = time.monotonic()
    with pytest.raises(Exception, match=r"postgresql://u:\*+@127\.0\.0\.1:1/d") as caught:
        storage.install()
    assert caught.value.code == 503
    assert "geheim" not in str(caught.value.message)
    assert time.monotonic() - began < 15
    storage.close()


def test_a_driver_that_is_not_installed_is_told_with_the_line_to_type(monkeypatch):
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(
        ConfigurationError, match=r"needs psycopg, which is not installed: pip install 'kser\[postgres\]'"
    ):
        get_storage_from_url("postgresql://u:geheim@h/d")


def test_user_password_and_database_of_a_url_are_decoded(postgresql):
    storage = get_storage_from_url(postgresql.url("d_"))
    storage.install()
    with storage.database.read() as connection:
        assert connection.execute(text("SELECT current_database()")).scalar() == "kser test/%"
    storage.uninstall()
    storage.close()


def test_a_thread_that_waits_for_a_lock_gets_it_when_it_is_free(storage):
    build_id = storage.create_build("job", {}, {})
    held, done = threading.Event(), threading.Event()

    def hold():
        with storage.database.write() as connection:
            storage._row(connection, build_id, lock=True)
            held.set()
            done.wait(0.2)

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(5)
    storage.start_build(build_id)
    thread.join()
    assert storage.get_build(build_id)["started"]


def test_a_begin_of_a_uuid_that_is_too_short_is_told_so(storage):
    with pytest.raises(NotFound, match="Nothing is known of 3f2a: of a uuid at least the first 8 characters"):
        storage.history.get_operation("3f2a")
    with pytest.raises(NotFound, match=r"Nothing is known of 99999$"):
        storage.history.get_operation(99999)
