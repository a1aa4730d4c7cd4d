"""Workers and recorders under kill -9; then the storage is compared with the topics. With real processes."""

import contextlib
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Self

from kser.confluent.producer import Producer
from kser.confluent.transport import ConfluentTransport
from kser.events import Event, events_topic, read
from kser.storage import get_storage_from_url
from kser.storage.recorder import topics_of
from kser.storage.sql import SqlStorage
from kser.transport import Partition, Record
from tests.apps.three import Three, registry
from tests.brokers import unique
from tests.processes import ROOT, environment, wait_for
from tests.recording import differences, read_topic, snapshot

__all__ = ["Recording"]

#: A killed member of a group is missed after so long.
SESSION = ("-X", "session.timeout.ms=6000", "-X", "heartbeat.interval.ms=1000")
APP = "tests.apps.three:registry"
WORKERS = ("w1", "w2")
RECORDERS = ("r1", "r2")


class Recording:
    """Two workers and two recorders on a broker, and a storage. All processes end with the block.

    Args:
        bootstrap: addresses of the broker.
        url: of the storage.
        logs: folder for the logs of the processes.
        topic: with its partitions; the group has the same name.
        properties: of the clients, as options of the command line.
    """

    def __init__(self, bootstrap: str, url: str, logs: Path, topic: str, properties: Sequence[str] = SESSION) -> None:
        self.bootstrap = bootstrap
        self.url = url
        self.topic = self.group = topic
        self._logs = logs
        self._properties = properties
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self.transport = ConfluentTransport({"bootstrap.servers": bootstrap, "log_level": 0})
        self.launched: list[str] = []
        self.kills = 0

    def __enter__(self) -> Self:
        for name in (*WORKERS, *RECORDERS):
            self.start(name)
        return self

    def __exit__(self, *exc_info: object) -> None:
        for process in self._processes.values():
            process.terminate()
        for process in self._processes.values():
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(20)

    def start(self, name: str) -> None:
        """Start a worker or recorder."""
        if name in WORKERS:
            command = ["worker", APP, "--topics", self.topic, "--drain", "5", "--no-relay"]
        else:
            command = ["recorder", "--storage", self.url]
        servers = ["--group", self.group, "--bootstrap-servers", self.bootstrap, *self._properties]
        with (self._logs / f"{name}.log").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                [sys.executable, "-m", "kser", *command, *servers],
                cwd=ROOT,
                env=environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def launch(self, number: int) -> None:
        """Launch so many operations, one in five of which fails at its second step."""
        with Producer({"bootstrap.servers": self.bootstrap, "log_level": 0}) as producer:
            registry.configure(producer=producer, topic=self.topic)
            for at in range(0, number, 50):
                some = [Three(params={"fails": (at + n) % 5 == 0}).build() for n in range(min(50, number - at))]
                with producer.batch():
                    for operation in some:
                        operation.launch()
                self.launched += [operation.uuid for operation in some]

    def kill_until(self, done: Callable[[], bool], *, seed: int, pace_s: float, limit_s: float) -> None:
        """kill -9 of one process after the other, each started again at once, until ``done``."""
        draw, end = random.Random(seed), time.monotonic() + limit_s
        while not done():
            assert time.monotonic() < end, f"not done after {limit_s} s and {self.kills} kills"
            name = draw.choice((*WORKERS, *RECORDERS))
            self._processes[name].kill()
            self._processes[name].wait(20)
            self.kills += 1
            self.start(name)
            time.sleep(draw.uniform(0.5, 1.5) * pace_s)

    # -- what came of it -----------------------------------------------------------------------------------------------

    def records(self) -> list[Record]:
        """All that was told so far."""
        there = self.transport.admin().describe(topics_of(self.group))
        return [record for topic in there for record in read_topic(self.transport, topic)]

    def events(self) -> list[Event]:
        """The events so far."""
        return list(read(read_topic(self.transport, events_topic(self.group))))

    def wait_ended(self, timeout_s: float) -> None:
        """Until the topic tells of the end of every operation."""
        wait_for(lambda: self.ended() >= len(self.launched), timeout_s, "the end of every operation")

    def ended(self) -> int:
        """How many operations have ended."""
        if not self.transport.admin().describe([events_topic(self.group)]):
            return 0
        return len({event.uuid for event in self.events() if event.ends} & set(self.launched))

    def wait_recorded(self, storage: SqlStorage, timeout_s: float = 60) -> None:
        """Until the storage has all that was told."""
        ends: dict[Partition, int] = {}
        for record in self.records():
            ends[record.of] = max(ends.get(record.of, 0), record.offset + 1)

        def whole() -> bool:
            stored = {Partition(v.topic, v.partition): v.next_offset for v in storage.history.list_projections()}
            return all(stored.get(partition, 0) >= end for partition, end in ends.items())

        wait_for(whole, timeout_s, "all of it in the storage")

    def compare(self) -> None:
        """The storage tells what the topics tell, step by step, and so does one that is made of them anew."""
        self._end(WORKERS)  # they would go on to tell of themselves
        with self.opened(self.url) as storage:
            self.wait_recorded(storage)
            events = self.events()
            assert differences(storage, events) == []
            self._look(storage)
            kept = snapshot(storage)
            self._end(RECORDERS)
            self.rebuild(self.url, "--rebuild")
            self.wait_recorded(storage)
            assert snapshot(storage) == kept
            with self.opened(f"sqlite:///{self._logs}/{unique()}.db") as fresh:
                self.rebuild(str(fresh.database.engine.url))
                self.wait_recorded(fresh)
                assert snapshot(fresh) == kept

    def rebuild(self, url: str, *options: str) -> None:
        """Record everything once more, in a process that ends when it has."""
        command = ["recorder", "--storage", url, *options, "--group", self.group, "--bootstrap-servers", self.bootstrap]
        with (self._logs / "rebuild.log").open("ab") as log:
            child = subprocess.Popen(
                [sys.executable, "-m", "kser", *command], cwd=ROOT, env=environment(), stdout=log, stderr=log
            )
        try:
            with self.opened(url) as storage:
                wait_for(lambda: storage.version()[0], 30, "the tables")
                if options:
                    wait_for(lambda: self._stored(storage) < len(self.launched) or child.poll(), 30, "the rebuild")
                self.wait_recorded(storage)
        finally:
            child.terminate()
            child.wait(20)

    def _end(self, names: Sequence[str]) -> None:
        processes = [self._processes.pop(name) for name in names]
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait(30)

    def _stored(self, storage: SqlStorage) -> int:
        return len(storage.history.list_projections())

    def _look(self, storage: SqlStorage) -> None:
        """The same through the API that people use."""
        assert storage.history.count_operations(kind="operation") == len(self.launched)
        assert storage.history.count_operations(states=["RUNNING", "PENDING"]) == 0
        failed = storage.history.list_operations(states=["FAILED"], limit=1_000_000)
        assert len(failed) == len(range(0, len(self.launched), 5))
        for uuid in self.launched[:20]:
            found = storage.history.get_operation(uuid)
            steps = [(step.position, step.status) for step in found.tasks]
            good = [(0, "SUCCESS"), (1, "SUCCESS"), (2, "SUCCESS")]
            assert steps == (good if found.status == "SUCCESS" else [(0, "SUCCESS"), (1, "FAILED")])

    @staticmethod
    @contextlib.contextmanager
    def opened(url: str) -> Iterator[SqlStorage]:
        """The storage at this URL, with its tables."""
        storage = get_storage_from_url(url)
        assert isinstance(storage, SqlStorage)
        try:
            storage.prepare()
            yield storage
        finally:
            storage.close()
