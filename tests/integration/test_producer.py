"""Producers against real brokers, dead ones among them: a success is a confirmation, a failure comes in time."""

import contextlib
import gc
import os
import threading
import time
import uuid
from pathlib import Path

import pytest
from confluent_kafka import KafkaError

from kser import DeliveryError, Message, Operation, OperationRegistry, Result, Task
from kser.confluent.embedded import EmbeddedBroker
from kser.confluent.producer import Producer
from kser.confluent.transport import ConfluentTransport
from kser.python_kafka.producer import Producer as KafkaPythonProducer
from kser.testing import eventually
from kser.transport import TopicSpec
from tests.apache_kafka import free_ports
from tests.brokers import make_topic, unique
from tests.processes import new_topic, records


def closed_port() -> str:
    """An address where nobody listens."""
    return f"127.0.0.1:{free_ports(1, None)[0]}"


def message(**params) -> Message:
    return Message(uuid=str(uuid.uuid4()), entrypoint="a.B", params=params)


@pytest.fixture(params=["confluent", "python_kafka"])
def make(request):
    def go(bootstrap, **more):
        if request.param == "confluent":
            return Producer({"bootstrap.servers": bootstrap, **more})
        return KafkaPythonProducer({"bootstrap_servers": bootstrap, **more})

    return go


def test_a_dead_broker_gives_a_failed_result_in_time(make):
    """K-96, T-17: no exception, no false success."""
    producer = make(closed_port())
    sent = message()
    begun = time.monotonic()
    result = producer.send("t", sent, timeout=1.5)
    assert 1 < time.monotonic() - begun < 4
    assert (result.retcode, result.uuid) == (504, sent.uuid)
    assert "not confirmed" in result.stderr
    assert producer.bulk_send("t", (message() for _ in range(3)), timeout=0.5).retcode != 0
    producer.close(1)


def test_a_batch_to_a_dead_broker_names_every_uuid(make):
    producer = make(closed_port())
    sent = [message() for _ in range(5)]
    with pytest.raises(DeliveryError) as caught, producer.batch(timeout=1):
        results = [producer.send("t", m) for m in sent]
        assert {r.retcode for r in results} == {202}
    assert caught.value.extra["uuids"] == [m.uuid for m in sent]
    assert {r.retcode for r in results} == {504}
    producer.close(1)


def test_messages_given_up_do_not_arrive_later(embedded):
    """What was reported as not delivered, and never left the client, is not sent when the broker comes back."""
    topic = f"t{uuid.uuid4().hex[:8]}"
    embedded.create_topic(topic, 1)
    with Producer({"bootstrap.servers": embedded.bootstrap_servers}) as producer:
        assert producer.send(topic, message(n=0)).retcode == 0
        embedded.broker_down(1)
        try:
            assert producer.send(topic, message(n=1), timeout=1).retcode == 504
        finally:
            embedded.broker_up(1)
        assert producer.send(topic, message(n=2), timeout=30).retcode == 0
    found = [Message.loads(r.value).params["n"] for r in records(embedded.bootstrap_servers, topic)]
    assert found == [0, 2]


# -- batches, which go through a sink that tells of failures only ------------------------------------------------------


def batch_of(producer, topic, numbers, timeout=30.0):
    """The Results of one batch, by the number in its messages."""
    with contextlib.suppress(DeliveryError), producer.batch(timeout):
        results = {n: producer.send(topic, message(n=n)) for n in numbers}
    return results


def arrived(bootstrap, topic):
    return sorted(Message.loads(r.value).params["n"] for r in records(bootstrap, topic))


@pytest.fixture
def broker():
    """A broker of the test's own, to be broken."""
    with EmbeddedBroker({"t": 1}) as one:
        yield one


def test_a_batch_given_up_does_not_arrive_later_and_the_next_one_arrives_whole(broker):
    with Producer({"bootstrap.servers": broker.bootstrap_servers}) as producer:
        assert batch_of(producer, "t", range(10))[9].retcode == 0
        for turn in range(1, 4):
            broker.broker_down(1)
            try:
                lost = batch_of(producer, "t", range(turn * 1000, turn * 1000 + 500), timeout=0.3)
            finally:
                broker.broker_up(1)
            assert {r.retcode for r in lost.values()} == {504}
            after = batch_of(producer, "t", range(turn * 10, turn * 10 + 10))
            assert {r.retcode for r in after.values()} == {0}
    assert arrived(broker.bootstrap_servers, "t") == list(range(40))


def test_batches_right_after_ones_that_were_given_up_at_once_arrive(embedded):
    """Timeout 0: the client gives up late, and takes what is on its way then (15 of 100 batches, in one lane)."""
    topic = make_topic(embedded, 1)
    with Producer({"bootstrap.servers": embedded.bootstrap_servers}) as producer:
        assert batch_of(producer, topic, [0])[0].retcode == 0
        good = {0}
        for turn in range(1, 30):
            gone = batch_of(producer, topic, [-turn], timeout=0)
            assert gone[-turn].retcode in (0, 504)
            sent = batch_of(producer, topic, [turn])
            assert sent[turn].retcode == 0
            good.add(turn)
    assert good <= set(arrived(embedded.bootstrap_servers, topic))


@pytest.mark.parametrize("code", ["OUT_OF_ORDER_SEQUENCE_NUMBER", "INVALID_PRODUCER_EPOCH", "UNKNOWN_PRODUCER_ID"])
def test_a_batch_whose_client_breaks_tells_no_success_that_is_none(broker, code):
    """One request for each flush: see ONE_REQUEST in test_confluent_transport."""
    with Producer({"bootstrap.servers": broker.bootstrap_servers, "linger.ms": 10_000}) as producer:
        assert batch_of(producer, "t", range(5))[4].retcode == 0
        broker.fail_next("Produce", getattr(KafkaError, code))
        with contextlib.suppress(DeliveryError), producer.batch(30):
            results = {n: producer.send("t", message(n=n)) for n in range(5, 10)}
            producer._lanes[0].flush(10)
            results |= {n: producer.send("t", message(n=n)) for n in range(10, 15)}
        assert batch_of(producer, "t", range(15, 20))[19].retcode == 0
    found = arrived(broker.bootstrap_servers, "t")
    assert {n for n, r in results.items() if r.retcode == 0} <= set(found)
    assert set(found) >= {*range(5), *range(15, 20)}
    assert all(r.retcode in (0, 503, 504) for r in results.values())


def test_the_messages_of_a_batch_that_the_broker_refuses_are_told_with_its_reason(broker):
    with Producer({"bootstrap.servers": broker.bootstrap_servers, "linger.ms": 10_000}) as producer:
        assert batch_of(producer, "t", range(5))[4].retcode == 0
        broker.fail_next("Produce", KafkaError.TOPIC_AUTHORIZATION_FAILED)
        refused = batch_of(producer, "t", range(5, 10))
        assert {r.retcode for r in refused.values()} == {400}
        assert all("t" in r.stderr and "uthoriz" in r.stderr for r in refused.values())
    assert arrived(broker.bootstrap_servers, "t") == list(range(5))


def test_threads_with_batches_of_their_own(embedded):
    topic = make_topic(embedded, 3)
    outcomes = {}

    def work(number):
        for n in range(5):
            outcomes.update(batch_of(producer, topic, range(number * 1000 + n * 100, number * 1000 + n * 100 + 100)))

    with Producer({"bootstrap.servers": embedded.bootstrap_servers}) as producer:
        threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert {r.retcode for r in outcomes.values()} == {0}
    assert arrived(embedded.bootstrap_servers, topic) == sorted(outcomes)
    assert len(outcomes) == 3000


def test_more_messages_than_the_client_holds(embedded):
    topic = make_topic(embedded, 1)
    with Producer({"bootstrap.servers": embedded.bootstrap_servers, "queue.buffering.max.messages": 50}) as producer:
        results = batch_of(producer, topic, range(1000))
    assert {r.retcode for r in results.values()} == {0}
    assert arrived(embedded.bootstrap_servers, topic) == list(range(1000))


def test_a_producer_that_nobody_closes_ends_its_clients_without_the_garbage_collector(embedded):
    topic, before = make_topic(embedded, 1), client_threads()
    gc.disable()
    try:
        producer = Producer({"bootstrap.servers": embedded.bootstrap_servers})
        assert batch_of(producer, topic, [1])[1].retcode == 0
        assert client_threads() > before
        del producer
        eventually(lambda: client_threads() <= before, 20, "ended")
    finally:
        gc.enable()


def client_threads():
    return len(list(Path("/proc/self/task").iterdir()))


@pytest.mark.apache
def test_a_client_that_is_refused_is_told_why_by_its_batch_long_before_the_timeout(apache):
    refused = {"security.protocol": "sasl_plaintext", "sasl.mechanism": "PLAIN", "sasl.username": "kser",
               "sasl.password": "hunter2"}  # fmt: skip
    producer = Producer({"bootstrap.servers": apache.bootstrap_servers, **refused})
    begun = time.monotonic()
    result = batch_of(producer, "t", [1])[1]
    assert time.monotonic() - begun < 15
    assert (result.retcode, "check sasl.mechanism" in result.stderr) == (400, True)
    producer.close(1)


@pytest.mark.apache
def test_one_message_of_a_batch_that_its_topic_does_not_take(apache):
    topic, strict = new_topic(apache.bootstrap_servers, 3), unique("strict")
    ConfluentTransport({"bootstrap.servers": apache.bootstrap_servers}).admin().create(
        [TopicSpec(name=strict, partitions=1, config={"max.message.bytes": "2000"})]
    )
    with Producer({"bootstrap.servers": apache.bootstrap_servers}) as producer:
        given = []
        with pytest.raises(DeliveryError) as caught, producer.batch():
            for n in range(200):
                given.append(producer.send(topic, message(n=n)))
            given.append(producer.send(strict, message(text=os.urandom(4000).hex())))
    assert [r.retcode for r in given] == [0] * 200 + [413]
    assert caught.value.extra["uuids"] == [given[-1].uuid]
    assert arrived(apache.bootstrap_servers, topic) == list(range(200))


# -- on Apache Kafka ---------------------------------------------------------------------------------------------------


@pytest.mark.apache
def test_sends_are_confirmed_and_keyed(apache, make):
    topic = new_topic(apache.bootstrap_servers, 3)
    sent = [message(n=n) for n in range(10)]
    with make(apache.bootstrap_servers) as producer:
        results = [producer.send(topic, m) for m in sent]
        bulk = producer.bulk_send(topic, (message(n=n) for n in range(10, 30)))
    assert {r.retcode for r in results} == {0}
    assert results[0].stdout == f"Message a.B[{sent[0].uuid}] sent in {topic}"
    assert (bulk.retcode, bulk.stdout) == (0, "20 message(s) sent")
    found = records(apache.bootstrap_servers, topic)
    assert sorted(Message.loads(r.value).params["n"] for r in found) == list(range(30))
    assert all(r.key.decode() == Message.loads(r.value).uuid for r in found)


@pytest.mark.apache
def test_a_topic_that_does_not_exist_is_told(apache):
    with Producer(
        {"bootstrap.servers": apache.bootstrap_servers, "topic.metadata.propagation.max.ms": 500}
    ) as producer:
        result = producer.send("no-such-topic", message(), timeout=20)
    assert result.retcode != 0
    assert "no-such-topic" in result.stderr


@pytest.mark.apache
def test_a_batch_of_launches_is_confirmed_at_its_end(apache):
    topic = new_topic(apache.bootstrap_servers, 3)
    with Producer({"bootstrap.servers": apache.bootstrap_servers}) as producer:
        registry = OperationRegistry(producer=producer, topic=topic)

        @registry.subscribe(name="batch.Step")
        class Step(Task):
            def run(self):
                return Result()

        with producer.batch():
            operations = [Operation(tasks=[Step(), Step()]) for _ in range(200)]
            results = [operation.launch() for operation in operations]
            assert {r.retcode for r in results} == {202}
        assert {r.retcode for r in results} == {0}
    found = records(apache.bootstrap_servers, topic)
    assert {r.key.decode() for r in found} == {operation.uuid for operation in operations}
    assert len(found) == 200


@pytest.mark.apache
def test_a_large_message_passes_and_a_larger_one_is_refused_before_it_is_sent(apache):
    topic = new_topic(apache.bootstrap_servers, 1)
    with Producer({"bootstrap.servers": apache.bootstrap_servers}) as producer:
        assert producer.send(topic, message(text="x" * 920_000)).retcode == 0
        refused = producer.send(topic, message(text="x" * 930_000))
    assert refused.retcode == 413
    assert "921600" in refused.stderr
    assert "nest" in refused.stderr
    assert len(records(apache.bootstrap_servers, topic)) == 1
