"""kser.http: the producer that posts, and the endpoint that takes it (K-93 to K-98), over sockets of this machine."""

import contextlib
import http.client
import json
import logging
import socket
import threading
import time
from typing import ClassVar
from urllib.parse import urlsplit

import pytest
from flask import Flask
from hypothesis import given
from hypothesis import strategies as st

from kser import ConfigurationError, Controller, DeliveryError, Entrypoint, Message, Operation, Result, Task
from kser.http.consumer import Consumer
from kser.http.endpoint import endpoint, handing_to
from kser.http.guard import check_listen
from kser.http.producer import Producer
from kser.http.serving import Server
from kser.http.sink import record_as_json
from kser.http.wire import MessagesSchema, posted
from kser.schemas import parse
from kser.sequencing.registry import OperationRegistry
from kser.testing import eventually
from kser.transport import OutRecord
from tests.unit.fakes import FakeSink
from tests.unit.fakes import Producer as MemoryProducer

U = "872c3be0-51ac-457f-a4d9-12c2f7667b80"


def kmsg(uuid="u", **fields):
    return Message(uuid=uuid, entrypoint="__main__.DiceRoll", **fields)


@contextlib.contextmanager
def served(take, token=None):
    """The endpoint on a port; gives its url."""
    app = Flask(__name__)
    app.register_blueprint(endpoint(take, token=token))
    with Server(app, port=0, token=token) as server:
        yield server.url


@pytest.fixture
def sink():
    return FakeSink()


@pytest.fixture
def url(sink):
    with MemoryProducer(sink) as producer, served(handing_to(producer)) as url:
        yield url


@pytest.fixture
def producer(url):
    with Producer(url) as producer:
        yield producer


# -- the producer ----------------------------------------------------------------------------------------------------


def test_k93_k94_a_message_is_posted_and_confirmed_as_it_is(producer, sink, caplog):
    caplog.set_level(logging.INFO, logger="kser")
    message = kmsg(U, params={"big": 10**30, "text": "é\u2028"}, metadata={"a": 1})
    result = producer.send("dice", message, key="table 4", headers=(("kser-claim", b"x"), ("none", None)))
    (record,) = sink.records
    assert (result.retcode, result.uuid) == (0, U)
    assert result.stdout == f"Message __main__.DiceRoll[{U}] sent in dice"
    assert (record.topic, record.key) == ("dice", b"table 4")
    assert record.headers == (("kser-claim", b"x"), ("none", None))
    assert Message.loads(record.value).dump() == message.dump()
    assert f"Producer.Success: __main__.DiceRoll[{U}]: {result.stdout}" in caplog.messages


def test_k97_bulk_send_takes_any_iterable_and_keeps_the_order(producer, sink):
    result = producer.bulk_send("dice", (kmsg(f"u{n}") for n in range(2500)))
    assert (result.retcode, result.stdout) == (0, "2500 message(s) sent")
    assert [record.key.decode() for record in sink.records] == [f"u{n}" for n in range(2500)]


def test_k97_a_partial_failure_names_the_uuids(sink, url):
    sink.answer = lambda record: DeliveryError("no leader") if record.key == b"u1" else None
    with Producer(url) as producer:
        result = producer.bulk_send("dice", [kmsg("u0"), kmsg("u1"), kmsg("u2")])
    assert (result.retcode, result.stdout) == (504, "2 message(s) sent")
    assert result.retval == {"failed": ["u1"], "sent": ["u0", "u2"]}
    assert "no leader" in result.stderr


def test_a_batch_posts_together_and_settles_its_results_in_place(producer, sink):
    with producer.batch():
        sent = [producer.send("dice", kmsg(f"u{n}")) for n in range(3)]
    assert [result.retcode for result in sent] == [0, 0, 0]
    assert len(sink.records) == 3


def test_an_operation_is_launched_through_it(producer, sink):
    registry = OperationRegistry(producer=producer, topic="dice")

    @registry.subscribe
    class Roll(Task):
        pass

    @registry.subscribe
    class Game(Operation):
        def build_tasks(self, **params):
            return [Roll(), Roll()]

    assert Game().build().launch().retcode == 0
    assert [Message.loads(record.value).entrypoint for record in sink.records] == [Roll.path]


def test_k95_k96_a_server_that_is_away_is_a_failed_result_within_the_time(caplog):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        with Producer({"url": url}) as producer:
            result = producer.send("dice", kmsg(U), timeout=5)
            bulk = producer.bulk_send("dice", [kmsg("a"), kmsg("b")], timeout=5)
    assert (result.retcode, result.uuid) == (503, U)
    assert url in result.stderr
    assert "cannot be reached" in result.stderr
    assert bulk.retval["failed"] == ["a", "b"]
    assert any(text.startswith("Producer.Failed: ") for text in caplog.messages)


def test_k96_a_server_that_never_answers_is_given_up_in_time():
    with socket.create_server(("127.0.0.1", 0)) as mute:
        producer = Producer(f"http://127.0.0.1:{mute.getsockname()[1]}", request_s=1)
        begun = time.monotonic()
        result = producer.send("dice", kmsg(U), timeout=0.3)
        assert time.monotonic() - begun < 0.9
        assert (result.retcode, result.retval["error"]["name"]) == (504, "DeliveryError")
        producer.close(timeout=2)


def test_what_answers_but_is_not_the_api_is_a_failed_result():
    app = Flask(__name__)
    app.add_url_rule("/api/1/messages", view_func=lambda: {"hello": "you"}, methods=["POST"])
    with Server(app, port=0) as server, Producer(server.url) as producer:
        result = producer.send("dice", kmsg(U))
    assert result.retcode == 504
    assert "does not say what became of each message" in result.stderr


def test_a_wrong_token_is_a_failed_result_and_is_not_shown(sink):
    with MemoryProducer(sink) as inner, served(handing_to(inner), token="right") as url:
        with Producer(url, token="wr0ng") as producer:
            result = producer.send("dice", kmsg(U))
        with Producer(url, token="right") as producer:
            assert producer.send("dice", kmsg(U)).retcode == 0
    assert result.retcode == 400
    assert "A token is needed" in result.stderr
    assert "wr0ng" not in str(result.retval)


def test_a_message_that_is_too_large_is_refused_before_it_is_posted(producer, sink):
    assert producer.send("dice", kmsg(U, params={"x": "y" * 1_000_000})).retcode == 413
    assert not sink.records


def test_after_close_it_fails_and_raises_nothing(producer):
    producer.close()
    assert "closed" in producer.send("dice", kmsg(U)).stderr


@pytest.mark.parametrize("url", ["", "127.0.0.1:5000", "ftp://x", "http://", "http://me:pw@host"])
def test_an_url_that_cannot_be_is_told(url):
    with pytest.raises(ConfigurationError) as told:
        Producer(url)
    assert "pw" not in str(told.value)


def test_an_unknown_option_is_told():
    with pytest.raises(ConfigurationError, match="Unknown option servers: there are request_s, token, url"):
        Producer({"url": "http://x", "servers": 1})


TEXT = st.text(alphabet=st.characters(exclude_categories=["Cs"]))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


@given(
    params=st.dictionaries(TEXT, JSON, max_size=4),
    uuid=TEXT.filter(bool),
    key=st.none() | TEXT,
    headers=st.lists(st.tuples(TEXT, st.none() | TEXT.map(str.encode)), max_size=3).map(tuple),
)
def test_what_is_posted_is_what_arrives(params, uuid, key, headers):
    message = Message(uuid, "e", params, Result(uuid=uuid, retval=params), {"m": params})
    raw = record_as_json(OutRecord("t", None if key is None else key.encode(), message.to_bytes(), headers))
    (arrived,) = posted(MessagesSchema().load(parse(b'{"messages": [' + raw + b"]}")))
    assert (arrived.topic, arrived.key, arrived.headers) == ("t", key, headers)
    assert arrived.kmsg.dump() == message.dump()


@pytest.mark.parametrize("seconds", [0, -1, "5", True, float("nan")])
def test_a_time_that_cannot_be_is_told(seconds):
    with pytest.raises(ConfigurationError, match="give a number of seconds"):
        Producer("http://127.0.0.1:1", request_s=seconds)


def test_what_cannot_be_posted_is_a_failed_result(producer):
    assert producer.resume("u", params={"x": object()}).retcode == 400
    assert producer.abort("u", timeout=-1).retcode == 400
    assert producer.abort("u").retcode == 404  # this endpoint takes messages only


# -- the consumer ----------------------------------------------------------------------------------------------------


class Roll(Entrypoint):
    rolled: ClassVar[list[dict]] = []

    def run(self):
        self.rolled.append(self.params)
        return Result(uuid=self.uuid, retcode=self.params.get("retcode", 0))


@pytest.fixture
def registry():
    Roll.rolled = []
    registry = OperationRegistry()
    registry.subscribe(Roll)
    return registry


@pytest.mark.parametrize("options", [{"port": "five"}, {"threads": []}])
def test_an_option_that_is_no_number_is_told(options):
    with pytest.raises(ConfigurationError, match=r"(port='five'|threads=\[\]): give a whole number"):
        Consumer(options, ["dice"])


@contextlib.contextmanager
def running(registry, **config):
    consumer = Consumer({"port": 0, **config}, ["dice"])
    consumer.REGISTRY = registry
    thread = threading.Thread(target=consumer.run)
    thread.start()
    try:
        yield eventually(lambda: consumer.url)
    finally:
        consumer.stop()
        thread.join(10)
        assert not thread.is_alive()


def test_k98_from_producer_to_consumer_without_a_broker(registry):
    with running(registry, token="t") as url, Producer(url, token="t") as producer:
        ran = producer.send("dice", Message(U, Roll.path, {"eyes": 6}))
        failed = producer.send("dice", Message(U, Roll.path, {"retcode": 9}))
    assert Roll.rolled == [{"eyes": 6}, {"retcode": 9}]
    assert (ran.retcode, failed.retcode) == (0, 0)  # taken and run, whatever came of it


def test_a_registry_runs_messages_and_so_does_its_controller(registry):
    consumer = Consumer({"token": "t"}, ["dice"])
    consumer.REGISTRY = registry.controller
    app = Flask(__name__)
    app.register_blueprint(consumer.blueprint())
    body = {"messages": [{"topic": "dice", "message": {"entrypoint": Roll.path, "params": {"eyes": 1}}}]}
    answer = app.test_client().post("/api/1/messages", json=body, headers={"Authorization": "Bearer t"})
    assert [result["retcode"] for result in answer.json["results"]] == [0]
    assert Roll.rolled == [{"eyes": 1}]


def test_an_operation_is_run_as_a_whole_and_a_step_of_one_is_refused(registry):
    class Throw(Task):
        def run(self):
            Roll.rolled.append({"throw": self.params["n"]})

    class Game(Operation):
        def build_tasks(self, **params):
            return [Throw(params={"n": 1}), Throw(params={"n": 2})]

    registry.subscribe(Throw)
    registry.subscribe(Game)
    with running(registry) as url, Producer(url) as producer:
        registry.configure(producer=producer, topic="dice")
        whole = Game().send()
        step = Game().build().launch()
        once = Game(idempotency_key="A7").send()
        later = Throw(params={"n": 3}).send(delay=60)
    assert whole.result.retcode == 0
    assert Roll.rolled == [{"throw": 1}, {"throw": 2}]
    assert step.retcode == 400
    assert "is a step of operation" in step.stderr
    assert "idempotency key" in once.result.stderr
    assert "is to run later" in later.stderr


def test_messages_for_other_topics_are_refused(registry):
    with running(registry) as url, Producer(url) as producer:
        result = producer.send("mails", Message(U, Roll.path))
    assert (result.retcode, Roll.rolled) == (404, [])
    assert "Nothing takes topic 'mails' here: there is dice" in result.stderr


def test_an_idle_consumer_ends_when_it_is_asked_to(registry):
    consumer = Consumer({"port": 0}, ["dice"])
    consumer.run(until_idle=True)
    assert consumer.url.startswith("http://127.0.0.1:")


def test_a_consumer_with_a_producer_hands_on(sink):
    app = Flask(__name__)
    with MemoryProducer(sink) as producer:
        app.register_blueprint(Consumer({}, ["dice"], producer).blueprint())
        answer = app.test_client().post(
            "/api/1/messages", json={"messages": [{"topic": "dice", "message": {"entrypoint": "shop.Charge"}}]}
        )
    assert answer.status_code == 200
    (record,) = sink.records
    assert answer.json["results"][0]["uuid"] == record.key.decode()
    assert Message.loads(record.value).entrypoint == "shop.Charge"


# -- the endpoint ----------------------------------------------------------------------------------------------------


def client_of(take=lambda messages: [], token=None):
    app = Flask(__name__)
    app.register_blueprint(endpoint(take, token=token))
    return app.test_client()


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": [{"topic": "a b", "message": {"entrypoint": "e"}}]}, "messages"),
        ({"messages": [{"topic": "a", "message": {}}]}, "messages"),
        ({"messages": [{"topic": "a", "message": {"entrypoint": "e"}, "headers": [["x"]]}]}, "messages"),
        ({"messages": [{"topic": "a", "message": {"entrypoint": "e", "params": 1}}]}, "messages"),
        ({"messages": [{"topic": "a", "message": {"entrypoint": "e"}, "headers": [[None, "x"]]}]}, "messages"),
        ([], "_schema"),
    ],
)
def test_a_bad_request_is_a_problem_that_names_the_field(body, field):
    answer = client_of().post("/api/1/messages", json=body)
    assert (answer.status_code, answer.content_type) == (422, "application/problem+json")
    assert field in answer.json["errors"]


@pytest.mark.parametrize("body", [b"", b"{", b"null", b"[" * 100_000, b"\xff", b'{"messages": NaN}'])
def test_a_body_that_is_no_json_is_a_problem(body):
    answer = client_of().post("/api/1/messages", data=body, content_type="application/json")
    assert (answer.status_code, answer.content_type) == (422, "application/problem+json")


def test_a_form_of_a_web_page_is_not_taken():
    answer = client_of().post("/api/1/messages", data=b"{}", content_type="text/plain")
    assert answer.status_code == 422
    assert "application/json" in answer.json["detail"]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Authorization": "Bearer s3cret"}, 422),
        ({"Authorization": "bearer s3cret"}, 422),
        ({"Authorization": "Bearer s3cre"}, 401),
        ({"Authorization": "Bearer s3cret\xe9"}, 401),
        ({"Authorization": "Basic s3cret"}, 401),
        ({}, 401),
        ({"Authorization": "Bearer s3cret", "Origin": "http://evil.example"}, 403),
        ({"Authorization": "Bearer s3cret", "Origin": "http://localhost"}, 422),
    ],
)
def test_only_who_has_the_token_is_let_in(headers, status):
    answer = client_of(token="s3cret").post("/api/1/messages", json={}, headers=headers)
    assert answer.status_code == status
    assert b"s3cret" not in answer.data


@pytest.mark.parametrize(
    ("host", "status"),
    [("localhost:1", 422), ("127.0.0.1", 422), ("[::1]:5000", 422), ("evil.example", 403), ("127.0.0.1.evil", 403)],
)
def test_without_a_token_only_names_of_this_machine_pass(host, status):
    answer = client_of().post("/api/1/messages", json={}, headers={"Host": host})
    assert answer.status_code == status


@pytest.mark.parametrize(
    ("address", "status"), [("127.0.0.1", 422), ("::1", 422), ("::ffff:127.0.0.1", 422), ("10.0.0.7", 403), ("", 422)]
)
def test_without_a_token_only_this_machine_may_call_whatever_server_it_is(address, status):
    """A program of one's own may listen anywhere; a socket of this machine's files has no address."""
    answer = client_of().post("/api/1/messages", json={}, environ_base={"REMOTE_ADDR": address})
    assert answer.status_code == status


def test_an_exception_of_the_program_is_no_traceback_and_logged_once(caplog):
    def take(messages):
        raise RuntimeError("secret detail")

    client = client_of(take)
    client.application.testing = False
    answer = client.post("/api/1/messages", json={"messages": [{"topic": "a", "message": {"entrypoint": "e"}}]})
    assert (answer.status_code, answer.content_type) == (500, "application/problem+json")
    assert b"secret detail" not in answer.data
    assert [str(record.exc_info[1]) for record in caplog.records if record.exc_info] == ["secret detail"]


@pytest.mark.parametrize(("host", "token", "good"), [
    ("127.0.0.1", None, True), ("localhost", None, True), ("::1", None, True), ("0.0.0.0", "t", True),
    ("0.0.0.0", None, False), ("::", None, False), ("example.org", None, False), ("127.0.0.1", " ", False),
])  # fmt: skip
def test_listening_where_others_come_in_takes_a_token(host, token, good):
    with contextlib.nullcontext() if good else pytest.raises(ConfigurationError):
        check_listen(host, token)


def test_a_port_that_is_taken_is_told_in_one_line():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ConfigurationError, match=f"Cannot listen on 127.0.0.1:{port}"):
            Server(Flask(__name__), port=port)


def test_a_body_that_is_too_large_is_not_read(url):
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=10)
    connection.putrequest("POST", "/api/1/messages")
    connection.putheader("Content-Length", str(1 << 40))
    connection.endheaders()
    assert connection.getresponse().status == 413
    connection.close()


def test_the_answer_tells_the_first_failure_and_all_results():
    results = [Result(uuid="a"), Result(uuid="b", retcode=503, stderr="away", retval={"error": {"stack": "Traceback"}})]
    answer = client_of(lambda messages: results).post(
        "/api/1/messages", json={"messages": [{"topic": "a", "message": {"entrypoint": "e"}}]}
    )
    assert answer.status_code == 503
    assert answer.json["detail"] == "1 of 2 messages not taken: away"
    assert [result["retcode"] for result in answer.json["results"]] == [0, 503]
    assert "Traceback" not in json.dumps(answer.json)


def test_the_consumer_is_a_controllers_face_by_default():
    assert Consumer.REGISTRY is Controller
