"""Producers against real brokers, dead ones among them: a success is a confirmation, a failure comes in time."""

import socket
import time
import uuid

import pytest

from kser import DeliveryError, Message, Operation, OperationRegistry, Result, Task
from kser.confluent.producer import Producer
from kser.python_kafka.producer import Producer as KafkaPythonProducer
from tests.processes import new_topic, records


def closed_port() -> str:
    """An address where nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


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
