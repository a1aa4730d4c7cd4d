"""kser.confluent.config, .errors, .aside and .logs: no broker is needed for any of it."""

import logging
import threading
from typing import Any

import pytest
from confluent_kafka import Consumer, KafkaError, KafkaException, Producer

from kser.confluent.aside import Aside
from kser.confluent.config import (
    admin_config,
    checked,
    consumer_config,
    from_environment,
    is_incremental,
    masked,
    new_client,
    new_group_start,
    producer_config,
    reader_config,
)
from kser.confluent.errors import kafka_errors, too_large, translate
from kser.confluent.logs import REPEAT_AFTER_S, ClientState, QuietLog
from kser.confluent.properties import ALIASES, CONSUMER, KNOWN, PRODUCER
from kser.errors import (
    ConfigurationError,
    DeliveryError,
    FencedError,
    GroupError,
    MessageTooLargeError,
    OffsetLostError,
    TransportError,
)
from kser.masking import MASK

BROKER = {"bootstrap.servers": "127.0.0.1:9092"}


def refused(config: dict[str, Any]) -> str:
    with pytest.raises(ConfigurationError) as caught:
        checked(config)
    return caught.value.message or ""


# -- what users give ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({}, ["bootstrap.servers is missing", "host1:9092", "KSER_KAFKA_BOOTSTRAP_SERVERS"]),
        ({"bootstrap_servers": "a:1"}, ["bootstrap_servers", "did you mean bootstrap.servers?"]),
        (BROKER | {"sesion.timeout.ms": 1}, ["sesion.timeout.ms", "did you mean session.timeout.ms?"]),
        (BROKER | {"nonsense": 1}, ["nonsense does not exist"]),
        (BROKER | {"linger.ms": "soon"}, ["linger.ms='soon'"]),
        (BROKER | {"security.protocol": "magic"}, ["security.protocol='magic'"]),
        (BROKER | {"auto.offset.reset": "middle"}, ["auto.offset.reset='middle'", "earliest or latest"]),
        (BROKER | {"acks": 1, "request.required.acks": 1}, ["acks", "request.required.acks", "same setting"]),
        (BROKER | {"acks": 1, "enable.idempotence": True}, ["acks"]),
        (BROKER | {"transactional.id": "mine"}, ["transactional.id", "leave it out"]),
        (BROKER | {"delivery.report.only.error": True}, ["delivery.report.only.error", "every confirmation"]),
        (BROKER | {"value.deserializer": str}, ["value.deserializer", "leave it out"]),
        (BROKER | {"group.protocol": "consumer", "session.timeout.ms": 6000}, ["session.timeout.ms"]),
        (BROKER | {"ssl.ca.location": "/nowhere", "security.protocol": "ssl"}, ["ssl.ca.location='/nowhere'"]),
        (BROKER | {"stats_cb": "not callable"}, ["stats_cb takes a function"]),
        (BROKER | {"linger.ms": print}, ["linger.ms takes no function"]),
        (BROKER | {5: 1}, ["5", "names are strings"]),
    ],
)
def test_a_setting_that_cannot_work_is_refused_by_name_with_what_to_write(config, words):
    message = refused(config)
    for word in words:
        assert word in message


def test_both_kinds_of_client_take_what_was_checked_and_nothing_is_connected():
    user = checked(BROKER | {"session.timeout.ms": "9000", "metadata.max.age.ms": 60000, "retries": 3, "acks": "-1"})
    new_client(Producer, producer_config(user))
    new_client(Producer, producer_config(user, "tx"))
    new_client(Consumer, consumer_config(user, "g")).close()
    new_client(Consumer, reader_config(user, "r")).close()


def test_second_names_addresses_in_a_list_and_none_are_understood():
    user = checked({"metadata.broker.list": ["a:1", "b:2"], "queue.buffering.max.ms": 3, "client.id": None, "acks": -1})
    assert user == {"bootstrap.servers": "a:1,b:2", "linger.ms": 3, "acks": "all"}


def test_secrets_are_masked_in_what_is_shown_and_in_errors():
    secrets = {"sasl.password": "hunter2", "ssl.key.password": "hunter3", "sasl.oauthbearer.config": "hunter4"}
    shown = masked(BROKER | secrets | {"sasl.username": "bob"})
    assert shown == BROKER | dict.fromkeys(secrets, MASK) | {"sasl.username": "bob"}
    assert "hunter2" not in refused(BROKER | {"security.protocol": "hunter2", "sasl.password": "hunter2"})


def test_the_environment_gives_properties_by_their_names_in_capitals():
    environment = {
        "KSER_KAFKA_BOOTSTRAP_SERVERS": "a:1",
        "KSER_KAFKA_SASL_PASSWORD": "x_y.z",
        "KSER_KAFKA_LOG_LEVEL": "3",
        "KSER_KAFKA_CLIENT_ID": "",
        "KSER_GROUP": "g",
        "PATH": "/bin",
    }
    assert from_environment(environment) == {"bootstrap.servers": "a:1", "sasl.password": "x_y.z", "log_level": "3"}


def test_a_variable_that_names_no_property_is_refused_with_the_nearest_one():
    with pytest.raises(ConfigurationError, match=r"KSER_KAFKA_BOOTSTRAP_SERVER .*mean KSER_KAFKA_BOOTSTRAP_SERVERS\?"):
        from_environment({"KSER_KAFKA_BOOTSTRAP_SERVER": "a:1"})


def test_every_property_can_be_given_by_the_environment():
    variables = {f"KSER_KAFKA_{name.replace('.', '_').upper()}": "1" for name in KNOWN}
    assert from_environment(variables) == dict.fromkeys(KNOWN, "1")


@pytest.mark.parametrize("name", sorted(KNOWN))
def test_every_listed_property_exists_in_librdkafka_for_the_clients_it_is_listed_for(name):
    for factory, excluded, base in (
        (Producer, CONSUMER, {}),
        (Consumer, PRODUCER, {"group.id": "g"}),
    ):
        if name in excluded:
            continue
        problem = ""
        try:
            made = factory({**base, name: "?", "log_level": 0})
        except (KafkaException, TypeError) as exc:  # the value; confluent-kafka looks at some itself
            problem = str(exc)
        else:
            if isinstance(made, Consumer):
                made.close()
        assert "No such configuration property" not in problem


def test_second_names_are_listed_and_lead_to_first_ones():
    assert set(ALIASES) <= KNOWN
    assert set(ALIASES.values()) <= KNOWN - set(ALIASES)


# -- what clients get --------------------------------------------------------------------------------------------------


def test_a_consumer_never_commits_by_itself_nor_resets_silently(caplog):
    user = checked(BROKER | {"enable.auto.commit": "true", "auto.offset.reset": "latest", "group.id": "theirs"})
    config = consumer_config(user, "ours")
    assert config["enable.auto.commit"] is False
    assert config["enable.auto.offset.store"] is False
    assert config["isolation.level"] == "read_committed"
    assert config["auto.offset.reset"] == "error"
    assert config["group.id"] == "ours"
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "enable.auto.commit=true is overridden" in caplog.text


def test_what_agrees_with_kser_is_not_warned_about(caplog):
    user = checked(BROKER | {"enable.auto.commit": "False", "isolation.level": "read_committed", "acks": -1})
    consumer_config(user, "g")
    producer_config(user)
    producer_config(user, "tx")
    assert caplog.records == []


@pytest.mark.parametrize(
    ("reset", "start"),
    [
        (None, "earliest"),
        ("earliest", "earliest"),
        ("smallest", "earliest"),
        ("latest", "latest"),
        ("end", "latest"),
        ("error", "error"),
    ],
)
def test_the_users_reset_policy_says_where_a_new_group_starts(reset, start):
    assert new_group_start(checked(BROKER | {"auto.offset.reset": reset})) == start


def test_groups_balance_cooperatively_unless_the_user_chose():
    classic = consumer_config(checked(BROKER), "g")
    assert classic["partition.assignment.strategy"] == "cooperative-sticky"
    assert is_incremental(classic)
    eager = consumer_config(checked(BROKER | {"partition.assignment.strategy": "range,roundrobin"}), "g")
    assert not is_incremental(eager)
    new = consumer_config(checked(BROKER | {"group.protocol": "consumer"}), "g")
    assert "partition.assignment.strategy" not in new
    assert is_incremental(new)


@pytest.mark.parametrize("given", ["consumer", "Consumer", " CONSUMER"])
def test_the_protocol_of_kip_848_is_used_however_it_is_written(given):
    config = consumer_config(checked(BROKER | {"group.protocol": given}), "g")
    assert config["group.protocol"] == "consumer"
    assert config["isolation.level"] == "read_committed"
    assert is_incremental(config)
    new_client(Consumer, config).close()


def test_members_balance_cooperatively_with_the_classic_protocol_written_in_capitals():
    config = consumer_config(checked(BROKER | {"group.protocol": "CLASSIC"}), "g")
    assert config["partition.assignment.strategy"] == "cooperative-sticky"


@pytest.mark.parametrize(
    "other",
    [
        {"session.timeout.ms": 9000},
        {"heartbeat.interval.ms": 300},
        {"partition.assignment.strategy": "range"},
        {"group.protocol.type": "consumer"},
    ],
)
def test_what_the_broker_decides_under_kip_848_is_refused_by_name(other):
    (name,) = other
    message = refused(BROKER | {"group.protocol": "consumer"} | other)
    assert name in message
    assert "group.protocol=consumer" in message


def test_the_name_of_a_static_member_wins_over_the_setting_and_is_checked():
    user = checked(BROKER | {"group.instance.id": "theirs"})
    assert consumer_config(user, "g")["group.instance.id"] == "theirs"
    assert consumer_config(user, "g", member_id="slot-1")["group.instance.id"] == "slot-1"
    for kip848 in (False, True):
        new_client(Consumer, consumer_config(user, "g", kip848=kip848, member_id="slot-1")).close()
    with pytest.raises(ConfigurationError, match="name of a member"):
        consumer_config(user, "g", member_id="no blanks")


@pytest.mark.parametrize("transactional_id", [None, "tx"])
def test_a_producer_of_failures_only_is_told_so_and_only_that_one(transactional_id):
    user = checked(BROKER)
    config = producer_config(user, transactional_id, failures_only=True)
    assert config["delivery.report.only.error"] is True
    new_client(Producer, config)
    assert "delivery.report.only.error" not in producer_config(user, transactional_id)


def test_where_kip_848_is_wanted_settings_of_the_classic_protocol_give_way_and_the_users_choice_does_not():
    user = checked(BROKER | {"session.timeout.ms": 6000, "heartbeat.interval.ms": 300})
    config = consumer_config(user, "g", kip848=True)
    assert config["group.protocol"] == "consumer"
    assert not {"session.timeout.ms", "heartbeat.interval.ms", "partition.assignment.strategy"} & set(config)
    new_client(Consumer, config).close()
    chosen = consumer_config(checked(BROKER | {"group.protocol": "classic"}), "g", kip848=True)
    assert chosen["group.protocol"] == "classic"


def test_a_producer_confirms_everything_by_all_replicas_and_places_keys_as_java_does():
    config = producer_config(checked(BROKER | {"session.timeout.ms": 6000, "group.id": "g"}))
    assert config["acks"] == "all"
    assert config["enable.idempotence"] is True
    assert config["partitioner"] == "murmur2_random"
    assert config["compression.type"] == "lz4"
    assert not set(config) & CONSUMER


@pytest.mark.parametrize("less", [{"acks": 1}, {"acks": "1"}, {"retries": 0}, {"max.in.flight": 10}])
def test_a_user_who_wants_less_gets_a_producer_without_idempotence_but_transactions_as_they_must_be(less):
    user = checked(BROKER | less)
    assert producer_config(user)["enable.idempotence"] is False
    transactional = producer_config(user, "tx")
    assert transactional["enable.idempotence"] is True
    assert transactional["acks"] == "all"
    new_client(Producer, transactional)


def test_acks_0_is_refused_for_a_producer_because_nothing_would_ever_be_confirmed():
    """K-96. A consumer made of the same properties does not mind."""
    with pytest.raises(ConfigurationError, match="write all, or 1"):
        producer_config(checked(BROKER | {"acks": 0}))
    consumer_config(checked(BROKER | {"acks": 0}), "g")


@pytest.mark.parametrize("given", [None, "127.0.0.1:9092", ["bootstrap.servers"]])
def test_what_is_no_mapping_is_refused(given):
    with pytest.raises(ConfigurationError, match="give a dict of librdkafka properties"):
        checked(given)


def test_transactions_end_soon_and_longer_timeouts_of_the_user_are_no_obstacle():
    user = checked(BROKER | {"message.timeout.ms": 300_000, "socket.timeout.ms": 30_000})
    config = producer_config(user, "group.worker.0")
    assert config["transaction.timeout.ms"] == 10_000
    assert config["retry.backoff.ms"] == 10
    new_client(Producer, config)
    assert producer_config(user)["delivery.timeout.ms"] == 300_000


def test_a_reader_is_in_no_group_and_goes_on_where_records_are_gone():
    user = checked(BROKER | {"group.instance.id": "me", "session.timeout.ms": 9000, "auto.offset.reset": "latest"})
    config = reader_config(user, "nobody")
    assert not {"group.instance.id", "session.timeout.ms", "group.protocol"} & set(config)
    assert config["auto.offset.reset"] == "earliest"
    assert config["enable.partition.eof"] is True
    assert config["isolation.level"] == "read_committed"


def test_an_admin_client_makes_no_topic_by_asking():
    config = admin_config(checked(BROKER | {"allow.auto.create.topics": True, "acks": 1, "session.timeout.ms": 9000}))
    assert config["allow.auto.create.topics"] is False
    assert not set(config) & (CONSUMER | PRODUCER)


def test_a_callback_of_the_user_is_called_and_what_it_raises_stays_with_it(caplog):
    told = []

    def stats(text: str) -> None:
        told.append(text)
        raise ZeroDivisionError

    config = producer_config(checked(BROKER | {"stats_cb": stats, "statistics.interval.ms": 10, "log_level": 0}))
    producer = new_client(Producer, config | {"bootstrap.servers": ""})
    for _ in range(200):
        producer.poll(0.05)
        if told:
            break
    assert told
    assert "ZeroDivisionError" in caplog.text


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "kind", "retriable"),
    [
        (KafkaError._TRANSPORT, TransportError, True),
        (KafkaError._ALL_BROKERS_DOWN, TransportError, True),
        (KafkaError.NOT_LEADER_FOR_PARTITION, TransportError, True),
        (KafkaError.REBALANCE_IN_PROGRESS, TransportError, True),
        (KafkaError.UNKNOWN_TOPIC_OR_PART, TransportError, False),
        (KafkaError.INVALID_RECORD, TransportError, False),
        (KafkaError._MSG_TIMED_OUT, DeliveryError, True),
        (KafkaError._PURGE_QUEUE, DeliveryError, True),
        (KafkaError.ILLEGAL_GENERATION, GroupError, False),
        (KafkaError.UNKNOWN_MEMBER_ID, GroupError, False),
        (KafkaError.STALE_MEMBER_EPOCH, GroupError, False),
        (KafkaError.UNRELEASED_INSTANCE_ID, GroupError, True),
        (KafkaError._FENCED, FencedError, False),
        (KafkaError.INVALID_PRODUCER_EPOCH, FencedError, False),
        (KafkaError._AUTO_OFFSET_RESET, OffsetLostError, False),
        (KafkaError.OFFSET_OUT_OF_RANGE, OffsetLostError, False),
    ],
)
def test_each_error_of_the_client_has_its_error_of_kser(code, kind, retriable):
    error = translate(KafkaError(code, "what happened"), "Doing it", topic="t")
    assert type(error) is kind
    assert error.retriable is retriable
    assert error.message.startswith("Doing it failed: what happened")
    assert error.extra["topic"] == "t"
    assert error.extra["kafka_error"] == KafkaError(code).name()


@pytest.mark.parametrize(
    "code",
    [
        KafkaError._AUTHENTICATION,
        KafkaError.SASL_AUTHENTICATION_FAILED,
        KafkaError.TOPIC_AUTHORIZATION_FAILED,
        KafkaError.GROUP_AUTHORIZATION_FAILED,
        KafkaError._INVALID_ARG,
    ],
)
def test_what_only_a_setting_cures_is_a_configuration_error_that_names_the_cure(code):
    error = translate(KafkaError(code, "no"), "Doing it")
    assert type(error) is ConfigurationError
    assert "; " in error.message


def test_in_transactions_only_what_librdkafka_flags_may_be_repeated():
    passing = KafkaError(KafkaError._TRANSPORT, "gone")
    assert translate(passing, "Committing").retriable
    assert not translate(passing, "Committing", strict=True).retriable
    flagged = KafkaError(KafkaError._TIMED_OUT, "late", retriable=True)
    assert translate(flagged, "Committing", strict=True).retriable


def test_a_fatal_error_is_never_retriable():
    assert not translate(KafkaError(KafkaError._TRANSPORT, "gone", fatal=True, retriable=True), "Doing it").retriable


def test_an_error_about_size_tells_size_and_limit():
    error = too_large(KafkaError(KafkaError.MSG_SIZE_TOO_LARGE), "A record", 2000, 1000)
    assert isinstance(error, MessageTooLargeError)
    assert (error.extra["size"], error.extra["limit"]) == (2000, 1000)
    assert too_large(KafkaError(KafkaError._TRANSPORT), "A record", 2000, 1000) is None


def test_what_the_client_raises_for_misuse_is_a_transport_error_too():
    with pytest.raises(TransportError, match="Reading failed: Consumer closed"), kafka_errors("Reading"):
        raise RuntimeError("Consumer closed")
    with pytest.raises(GroupError), kafka_errors("Reading"):
        raise KafkaException(KafkaError(KafkaError.UNKNOWN_MEMBER_ID))
    with pytest.raises(TransportError), kafka_errors("Reading"):
        raise KafkaException("no error object")


# -- calls that know no timeout ----------------------------------------------------------------------------------------


def test_a_call_aside_gives_what_the_function_gives_or_raises():
    aside = Aside()
    assert aside.call(lambda: 5, 5) == 5
    with pytest.raises(ZeroDivisionError):
        aside.call(lambda: 1 // 0, 5)
    assert aside.call(threading.get_ident, 5) != threading.get_ident()
    assert aside.call(threading.get_ident, 5) == aside.call(threading.get_ident, 5)  # one thread for all of them


def test_a_call_aside_that_takes_too_long_is_left_and_the_next_one_waits_for_it():
    aside, go_on, calls = Aside(), threading.Event(), []
    with pytest.raises(TimeoutError):
        aside.call(go_on.wait, 0.01)
    with pytest.raises(TimeoutError):
        aside.call(lambda: calls.append("not made"), 0.01)
    go_on.set()
    assert aside.call(lambda: calls.append("made"), 10) is None
    assert calls == ["made"]


@pytest.mark.parametrize("end", ["close", "collected"])
def test_the_thread_of_calls_aside_ends_with_their_owner(end):
    aside = Aside()
    thread = aside.call(threading.current_thread, 5)
    assert thread.is_alive()
    if end == "close":
        aside.close()
        thread.join(10)
        assert not thread.is_alive()
        assert aside.call(lambda: "again", 5) == "again"
    del aside
    thread.join(10)
    assert not thread.is_alive()


# -- logs --------------------------------------------------------------------------------------------------------------


def test_a_line_that_comes_again_with_other_numbers_is_logged_once_a_minute_with_the_count(caplog):
    now = [0.0]
    quiet = QuietLog(lambda: now[0])
    with caplog.at_level(logging.INFO, "kser.confluent"):
        for n in range(100):
            quiet.log(logging.ERROR, "%s [%s] %s", "FAIL", "kser#1", f"Connection refused after {n} ms")
        quiet.log(logging.INFO, "%s [%s] %s", "FAIL", "kser#1", "something else")
        now[0] = REPEAT_AFTER_S
        quiet.log(logging.ERROR, "%s [%s] %s", "FAIL", "kser#1", "Connection refused after 7 ms")
    assert [r.getMessage() for r in caplog.records] == [
        "FAIL [kser#1] Connection refused after 0 ms",
        "FAIL [kser#1] something else",
        "FAIL [kser#1] Connection refused after 7 ms (99 more like it since)",
    ]
    assert {r.levelname for r in caplog.records} == {"WARNING", "INFO"}  # what needs a decision is raised instead


def test_a_state_is_told_when_it_changes(caplog):
    state = ClientState("consumer of group g", "a:1")
    down = KafkaError(KafkaError._ALL_BROKERS_DOWN)
    with caplog.at_level(logging.INFO, "kser.confluent"):
        for _ in range(3):
            state.on_error(down)
            state.on_error(down)
            state.up()
            state.up()
    assert [r.getMessage() for r in caplog.records] == [
        "The consumer of group g reaches no broker of a:1: it goes on trying",
        "The consumer of group g reaches a:1 again",
    ] * 3


def test_a_client_that_was_never_let_in_is_refused_and_one_that_was_goes_on_trying():
    refusal = KafkaError(KafkaError._AUTHENTICATION, "wrong password")
    new, old = ClientState("producer", "a:1"), ClientState("producer", "a:1")
    old.up()
    for state in (new, old):
        state.on_error(refusal)
    assert isinstance(new.refusal, ConfigurationError)
    assert "sasl.password" in new.refusal.message
    assert old.refusal is None
