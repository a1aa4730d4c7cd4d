"""Events a second that a recorder stores, on sqlite and on PostgreSQL, beside what one worker tells at full speed.

First without a broker, from memory: no-op tasks that belong to no operation (one event each), operations of three
tasks (five events), and the same with each event of an operation in another batch. Then as it is: one worker runs
no-op tasks on a broker at full speed with the default events, and operations of three of them: 2,000 open at any time,
a new one for each that ends, then all begun at once, so that their events lie far apart. When it has ended a recorder
reads what it told from there.
PostgreSQL is one of the tests' own and commits to disk here, as a real one does. Telemetry has only tasks over 0.1 s.
"""

import argparse
import contextlib
import gc
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from pathlib import Path

from common import HERE, ROOT, broker, make_topic, show
from confluent_kafka import Producer
from produce_to_done import envelope
from worker_app import Noop, registry

from kser import Operation
from kser.confluent.producer import Producer as KserProducer
from kser.confluent.transport import ConfluentTransport
from kser.events import EventType, events_topic, read
from kser.storage import get_storage_from_url
from kser.storage.projection import Projection
from kser.storage.recorder import BATCH, Recorder

sys.path.insert(0, str(ROOT))
from tests import postgresql
from tests.recording import Tape, result

#: Operations that are open in a steady stream of them: more, and the worker is no faster.
_OPEN = 2000
#: Longest time that a recorder may take.
_LIMIT_S = 60


def only_events(tape):
    tape.records = [record for record in tape.records if record.topic.endswith(".events")]
    return tape


def lone(count):
    tape = Tape()
    for _ in range(count):
        name = str(uuid.uuid4())
        tape.event("step.done", name, status="SUCCESS", result=result(name), began=tape.now_ms)
    return tape


def operations(count):
    """Events alone, as short tasks tell them: started, three steps, ended."""
    tape = Tape()
    for _ in range(count // 5):
        tape.operation(str(uuid.uuid4()), 3)
    return only_events(tape)


def spread(count):
    """Operations that go on side by side, each event of one in another batch than the one before."""
    tape = operations(count)
    turns = [tape.records[at::5] for at in range(5)]
    size = BATCH // 5
    tape.records = []
    for at in range(0, count // 5 + 4 * size, size):  # the first event of some, with the second of those before
        for turn, records in enumerate(turns):
            tape.records += records[max(at - turn * size, 0) : max(at - turn * size + size, 0)]
    return tape


def in_memory(url, tape):
    storage = get_storage_from_url(url)
    storage.install()
    projection = Projection(storage.database, "c", "shop")
    projection.positions(tape.partitions)
    # As a broker gives them: each partition's in the order of their offsets.
    records = [record._replace(offset=number) for number, record in enumerate(tape.records)]
    gc.collect()
    gc.freeze()  # the records: a recorder does not have those of all time
    began = time.perf_counter()
    for at in range(0, len(records), BATCH):
        projection.apply(records[at : at + BATCH])
    seconds = time.perf_counter() - began
    assert storage.history.count_operations() == storage.history.count_operations(states=["SUCCESS"]) > 0
    storage.uninstall()
    storage.close()
    return len(records) / seconds


def worker(bootstrap, topic, group, count):
    """Tasks a second of a worker at full speed; when this returns all of its events are in their topic."""
    producer = Producer({"bootstrap.servers": bootstrap, "linger.ms": 5})
    for i in range(count):
        producer.produce(topic, envelope(i, count), partition=0)
        if i % 500 == 0:
            producer.poll(0)
    assert producer.flush(60) == 0
    command = [sys.executable, str(HERE / "peers" / "ours.py"), bootstrap, topic, group, "all"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        times = [int(process.stdout.readline().split()[1]) for _ in range(2)]
        time.sleep(2)  # for those beside the last one, and for the last transactions
        return (count - 1) / (times[1] - times[0]) * 1e9
    finally:
        process.terminate()
        process.wait(30)


def chains(bootstrap, topic, group, count, side_by_side):
    """Events a second that a worker tells of so many operations, of which so many are open; and how many these are."""
    with KserProducer({"bootstrap.servers": bootstrap}) as producer:
        registry.configure(producer=producer, topic=topic)

        def launch(many):
            with producer.batch(timeout=120):
                for _ in range(many):
                    Operation(tasks=[Noop(), Noop(), Noop()]).launch()
            return many

        launched = launch(side_by_side)
        command = [sys.executable, "-m", "kser", "worker", "benchmarks/worker_app.py:registry", "--topics", topic]
        process = subprocess.Popen(
            [*command, "--group", group, "--bootstrap-servers", bootstrap, "--log-level", "error"], cwd=ROOT
        )
        try:
            transport = ConfluentTransport({"bootstrap.servers": bootstrap})
            while not transport.admin().describe([events_topic(group)]):
                time.sleep(0.2)
            reader = transport.reader([events_topic(group)], start="beginning")
            times, ended, limit = [], 0, time.monotonic() + _LIMIT_S
            while ended < count and time.monotonic() < limit:
                for event in read(reader.poll(0.02)):
                    times.append(event.at)
                    ended += event.type == EventType.OPERATION_ENDED
                if launched < count and (room := ended + side_by_side - launched) > 0:
                    launched += launch(min(room, count - launched, 500))
            reader.close()
        finally:
            process.terminate()
            process.wait(60)
    assert ended == count
    return len(times) / (max(times) - min(times)) * 1000, len(times)


def from_broker(bootstrap, group, url, events, operations):
    """Events a second of Recorder.run(), from when it has stored its first batch."""
    storage = get_storage_from_url(url)
    storage.install()
    recorder = Recorder(ConfluentTransport({"bootstrap.servers": bootstrap}), storage, group=group)
    thread = threading.Thread(target=recorder.run)
    thread.start()
    try:
        limit = time.monotonic() + _LIMIT_S
        while not (first := recorder.recorded) and time.monotonic() < limit:
            time.sleep(0.001)
        began = time.perf_counter()
        while recorder.recorded < events and time.monotonic() < limit:
            time.sleep(0.002)
        seconds = time.perf_counter() - began
        rate = (recorder.recorded - first) / seconds
        while storage.history.count_operations(states=["SUCCESS"]) != operations:  # what workers tell was counted too
            assert time.monotonic() < limit, f"{recorder.recorded} recorded"
            time.sleep(0.1)
    finally:
        recorder.stop()
        thread.join(30)
    storage.uninstall()
    storage.close()
    return rate


@contextlib.contextmanager
def databases():
    """Name and URL of each."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as closing:
        urls = {"sqlite": f"sqlite:///{Path(folder) / 'kser.db'}"}
        if reason := postgresql.unavailable():
            print(f"PostgreSQL: left out, {reason}")
        else:
            server = {"fsync": "on", "synchronous_commit": "on", "full_page_writes": "on", "shared_buffers": "128MB"}
            postgresql.SETTINGS.update(server)  # as it is by default
            urls["PostgreSQL"] = closing.enter_context(postgresql.PostgreSQL()).url("bench_")
        yield urls


def main(kind, count):
    in_memory("memory:", operations(1000))  # imports and caches
    with databases() as urls:
        for name, tape in {"tasks": lone(count), "operations": operations(count), "spread": spread(count)}.items():
            for database, url in urls.items():
                show(f"from memory, {name}, {database}", in_memory(url, tape), "events/s")
        if kind == "none":
            return
        with broker(kind) as bootstrap:
            topic, group = make_topic(bootstrap), f"bench-{uuid.uuid4().hex[:8]}"
            rate = worker(bootstrap, topic, group, count)
            gc.collect()
            gc.freeze()
            show("one worker, no-op tasks, default events", rate, "events/s")
            for database, url in urls.items():
                stored = from_broker(bootstrap, group, url, count, count)
                show(f"one recorder, {database}", stored, "events/s", f"{stored / rate:.2f} of the worker")
            many = count // 5
            for side_by_side in (_OPEN, many):
                topic, group = make_topic(bootstrap), f"bench-{uuid.uuid4().hex[:8]}"
                rate, events = chains(bootstrap, topic, group, many, side_by_side)
                show(f"one worker, {side_by_side} operations open of {many}, default events", rate, "events/s")
                for database, url in urls.items():
                    stored = from_broker(bootstrap, group, url, events, many)
                    show(f"one recorder, {database}", stored, "events/s", f"{stored / rate:.2f} of the worker")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--broker", default="apache", help="apache, embedded, host:port of one that runs, or none")
    parser.add_argument("--count", type=int, default=40_000, help="events")
    given = parser.parse_args()
    main(given.broker, given.count)
