"""The REST API (kser.web), on a memory transport and a memory storage: DESIGN.md 5; J-85 and J-86 as far as they go."""

import contextlib
import json
import threading
from typing import Any

import pytest
import urllib3
from openapi_spec_validator import validate
from sqlalchemy import update

from kser import Operation, OperationRegistry, Result, Task, TransportError, Worker
from kser.control import read_control
from kser.dead_letters import DeadLetters
from kser.http.producer import Producer
from kser.http.serving import Server
from kser.masking import MASK
from kser.storage import get_storage_from_url
from kser.storage.projection import Projection
from kser.testing import eventually
from kser.transport.memory import MemoryTransport
from kser.web import WebSettings, create_app
from kser.worker.topics import ensure_group_topics
from tests.recording import Tape

registry = OperationRegistry()


@registry.subscribe
class Charge(Task):
    """Takes the money."""

    REQUIRED_FIELDS = ("amount",)

    def run(self):
        if self.params["amount"] > 100:
            raise ValueError("too much")
        return Result(uuid=self.uuid, stdout="charged")


@registry.subscribe
class Order(Operation):
    def build_tasks(self, amount=1, **params):
        if amount == "x":
            raise KeyError("no such price")
        return [Charge(params={"amount": amount, "password": "hunter2"}), Charge(params={"amount": 1})]


@pytest.fixture
def transport():
    return with_topics(MemoryTransport())


def with_topics(transport):
    """The transport, with the topics that a worker makes."""
    ensure_group_topics(transport.admin(), "shop", ["shop"])
    return transport


def work(transport):
    """What is there is run to its end."""
    Worker(registry, topics=["shop"], group="shop", transport=transport).run(until_idle=True)


@pytest.fixture
def storage():
    storage = get_storage_from_url("memory:")
    yield storage
    storage.close()


@pytest.fixture
def make(transport, storage):
    """Makes a client of the API; keywords are settings, or arguments of create_app()."""
    with contextlib.ExitStack() as stack:

        def make(**kwargs: Any):
            given = {name: kwargs.pop(name) for name in ("storage", "registry", "transport") if name in kwargs}
            arguments = {"storage": storage, "registry": registry, "transport": transport, **given}
            settings = WebSettings(**{"group": "shop", "topic": "shop", **kwargs})
            app = create_app(arguments.pop("transport"), settings=settings, **arguments)
            stack.callback(app.extensions["kser"].close)
            return app.test_client()

        yield make


@pytest.fixture
def api(make):
    return make()


@pytest.fixture(scope="module")
def still():
    """A client for tests that change nothing: one for all of them."""
    transport, storage = with_topics(MemoryTransport()), get_storage_from_url("memory:")
    app = create_app(transport, storage=storage, registry=registry, settings=WebSettings(group="shop", topic="shop"))
    yield app.test_client()
    app.extensions["kser"].close()
    storage.close()


def launch(api, **body):
    answer = api.post("/api/1/operations", json={"entrypoint": "Order", **body})
    assert answer.status_code == 202, answer.json
    return answer.json["uuid"]


def events_in(answer) -> list[tuple[str, dict]]:
    """Name and data of each server-sent event."""
    found = []
    for block in answer.get_data(as_text=True).split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith((":", "retry")))
        if "event" in lines:
            found.append((lines["event"], json.loads(lines["data"])))
    return found


# -- launching ---------------------------------------------------------------------------------------------------------


def test_an_operation_is_launched_and_its_events_are_streamed_to_its_end(api, transport):
    answer = api.post("/api/1/operations", json={"entrypoint": "Order", "params": {"amount": 3}})
    assert answer.status_code == 202
    uuid = answer.json["uuid"]
    assert (answer.json["entrypoint"], answer.json["topic"]) == (Order.path, "shop")
    assert answer.headers["Location"] == f"/api/1/operations/{uuid}"
    work(transport)
    stream = api.get(f"/api/1/operations/{uuid}/events")
    told = events_in(stream)
    assert stream.content_type == "text/event-stream"
    names = [name for name, _ in told]
    assert names == ["operation.started", "step.done", "step.done", "operation.ended", "end"]
    assert told[-1][1] == {"status": "SUCCESS"}


def test_secrets_in_events_are_masked(api, transport):
    uuid = launch(api, entrypoint="Charge", params={"amount": 1000, "password": "hunter2"})
    work(transport)
    stream = api.get(f"/api/1/operations/{uuid}/events")
    letters = api.get("/api/1/dead-letters").json["letters"]
    shown = api.get(f"/api/1/dead-letters/{letters[0]['id']}")
    assert shown.json["value"]["params"] == {"amount": 1000, "password": MASK}
    assert b"hunter2" not in stream.data + shown.data


def test_a_task_is_sent_alone_and_to_the_topic_that_is_named(api, transport):
    answer = api.post("/api/1/operations", json={"entrypoint": "Charge", "params": {"amount": 1}, "topic": "other"})
    assert answer.json["topic"] == "other"
    assert transport.admin().describe(["other"])


def test_without_a_registry_any_name_is_sent_and_the_workers_build_it(make, transport):
    api = make(registry=None)
    uuid = launch(api, entrypoint=Order.path, params={"amount": 3})
    work(transport)
    assert events_in(api.get(f"/api/1/operations/{uuid}/events"))[-1] == ("end", {"status": "SUCCESS"})
    assert api.get("/api/1/entrypoints").status_code == 404
    assert api.post("/api/1/operations", json={"entrypoint": "a", "idempotency_key": "A7"}).status_code == 422
    assert make(registry=None, topic=None).post("/api/1/operations", json={"entrypoint": "a"}).status_code == 422


def test_launched_twice_with_one_idempotency_key_it_is_started_once(api, transport):
    first = launch(api, idempotency_key="A7")
    assert launch(api, idempotency_key="A7") == first
    work(transport)
    told = [name for name, _ in events_in(api.get(f"/api/1/operations/{first}/events?follow=false"))]
    assert told.count("operation.started") == 1


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({"entrypoint": "Ordr"}, "did you mean Order?"),
        ({"entrypoint": "Charge"}, "Missing parameter: amount"),
        ({"entrypoint": "Order", "params": {"amount": "x"}}, "KeyError: 'no such price'"),
        ({"entrypoint": "Order", "topic": "a b"}, "topic"),
        (
            {"entrypoint": "Charge", "params": {"amount": 1}, "idempotency_key": "A7"},
            "only operations are started once",
        ),
        ({"entrypoint": "Order", "parms": {}}, "parms"),
        ({"entrypoint": "Order", "params": [1]}, "params"),
        ({"params": {}}, "entrypoint"),
        ([], "_schema"),
    ],
)
def test_what_cannot_be_launched_is_a_problem_that_says_why(still, body, told):
    answer = still.post("/api/1/operations", json=body)
    assert (answer.status_code, answer.content_type) == (422, "application/problem+json")
    assert told in answer.json["detail"]
    assert "Traceback" not in answer.text


def test_the_entrypoints_are_listed(still):
    found = {entry["name"]: entry for entry in still.get("/api/1/entrypoints").json["entrypoints"]}
    assert found[Charge.path] == {
        "name": Charge.path, "aliases": [], "kind": "task", "required": ["amount"], "about": "Takes the money.",
    }  # fmt: skip
    assert found[Order.path]["kind"] == "operation"


# -- abort and resume --------------------------------------------------------------------------------------------------


def test_an_operation_is_aborted(api, transport):
    uuid = launch(api)
    answer = api.post(f"/api/1/operations/{uuid}/abort", json={"why": "wrong prices"})
    assert (answer.status_code, answer.json["run"]) == (202, 1)
    assert read_control(transport, "shop").aborts[uuid].why == "wrong prices"
    work(transport)
    assert events_in(api.get(f"/api/1/operations/{uuid}/events"))[-1] == ("end", {"status": "ABORTED"})
    again = api.post(f"/api/1/operations/{uuid}/abort")
    assert again.status_code == 409
    assert "has ended before: ABORTED" in again.json["detail"]


def test_a_failed_operation_is_resumed_with_other_parameters(api, transport):
    uuid = launch(api, params={"amount": 1000})
    work(transport)
    dry = api.post(f"/api/1/operations/{uuid}/resume", json={"dry_run": True})
    done = api.post(f"/api/1/operations/{uuid}/resume", json={"params": {"amount": 2}})
    assert (dry.status_code, done.status_code, done.json["run"]) == (202, 202, 2)
    work(transport)
    assert events_in(api.get(f"/api/1/operations/{uuid}/events"))[-1] == ("end", {"status": "SUCCESS"})
    assert api.post(f"/api/1/operations/{uuid}/resume").status_code == 409


def test_what_nobody_knows_is_not_found(still):
    for answer in (
        still.get("/api/1/operations/nope"),
        still.get("/api/1/operations/nope/logs"),
        still.get("/api/1/operations/nope/progress"),
        still.get("/api/1/operations/nope/timeline"),
        still.post("/api/1/operations/nope/resume"),
        still.get("/api/1/builds/77"),
        still.delete("/api/1/builds/77"),
        still.get("/api/1/dead-letters/0:99"),
        still.get("/api/1/dead-letters?group=nobody"),
        still.get("/api/1/nothing"),
        still.get("/api/1/operations/a%00b"),
        still.get("/"),
    ):
        assert (answer.status_code, answer.content_type) == (404, "application/problem+json")
        assert answer.json["status"] == 404


def test_the_http_producer_aborts_and_resumes_through_it(transport, storage):
    app = create_app(transport, storage=storage, registry=registry, settings=WebSettings(group="shop", topic="shop"))
    with Server(app, port=0) as server, Producer(server.url) as producer:
        uuid = launch(app.test_client(), params={"amount": 1000})
        work(transport)
        resumed = producer.resume(uuid, group="shop", params={"amount": 2})
        aborted = producer.abort(launch(app.test_client()), group="shop", why="no more")
        unknown = producer.resume("nope", group="shop")
    app.extensions["kser"].close()
    assert (resumed.retcode, resumed.retval) == (0, {"run": 2})
    assert (aborted.retcode, unknown.retcode) == (0, 404)
    assert "Nothing is known of nope" in unknown.stderr


# -- dead letters ------------------------------------------------------------------------------------------------------


@pytest.fixture
def dead(api, transport):
    """The ids of three dead letters, the newest first."""
    for amount in (101, 102, 103):
        launch(api, entrypoint="Charge", params={"amount": amount})
    work(transport)
    return [letter["id"] for letter in api.get("/api/1/dead-letters").json["letters"]]


def test_dead_letters_are_listed_shown_and_filtered(api, dead):
    found = api.get("/api/1/dead-letters?task=Charge&error=too+much&limit=2&since=2020-01-01T00:00:00Z").json
    assert (len(found["letters"]), found["total"]) == (2, 3)
    shown = api.get(f"/api/1/dead-letters/{dead[0]}").json
    assert shown["error_type"] == "ValueError"
    assert shown["origin"]["topic"] == "shop"
    assert api.get("/api/1/dead-letters?until=2020-01-01T00:00:00Z").json["total"] == 0


def test_dead_letters_are_replayed(api, dead, transport):
    dry = api.post("/api/1/dead-letters/replay", json={"ids": dead[:1], "dry_run": True}).json
    sent = api.post("/api/1/dead-letters/replay", json={"ids": dead[:1], "params": {"amount": 1}}).json
    assert [outcome["status"] for outcome in (*dry["outcomes"], *sent["outcomes"])] == ["ready", "sent"]
    work(transport)
    left = api.post("/api/1/dead-letters/replay", json={"matching": {"task": "Charge"}, "dry_run": True}).json
    assert [outcome["id"] for outcome in left["outcomes"]] == sorted(dead[1:], key=dead.index, reverse=True)


def test_dead_letters_are_purged(api, dead, transport):
    dry = api.post("/api/1/dead-letters/purge", json={"matching": {}, "dry_run": True}).json
    assert sorted(dry["deleted"]) == sorted(dead)
    assert DeadLetters(transport, "shop").search().total == 3
    api.post("/api/1/dead-letters/purge", json={"matching": {}})
    assert DeadLetters(transport, "shop").search().total == 0


@pytest.mark.parametrize("body", [{}, {"ids": ["0:1"], "matching": {}}, {"ids": []}, {"ids": ["x"]}])
@pytest.mark.parametrize("action", ["replay", "purge"])
def test_which_dead_letters_are_meant_has_to_be_said(still, action, body):
    assert still.post(f"/api/1/dead-letters/{action}", json=body).status_code == 422


# -- what is stored ----------------------------------------------------------------------------------------------------


@pytest.fixture
def build(storage):
    """The number of a build that failed, with a log record and progress."""
    build_id = storage.create_build("nightly", {"function": "shop:nightly"}, {"token": "hunter2"})
    storage.start_build(build_id)
    storage.report_build_progress(build_id, 3, 10, "pages", "page 3")
    storage.log_message(build_id, 30, "slow", logger="shop")
    storage.log_message(build_id, 20, "fine", logger="shop")
    storage.finish_build(build_id, success=False, exception={"message": "no"})
    return build_id


def test_builds_are_listed_shown_and_deleted(api, build):
    (found,) = api.get("/api/1/builds?job_id=nightly").json["builds"]
    shown = api.get(f"/api/1/builds/{build}")
    assert (found["id"], found["finished"], found["success"]) == (build, True, False)
    assert shown.json["build_config"] == {"token": MASK}
    assert api.get("/api/1/builds?job_id=nightly&success=true").json["builds"] == []
    assert api.delete(f"/api/1/builds/{build}").status_code == 204
    assert api.get(f"/api/1/builds/{build}").status_code == 404


def test_operations_are_listed_by_filters_and_pages(api, storage, build):
    other = storage.create_build("weekly", {}, {})
    storage.start_build(other)
    uuid = storage.get_build(other)["uuid"]
    page = api.get("/api/1/operations?limit=1&offset=1").json
    assert (len(page["operations"]), page["total"], page["limit"], page["offset"]) == (1, 2, 1, 1)
    assert [it["uuid"] for it in api.get("/api/1/operations?state=RUNNING&state=SUCCESS").json["operations"]] == [uuid]
    assert api.get("/api/1/operations?since=2100-01-01T00:00:00Z").json["total"] == 0
    assert api.get("/api/1/operations?text=weekly").json["total"] == 1
    assert api.get(f"/api/1/operations/{uuid}").json["status"] == "RUNNING"


def test_logs_and_progress_of_an_execution(api, storage, build):
    uuid = storage.get_build(build)["uuid"]
    lines = api.get(f"/api/1/operations/{uuid}/logs?min_level=30").json["logs"]
    assert [(line["message"], line["level_name"]) for line in lines] == [("slow", "WARNING")]
    later = api.get(f"/api/1/operations/{uuid}/logs?after={lines[0]['id']}").json["logs"]
    assert [line["message"] for line in later] == ["fine"]
    assert [line["message"] for line in api.get("/api/1/logs?limit=1").json["logs"]] == ["slow"]
    progress = api.get(f"/api/1/operations/{uuid}/progress").json
    assert (progress["current"], progress["total"]) == (3, 10)
    assert progress["children"][0]["status_line"] == "page 3"
    assert api.get(f"/api/1/operations/{uuid}/timeline").json == {"events": []}
    assert api.get("/api/1/workers").json == {"workers": []}


def test_workers_are_listed_whatever_one_told_of_itself(make, storage):
    tape = Tape()
    tape.worker("usual")
    tape.worker("endless", interval_s=1e12)
    projection = Projection(storage.database, "c", "shop")
    projection.positions(tape.partitions)
    projection.apply(tape.records)
    with storage.database.write() as connection:  # as a release before stored it
        connection.execute(update(storage.database.tables.worker).values(interval_s=1e300))
    answer = make().get("/api/1/workers")
    assert [worker["name"] for worker in answer.json["workers"]] == ["usual"]


@pytest.mark.parametrize(
    ("path", "field"),
    [
        ("operations?state=DONE", "state"),
        ("operations?limit=0", "limit"),
        ("operations?limit=501", "limit"),
        ("operations?offset=-1", "offset"),
        ("operations?since=yesterday", "since"),
        ("operations?since=0001-01-01T00:00:00", "since"),
        ("operations?until=9999-12-31T23:59:59-14:00", "until"),
        ("operations?stat=FAILED", "stat"),
        ("operations?text=%00", "text"),
        ("builds", "job_id"),
        ("builds?job_id=a&order=up", "order"),
        ("logs?min_level=high", "min_level"),
        ("dead-letters?limit=x", "limit"),
        ("dead-letters?replayed=perhaps", "replayed"),
    ],
)
def test_a_wrong_query_is_a_problem_that_names_the_field(still, path, field):
    answer = still.get(f"/api/1/{path}")
    assert (answer.status_code, answer.content_type) == (422, "application/problem+json")
    assert field in answer.json["errors"]


def test_without_a_storage_the_past_is_not_served_and_the_rest_is(make, transport):
    api = make(storage=None)
    answer = api.get("/api/1/operations")
    assert (answer.status_code, answer.content_type) == (501, "application/problem+json")
    assert "start the API with a storage" in answer.json["detail"]
    uuid = launch(api)
    work(transport)
    assert events_in(api.get(f"/api/1/operations/{uuid}/events"))[-1] == ("end", {"status": "SUCCESS"})


# -- streams -----------------------------------------------------------------------------------------------------------


def test_a_stream_waits_for_what_happens_after_it_was_opened(api, transport):
    uuid = launch(api)
    answer = api.get(f"/api/1/operations/{uuid}/events", buffered=False)
    found: list[bytes] = []
    reader = threading.Thread(target=lambda: found.extend(answer.iter_encoded()))
    reader.start()
    work(transport)
    reader.join(10)
    assert not reader.is_alive()
    assert b"".join(found).count(b"event: ") == 5
    answer.close()


def test_the_events_so_far_of_an_unknown_operation_are_a_404(make):
    api = make(max_streams=1)
    for _ in range(2):  # and none of the places of streams is taken by it
        answer = api.get("/api/1/operations/nowhere/events?follow=false")
        assert (answer.status_code, answer.content_type) == (404, "application/problem+json")
        assert "shop.events tells nothing of nowhere" in answer.json["detail"]


def test_a_stream_of_a_group_tells_of_all_that_happens(make, transport):
    api = make(stream_s=2)
    answer = api.get("/api/1/events", buffered=False)
    chunks = answer.iter_encoded()
    assert next(chunks).startswith(b"retry")
    launch(api)
    work(transport)
    assert next(chunk for chunk in chunks if b"operation.ended" in chunk)
    answer.close()


def test_last_event_id_leaves_out_what_the_caller_has(api, transport):
    uuid = launch(api)
    work(transport)
    whole = api.get(f"/api/1/operations/{uuid}/events").get_data(as_text=True)
    ids = [line.removeprefix("id: ") for line in whole.splitlines() if line.startswith("id: ")]
    rest = api.get(f"/api/1/operations/{uuid}/events", headers={"Last-Event-ID": ids[1]})
    assert [name for name, _ in events_in(rest)] == ["step.done", "operation.ended", "end"]


def test_there_are_only_so_many_streams_and_one_that_is_closed_makes_room(make):
    api = make(max_streams=2)
    first, second = (api.get("/api/1/events", buffered=False) for _ in range(2))
    third = api.get("/api/1/events")
    assert (third.status_code, third.content_type) == (429, "application/problem+json")
    first.close()
    assert api.get("/api/1/events", buffered=False).status_code == 200
    second.close()


def test_a_reader_that_hangs_up_makes_room_for_another(transport):
    """Over a socket: the server notices, although nothing happens that could be told."""
    app = create_app(transport, settings=WebSettings(group="shop", max_streams=1))
    pool = urllib3.PoolManager(retries=False, timeout=10)
    with Server(app, port=0, on_stop=app.extensions["kser"].streams.close) as server:
        events = f"{server.url}/api/1/events"
        first = pool.request("GET", events, preload_content=False)
        assert first.read(5) == b"retry"
        assert pool.request("GET", events).status == 429
        first.close()
        opened = eventually(lambda: (it := pool.request("GET", events, preload_content=False)).status == 200 and it)
    assert b"event" not in opened.read()
    app.extensions["kser"].close()


def test_a_stream_ends_with_its_time_and_with_the_app(make):
    assert events_in(make(stream_s=0.05).get("/api/1/events")) == []
    api = make()
    answer = api.get("/api/1/events", buffered=False)
    api.application.extensions["kser"].close()
    assert next(iter(answer.iter_encoded())).startswith(b"retry")
    answer.close()


# -- who may, and what goes wrong --------------------------------------------------------------------------------------


def test_with_a_token_nothing_but_health_and_the_document_is_open(make):
    api = make(token="t0ken")
    document = api.get("/api/1/openapi.json").json
    assert document["security"] == [{"token": []}]
    assert api.get("/api/1/health").status_code == 200
    for path, methods in document["paths"].items():
        for method in methods:
            if method not in ("get", "post", "delete") or path == "/api/1/health":
                continue
            answer = api.open(path.replace("{build_id}", "1"), method=method.upper(), json={})
            assert answer.status_code == 401, path
            assert answer.headers["WWW-Authenticate"] == 'Bearer realm="kser"'
    assert api.get("/api/1/workers", headers={"Authorization": "Bearer t0ken"}).status_code == 200
    assert "t0ken" not in repr(api.application.extensions["kser"].settings)


def test_a_web_page_of_another_site_can_do_nothing(still):
    answer = still.post("/api/1/operations", json={"entrypoint": "Order"}, headers={"Origin": "http://evil.example"})
    assert answer.status_code == 403
    assert still.get("/api/1/workers", headers={"Host": "evil.example"}).status_code == 403


@pytest.mark.parametrize(
    ("body", "content_type", "status"),
    [
        (b"{", "application/json", 400),
        (b"[" * 100_000, "application/json", 400),
        (b"\xff", "application/json", 400),
        (b'{"entrypoint": "Order", "params": {"amount": NaN}}', "application/json", 400),
        (b'{"entrypoint": "Order"}', "text/plain", 415),
        (b"", "application/json", 422),
        (b'{"entrypoint": "\\ud800"}', "application/json", 422),
    ],
)
def test_a_body_that_cannot_be_read_is_a_problem(still, body, content_type, status):
    answer = still.post("/api/1/operations", data=body, content_type=content_type)
    assert (answer.status_code, answer.content_type) == (status, "application/problem+json")


def test_a_wrong_method_is_a_problem(still):
    answer = still.put("/api/1/operations")
    assert (answer.status_code, answer.content_type) == (405, "application/problem+json")
    assert "GET" in answer.headers["Allow"]


class Away(MemoryTransport):
    """A broker that does not answer any more."""

    away = False

    def admin(self):
        if self.away:
            raise TransportError("No broker answers", retriable=True)
        return super().admin()


def test_a_broker_that_is_away_is_a_503(make):
    transport = with_topics(Away())
    api = make(transport=transport)
    transport.away = True
    for answer in (
        api.get("/api/1/dead-letters"),
        api.get("/api/1/events"),
        api.get("/api/1/operations/u/events"),
        api.post("/api/1/operations/u/abort"),
        api.post("/api/1/operations/u/resume"),
        api.get("/api/1/health"),
    ):
        assert answer.status_code == 503
    assert api.get("/api/1/health").json["status"] == "the broker does not answer"
    assert api.get("/api/1/dead-letters").json["detail"] == "No broker answers"


def test_a_fault_of_the_api_is_told_without_details(make, storage, caplog):
    api = make()
    api.application.testing = False
    storage.close()
    api.application.extensions["kser"]._storage = object()
    answer = api.get("/api/1/workers")
    assert (answer.status_code, answer.content_type) == (500, "application/problem+json")
    assert "log of the server" in answer.json["detail"]
    assert "AttributeError" in caplog.text


def test_the_openapi_document_is_valid_and_tells_of_every_resource(still):
    document = still.get("/api/1/openapi.json").json
    validate(document)
    rules = {
        rule.rule.replace("<int:", "{").replace("<", "{").replace(">", "}")
        for rule in still.application.url_map.iter_rules()
    }
    assert rules - {"/api/1/openapi.json"} == set(document["paths"])
    operations = [path[method] for path in document["paths"].values() for method in path if method != "parameters"]
    assert all(operation["summary"] and "default" in operation["responses"] for operation in operations)


def test_health_is_asked_again_after_a_while_only(api, transport, monkeypatch):
    asked = []
    monkeypatch.setattr(type(transport.admin()), "describe", lambda self, names, timeout_s=10: asked.append(1) or {})
    assert [api.get("/api/1/health").json["status"] for _ in range(3)] == ["ok"] * 3
    assert len(asked) == 1


def test_messages_are_sent_through_it(api, transport):
    body = {"messages": [{"topic": "shop", "message": {"entrypoint": Charge.path, "params": {"amount": 1}}}]}
    answer = api.post("/api/1/messages", json=body)
    assert (answer.status_code, answer.json["results"][0]["retcode"]) == (200, 0)
