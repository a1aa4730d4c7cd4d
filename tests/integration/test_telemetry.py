"""What a worker process tells, on the embedded broker: in the topics, and by kser workers and kser lag."""

import json
import subprocess
import sys
import uuid

import pytest
from jsonschema import Draft202012Validator

from kser import Message
from kser.confluent.producer import Producer
from kser.events import EventType, events_topic, read, schema
from kser.masking import MASK
from kser.telemetry import TaskLog, TaskProgress, TaskStarted, WorkerState, telemetry_topic
from kser.telemetry import read as read_telemetry
from tests.processes import ROOT, environment, process, records, wait_for


@pytest.fixture
def names():
    return f"t{uuid.uuid4().hex[:8]}", f"g{uuid.uuid4().hex[:8]}"


def asked(bootstrap, *args):
    """What a command prints as JSON."""
    command = [sys.executable, "-m", "kser", *args, "--bootstrap-servers", bootstrap, "--format", "json"]
    found = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=60)
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout)


def test_a_worker_tells_of_itself_and_of_its_tasks(embedded, names, tmp_path):
    (topic, group), servers, task = names, embedded.bootstrap_servers, str(uuid.uuid4())
    embedded.create_topic(topic, 2)
    stop, log = tmp_path / "stop", tmp_path / "log"
    command = ("-m", "kser", "worker", "tests.apps.telling:registry", "--topics", topic, "--group", group)
    options = ("--name", "w-1", "--concurrency", "1", "--bootstrap-servers", servers)
    with Producer({"bootstrap.servers": servers}) as producer:
        for one in (task, str(uuid.uuid4())):
            kmsg = Message(one, "telling.Import", {"file": "a.csv"})
            assert producer.send(topic, kmsg, key="k").retcode == 0

    def told(kind):
        found = read_telemetry(records(servers, telemetry_topic(group)))
        return [record for record in found if isinstance(record, kind)]

    with process(*command, *options, log=log, STOP=str(stop)):
        wait_for(lambda: told(TaskStarted), what="the start of the task")
        [worker] = asked(servers, "workers", "--group", group)
        assert (worker["worker"], worker["group"], worker["topics"]) == ("w-1", group, [topic])
        assert worker["state"] in ("starting", "running")
        assert sum(each["unfinished"] for each in asked(servers, "lag", "--group", group, "--topics", topic)) == 2
        wait_for(lambda: len(told(TaskProgress)) > 1, what="progress")
        stop.touch()
        wait_for(
            lambda: not sum(each["unfinished"] for each in asked(servers, "lag", "--group", group, "--topics", topic)),
            what="the end of both",
        )
    first = [report for report in told(TaskProgress) if report.task.uuid == task]
    assert [report.current for report in first] == sorted(report.current for report in first)
    assert first[-1].group == ("rows", "read")
    line = next(line for line in told(TaskLog) if line.task.uuid == task)
    assert (line.message, line.logger, line.level) == ("reading a.csv", "tests.telling", 20)
    assert told(WorkerState)[-1].state == "stopped"
    assert asked(servers, "workers", "--group", group)[0]["state"] == "stopped"
    failed = [event for event in read(records(servers, events_topic(group))) if event.type == EventType.STEP_FAILED]
    trace = next(event for event in failed if event.uuid == task).trace
    assert [frame.function for frame in trace.frames] == ["Import.run", "Import.store", "Import.connect"]
    assert trace.frames[-1].locals["password"] == MASK
    assert "attempts = 3" in str(trace)
    valid = Draft202012Validator(schema())
    for record in (*records(servers, telemetry_topic(group)), *records(servers, events_topic(group))):
        valid.validate(json.loads(record.value))
        assert b"hunter2" not in record.value
