"""Processes of kser under test, and what they leave in the topics."""

import contextlib
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from kser.confluent.transport import ConfluentTransport
from kser.events import Event, OperationView, events_topic, read
from kser.transport import Partition, Record, TopicSpec
from kser.worker.offsets import decode

ROOT = Path(__file__).resolve().parent.parent
DICE = "tests.apps.dice:registry"


def environment(**more: str) -> dict[str, str]:
    """The environment of a child: this one, with the repository importable and nothing buffered."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **more}


def wait_for(condition: Callable[[], object], seconds: float = 30, what: str = "it") -> object:
    """The first true value of ``condition``. Fails the test after ``seconds``."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        time.sleep(0.05)
    raise AssertionError(f"{what} did not happen within {seconds} s")


@contextlib.contextmanager
def process(*command: str, log: Path, **more: str) -> Iterator[subprocess.Popen[bytes]]:
    """A child whose output goes to ``log``; ended, if need be by force, at the end of the block."""
    with log.open("ab") as out:
        child = subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env=environment(**more),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    try:
        yield child
    finally:
        if child.poll() is None:
            child.terminate()
            try:
                child.wait(15)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait(15)


def worker(bootstrap: str, topic: str, group: str, log: Path, name: str, *options: str, app: str = DICE):
    """A `kser worker` process."""
    return process(
        *("-m", "kser", "worker", app, "--topics", topic, "--group", group, "--name", name, "--drain", "10"),
        *("--bootstrap-servers", bootstrap, *options),
        *("-X", "session.timeout.ms=6000", "-X", "heartbeat.interval.ms=1000"),  # a killed member is missed soon
        log=log,
    )


def ready(port: int | str) -> dict[str, Any] | None:
    """What the /readyz of a worker with ``--health`` says; None while it says no."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as exc:
        exc.close()
    except OSError:
        pass
    return None


def new_topic(bootstrap: str, partitions: int = 1) -> str:
    """A new topic on Apache Kafka."""
    name = f"t{uuid.uuid4().hex[:10]}"
    admin = ConfluentTransport({"bootstrap.servers": bootstrap}).admin()
    assert admin.create([TopicSpec(name=name, partitions=partitions)]) == [name]
    wait_for(lambda: admin.describe([name]), what=f"topic {name}")
    return name


def records(bootstrap: str, topic: str) -> list[Record]:
    """All that is in a topic now."""
    reader = ConfluentTransport({"bootstrap.servers": bootstrap}).reader([topic], start="beginning")
    found: list[Record] = []
    end = time.monotonic() + 20
    while time.monotonic() < end:
        found += reader.poll(0.2)
        if reader.at_end():
            break
    reader.close()
    return found


def unfinished(bootstrap: str, group: str, topic: str, partitions: int) -> int:
    """How many records of a topic the group has not settled; markers of transactions count as records."""
    source = ConfluentTransport({"bootstrap.servers": bootstrap}).source(group)
    try:
        left = 0
        for position in source.committed([Partition(topic, number) for number in range(partitions)]):
            end = source.watermarks(position.of)[1]
            if position.offset < 0:
                left += end
                continue
            found = decode(position.offset, position.metadata)
            left += end - max(found.end, position.offset) + len(found.unfinished)
        return left
    finally:
        source.close()


def events(bootstrap: str, group: str) -> list[Event]:
    """All events of a group so far, each once."""
    unique = {event.identity: event for event in read(records(bootstrap, events_topic(group)))}
    return list(unique.values())


def views(bootstrap: str, group: str) -> dict[str, OperationView]:
    """What the events say of each operation."""
    found: dict[str, OperationView] = {}
    for event in events(bootstrap, group):
        found.setdefault(event.key, OperationView(event.key)).apply(event)
    return found
