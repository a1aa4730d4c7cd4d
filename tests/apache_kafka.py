"""A real Apache Kafka for tests, and for a person to play with: ``python -m tests.apache_kafka --help``.

One or three nodes in KRaft mode, on free ports of 127.0.0.1, with their data in a temporary folder. The first use
fetches Kafka through Maven (tests/kafka_jars.py). All of it goes with the process that made it, also when that is
killed: tests/keeper.py.
"""

import argparse
import base64
import contextlib
import json
import os
import random
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NoReturn, Self

from confluent_kafka import Consumer, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, ClusterMetadata, NewTopic

from tests import kafka_jars
from tests.kafka_jars import KAFKA_VERSION, KafkaUnavailableError, unavailable

__all__ = ["ApacheKafka", "KafkaStartError", "KafkaUnavailableError", "unavailable"]

#: Partitions of a topic for which nobody says how many; that of the embedded broker too.
DEFAULT_PARTITIONS = 4
FOLDER_PREFIX = "kser-kafka-"
START_TIMEOUT_S = 90
ANSWER_TIMEOUT_S = 30
ATTEMPTS = 3
TAIL_LINES = 30

LOG4J = """\
status=error
appenders=console
appender.console.type=Console
appender.console.name=C
appender.console.layout.type=PatternLayout
appender.console.layout.pattern=[%d] %p %m (%c)%n
rootLogger.level=warn
rootLogger.appenderRefs=c
rootLogger.appenderRef.c.ref=C
"""

#: Small, and quick where the defaults are made for production: a test waits for each of these times.
SETTINGS: Mapping[str, object] = {
    "process.roles": "broker,controller",
    "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
    "controller.listener.names": "CONTROLLER",
    "inter.broker.listener.name": "PLAINTEXT",
    "num.partitions": DEFAULT_PARTITIONS,
    "auto.create.topics.enable": "false",
    "offsets.topic.num.partitions": 4,
    "transaction.state.log.num.partitions": 4,
    "share.coordinator.state.topic.num.partitions": 4,
    # A join waits for nobody; a dead broker is noticed after 3 s, a dead member of a group as soon as it asked for.
    "group.initial.rebalance.delay.ms": 0,
    "broker.session.timeout.ms": 3000,
    "broker.heartbeat.interval.ms": 500,
    "group.min.session.timeout.ms": 1000,
    "group.consumer.min.session.timeout.ms": 3000,
    "group.consumer.session.timeout.ms": 6000,
    "group.consumer.min.heartbeat.interval.ms": 500,
    "group.consumer.heartbeat.interval.ms": 1000,
    "transaction.abort.timed.out.transaction.cleanup.interval.ms": 1000,
    "num.network.threads": 2,
    "num.io.threads": 2,
    "background.threads": 2,
    "log.cleaner.dedupe.buffer.size": 4 << 20,
    "log.segment.bytes": 16 << 20,
    "offsets.topic.segment.bytes": 4 << 20,
    "transaction.state.log.segment.bytes": 4 << 20,
}


class KafkaStartError(Exception):
    """Apache Kafka is here but does not come up; the text ends with the last lines of its log."""


class PortTakenError(KafkaStartError):
    """Somebody else listens on a port that was free a moment ago."""


class Keeper:
    """This process's side of tests/keeper.py. May be shared by threads.

    Args:
        prefix: of the name of its folder.
    """

    def __init__(self, prefix: str = FOLDER_PREFIX) -> None:
        command = [sys.executable, "-I", "-S", str(Path(__file__).with_name("keeper.py")), str(os.getpid())]
        self._process = subprocess.Popen(
            [*command, prefix],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            # Out of reach of Ctrl-C and of a signal to the whole test run: Kafka ends when its user has ended.
            start_new_session=True,
        )
        self._buffer = b""
        self._lock = threading.Lock()
        self.folder = Path(self._answer())

    def call(self, name: str, *args: Any) -> Any:
        assert self._process.stdin is not None
        with self._lock:
            # A keeper that is gone is told of by _answer(), with its exit code.
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.write(json.dumps({"call": name, "args": args}).encode() + b"\n")
            return self._answer()

    def close(self) -> None:
        """End what it keeps. A second call does nothing."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        if self._process.stdin.closed:
            return
        # The end of its stdin is not enough: a process that this one has forked may hold a copy.
        with contextlib.suppress(OSError, KafkaStartError):
            self.call("close")
        self._process.stdin.close()
        try:
            self._process.wait(ANSWER_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        deadline = time.monotonic() + ANSWER_TIMEOUT_S
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise KafkaStartError(f"tests/keeper.py did not answer within {ANSWER_TIMEOUT_S} s")
                chunk = os.read(self._process.stdout.fileno(), 65536)
                if not chunk:
                    raise KafkaStartError(f"tests/keeper.py ended with exit code {self._process.wait()}")
                self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        answer = json.loads(line)
        if "error" in answer:
            raise KafkaStartError(answer["error"])
        return answer["ok"]


class ApacheKafka:
    """An Apache Kafka of its own, up and ready for groups and transactions when this returns, gone at stop().

    Args:
        nodes: 1 or 3; their ids are 1 to ``nodes``. With three, topics have three copies and need two to write.
        port: the port of node 1, the next ones for the others; None takes free ones.
        settings: broker settings beside or instead of SETTINGS.

    Raises:
        KafkaUnavailableError: what it needs is missing here, or it could not be fetched.
        KafkaStartError: it did not come up; the text has the tail of its log.
    """

    def __init__(
        self,
        nodes: int = 1,
        *,
        port: int | None = None,
        settings: Mapping[str, object] | None = None,
        start_timeout_s: float = START_TIMEOUT_S,
    ) -> None:
        self.nodes = nodes
        self._settings = dict(settings or {})
        self._timeout_s = start_timeout_s
        self._classpath = f"{kafka_jars.fetch()}/*"
        for attempt in range(1, ATTEMPTS + 1):
            self._ports = free_ports(nodes, port)
            self._controller_ports = free_ports(nodes, None, taken=self._ports)
            self._running: dict[int, int] = {}
            self._keeper = Keeper()
            self._stopped = False
            try:
                self._start()
            except PortTakenError:
                self.stop()
                if port is not None or attempt == ATTEMPTS:
                    raise
            except BaseException:
                self.stop()
                raise
            else:
                return

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def bootstrap_servers(self) -> str:
        """The addresses for clients: host:port of each node, separated by commas, dead ones too."""
        return ",".join(f"127.0.0.1:{port}" for port in self._ports)

    @property
    def pids(self) -> dict[int, int]:
        """The process ids of the nodes that run, by node id."""
        return {node: pid for node, pid in self._running.items() if self._exit_code(node) is None}

    @property
    def folder(self) -> Path:
        """Where data, configuration and logs are until stop()."""
        return self._keeper.folder

    def log_tail(self, node: int, lines: int = TAIL_LINES) -> str:
        """The last lines of a node's log."""
        log = self.folder / f"node{node}.log"
        return "\n".join(log.read_text(errors="replace").splitlines()[-lines:]) if log.exists() else ""

    def kill(self, node: int) -> None:
        """kill -9 of a node; returns when it is dead."""
        self._end_node(node, signal.SIGKILL)

    def stop_node(self, node: int) -> None:
        """Shut a node down in order, as a rolling restart does; returns when it has ended."""
        self._end_node(node, signal.SIGTERM)

    def start_node(self, node: int) -> None:
        """Start a node that was killed or stopped, on its data and ports; returns when its copies have caught up."""
        if node in self.pids:
            raise ValueError(f"node {node} runs already")
        self._spawn(node)
        self._wait_whole(time.monotonic() + self._timeout_s)

    def restore(self) -> None:
        """Start all nodes that do not run."""
        alive = self.pids
        for node in set(range(1, self.nodes + 1)) - set(alive):
            self._spawn(node)
        if len(alive) < self.nodes:
            self._wait_whole(time.monotonic() + self._timeout_s)

    def create_topic(
        self,
        name: str,
        partitions: int = DEFAULT_PARTITIONS,
        *,
        replication: int | None = None,
        config: Mapping[str, str] | None = None,
    ) -> None:
        """Make a topic; returns when each of its partitions has a leader. ``replication``: a copy on each node."""
        topic = NewTopic(name, partitions, replication or self.nodes, config=dict(config or {}))
        self.admin.create_topics([topic])[name].result(ANSWER_TIMEOUT_S)

        def led(metadata: ClusterMetadata) -> bool:
            found = metadata.topics.get(name)
            return (
                found is not None
                and len(found.partitions) == partitions
                and all(partition.leader > 0 for partition in found.partitions.values())
            )

        self._wait_metadata(time.monotonic() + ANSWER_TIMEOUT_S, f"topic {name} has leaders", led)

    def stop(self) -> None:
        """End all nodes, with kill -9, and remove their data. A second call does nothing."""
        if not self._stopped:
            self._stopped = True
            self._running.clear()
            self._keeper.close()

    def _start(self) -> None:
        deadline = time.monotonic() + self._timeout_s
        (self.folder / "log4j2.properties").write_text(LOG4J)
        # One that begins with "-" is taken for an option by the tool.
        cluster_id = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=").replace("-", "_")
        for node in range(1, self.nodes + 1):
            self._properties(node).write_text(self._configuration(node))
            tool = ["kafka.tools.StorageTool", "format", "-t", cluster_id, "-c", str(self._properties(node))]
            self._java(f"format{node}", ["-Xmx256m", "-XX:TieredStopAtLevel=1"], tool)
        for node in range(1, self.nodes + 1):
            self._wait_formatted(node, deadline)
            self._spawn(node)
        # It logs nothing: a node that is killed on purpose is no news, and stderr is the test's.
        self.admin = AdminClient({"bootstrap.servers": self.bootstrap_servers, "log_level": 0})
        self._wait_whole(deadline)
        self._wait_coordinators(deadline)

    def _configuration(self, node: int) -> str:
        copies, needed = (3, 2) if self.nodes >= 3 else (1, 1)
        settings = {
            **SETTINGS,
            "node.id": node,
            "controller.quorum.voters": ",".join(
                f"{voter}@127.0.0.1:{port}" for voter, port in enumerate(self._controller_ports, 1)
            ),
            "listeners": f"PLAINTEXT://127.0.0.1:{self._ports[node - 1]},"
            f"CONTROLLER://127.0.0.1:{self._controller_ports[node - 1]}",
            "advertised.listeners": f"PLAINTEXT://127.0.0.1:{self._ports[node - 1]}",
            "log.dirs": self.folder / f"data{node}",
            "default.replication.factor": copies,
            "min.insync.replicas": needed,
            "offsets.topic.replication.factor": copies,
            "transaction.state.log.replication.factor": copies,
            "transaction.state.log.min.isr": needed,
            "share.coordinator.state.topic.replication.factor": copies,
            "share.coordinator.state.topic.min.isr": needed,
            **self._settings,
        }
        return "".join(f"{name}={value}\n" for name, value in settings.items())

    def _properties(self, node: int) -> Path:
        return self.folder / f"node{node}.properties"

    def _java(self, name: str, options: list[str], command: list[str]) -> int:
        java = kafka_jars.java()
        if java is None:
            raise KafkaUnavailableError("no java on PATH")
        options = [*options, "-XX:+UseSerialGC", "-Djava.awt.headless=true", f"-Dkafka.logs.dir={self.folder}"]
        options += [f"-Dlog4j2.configurationFile=file:{self.folder}/log4j2.properties", "-cp", self._classpath]
        pid: int = self._keeper.call("spawn", name, [java, *options, *command], str(self.folder / f"{name}.log"))
        return pid

    def _spawn(self, node: int) -> None:
        command = ["kafka.Kafka", str(self._properties(node))]
        self._running[node] = self._java(f"node{node}", ["-Xms256m", "-Xmx512m"], command)

    def _exit_code(self, node: int) -> int | None:
        code: int | None = self._keeper.call("poll", f"node{node}")
        return code

    def _end_node(self, node: int, number: signal.Signals) -> None:
        if node not in self._running:
            raise ValueError(f"node {node} does not run: {sorted(self._running)} do")
        self._keeper.call("signal", f"node{node}", number)
        deadline = time.monotonic() + self._timeout_s
        while self._exit_code(node) is None:
            if time.monotonic() > deadline:
                raise KafkaStartError(f"node {node} has not ended {self._timeout_s} s after {number.name}")
            time.sleep(0.02)
        del self._running[node]

    def _wait_formatted(self, node: int, deadline: float) -> None:
        while (code := self._keeper.call("poll", f"format{node}")) is None:
            if time.monotonic() > deadline:
                raise KafkaStartError(f"the folder of node {node} was not formatted within {self._timeout_s} s")
            time.sleep(0.02)
        if code:
            log = (self.folder / f"format{node}.log").read_text(errors="replace")
            raise KafkaStartError(f"the folder of node {node} could not be formatted, exit code {code}:\n{log}")

    def _check_alive(self) -> None:
        for node in self._running:
            if (code := self._exit_code(node)) is not None:
                tail = self.log_tail(node)
                kind = PortTakenError if "Address already in use" in tail else KafkaStartError
                raise kind(f"node {node} of Apache Kafka ended with exit code {code}:\n{tail}")

    def _wait_whole(self, deadline: float) -> None:
        """Wait until each running node is known and every copy that is on a running node is in sync."""
        running = set(self._running)

        def whole(metadata: ClusterMetadata) -> bool:
            partitions = [p for topic in metadata.topics.values() for p in topic.partitions.values()]
            return set(metadata.brokers) == running and all(
                p.leader in running and running.intersection(p.replicas) <= set(p.isrs) for p in partitions
            )

        self._wait_metadata(deadline, f"nodes {sorted(running)} are in sync", whole)

    def _wait_metadata(self, deadline: float, what: str, good: Callable[[ClusterMetadata], bool]) -> None:
        seen = "no broker answers"
        while True:
            self._check_alive()
            try:
                metadata = self.admin.list_topics(timeout=1)
            except KafkaException as error:
                seen = str(error)
            else:
                if good(metadata):
                    return
                seen = f"brokers {sorted(metadata.brokers)}, topics {sorted(metadata.topics)}"
            if time.monotonic() > deadline:
                tails = "\n".join(f"node {node}:\n{self.log_tail(node)}" for node in self._running)
                raise KafkaStartError(f"waited in vain until {what}; last seen: {seen}\n{tails}")
            time.sleep(0.05)

    def _wait_coordinators(self, deadline: float) -> None:
        """Use a group and a transactional id once: their topics are made now, and not while a test waits."""
        common = {"bootstrap.servers": self.bootstrap_servers, "log_level": 0}
        consumer = Consumer({**common, "group.id": "kser-harness"})
        producer = Producer({**common, "transactional.id": "kser-harness", "retry.backoff.ms": 20})
        calls: list[Callable[[], object]] = [
            lambda: consumer.committed([TopicPartition("kser-harness", 0)], timeout=5),
            lambda: producer.init_transactions(5),
        ]
        try:
            with ThreadPoolExecutor(len(calls)) as pool:
                list(pool.map(lambda call: self._retry(deadline, call), calls))
        finally:
            consumer.close()

    def _retry(self, deadline: float, call: Callable[[], object]) -> None:
        while True:
            try:
                call()
            except KafkaException as error:
                self._check_alive()
                if time.monotonic() > deadline:
                    raise KafkaStartError(f"Apache Kafka is up, but a coordinator is not: {error}") from error
                time.sleep(0.05)
            else:
                return


def free_ports(count: int, first: int | None, *, taken: list[int] | None = None) -> list[int]:
    """Ports that nobody listens on now: from ``first`` on, else any but ``taken``.

    Below the range that the kernel takes for outgoing connections: a client that tries a dead node again and again
    on a port of that range would one day be given the very port as its own, and then the node cannot start again.
    """
    if first is not None:
        for port in range(first, first + count):
            if not _is_free(port):
                raise PortTakenError(f"port {port} is in use: end what listens there, or take another --port")
        return list(range(first, first + count))
    low, high = 20000, min(_outgoing_from(), 32768)
    found: list[int] = []
    for port in random.sample(range(low, high), high - low) if high - low >= 1000 else [0] * 100:
        chosen = port or _any_port()
        if chosen not in found and chosen not in (taken or []) and _is_free(chosen):
            found.append(chosen)
        if len(found) == count:
            return found
    raise KafkaStartError(f"no {count} free ports on 127.0.0.1")


def _outgoing_from() -> int:
    try:
        return int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except OSError:  # not Linux: the standard says 49152
        return 49152


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def _any_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def main(arguments: list[str] | None = None) -> int:
    """Run one in the foreground until Ctrl-C or SIGTERM; the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.apache_kafka",
        description=f"Run Apache Kafka {KAFKA_VERSION} on this machine, in the foreground, with nothing kept.",
        epilog="example: python -m tests.apache_kafka --nodes 3 --port 19092",
    )
    parser.add_argument("--nodes", type=int, choices=(1, 3), default=1, help="how many nodes (1)")
    parser.add_argument("--port", type=int, help="port of the first node, the next ones for the others (free ones)")
    options = parser.parse_args(arguments)
    if options.port is not None and not 1024 <= options.port <= 65535 - options.nodes:
        parser.error(f"--port {options.port}: take one of 1024 to {65535 - options.nodes}")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _end)
    try:
        return _run(options.nodes, options.port)
    except KafkaUnavailableError as error:
        print(f"Apache Kafka cannot run here: {error}; {kafka_jars.CURE}", file=sys.stderr)
    except KafkaStartError as error:
        print(error, file=sys.stderr)
    return 1


def _run(nodes: int, port: int | None) -> int:
    if not kafka_jars.cached() and not unavailable():
        print(f"Fetching Apache Kafka {KAFKA_VERSION} through Maven, once, into {kafka_jars.folder()} ...", flush=True)
    with ApacheKafka(nodes, port=port, settings={"auto.create.topics.enable": "true"}) as kafka:
        first = kafka.bootstrap_servers.partition(",")[0]
        print(
            f"Apache Kafka {KAFKA_VERSION} is up: {kafka.bootstrap_servers}\n"
            f"The first use of a topic name makes {DEFAULT_PARTITIONS} partitions; to have another number:\n"
            f"  kser topics create --topics NAME:6 --bootstrap-servers {first}\n"
            f"Logs and data: {kafka.folder}. Ctrl-C ends it, and nothing is kept.",
            flush=True,
        )
        while len(kafka.pids) == nodes:
            threading.Event().wait(1)
        dead = min(set(range(1, nodes + 1)) - set(kafka.pids))
        print(f"node {dead} has ended by itself:\n{kafka.log_tail(dead)}", file=sys.stderr)
        return 1


def _end(number: int, frame: FrameType | None) -> NoReturn:
    # Once is enough: a second Ctrl-C must not break off the clean end of the first.
    for other in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(other, lambda *_: None)
    raise SystemExit(0)


if __name__ == "__main__":
    sys.exit(main())
