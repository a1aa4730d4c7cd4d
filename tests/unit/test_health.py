"""The health pages of a worker, over HTTP."""

import json
import socket
import threading
import urllib.error
import urllib.request

import pytest

from kser import OperationRegistry, Task
from kser.errors import ConfigurationError
from kser.producer import BaseProducer
from kser.transport import TopicSpec
from kser.transport.memory import MemoryTransport
from kser.worker.health import HealthServer, HealthStatus
from tests.unit.test_worker import TOPIC, Running, wait_for


@pytest.fixture
def serve():
    servers = []

    def go(status):
        servers.append(HealthServer(0, lambda: status))
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
    port = serve(HealthStatus(worker="w", group="g", free_executors=3, partitions=2))
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
    assert get(port, "/healthz", "POST")[0] == 405
    assert get(port, "/healthz", "HEAD") == (200, b"")


def test_a_port_that_is_taken_is_told():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ConfigurationError, match=f"127.0.0.1:{port}.*another port"):
            HealthServer(port, lambda: HealthStatus(worker="w", group="g")).start()


def test_a_worker_tells_what_it_runs_and_when_it_is_full():
    transport, go = MemoryTransport(), threading.Event()
    transport.admin().create([TopicSpec(name=TOPIC, partitions=1)])
    registry = OperationRegistry(producer=BaseProducer(transport.sink()), topic=TOPIC)

    @registry.subscribe
    class Long(Task):
        def run(self):
            self.heartbeat()
            go.wait(20)

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    one = Running(registry, transport, concurrency=1, health_port=port)
    wait_for(lambda: one.worker.status().partitions == 1)
    wait_for(lambda: get(port, "/readyz")[0] == 200)
    task = Long()
    task.send()
    wait_for(lambda: one.worker.status().running)
    code, body = get(port, "/readyz")
    said = json.loads(body)
    assert (code, said["reasons"], said["in_flight"]) == (503, ["no free executor"], 1)
    assert (said["running"][0]["entrypoint"], said["running"][0]["uuid"]) == (Long.path, task.uuid)
    assert said["running"][0]["heartbeat_s_ago"] < 10
    assert get(port, "/healthz")[0] == 200
    go.set()
    one.stop()
    with pytest.raises(urllib.error.URLError):
        get(port, "/healthz")
