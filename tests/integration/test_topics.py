"""The topics of a group on real brokers: what kser makes is right, what is wrong is found, and its cures cure."""

import itertools
import json
import re
import shlex
import signal
import subprocess
import sys
import threading

import pytest
from confluent_kafka.admin import (
    AdminClient,
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    NewPartitions,
)

from kser.confluent.transport import ConfluentTransport
from kser.errors import ConfigurationError
from kser.worker.topic_plan import KINDS, Feature, TopicPlan
from kser.worker.topics import check_topics, create_topics, ensure_group_topics
from tests.processes import DICE, ROOT, environment, process, wait_for

KSER = [sys.executable, "-m", "kser"]
DAY_MS = 24 * 3600 * 1000
WAIT_S = 30


def kser(*args):
    command = [*KSER, *args]
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=60)


class Cluster:
    """What an administrator does to topics."""

    def __init__(self, servers):
        self.servers = servers
        self.admin = ConfluentTransport({"bootstrap.servers": servers}).admin()
        self.client = AdminClient({"bootstrap.servers": servers, "log_level": 0})

    def set(self, topic, **settings):
        entries = [
            ConfigEntry(name.replace("_", "."), str(value), incremental_operation=AlterConfigOpType.SET)
            for name, value in settings.items()
        ]
        resource = ConfigResource(ConfigResource.Type.TOPIC, topic, incremental_configs=entries)
        for answer in self.client.incremental_alter_configs([resource]).values():
            answer.result(WAIT_S)
        wanted = {name.replace("_", "."): str(value) for name, value in settings.items()}
        wait_for(lambda: wanted.items() <= self.info(topic).config.items(), WAIT_S, f"{topic} has {wanted}")

    def grow(self, topic, partitions):
        self.client.create_partitions([NewPartitions(topic, partitions)])[topic].result(WAIT_S)
        wait_for(lambda: self.info(topic).partitions == partitions, WAIT_S, f"{topic} has {partitions} partitions")

    def delete(self, topic):
        self.client.delete_topics([topic])[topic].result(WAIT_S)
        wait_for(lambda: self.info(topic) is None, WAIT_S, f"the end of {topic}")

    def info(self, topic):
        return self.admin.describe([topic]).get(topic)

    def apply(self, cure):
        """Do what the command line of a cure says."""
        for command in cure.split(" && "):
            words = shlex.split(command)
            options = dict(itertools.pairwise(words))
            if words[0] == "kser":
                result = kser(*words[1:])
                assert result.returncode == 0, result.stderr
                continue
            assert options["--bootstrap-server"] == self.servers
            if words[0] == "kafka-configs.sh":
                assert ("--alter" in words, options["--entity-type"]) == (True, "topics")
                settings = dict(pair.split("=") for pair in options["--add-config"].split(","))
                self.set(options["--entity-name"], **settings)
            elif "--delete" in words:
                self.delete(options["--topic"])
            else:
                assert (words[0], "--alter" in words) == ("kafka-topics.sh", True)
                self.grow(options["--topic"], int(options["--partitions"]))


@pytest.fixture
def cluster(apache):
    return Cluster(apache.bootstrap_servers)


@pytest.fixture
def names(topic_name):
    """A task topic and a group that no other test has."""
    return topic_name("shop"), topic_name("g")


def check(cluster, topics, group, *more):
    args = ("--group", group, "--topics", topics, "--bootstrap-servers", cluster.servers, "--format", "json")
    result = kser("topics", "check", *args, *more)
    assert result.stderr == ""
    return result.returncode, json.loads(result.stdout)


# -- Apache Kafka ----------------------------------------------------------------------------------------------------


def test_created_topics_have_the_settings_of_the_table_and_are_approved(cluster, names):
    task, group = names
    args = ("--group", group, "--topics", f"{task}:3", "--bootstrap-servers", cluster.servers)
    code, missing = check(cluster, f"{task}:3", group)
    assert code == 1
    assert {found["finding"] for found in missing} == {"does not exist"}
    needed = [found["topic"] for found in missing if found["level"] == "error"]
    assert needed == [found["topic"] for found in missing]
    made = kser("topics", "create", *args, "--format", "json")
    assert made.returncode == 0, made.stderr
    topics = {topic["name"]: topic for topic in json.loads(made.stdout)["topics"]}
    assert all(topic["created"] for topic in topics.values())
    assert [found["topic"] for found in missing] == list(topics)
    told = cluster.admin.describe(list(topics))
    for kind in KINDS:
        info = told[kind.pattern.format(group=group, topic=task)]
        assert info.partitions == {"one": 1, "chosen": 3 if kind.feature is None else 6}.get(kind.partitions, 3)
        assert info.config["cleanup.policy"] == kind.cleanup
        assert info.config["message.timestamp.type"] == kind.timestamps or not kind.timestamps
        if kind.cleanup == "delete":
            assert info.config["retention.ms"] == str(kind.retention_ms)
    assert check(cluster, f"{task}:3", group) == (0, [])
    assert kser("topics", "create", *args).stdout.count("existed") == len(topics)


def test_with_three_copies_two_must_confirm(apache3, names):
    task, group = names
    cluster = Cluster(apache3.bootstrap_servers)
    plan = TopicPlan(group=group, tasks={task: 3}, replication=3, servers=cluster.servers)
    there, _ = create_topics(cluster.admin, plan)
    assert {(t.replication, t.config["min.insync.replicas"]) for t in there.values()} == {(3, "2")}
    assert check_topics(cluster.admin, plan) == []
    cluster.set(task, min_insync_replicas=1)
    # Each node learns of it in its own time, and another one may be asked.
    [found] = wait_for(lambda: check_topics(cluster.admin, plan), WAIT_S, "what is wrong is found")
    assert found.finding.startswith("min.insync.replicas is 1 with 3 replicas")
    cluster.apply(found.cure)
    wait_for(lambda: check_topics(cluster.admin, plan) == [], WAIT_S, "all is well")


def test_the_groups_topics_have_as_many_copies_as_the_task_topics(apache3, names):
    task, group = names
    admin = ConfluentTransport({"bootstrap.servers": apache3.bootstrap_servers}).admin()
    apache3.create_topic(task, 2, replication=2)
    ensure_group_topics(admin, group, [task])
    assert admin.describe([f"{group}.events"])[f"{group}.events"].replication == 2


def test_everything_that_was_put_wrong_is_found_and_each_cure_puts_it_right(cluster, names):
    task, group = names
    plan = TopicPlan(group=group, tasks={task: None}, used=frozenset(Feature), servers=cluster.servers)
    create_topics(cluster.admin, TopicPlan(group=group, tasks={task: 3}))
    cluster.set(task, retention_ms=DAY_MS, max_message_bytes=500_000, cleanup_policy="compact")
    cluster.set(f"{group}.control", cleanup_policy="delete")
    cluster.set(f"{group}.retry.10s", message_timestamp_type="CreateTime", retention_ms=DAY_MS, retention_bytes=9999)
    cluster.set(f"{group}.dlq", retention_ms=DAY_MS)
    cluster.delete(f"{group}.retry.1m")
    cluster.grow(task, 4)
    found = check_topics(cluster.admin, plan)
    assert [(f.topic.removeprefix(group), f.level, f.finding.split()[0]) for f in found] == [
        # Its retention says nothing while the policy is compact.
        (task, "error", "cleanup.policy"),
        (task, "warning", "max.message.bytes"),
        (".control", "error", "cleanup.policy"),
        (f".state.{task}", "error", "3"),
        (".dlq", "error", "keeps"),
        (".retry.10s", "warning", "3"),
        (".retry.10s", "error", "keeps"),
        (".retry.10s", "error", "retention.bytes"),
        (".retry.10s", "error", "message.timestamp.type"),
        (".retry.1m", "error", "does"),
        (".retry.10m", "warning", "3"),
        (".retry.1h", "warning", "3"),
    ]
    for cure in dict.fromkeys(f.cure for f in found):
        cluster.apply(cure)
    [last] = check_topics(cluster.admin, plan)
    assert (last.topic, last.finding.split(",")[0]) == (task, "keeps records for 1 day")
    cluster.apply(last.cure)
    assert check_topics(cluster.admin, plan) == []


def test_workers_that_start_together_make_each_topic_once_and_none_fails(cluster, names, caplog):
    task, group = names
    create_topics(cluster.admin, TopicPlan(group=group, tasks={task: 2}, features=frozenset()))
    failed = []

    def start():
        try:
            admin = ConfluentTransport({"bootstrap.servers": cluster.servers}).admin()
            ensure_group_topics(admin, group, [task], features=frozenset(Feature))
        except Exception as exc:
            failed.append(exc)

    threads = [threading.Thread(target=start) for _ in range(4)]
    with caplog.at_level("INFO", "kser.worker.topics"):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert failed == []
    made = [line.split()[1] for line in caplog.messages if line.startswith("Topic ") and " created: " in line]
    assert sorted(made) == sorted(set(made))
    assert len(made) == 9
    assert check_topics(cluster.admin, TopicPlan(group=group, tasks={task: 2}, used=frozenset(Feature))) == []


def test_a_worker_refuses_a_tier_that_forgets_and_a_state_that_does_not_match(cluster, names):
    task, group = names
    create_topics(cluster.admin, TopicPlan(group=group, tasks={task: 2}))
    cluster.set(f"{group}.retry.1h", retention_ms=7 * DAY_MS)
    cluster.grow(task, 3)
    with pytest.raises(ConfigurationError) as caught:
        ensure_group_topics(cluster.admin, group, [task], features=frozenset(Feature), servers=cluster.servers)
    refused = {found["topic"]: found for found in caught.value.extra["findings"]}
    assert set(refused) == {f"{group}.retry.1h", f"{group}.state.{task}"}
    assert "less than 7 days beyond its delay of 1 hour" in caught.value.message
    for found in refused.values():
        cluster.apply(found["cure"])
    ensure_group_topics(cluster.admin, group, [task], features=frozenset(Feature))


def test_a_worker_without_its_task_topic_ends_with_the_command_that_makes_it(cluster, names):
    task, group = names
    args = ("--topics", task, "--group", group, "--bootstrap-servers", cluster.servers)
    refused = kser("worker", DICE, *args)
    assert refused.returncode == 2
    last = refused.stderr.splitlines()[-1]
    assert last.startswith(f"kser: error: Topics of group {group} are missing: {task}. Create them with: kser topics ")
    assert cluster.info(f"{group}.events") is None
    cluster.admin.create(TopicPlan(group=group, tasks={task: 2}, features=frozenset()).specs({}))
    unwilling = kser("worker", DICE, *args, "--no-create-topics")
    assert unwilling.returncode == 2
    assert f"are missing: {group}.events, {group}.telemetry, {group}.control, " in unwilling.stderr
    assert f"{group}.retry.1h. Create them with: kser topics create" in unwilling.stderr


def test_a_worker_makes_the_topics_of_its_group_and_logs_it(cluster, names, tmp_path):
    task, group = names
    cluster.admin.create(TopicPlan(group=group, tasks={task: 2}, features=frozenset()).specs({}))
    log = tmp_path / "log"
    args = ("--topics", task, "--group", group, "--bootstrap-servers", cluster.servers)
    with process("-m", "kser", "worker", DICE, *args, log=log) as child:
        wait_for(lambda: f"Topic {group}.events created: 6 partitions" in log.read_text(), WAIT_S, "the log line")
        child.send_signal(signal.SIGTERM)
        assert child.wait(WAIT_S) == 0
    assert cluster.info(f"{group}.events").config["retention.ms"] == str(30 * DAY_MS)


# -- the embedded broker ---------------------------------------------------------------------------------------------


def test_kser_broker_makes_the_topics_of_a_group_to_match_and_check_approves():
    command = [*KSER, "broker", "--topic", "shop:3", "--topic", "mails:1", "--group", "g"]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
    ) as child:
        try:
            lines = [child.stdout.readline() for _ in range(4)]
            assert "Topics: shop (3 partitions), mails (1 partition), those of group g; " in lines[1]
            servers = re.search(r"127\.0\.0\.1:\d+", lines[0])[0]
            admin = ConfluentTransport({"bootstrap.servers": servers}).admin()
            plan = TopicPlan(group="g", tasks={"shop": 3, "mails": 1})
            there = admin.describe(plan.names)
            assert {name: info.partitions for name, info in there.items()} == {
                spec.name: spec.partitions for spec in plan.specs({})
            }
            args = ("--group", "g", "--topics", "shop,mails", "--bootstrap-servers", servers)
            checked = kser("topics", "check", *args, "--format", "json")
            assert (checked.returncode, json.loads(checked.stdout)) == (0, [])
            assert checked.stderr.startswith("kser: This is the embedded broker")
            ensure_group_topics(admin, "g", ["shop", "mails"], features=frozenset(Feature))
        finally:
            child.terminate()
            child.wait(WAIT_S)


def test_check_on_the_embedded_broker_compares_partitions(embedded, make_topic, topic_name):
    task, group = make_topic(embedded, partitions=2), topic_name("g")
    args = ("--group", group, "--bootstrap-servers", embedded.bootstrap_servers)
    assert kser("topics", "check", *args, "--topics", f"{task}:2").returncode == 0
    wrong = kser("topics", "check", *args, "--topics", f"{task}:3")
    assert wrong.returncode == 1
    assert re.search(rf"^error +{task} +2 partitions, expected 3$", wrong.stdout, re.MULTILINE)
    assert f"kser broker --group {group} --topic {task}:3" in wrong.stdout
    admin = ConfluentTransport({"bootstrap.servers": embedded.bootstrap_servers}).admin()
    ensure_group_topics(admin, group, [task], features=frozenset({Feature.STATE}))  # not there yet, maybe never
    checked = kser("topics", "check", *args, "--topics", f"{task}:2").stdout
    assert f"{group}.state.{task}  does not exist yet, would get 4 partitions, and {task} has 2" in checked


def test_create_on_the_embedded_broker_says_how_to_have_them(embedded):
    args = ("--group", "g", "--topics", "a:3", "--bootstrap-servers", embedded.bootstrap_servers)
    result = kser("topics", "create", *args)
    assert (result.returncode, result.stdout) == (1, "")
    [line] = result.stderr.splitlines()
    assert line.endswith("start it with them: kser broker --group g --topic a:3")
