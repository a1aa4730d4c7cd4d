"""`kser web` and `kser dev`: processes, the embedded broker, HTTP."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from urllib.parse import quote

import pytest
import urllib3

from kser.confluent.embedded import EmbeddedBroker
from kser.http.producer import Producer
from kser.schemas import Message
from tests.apache_kafka import free_ports
from tests.processes import DICE, ROOT, environment, process, wait_for, worker

pytestmark = pytest.mark.timeout(90)
APP = """
    from kser import Operation, OperationRegistry, Result, Task

    registry = OperationRegistry(topic="shop")


    @registry.subscribe
    class Charge(Task):
        def run(self):
            return Result(stdout="{answer}")


    @registry.subscribe
    class Order(Operation):
        def build_tasks(self, **params):
            return [Charge(), Charge()]
"""


class Api:
    """Calls one API; what does not answer yet is an answer with status 0."""

    def __init__(self, port: int, token: str | None = None) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self._pool = urllib3.PoolManager(retries=False, timeout=20)
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}

    def call(self, method: str, path: str, **body: object) -> tuple[int, dict]:
        try:
            answer = self._pool.request(
                method,
                f"{self.url}/api/1/{path}",
                headers=self._headers,
                **({"json": body} if method == "POST" else {}),
            )
        except urllib3.exceptions.HTTPError:
            return 0, {}
        return answer.status, json.loads(answer.data) if answer.data else {}

    def wait(self, seconds: float = 30) -> None:
        wait_for(lambda: self.call("GET", "health")[0] == 200, seconds, "a healthy API")

    def stream(self, path: str):
        return self._pool.request("GET", f"{self.url}/api/1/{path}", headers=self._headers, preload_content=False)


@contextlib.contextmanager
def web(broker, tmp_path, *options, **variables):
    port = free_ports(1, None)[0]
    command = ("-m", "kser", "web", "--port", str(port), "--bootstrap-servers", broker.bootstrap_servers, *options)
    with process(*command, log=tmp_path / "web.log", **variables) as child:
        yield child, port


def test_k98_a_service_posts_to_the_api_and_a_worker_runs_it(embedded, topic_name, tmp_path):
    """Producer over HTTP -> kser web -> Kafka -> worker -> recorder -> kser web; the stream tells of it as it goes."""
    group, topic, storage = topic_name("g"), topic_name("t"), f"sqlite:///{tmp_path}/kser.db"
    options = (DICE, "--group", group, "--topic", topic, "--storage", storage)
    with (
        web(embedded, tmp_path, *options, KSER_WEB_TOKEN="t0ken") as (child, port),
        worker(embedded.bootstrap_servers, topic, group, tmp_path / "worker.log", "w1"),
    ):
        api = Api(port, "t0ken")
        api.wait()
        assert Api(port).call("GET", "operations")[0] == 401
        with Producer(api.url, token="t0ken") as producer:
            sent = producer.send(topic, Message("dddddddd-0000-4000-8000-000000000001", "dice.Roll"))
        assert sent.retcode == 0, sent.stderr
        status, launched = api.call("POST", "operations", entrypoint="dice.Launch")
        assert status == 202, launched
        told = api.stream(f"operations/{launched['uuid']}/events")
        assert told.read().count(b"event: ") >= 3  # it ends by itself, with the operation
        operations = f"operations?kind=operation&state=SUCCESS&entrypoint={quote(launched['entrypoint'])}"
        wait_for(lambda: api.call("GET", operations)[1].get("total") == 1, what="the operation in the storage")
        shown = api.call("GET", f"operations/{launched['uuid']}")[1]
        assert {task["status"] for task in shown["tasks"]} == {"SUCCESS"}
        endless = api.stream("events")
        begun = time.monotonic()
        child.terminate()
        assert child.wait(10) == 0
        assert time.monotonic() - begun < 8  # an open stream does not hold it
        endless.close()
    assert "t0ken" not in (tmp_path / "web.log").read_text()


def test_a_broker_that_dies_is_a_503_and_health_says_so(tmp_path):
    with EmbeddedBroker() as broker, web(broker, tmp_path, "--group", "g", "--timeout", "1") as (_, port):
        api = Api(port)
        api.wait()
        broker.close()
        begun = time.monotonic()
        status, told = api.call("POST", "messages", messages=[{"topic": "t", "message": {"entrypoint": "e"}}])
        assert status in (503, 504)
        assert told["results"][0]["retcode"] in (503, 504)
        assert time.monotonic() - begun < 5
        assert api.call("GET", "dead-letters")[0] == 503
        wait_for(lambda: api.call("GET", "health")[0] == 503, what="health to say so")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--host", "0.0.0.0"), "set a token (--token, KSER_WEB_TOKEN), or listen on 127.0.0.1"),
        (("--storage", "sqlite3:x"), "Unknown storage"),
        (("nowhere.py",), "There is no file"),
        (("--token", " "), "The token is empty"),
    ],
)
def test_what_kser_web_refuses_is_told_in_one_line(embedded, options, told):
    done = subprocess.run(
        [sys.executable, "-m", "kser", "web", "--bootstrap-servers", embedded.bootstrap_servers, *options],
        capture_output=True, text=True, timeout=30, cwd=ROOT, env=environment(),
    )  # fmt: skip
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert told in line


# -- kser dev --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def dev(folder, *options):
    port, log = free_ports(1, None)[0], folder / "dev.log"
    with log.open("ab") as out:
        child = subprocess.Popen(
            [sys.executable, "-m", "kser", "dev", "app.py", "--port", str(port), *options],
            cwd=folder, env=environment(), stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        yield child, Api(port), log
    finally:
        child.kill()
        child.wait(10)


def write(folder, answer):
    (folder / "app.py").write_text(textwrap.dedent(APP).replace("{answer}", answer))


def result_of(api, uuid):
    """What the tasks of an operation gave, once it has ended."""
    status, shown = api.call("GET", f"operations/{uuid}")
    return [task["result"]["stdout"] for task in shown["tasks"]] if status == 200 and shown["ended"] else None


def launched(api):
    status, told = api.call("POST", "operations", entrypoint="Order")
    return told["uuid"] if status == 202 else None


def children_of(pid):
    """All that descends from a process and lives."""
    listed = subprocess.run(["ps", "-eo", "pid,ppid,stat"], capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in listed.splitlines()[1:]]
    found, todo = [], [pid]
    while todo:
        parent = todo.pop()
        below = [int(row[0]) for row in rows if int(row[1]) == parent and not row[2].startswith("Z")]
        found += below
        todo += below
    return found


def alive(pid):
    with contextlib.suppress(OSError):
        os.kill(pid, 0)
        return True
    return False


def test_kser_dev_runs_everything_reloads_and_ends_as_one(tmp_path):
    write(tmp_path, "first")
    with dev(tmp_path) as (child, api, log):
        api.wait()
        uuid = launched(api)
        wait_for(lambda: result_of(api, uuid) == ["first", "first"], what="the operation in the history")
        write(tmp_path, "second")
        wait_for(lambda: "app.py changed" in log.read_text(), what="the reload")
        api.wait()
        again = wait_for(lambda: launched(api), what="a launch after the reload")
        wait_for(lambda: result_of(api, again) == ["second", "second"], what="the operation with the new code")
        (exports,) = re.findall(r"^  export (.*)$", log.read_text(), re.MULTILINE)
        named = dict(word.split("=", 1) for word in exports.split())
        lag = [sys.executable, "-m", "kser", "lag", "--format", "json"]
        done = subprocess.run(lag, capture_output=True, text=True, env=environment(**named), timeout=30, check=False)
        assert done.returncode == 0, done.stderr
        started = children_of(child.pid)
        assert len(started) >= 3  # broker, worker, API
        listing = ["ps", "-ww", "-o", "args=", "-p", ",".join(map(str, started))]
        shown = subprocess.run(listing, capture_output=True, text=True, check=True)
        assert "kser web" in shown.stdout
        assert "sqlite:" not in shown.stdout  # a URL may have a password
        child.send_signal(signal.SIGINT)
        assert child.wait(30) == 0
        wait_for(lambda: not any(map(alive, started)), what="all of it to end")
    text = log.read_text()
    for told in (
        "in memory",
        "group dev, topics shop (6 partitions)",
        "sqlite:///kser-dev.db",
    ):
        assert told in text


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGHUP, marks=pytest.mark.long)])
def test_kser_dev_that_cannot_end_in_peace_leaves_nothing_behind(tmp_path, number):
    write(tmp_path, "x")
    with dev(tmp_path, "--no-reload") as (child, api, _):
        api.wait()
        started = children_of(child.pid)
        child.send_signal(number)
        wait_for(lambda: not any(map(alive, started)), what="all of it to end")


def test_kser_dev_tells_of_a_program_that_cannot_be_loaded(tmp_path):
    (tmp_path / "app.py").write_text("x =\n")
    with dev(tmp_path) as (child, _, log):
        assert child.wait(30) == 2
        assert log.read_text() == "kser: error: app.py:1: SyntaxError: invalid syntax\n"
