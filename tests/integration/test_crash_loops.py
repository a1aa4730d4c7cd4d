"""What ends its process not in run() but while it is made or built, on the embedded broker."""

import json
import subprocess
import sys
import uuid

import pytest

from kser import headers
from kser.confluent.producer import Producer
from kser.worker.topic_plan import Feature, TopicPlan
from tests.apps import failing
from tests.processes import ROOT, environment, records, wait_for

OPTIONS = ("-X", "session.timeout.ms=3000", "-X", "heartbeat.interval.ms=500", "--log-level", "warning")


@pytest.mark.embedded
@pytest.mark.parametrize("culprit", [failing.Unmakable, pytest.param(failing.Unbuildable, marks=pytest.mark.long)])
def test_what_ends_its_process_while_it_is_made_ends_in_the_dead_letters_too(embedded, tmp_path, culprit):
    servers, group = embedded.bootstrap_servers, f"g{uuid.uuid4().hex[:8]}"
    topic = f"t{uuid.uuid4().hex[:8]}"
    embedded.create_topic(topic, 1)
    plan = TopicPlan(group=group, tasks={topic: 1}, features=frozenset(Feature))
    for spec in plan.specs({}):
        if spec.name != topic:
            embedded.create_topic(spec.name, spec.partitions)
    with Producer({"bootstrap.servers": servers}) as producer:
        failing.registry.configure(producer=producer, topic=topic)
        culprit(params={}).send()
        failing.Good(params={"n": 1}).send()
    runs, deaths = tmp_path / "runs", 0
    runs.touch()
    command = [sys.executable, "-m", "kser", "worker", "tests.apps.failing:registry", "--topics", topic]
    command += ["--group", group, "--name", "one", "--bootstrap-servers", servers, *OPTIONS]
    for _ in range(7):  # each time it dies it is started again
        worker = subprocess.Popen(command, cwd=ROOT, env=environment(RUNS=str(runs)), stderr=subprocess.DEVNULL)
        try:
            wait_for(lambda it=worker: it.poll() is not None or letters(servers, group), 30, "a death or a dead letter")
        finally:
            worker.terminate()
            deaths += worker.wait(30) < 0
        if letters(servers, group):
            break
    (letter,) = letters(servers, group)
    assert json.loads(letter.value)["entrypoint"] == culprit.path
    assert "SIGABRT" in headers.text(letter.headers, headers.ERROR)
    assert deaths == 4


def letters(servers, group):
    return records(servers, f"{group}.dlq")
