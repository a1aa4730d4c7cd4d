"""The health pages of a worker, over HTTP."""

import asyncio
import json
import socket
import struct
import threading
import urllib.error
import urllib.request

import pytest

from kser import OperationRegistry, Task
from kser.errors import ConfigurationError
from kser.producer import BaseProducer
from kser.transport import TopicSpec
from kser.transport.memory import MemoryTransport
from kser.worker import health
from kser.worker.health import HealthServer, HealthStatus, RunningTask
from tests.apache_kafka import free_ports
from tests.unit.test_worker import TOPIC, Running, wait_for


@pytest.fixture
def serve():
    servers = []

    def go(status):
        servers.append(HealthServer(0, lambda: status() if callable(status) else status))
        servers[-1].start()
        return servers[-1].port

    yield go
    for server in servers:
        server.stop()


def get(port, path, method="GET"):
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", method=method)
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as exc:
        with exc:
            return exc.code, exc.read()


def test_a_worker_that_turns_and_has_room_is_alive_and_ready(serve):
    port = serve(HealthStatus(worker="w", group="g", free_executors=3, assigned={"shop": [0, 3]}))
    for path in ("/healthz", "/readyz", "/readyz/", "/healthz?verbose=1"):
        code, body = get(port, path)
        said = json.loads(body)
        assert (code, said["status"], said["reasons"], said["worker"], said["partitions"]) == (200, "ok", [], "w", 2)


def test_one_that_is_draining_is_alive_but_not_ready(serve):
    port = serve(HealthStatus(worker="w", group="g", reasons=("draining",), draining=True))
    assert get(port, "/healthz")[0] == 200
    code, body = get(port, "/readyz")
    assert (code, json.loads(body)["reasons"]) == (503, ["draining"])


def test_a_loop_that_hangs_is_not_alive(serve):
    port = serve(HealthStatus(worker="w", group="g", polled_s_ago=31))
    for path in ("/healthz", "/readyz"):
        code, body = get(port, path)
        assert (code, json.loads(body)["reasons"]) == (503, ["the loop has not turned for 31 s"])


def test_other_paths_and_methods_are_refused(serve):
    port = serve(HealthStatus(worker="w", group="g"))
    assert get(port, "/")[0] == 404
    for method in ("POST", "PUT", "DELETE", "OPTIONS", "TRACE", "BREW"):
        assert get(port, "/healthz", method)[0] == 405
    assert get(port, "/healthz", "HEAD") == (200, b"")


def test_the_answer_has_what_runs_and_how_much_there_is(serve):
    tasks = (RunningTask("shop.Charge", "u-1", 3.14159, 0.5), RunningTask("shop.Mail", "u-2", 0.25, None))
    port = serve(HealthStatus(worker="w", group="g", running=tasks, in_flight=7, polled_s_ago=0.0625))
    assert json.loads(get(port, "/readyz")[1]) == {
        "status": "ok",
        "reasons": [],
        "worker": "w",
        "group": "g",
        "polled_s_ago": 0.062,
        "in_flight": 7,
        "unsettled": 0,
        "free_executors": 0,
        "partitions": 0,
        "draining": False,
        "running": [
            {"entrypoint": "shop.Charge", "uuid": "u-1", "seconds": 3.142, "heartbeat_s_ago": 0.5},
            {"entrypoint": "shop.Mail", "uuid": "u-2", "seconds": 0.25, "heartbeat_s_ago": None},
        ],
    }


def test_a_status_that_fails_is_answered_and_logged(serve, caplog):
    port = serve(lambda: 1 / 0)
    assert get(port, "/healthz")[0] == 500
    assert "ZeroDivisionError" in caplog.text


def test_callers_that_say_nothing_or_go_away_keep_nobody_waiting(serve, monkeypatch, capfd):
    monkeypatch.setattr(health, "_REQUEST_S", 0.2)
    port = serve(HealthStatus(worker="w", group="g"))
    with socket.create_connection(("127.0.0.1", port), 5) as silent:
        with socket.create_connection(("127.0.0.1", port), 5) as rude:
            rude.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            rude.sendall(b"GET /healthz HTTP/1.0\r\n")
        assert get(port, "/healthz")[0] == 200
        assert silent.recv(1) == b""  # it was hung up on
    assert capfd.readouterr().err == ""


def test_listening_asks_nobody_for_the_hosts_name(monkeypatch):
    """In a cluster whose name server is slow the worker would wait for it."""
    monkeypatch.setattr(socket, "getfqdn", lambda *args: pytest.fail("a look-up"))
    server = HealthServer(0, lambda: HealthStatus(worker="w", group="g"), host="0.0.0.0")
    server.start()
    try:
        assert get(server.port, "/healthz")[0] == 200
    finally:
        server.stop()
        server.stop()


def test_a_port_that_is_taken_is_told():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ConfigurationError, match=f"127.0.0.1:{port}.*another port"):
            HealthServer(port, lambda: HealthStatus(worker="w", group="g")).start()


@pytest.mark.parametrize("coroutine", [False, True])
def test_a_worker_tells_what_it_runs_and_when_it_is_full(coroutine):
    transport, go = MemoryTransport(), threading.Event()
    transport.admin().create([TopicSpec(name=TOPIC, partitions=1)])
    registry = OperationRegistry(producer=BaseProducer(transport.sink()), topic=TOPIC)

    @registry.subscribe
    class Long(Task):
        def run(self):
            self.heartbeat()
            go.wait(20)

    @registry.subscribe
    class LongCoroutine(Task):
        async def run(self):
            self.heartbeat()
            await asyncio.to_thread(go.wait, 20)

    port = free_ports(1, None)[0]
    one = Running(registry, transport, concurrency=1 + coroutine, coroutines=1, health_port=port)
    wait_for(lambda: one.worker.status().partitions == 1)
    wait_for(lambda: get(port, "/readyz")[0] == 200)
    task = (LongCoroutine if coroutine else Long)()
    task.send()
    wait_for(lambda: one.worker.status().running)
    code, body = get(port, "/readyz")
    said = json.loads(body)
    assert (code, said["reasons"], said["in_flight"]) == (503, ["no free executor"], 1)
    assert (said["running"][0]["entrypoint"], said["running"][0]["uuid"]) == (task.path, task.uuid)
    assert said["running"][0]["heartbeat_s_ago"] < 10
    assert get(port, "/healthz")[0] == 200
    go.set()
    one.stop()
    with pytest.raises(urllib.error.URLError):
        get(port, "/healthz")
