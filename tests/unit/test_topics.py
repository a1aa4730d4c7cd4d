"""The topics of a group: how each should be, what is made, what is refused. Brokers are fakes and in memory."""

import json
import logging
import re

import pytest
from click.testing import CliRunner

from kser.cli.connection import Drivers
from kser.cli.main import cli
from kser.errors import ConfigurationError, TransportError
from kser.events import events_topic
from kser.transport import TopicInfo, TopicSpec
from kser.transport.memory import MemoryTransport
from kser.worker.topic_findings import find
from kser.worker.topic_plan import KINDS, TIERS, WORKER_FEATURES, Feature, TopicPlan
from kser.worker.topics import check_topics, create_topics, ensure_group_topics

DAY_MS = 24 * 3600 * 1000
SERVERS = ("--bootstrap-servers", "127.0.0.1:1")
#: What a Kafka gives a topic for which nobody says more.
KAFKA = {
    "cleanup.policy": "delete",
    "retention.ms": str(7 * DAY_MS),
    "retention.bytes": "-1",
    "message.timestamp.type": "CreateTime",
    "min.insync.replicas": "1",
    "max.message.bytes": "1048588",
    "unclean.leader.election.enable": "false",
}


class FakeKafka:
    """A TopicAdmin that keeps settings, as Kafka does; ``default_replication`` is for topics that name none."""

    def __init__(self, *, embedded=False, default_replication=3, refuses=None, unseen=0):
        self.topics = {}
        self.orders = []
        self.limits = []
        self.embedded = embedded
        self.default_replication = default_replication
        self.refuses = refuses
        #: So many describe() after a create() do not know what was created, as another broker may not.
        self.unseen = unseen
        self.hidden = (0, frozenset())

    def cluster_id(self, timeout_s=10):
        return "mockCluster1" if self.embedded else "wQ8ll2kSS2yXoPmsj8N3cQ"

    def can_create(self, timeout_s=10):
        self.limits.append(timeout_s)
        return not self.embedded

    def describe(self, names, timeout_s=10):
        self.limits.append(timeout_s)
        left, hidden = self.hidden
        self.hidden = (left - 1, hidden) if left > 1 else (0, frozenset())
        return {name: self.topics[name] for name in names if name in self.topics and name not in hidden}

    def create(self, specs, timeout_s=30):
        self.limits.append(timeout_s)
        if self.refuses is not None:
            raise self.refuses
        made = [spec for spec in specs if spec.name not in self.topics]
        for spec in made:
            self.have(spec.name, spec.partitions, spec.replication, **spec.config)
        self.orders.append([spec.name for spec in made])
        self.hidden = (self.unseen, frozenset(spec.name for spec in made))
        return [spec.name for spec in made]

    def have(self, name, partitions=6, replication=None, **config):
        settings = {} if self.embedded else KAFKA | {key.replace("_", "."): value for key, value in config.items()}
        self.topics[name] = TopicInfo(
            name=name, partitions=partitions, replication=replication or self.default_replication, config=settings
        )


def plan(tasks=None, **options):
    return TopicPlan(group="g", tasks={"shop": None} if tasks is None else tasks, **options)


def everything(**options):
    """A plan whose workers need all topics of the group."""
    return plan(used=frozenset(Feature), **options)


def specs(of, there=None):
    return {spec.name: spec for spec in of.specs(there or {})}


@pytest.fixture
def kafka():
    """A Kafka with all topics of group g and its task topic shop, as kser makes them, with three replicas."""
    made = FakeKafka()
    create_topics(made, plan(replication=3))
    made.orders.clear()
    return made


def findings(kafka, of=None, **options):
    return [(found.topic, found.level, found.finding) for found in check_topics(kafka, of or everything(), **options)]


def change(kafka, name, partitions=None, replication=None, **config):
    """Change a topic that is there."""
    old = kafka.topics[name]
    kafka.topics[name] = TopicInfo(
        name=name,
        partitions=partitions or old.partitions,
        replication=replication or old.replication,
        config={**old.config, **{key.replace("_", "."): value for key, value in config.items()}},
    )


# -- how they should be ----------------------------------------------------------------------------------------------


def test_the_topics_of_a_group_and_their_partitions():
    made = specs(plan({"shop": 12, "mails": None}, partitions=4))
    assert {name: spec.partitions for name, spec in made.items()} == {
        "shop": 12,
        "mails": 4,
        "g.events": 4,
        "g.telemetry": 4,
        "g.control": 1,
        "g.state.shop": 12,
        "g.state.mails": 4,
        "g.dlq": 12,
        "g.retry.10s": 12,
        "g.retry.1m": 12,
        "g.retry.10m": 12,
        "g.retry.1h": 12,
    }
    assert events_topic("g") in made


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("shop", {"cleanup.policy": "delete", "retention.ms": str(30 * DAY_MS), "retention.bytes": "-1"}),
        ("g.events", {"cleanup.policy": "delete", "retention.ms": str(30 * DAY_MS), "retention.bytes": "-1"}),
        ("g.telemetry", {"cleanup.policy": "delete", "retention.ms": str(7 * DAY_MS), "retention.bytes": "-1"}),
        ("g.control", {"cleanup.policy": "compact", "segment.bytes": "52428800"}),
        ("g.state.shop", {"cleanup.policy": "compact", "segment.bytes": "52428800"}),
        ("g.dlq", {"cleanup.policy": "delete", "retention.ms": "-1", "retention.bytes": "-1"}),
        *(
            (
                f"g.retry.{tier}",
                {
                    "cleanup.policy": "delete",
                    "retention.ms": "-1",
                    "retention.bytes": "-1",
                    "message.timestamp.type": "LogAppendTime",
                },
            )
            for tier in ("10s", "1m", "10m", "1h")
        ),
    ],
)
def test_the_settings_of_each_topic(name, wanted):
    assert dict(specs(plan())[name].config) == wanted


def test_each_row_of_the_table_is_of_one_feature_and_the_tiers_are_what_their_names_say():
    assert [kind.feature for kind in KINDS if kind.feature is None] == [None]
    assert {kind.feature for kind in KINDS} == {None, *Feature}
    unit = {"s": 1, "m": 60, "h": 3600}
    assert {tier: int(tier[:-1]) * unit[tier[-1]] for tier in TIERS} == dict(TIERS)
    assert set(Feature) >= WORKER_FEATURES


@pytest.mark.parametrize(("replication", "isr"), [(None, None), (1, None), (2, None), (3, "2"), (5, "2")])
def test_two_replicas_confirm_from_three_on(replication, isr):
    for spec in specs(plan(replication=replication)).values():
        assert spec.replication == replication
        assert spec.config.get("min.insync.replicas") == isr


@pytest.mark.parametrize(
    ("limit", "wanted"),
    [
        ("", None),  # 900 KiB fit into what Kafka takes
        ("1032204", None),  # the largest that does
        ("1032205", "1048589"),
        ("5000000", "5016384"),
    ],
)
def test_topics_take_messages_of_the_limit_that_was_set(monkeypatch, limit, wanted):
    monkeypatch.setenv("KSER_MAX_MESSAGE_BYTES", limit)
    assert {spec.config.get("max.message.bytes") for spec in plan().specs({})} == {wanted}


def test_what_is_made_matches_the_task_topics_that_are_there():
    there = {
        "shop": TopicInfo(name="shop", partitions=24, replication=3),
        "mails": TopicInfo(name="mails", partitions=3, replication=1),
    }
    made = specs(plan({"shop": 6, "mails": None}), there)
    assert (made["g.state.shop"].partitions, made["g.state.mails"].partitions) == (24, 3)
    assert made["g.retry.1h"].partitions == 24
    assert made["g.events"].replication == 3
    assert made["g.events"].config["min.insync.replicas"] == "2"
    assert made["shop"].replication is None


def test_a_single_copy_of_the_task_topic_is_no_reason_for_fewer_than_the_broker_makes():
    there = {"shop": TopicInfo(name="shop", partitions=6, replication=1)}
    assert specs(plan(), there)["g.events"].replication is None


@pytest.mark.parametrize(
    ("group", "task", "said"),
    [
        ("a b", "shop", "'a b.events' cannot be a topic"),
        ("g", "shop/eu", "'shop/eu' cannot be a topic"),
        ("g", "s" * 245, "cannot be a topic"),  # with its state topic it is too long
        ("g", "g.dlq", "g.dlq is group g's own"),
    ],
)
def test_names_that_cannot_be_are_refused(group, task, said):
    with pytest.raises(ConfigurationError, match=re.escape(said)):
        TopicPlan(group=group, tasks={task: None})


# -- create ----------------------------------------------------------------------------------------------------------


def test_what_was_created_is_as_it_should_be(kafka):
    assert findings(kafka) == []


def test_the_task_topics_are_made_first_and_the_others_as_well_kept_as_they_are():
    kafka = FakeKafka(default_replication=3)
    there, made = create_topics(kafka, plan({"shop": 3}))
    assert kafka.orders[0] == ["shop"]
    assert made == ["shop", *kafka.orders[1]]
    assert set(there) == set(plan().names)
    assert kafka.topics["g.events"].config["min.insync.replicas"] == "2"
    assert create_topics(kafka, plan())[1] == []


def test_creating_waits_until_the_brokers_know_the_topics_for_no_longer_than_it_may():
    assert len(create_topics(FakeKafka(unseen=2), plan())[0]) == 10
    with pytest.raises(TransportError, match="shop: created, but the brokers do not know it yet"):
        create_topics(FakeKafka(unseen=10**6), plan(), timeout_s=0.2)


# -- findings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes", "level", "said", "cure"),
    [
        # partitions
        ("g.state.shop", {"partitions": 4}, "error", "4 partitions, and shop has 6: partitions were added", "--delete"),
        ("g.state.shop", {"partitions": 8}, "error", "8 partitions, and shop has 6", "--topic shop --partitions 8"),
        ("g.retry.1m", {"partitions": 4}, "warning", "4 partitions, and the largest task", "retry.1m --partitions 6"),
        # replicas
        ("g.dlq", {"replication": 1}, "warning", "1 replica, and a task topic has 3", "kafka-reassign-partitions.sh"),
        ("shop", {"min_insync_replicas": "1"}, "warning", "can lose confirmed records", "min.insync.replicas=2"),
        ("shop", {"min_insync_replicas": "3"}, "warning", "nothing can be written", "min.insync.replicas=2"),
        # cleanup
        ("shop", {"cleanup_policy": "compact"}, "error", "is compact, not delete", "cleanup.policy=delete"),
        ("g.events", {"cleanup_policy": "compact,delete"}, "error", "not delete", "cleanup.policy=delete"),
        ("g.control", {"cleanup_policy": "delete"}, "error", "what is old is forgotten", "cleanup.policy=compact"),
        ("g.state.shop", {"cleanup_policy": "compact,delete"}, "error", "is forgotten", "cleanup.policy=compact"),
        ("g.control", {"cleanup_policy": ""}, "error", "is empty, not compact: it grows", "cleanup.policy=compact"),
        # retention
        ("shop", {"retention_ms": str(7 * DAY_MS - 1)}, "warning", "less than 7 days: what", "retention.ms=2592000000"),
        ("g.events", {"retention_ms": "5400000"}, "warning", "for 1.5 hours, less than 7 days", "retention.ms=25920"),
        ("g.telemetry", {"retention_ms": "1000"}, "warning", "for 1 s, less than 1 day", "retention.ms=604800000"),
        ("g.dlq", {"retention_ms": str(6 * DAY_MS)}, "error", "for 6 days, less than 7 days:", "retention.ms=-1"),
        ("g.retry.1h", {"retention_ms": str(7 * DAY_MS)}, "error", "beyond its delay of 1 hour", "retention.ms=-1"),
        ("shop", {"retention_bytes": "1000"}, "warning", "retention.bytes is 1000", "retention.bytes=-1"),
        ("g.retry.10s", {"retention_bytes": "1000"}, "error", "retention.bytes is 1000", "retention.bytes=-1"),
        # the rest
        ("g.retry.10s", {"message_timestamp_type": "CreateTime"}, "error", "not LogAppendTime", "type=LogAppendTime"),
        ("shop", {"max_message_bytes": "937983"}, "warning", "messages of up to 921600", "max.message.bytes=1048588"),
        ("shop", {"unclean_leader_election_enable": "true"}, "warning", "that lags", "election.enable=false"),
    ],
)
def test_what_is_wrong_is_told_with_its_value_and_a_cure(kafka, name, changes, level, said, cure):
    change(kafka, name, **changes)
    [found] = check_topics(kafka, everything(servers="k1:9092,k2:9092"))
    assert (found.topic, found.level) == (name, level)
    assert said in found.finding
    assert cure in found.cure
    assert "--bootstrap-server k1:9092,k2:9092 " in found.cure


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("shop", {"retention_ms": str(7 * DAY_MS)}),
        ("shop", {"retention_ms": "-1"}),
        ("shop", {"cleanup_policy": "", "retention_ms": "1"}),  # nothing is ever deleted
        ("shop", {"max_message_bytes": "937984"}),
        ("shop", {"message_timestamp_type": "LogAppendTime"}),
        ("g.events", {"partitions": 1}),  # a matter of choice
        ("g.control", {"partitions": 3, "retention_ms": "1"}),  # it is compacted
        ("g.dlq", {"partitions": 1}),
        ("g.dlq", {"retention_ms": str(7 * DAY_MS)}),
        ("g.retry.1h", {"retention_ms": str(7 * DAY_MS + 3_600_000)}),
        ("g.retry.1h", {"partitions": 7}),
    ],
)
def test_what_is_good_enough_is_no_finding(kafka, name, changes):
    change(kafka, name, **changes)
    assert findings(kafka) == []


def test_tiers_are_compared_with_task_topics_that_are_there_only(kafka):
    change(kafka, "g.retry.1h", partitions=2)
    assert findings(kafka, plan({}, used=frozenset(Feature))) == []
    assert [name for name, *_ in findings(kafka, plan({"new": 12}, features=frozenset({Feature.RETRIES})))] == ["new"]


def test_min_insync_replicas_of_a_single_copy_says_nothing_and_two_of_two_block():
    kafka = FakeKafka(default_replication=1)
    kafka.have("shop", min_insync_replicas="2", retention_ms="-1")
    assert findings(kafka, plan(features=frozenset())) == []
    change(kafka, "shop", replication=2)
    [(_, level, said)] = findings(kafka, plan(features=frozenset()))
    assert (level, said[:47]) == ("warning", "min.insync.replicas is 2 with 2 replicas: while")


def test_all_settings_of_a_topic_have_one_cure(kafka):
    change(kafka, "shop", retention_ms="1000", min_insync_replicas="1")
    [cure] = {found.cure for found in check_topics(kafka, everything())}
    assert cure == (
        "kafka-configs.sh --bootstrap-server HOST:PORT --alter --entity-type topics --entity-name shop "
        "--add-config min.insync.replicas=2,retention.ms=2592000000"
    )


def test_what_workers_do_not_use_is_never_an_error(kafka):
    change(kafka, "g.dlq", retention_ms="1000")
    change(kafka, "g.state.shop", partitions=3)
    del kafka.topics["g.control"]
    assert {level for _, level, _ in findings(kafka, everything())} == {"error"}
    assert {level for _, level, _ in findings(kafka, plan(used=frozenset({Feature.EVENTS})))} == {"warning"}


def test_missing_topics_have_the_command_that_makes_them():
    found = check_topics(FakeKafka(), plan({"shop": 12, "mails": None}, replication=3, servers="k:9092"))
    assert [f.topic for f in found if f.level == "error"] == [
        *("shop", "mails", "g.events", "g.telemetry", "g.control", "g.state.shop", "g.state.mails", "g.dlq"),
        *(f"g.retry.{tier}" for tier in TIERS),
    ]
    assert {f.finding for f in found} == {"does not exist"}
    [cure] = {f.cure for f in found}
    assert cure == "kser topics create --group g --topics shop:12,mails --replication 3 --bootstrap-servers k:9092"


def test_what_was_said_has_to_be_so(kafka):
    said = plan({"shop": 4}, replication=5)
    found = {f.topic: f for f in check_topics(kafka, said) if f.level == "error"}
    assert {"shop", "g.events"} < set(found)
    both = [f.finding for f in check_topics(kafka, said) if f.topic == "shop"]
    assert both == ["6 partitions, expected 4", "3 replicas, expected 5"]
    assert check_topics(kafka, plan({"shop": 6}, partitions=6, replication=1)) == []


@pytest.mark.parametrize(
    ("said", "state", "cure"),
    [
        (4, False, "kser topics check --group g --topics shop:6"),  # none can be taken away
        (8, False, "kafka-topics.sh --bootstrap-server HOST:PORT --alter --topic shop --partitions 8"),
        (8, True, "kser topics check --group g --topics shop:6"),  # none may be added
    ],
)
def test_partitions_are_added_only_where_no_state_is_tied_to_their_number(kafka, said, state, cure):
    if not state:
        del kafka.topics["g.state.shop"]
    [found] = [f for f in check_topics(kafka, plan({"shop": said})) if f.topic == "shop"]
    assert found.cure == cure


def test_a_chosen_number_for_the_groups_topics_can_be_said_too(kafka):
    found = [f for f in check_topics(kafka, plan({"shop": 6}, partitions=3)) if f.level == "error"]
    assert [f.topic for f in found] == ["g.events", "g.telemetry"]
    assert {f.finding for f in found} == {"6 partitions, expected 3"}
    assert {f.cure for f in found} == {"kser topics check --group g --topics shop:6 --partitions 6"}


def test_a_broker_that_tells_no_settings_is_judged_by_partitions_and_replicas():
    admin = MemoryTransport().admin()
    create_topics(admin, plan())
    assert check_topics(admin, everything()) == []


# -- the embedded broker ---------------------------------------------------------------------------------------------


def test_on_the_embedded_broker_only_partitions_count():
    kafka = FakeKafka(embedded=True, default_replication=1)
    for spec in plan({"shop": 6}).specs({}):
        kafka.have(spec.name, spec.partitions)
    assert findings(kafka) == []
    kafka.have("g.state.shop", 5)
    assert findings(kafka) == [("g.state.shop", "error", "5 partitions, and shop has 6")]


def test_what_the_embedded_broker_has_not_yet_is_made_with_four_partitions():
    kafka = FakeKafka(embedded=True, default_replication=1)
    assert findings(kafka) == []
    kafka.have("shop", 6)
    found = find(everything(), kafka.topics, embedded=True)
    assert (found[0].topic, found[0].finding) == (
        "g.state.shop",
        "does not exist yet, would get 4 partitions, and shop has 6",
    )
    assert {f.cure for f in found} == {"kser broker --group g --topic shop:6"}


# -- the worker's start ----------------------------------------------------------------------------------------------


def test_a_worker_makes_what_its_features_need_and_logs_it(caplog):
    kafka = FakeKafka()
    kafka.have("shop", 12, 3, retention_ms="-1", min_insync_replicas="2")
    with caplog.at_level(logging.INFO, "kser.worker.topics"):
        ensure_group_topics(kafka, "g", ["shop"])
    made = ["g.events", "g.telemetry", "g.control", "g.state.shop", "g.dlq", *(f"g.retry.{tier}" for tier in TIERS)]
    assert kafka.orders == [made]
    line, *others = caplog.messages
    assert len(others) == len(made) - 1
    assert line.startswith("Topic g.events created: 6 partitions, cleanup.policy=delete, retention.ms=2592000000")
    assert {kafka.topics[name].partitions for name in made if name not in made[:3]} == {12}
    assert max(kafka.limits) <= 30  # one creation; a question 10


def test_a_worker_without_features_needs_its_task_topics_only():
    kafka = FakeKafka()
    kafka.have("shop", retention_ms="-1", min_insync_replicas="2")
    ensure_group_topics(kafka, "g", ["shop"], create=False, features=frozenset())
    assert kafka.orders == []


def test_a_worker_that_may_create_nothing_refuses_and_names_what_is_missing():
    kafka = FakeKafka()
    kafka.have("shop")
    with pytest.raises(ConfigurationError) as caught:
        ensure_group_topics(kafka, "g", ["shop"], create=False, servers="k:9092")
    assert caught.value.message == (
        "Topics of group g are missing: g.events, g.telemetry, g.control, g.state.shop, g.dlq, g.retry.10s, "
        "g.retry.1m, g.retry.10m, g.retry.1h. Create them with: "
        "kser topics create --group g --topics shop --bootstrap-servers k:9092"
    )
    assert kafka.orders == []
    found, *_ = caught.value.extra["findings"]
    assert (found["topic"], found["level"]) == ("g.events", "error")


def test_a_task_topic_that_does_not_exist_is_refused_and_nothing_is_made():
    kafka = FakeKafka()
    kafka.have("shop")
    with pytest.raises(ConfigurationError, match=r"are missing: mails. Create .* --topics shop,mails$"):
        ensure_group_topics(kafka, "g", ["shop", "mails"])
    assert kafka.orders == []


def test_a_broker_that_does_not_answer_is_waited_for_no_longer_than_one_answer_takes():
    class Silent(FakeKafka):
        def can_create(self, timeout_s=10):
            self.limits.append(timeout_s)
            raise TransportError("no answer")

    kafka = Silent()
    with pytest.raises(TransportError, match="no answer"):
        ensure_group_topics(kafka, "g", ["shop"])
    with pytest.raises(TransportError, match="no answer"):
        ensure_group_topics(kafka, "g", ["shop"], timeout_s=3)
    assert kafka.limits[0] == 10
    assert 2.5 < kafka.limits[1] <= 3


def test_patterns_of_topics_are_passed_over():
    kafka = FakeKafka()
    ensure_group_topics(kafka, "g", ["^orders[.].*"])
    assert kafka.orders == [["g.events", "g.telemetry", "g.control", "g.dlq", *(f"g.retry.{tier}" for tier in TIERS)]]


def test_a_worker_refuses_what_loses_messages_and_says_all_of_it(kafka):
    change(kafka, "shop", cleanup_policy="compact", retention_bytes="5")
    change(kafka, "g.retry.1m", retention_ms=str(DAY_MS), message_timestamp_type="CreateTime")
    with pytest.raises(ConfigurationError) as caught:
        ensure_group_topics(kafka, "g", ["shop"], features=frozenset(Feature))
    lines = caught.value.message.split(". Topic ")
    assert lines[0].startswith("Topic shop: cleanup.policy is compact, not delete")
    assert re.fullmatch(
        r"g\.retry\.1m: keeps records for 1 day, .*; message\.timestamp\.type is CreateTime, .*\. To cure it: .* "
        r"retention\.ms=-1,message\.timestamp\.type=LogAppendTime",
        lines[1],
    )


def test_a_worker_refuses_a_state_topic_with_another_number_of_partitions(kafka):
    change(kafka, "shop", partitions=12)
    with pytest.raises(ConfigurationError, match=r"Topic g.state.shop: 6 partitions, and shop has 12: "):
        ensure_group_topics(kafka, "g", ["shop"], features=frozenset({Feature.STATE}))


def test_a_worker_logs_what_works_only_until_something_happens(kafka, caplog):
    change(kafka, "shop", min_insync_replicas="1", retention_ms="1000")
    ensure_group_topics(kafka, "g", ["shop"])
    [line] = caplog.messages
    assert line.startswith("Topic shop: min.insync.replicas is 1 with 3 replicas: ")
    assert "; keeps records for 1 s, less than 7 days" in line


def test_a_worker_on_the_embedded_broker_makes_nothing_and_compares_partitions():
    kafka = FakeKafka(embedded=True, default_replication=1)
    ensure_group_topics(kafka, "g", ["shop"], create=False, features=frozenset(Feature))
    kafka.have("shop", 6)
    ensure_group_topics(kafka, "g", ["shop"], create=False, features=frozenset(Feature))  # maybe nothing uses it
    kafka.have("g.state.shop", 4)
    with pytest.raises(
        ConfigurationError, match=r"g\.state\.shop: 4 partitions, and shop has 6.*kser broker --group g"
    ):
        ensure_group_topics(kafka, "g", ["shop"], features=frozenset({Feature.STATE}))
    assert kafka.orders == []


def test_a_worker_in_memory_makes_its_task_topics_too():
    admin = MemoryTransport(auto_create=False).admin()
    with pytest.raises(ConfigurationError, match=r"are missing: shop, g.events"):
        ensure_group_topics(admin, "g", ["shop"], create=False)
    ensure_group_topics(admin, "g", ["shop"])
    assert set(admin.describe(["shop", "g.events"])) == {"shop", "g.events"}


def test_a_worker_that_is_not_allowed_to_create_says_who_can_do_what():
    refusal = TransportError("Creating topic g.events failed", extra={"kafka_error": "TOPIC_AUTHORIZATION_FAILED"})
    kafka = FakeKafka(refuses=refusal)
    kafka.have("shop")
    with pytest.raises(ConfigurationError, match=r"failed.*who may: kser topics create --group g --topics shop"):
        ensure_group_topics(kafka, "g", ["shop"])
    kafka.refuses = TransportError("Creating topic g.events failed", extra={"kafka_error": "POLICY_VIOLATION"})
    with pytest.raises(TransportError, match="failed"):
        ensure_group_topics(kafka, "g", ["shop"])


def test_what_another_worker_has_just_made_is_waited_for():
    kafka = FakeKafka(unseen=3)
    kafka.have("shop", retention_ms="-1", min_insync_replicas="2")
    ensure_group_topics(kafka, "g", ["shop"])
    assert [order[0] for order in kafka.orders] == ["g.events"]


# -- kser topics -----------------------------------------------------------------------------------------------------


@pytest.fixture
def run():
    """``run(admin, "check", ...)`` is the result of the command ``kser topics check ...`` on that broker."""

    def invoke(admin, *args):
        class Transport:
            def admin(self):
                return admin

        drivers = Drivers(lambda config: Transport())
        return CliRunner().invoke(cli, ["topics", *args, "--group", "g", *SERVERS], obj=drivers)

    return invoke


def test_create_makes_what_is_missing_and_says_what_there_was(run):
    kafka = FakeKafka()
    kafka.have("shop", 2, retention_ms="-1", min_insync_replicas="2")
    result = run(kafka, "create", "--topics", "shop,new:3,other", "--partitions", "5", "--format", "json")
    assert result.exit_code == 0, result.stderr
    made = {topic["name"]: topic for topic in json.loads(result.stdout)["topics"]}
    assert made["shop"] == {"name": "shop", "partitions": 2, "replication": 3, "created": False}
    assert made["new"] == {"name": "new", "partitions": 3, "replication": 3, "created": True}
    assert {name: topic["partitions"] for name, topic in made.items() if name != "shop"} == {
        "new": 3,
        "other": 5,
        "g.events": 5,
        "g.telemetry": 5,
        "g.control": 1,
        "g.state.shop": 2,
        "g.state.new": 3,
        "g.state.other": 5,
        "g.dlq": 5,
        **{f"g.retry.{tier}": 5 for tier in TIERS},
    }
    again = run(kafka, "create", "--topics", "shop,new:3,other").stdout.splitlines()
    assert again[0].split() == ["TOPIC", "PARTITIONS", "REPLICAS"]
    assert re.fullmatch(r"new +3 +3 +existed", again[2])
    assert not [line for line in again if "created" in line]


def test_create_points_to_what_it_left_as_it_was(run):
    kafka = FakeKafka()
    kafka.have("shop", 2, retention_ms="1000", min_insync_replicas="2")
    result = run(kafka, "create", "--topics", "shop:3")
    assert result.exit_code == 0
    assert result.stderr == (
        "kser: 2 findings, told by: kser topics check --group g --topics shop:3 --bootstrap-servers 127.0.0.1:1\n"
    )


def test_check_as_json_is_a_list_of_findings_and_ends_with_1_while_there_are_errors(run):
    kafka = FakeKafka()
    args = ("--topics", "shop:6", "--format", "json")
    result = run(kafka, "check", *args)
    assert result.exit_code == 1
    assert json.loads(result.stdout)[0] == {
        "topic": "shop",
        "level": "error",
        "finding": "does not exist",
        "cure": "kser topics create --group g --topics shop:6 --bootstrap-servers 127.0.0.1:1",
    }
    create_topics(kafka, plan({"shop": 6}, replication=3))
    well = run(kafka, "check", *args)
    assert (well.exit_code, json.loads(well.stdout), well.stderr) == (0, [], "")
    change(kafka, "shop", min_insync_replicas="1")
    warned = run(kafka, "check", *args)
    assert (warned.exit_code, [f["level"] for f in json.loads(warned.stdout)]) == (0, ["warning"])


def test_check_for_people_has_errors_first_and_tells_a_cure_once(run, kafka):
    change(kafka, "shop", retention_ms="1000")
    change(kafka, "g.events", cleanup_policy="compact")
    del kafka.topics["g.control"]
    del kafka.topics["g.retry.1h"]
    result = run(kafka, "check", "--topics", "shop")
    assert result.exit_code == 1
    lines = result.stdout.splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["error", "g.events"],
        ["kafka-configs.sh", "--bootstrap-server"],
        ["error", "g.control"],
        ["error", "g.retry.1h"],
        ["kser", "topics"],
        ["warning", "shop"],
        ["kafka-configs.sh", "--bootstrap-server"],
        ["10", "topics:"],
    ]
    assert lines[-1] == "10 topics: 3 errors, 1 warning"
    assert lines[2].index("does not exist") == lines[3].index("does not exist")


def test_check_says_when_all_is_well(run, kafka):
    result = run(kafka, "check", "--topics", "shop")
    assert (result.exit_code, result.stdout) == (0, "10 topics, all as they should be\n")


def test_the_embedded_broker_is_told_from_kafka(run):
    kafka = FakeKafka(embedded=True, default_replication=1)
    checked = run(kafka, "check", "--topics", "shop:6", "--format", "json")
    assert (
        checked.stderr == "kser: This is the embedded broker, which keeps no settings: only partitions were checked\n"
    )
    assert (checked.exit_code, json.loads(checked.stdout)[0]["cure"]) == (1, "kser broker --group g --topic shop:6")
    refused = run(kafka, "create", "--topics", "shop:6,mails")
    assert refused.exit_code == 1
    assert refused.stderr.endswith("start it with them: kser broker --group g --topic shop:6 --topic mails:6\n")


def test_a_pattern_is_no_topic_to_create_or_check(run, kafka):
    for command in ("create", "check"):
        result = run(kafka, command, "--topics", "^shop.*")
        assert (result.exit_code, result.stdout) == (2, "")
        assert "^shop.* is a pattern: name the task topics with --topics a:6,b" in result.stderr


def test_the_memory_broker_makes_them_too(run):
    memory = MemoryTransport()
    memory.admin().create([TopicSpec(name="shop", partitions=2)])
    assert run(memory.admin(), "create", "--topics", "shop").exit_code == 0
    assert run(memory.admin(), "check", "--topics", "shop").stdout == "10 topics, all as they should be\n"
