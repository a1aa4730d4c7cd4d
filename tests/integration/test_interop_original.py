"""The original kser 0.8.27, from the package index, in an environment of its own: both ways over Apache Kafka."""

import json
import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from kser import Message, Result
from kser.confluent.producer import Producer
from tests.needs import need
from tests.processes import new_topic, views, wait_for, worker

pytestmark = [pytest.mark.apache, pytest.mark.timeout(300)]  # the first run makes the environment

CACHE = Path(os.environ.get("KSER_ORIGINAL_CACHE") or Path.home() / ".cache" / "kser" / "original-0.8.27")
WANTED = ["kser==0.8.27", "confluent-kafka", "kafka-python", "marshmallow<4"]

SEND = """
import sys, uuid
from cdumay_result import Result
from kser.schemas import Message
from kser.{driver}.producer import Producer
pro = Producer({config})
message = Message(uuid=sys.argv[1], entrypoint="dice.Roll", params={{"n": 7, "who": "\\u00e9\\u4e16"}},
                  result=Result(uuid=sys.argv[1], stdout="before", retval={{"kept": [1, None, 2.5]}}))
result = pro.send({topic!r}, message)
assert result.retcode == 0, result
"""

CONSUME = """
import json, os, sys
os.environ["RUNNING_FILE"] = "/dev/null"
from kser.confluent.consumer import Consumer
from kser.controller import Controller
from kser.entry import Entrypoint
from cdumay_result import Result
class Show(Entrypoint):
    def run(self):
        print(json.dumps({{"uuid": self.uuid, "params": self.params, "retval": self.result.retval,
                           "metadata": self.metadata}}), flush=True)
        return Result(uuid=self.uuid, stdout="seen")
Controller.register("dice.Show", Show)
Consumer({{"bootstrap.servers": {bootstrap!r}, "group.id": "original", "auto.offset.reset": "earliest"}},
         [{topic!r}]).run()
"""


@pytest.fixture(scope="module")
def original() -> str:
    """The interpreter of an environment with kser 0.8.27."""
    python = CACHE / "bin" / "python"
    if not (CACHE / ".done").exists():
        CACHE.parent.mkdir(parents=True, exist_ok=True)
        made = subprocess.run([sys.executable, "-m", "venv", "--clear", str(CACHE)], capture_output=True, timeout=120)
        install = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", *WANTED]
        if made.returncode == 0:
            made = subprocess.run(install, capture_output=True, timeout=600, text=True)
        if made.returncode:
            need("a package index", f"kser 0.8.27 cannot be installed: {str(made.stderr)[-300:]}")
        (CACHE / ".done").touch()
    return str(python)


def run_original(python: str, program: str, *arguments: str, path: Path) -> subprocess.CompletedProcess[str]:
    path.write_text(program)
    # Isolated (-I): the repository's own kser must not be found first.
    return subprocess.run([python, "-I", str(path), *arguments], capture_output=True, text=True, timeout=90)


@pytest.mark.parametrize("driver", ["confluent", "python_kafka"])
def test_a_message_of_the_original_producer_is_run_by_our_worker(original, apache, tmp_path, driver):
    bootstrap = apache.bootstrap_servers
    topic, group, name = new_topic(bootstrap), f"g{uuid.uuid4().hex[:8]}", str(uuid.uuid4())
    config = {"bootstrap.servers": bootstrap} if driver == "confluent" else {"bootstrap_servers": bootstrap}
    if driver == "python_kafka":  # its producer of 0.8.27 has the same interface under the other driver's options
        config["api_version"] = (2, 6)
    program = SEND.format(driver=driver, config=config, topic=topic)
    sent = run_original(original, program, name, path=tmp_path / "send.py")
    assert sent.returncode == 0, sent.stderr[-2000:]
    with worker(bootstrap, topic, group, tmp_path / "log", "w"):
        view = wait_for(lambda: (v := views(bootstrap, group).get(name)) and v.ended and v, 40, "the task")
    assert view.status == "SUCCESS"
    assert view.result.retval == {"kept": [1, None, 2.5], "roll7": 4}


def test_a_message_of_our_producer_is_run_by_the_original_consumer(original, apache, tmp_path):
    bootstrap = apache.bootstrap_servers
    topic, name = new_topic(bootstrap), str(uuid.uuid4())
    params = {"text": "é世", "number": 2**70, "nested": {"a": [None, True]}}
    with Producer({"bootstrap.servers": bootstrap}) as producer:
        message = Message(name, "dice.Show", params, Result(uuid=name, retval={"before": 1}), {"context": "kept"})
        assert producer.send(topic, message).retcode == 0
    log, program = tmp_path / "log", tmp_path / "consume.py"
    program.write_text(CONSUME.format(bootstrap=bootstrap, topic=topic))
    with log.open("wb") as out:
        child = subprocess.Popen([original, "-I", "-u", str(program)], stdout=out, stderr=subprocess.STDOUT)
    try:
        wait_for(lambda: b"\n" in log.read_bytes(), 40, "the original's run")
    finally:
        child.kill()
        child.wait(10)
    seen = json.loads(log.read_text().splitlines()[0])
    assert seen == {"uuid": name, "params": params, "retval": {"before": 1}, "metadata": {"context": "kept"}}
