"""One run of the fault suite: workers, operations and chaos on a broker, then the verdict."""

import contextlib
import random
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from kser.confluent.embedded import EmbeddedBroker
from kser.confluent.producer import Producer
from kser.errors import DeliveryError
from kser.events import events_topic
from tests.apache_kafka import ApacheKafka
from tests.chaos.app import Outer, registry
from tests.chaos.fleet import Delivery, Fleet, Protocol, Settings
from tests.chaos.judge import Facts, Verdict, judge
from tests.chaos.plan import SLOTS, Step, plan
from tests.chaos.topics import Observer, Tail, committed, group_state, partitions_of, read_all, set_session, wait_stable

__all__ = ["EMBEDDED_SESSION_S", "Chaos", "Outcome", "repeat_command", "run"]

#: Session timeout of groups on the embedded broker.
EMBEDDED_SESSION_S = 6.0
#: Longest time without any new record once the chaos is over. What may come together at worst: a member that is out of
#: step with its coordinator finds out (30 s), drains (5 s), leaves (5 s), joins within a session (3 s), and in the
#: partition there still is an open transaction of a killed worker (10 s and the broker's look for such).
QUIET_S = 60.0
#: Longest time in all after the chaos.
AFTER_S = 600.0
#: How long an open transaction may hold readers back at the end: its timeout (10 s), and the broker's look for such.
OPEN_S = 30.0
#: What a batch of launches may take; a broker may be down meanwhile.
LAUNCH_S = 120.0
#: How long a node that is back is left alone: of one that was not missed nobody knows whether it has caught up.
NODE_REST_S = 8.0
#: What a killed node may take until it has caught up.
NODE_S = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Chaos:
    """What to do. The same values give the same plan, the same operations and the same times."""

    seed: int
    operations: int
    #: How long operations are launched and faults are made.
    seconds: float
    delivery: Delivery
    protocol: Protocol
    #: Session timeout of the group; the embedded broker has one of its own, which must be told here.
    session_s: float = 3.0
    #: Mean time between two faults.
    pace_s: float = 8.0
    partitions: int = 6
    #: Kill nodes of the broker too.
    brokers: bool = True
    #: Static members (--name); None: the seed decides.
    named: bool | None = None
    #: Share of the operations that have a task of 0.5 to 2 s.
    slow: float = 0.03
    log_level: str = "warning"


@dataclass(slots=True)
class Outcome:
    """What became of a run."""

    verdict: Verdict
    #: How often each thing was done.
    done: dict[str, int]
    seconds: float
    #: Longest time that a worker took to end after SIGTERM.
    slowest_end_s: float
    log: list[str] = field(default_factory=list)


def run(
    chaos: Chaos,
    broker: ApacheKafka | EmbeddedBroker,
    *,
    logs: Path | None = None,
    out: Callable[[str], object] | None = None,
) -> Outcome:
    """Run it, to the verdict.

    Args:
        chaos: what to do.
        broker: where; its killed nodes run again when this returns.
        logs: folder for the logs of the workers; default a new one.
        out: takes each line of what is done as it is done.
    """
    folder = logs or Path(tempfile.mkdtemp(prefix="kser-chaos-"))
    with _Run(chaos, broker, folder, out or (lambda line: None)) as running:
        return running.run()


class _Run:
    def __init__(
        self, chaos: Chaos, broker: ApacheKafka | EmbeddedBroker, logs: Path, out: Callable[[str], object]
    ) -> None:
        self.chaos = chaos
        self.broker = broker
        self.nodes = NodeKiller(broker, self.say) if chaos.brokers and isinstance(broker, ApacheKafka) else None
        self.out = out
        self.lines: list[str] = []
        self.done: dict[str, int] = {}
        self.began = time.monotonic()
        unique = uuid.uuid4().hex[:6]
        self.topic, self.group = f"chaos-{unique}", f"chaos-{unique}"
        named = chaos.named if chaos.named is not None else random.Random(f"named {chaos.seed}").random() < 0.5
        settings = Settings(
            bootstrap=broker.bootstrap_servers,
            topic=self.topic,
            group=self.group,
            delivery=chaos.delivery,
            protocol=chaos.protocol,
            session_s=chaos.session_s,
            named=named,
            logs=logs,
            log_level=chaos.log_level,
        )
        self.logs = logs
        self.fleet = Fleet(settings, self.say)
        self.launcher = Launcher(chaos, broker.bootstrap_servers, self.topic)
        self.facts = Facts()
        self.observer = Observer(broker.bootstrap_servers, self.group, self.topic, events_topic(self.group))
        self.settings = settings

    def __enter__(self) -> "_Run":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.fleet.close()
        self.launcher.stop()
        if self.nodes is not None:
            self.nodes.restore()

    def say(self, text: str) -> None:
        line = f"{time.monotonic() - self.began:7.1f} s  {text}"
        self.lines.append(line)
        self.out(line)

    def run(self) -> Outcome:
        chaos = self.chaos
        steps = plan(
            chaos.seed,
            chaos.seconds,
            pace_s=chaos.pace_s,
            session_s=chaos.session_s,
            nodes=self.broker.nodes if self.nodes is not None and isinstance(self.broker, ApacheKafka) else 0,
        )
        members = "static members" if self.settings.named else "members without names"
        self.say(
            f"seed {chaos.seed}: {chaos.operations} operations in {chaos.seconds:g} s, {chaos.delivery}, "
            f"group protocol {chaos.protocol}, {members}, {len(steps)} faults; logs of the workers in {self.logs}"
        )
        self.broker.create_topic(self.topic, chaos.partitions)
        if isinstance(self.broker, EmbeddedBroker):
            self.broker.create_topic(events_topic(self.group), chaos.partitions)
        elif chaos.protocol == "consumer":
            set_session(self.broker.admin, self.group, chaos.session_s)
        for name in SLOTS:
            self.fleet.start(name)
        with self.observer:
            with self.tail() as tail:
                self.make_trouble(list(steps), tail)
                self.wait_until_done(tail)
            self.fleet.end()
        self.say(f"what was committed was looked at {len(self.observer.seen)} times")
        if self.fleet.took_s:
            self.say(f"all workers have ended, the slowest {max(self.fleet.took_s):.1f} s after SIGTERM")
        verdict = self.judge()
        self.say(verdict.told(chaos.delivery))
        if verdict.faults(chaos.delivery):  # where only what was printed is kept, as in CI
            for log in sorted(self.logs.glob("*.log")):
                self.say(f"the end of {log.name}:\n{self.fleet.log_tail(log.stem)}")
        return Outcome(
            verdict, self.done, time.monotonic() - self.began, max(self.fleet.took_s, default=0.0), self.lines
        )

    @contextlib.contextmanager
    def tail(self) -> Iterator[Tail]:
        """What is in the topics, as it comes. Making it waits until a worker has made the topic of events."""
        tail = Tail(self.broker.bootstrap_servers, self.topic, events_topic(self.group), self.facts)
        try:
            yield tail
        finally:
            tail.close()

    # -- trouble -----------------------------------------------------------------------------------------------------

    def make_trouble(self, steps: list[Step], tail: Tail) -> None:
        start = time.monotonic()
        self.say("the first worker is up; the plan counts from here")
        self.launcher.start()
        leaving: float | None = None
        while (now := time.monotonic() - start) < self.chaos.seconds or self.launcher.busy or leaving is not None:
            while steps and now >= steps[0].at_s:
                step = steps.pop(0)
                if step.what == "add" and self.do(step):
                    leaving = now + step.for_s
                elif step.what != "add":
                    self.do(step)
            if (
                leaving is not None
                and now >= leaving
                and ("extra" not in self.fleet.running or self.fleet.terminate("extra", None))
            ):
                self.count("removed")
                self.say("extra is asked to leave")
                leaving = None
            self.fleet.turn()
            if self.nodes is not None:
                self.nodes.turn()
            tail.read(0.05)

    def do(self, step: Step) -> bool:
        """One step of the plan; what cannot be done now is left out, and said."""
        done = False
        if step.what == "broker":
            done = self.nodes is not None and self.nodes.kill(int(step.target), step.for_s)
        elif step.what == "kill":
            done = self.fleet.kill(step.target, step.for_s)
        elif step.what == "terminate":
            done = self.fleet.terminate(step.target, step.for_s)
        elif step.what == "pause":
            done = self.fleet.pause(step.target, step.for_s)
        elif step.what == "add" and step.target not in self.fleet.running:
            self.fleet.start(step.target)
            done = True
        self.say(f"{step.what} {step.target} for {step.for_s:.1f} s" + ("" if done else ": not possible now, left out"))
        if done:
            self.count(step.what)
        return done

    def count(self, what: str) -> None:
        self.done[what] = self.done.get(what, 0) + 1

    # -- the end -----------------------------------------------------------------------------------------------------

    def wait_until_done(self, tail: Tail) -> None:
        """Until everything that must come has come, or nothing comes any more."""
        self.fleet.settle_down()
        while self.nodes is not None and self.nodes.busy:
            self.nodes.turn()
            self.fleet.turn()
            tail.read(0.05)
        self.launcher.join()
        self.say(f"the chaos is over: {len(self.facts.ended)} of {len(self.launched())} operations have ended")
        quiet = time.monotonic()
        until = quiet + AFTER_S
        looked = 0
        while time.monotonic() < min(until, quiet + QUIET_S):
            if tail.read(0.1):
                quiet = time.monotonic()
            self.fleet.turn()
            size = len(self.facts.messages) + len(self.facts.events)
            if len(self.facts.ended) >= len(self.launched()) and size != looked:
                looked = size
                if not judge(self.facts, self.launched()).lost:
                    self.say(f"everything has come: {size} records")
                    return
        self.say(f"nothing new for {QUIET_S:g} s: {len(self.facts.ended)} operations have ended")
        self.look_closer()

    def look_closer(self) -> None:
        """Say where it stands, for who looks for the reason."""
        if isinstance(self.broker, ApacheKafka):
            for line in group_state(self.broker.admin, self.group):
                self.say(line)
        highest: dict[int, int] = {}
        for message in self.facts.messages:
            highest[message.partition] = max(highest.get(message.partition, -1), message.offset)
        for position in committed(self.broker.bootstrap_servers, self.group, self.topic):
            self.say(f"{position}, the last record is at {highest.get(position.partition)}")

    def launched(self) -> list[str]:
        """The operations whose launch is confirmed, and those whose launch turned out to have arrived."""
        there = (
            {message.operation for message in self.facts.messages if message.plan} if self.launcher.uncertain else ()
        )
        return [*self.launcher.launched, *(uuid for uuid in self.launcher.uncertain if uuid in there)]

    def judge(self) -> Verdict:
        bootstrap, events = self.broker.bootstrap_servers, events_topic(self.group)
        held: list[str] = []
        if isinstance(self.broker, ApacheKafka):
            topics = {name: partitions_of(self.broker.admin, name) for name in (self.topic, events)}
            held = wait_stable(self.broker.admin, topics, OPEN_S)
        self.facts = read_all(bootstrap, self.topic, events)
        stored = committed(bootstrap, self.group, self.topic)
        verdict = judge(self.facts, self.launched(), stored, self.observer.seen)
        verdict.unfinished += [f"a transaction is never ended: {text}" for text in held]
        verdict.processes += self.fleet.faults
        if self.launcher.error is not None:
            verdict.processes.append(f"launching operations failed: {self.launcher.error!r}")
        return verdict


class Launcher:
    """Launches operations while the chaos runs, in bursts, in a thread of its own."""

    def __init__(self, chaos: Chaos, bootstrap: str, topic: str) -> None:
        self._chaos = chaos
        self._bootstrap = bootstrap
        self._topic = topic
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="chaos-launcher", daemon=True)
        #: uuids of the operations whose first message was confirmed.
        self.launched: list[str] = []
        #: Those of which it is not known.
        self.uncertain: list[str] = []
        self.error: Exception | None = None

    def start(self) -> None:
        self._thread.start()

    @property
    def busy(self) -> bool:
        return self._thread.is_alive()

    def join(self) -> None:
        self._thread.join(LAUNCH_S + 10)

    def stop(self) -> None:
        """Launch no more."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join(LAUNCH_S + 10)

    def _work(self) -> None:
        try:
            with Producer({"bootstrap.servers": self._bootstrap, "log_level": 0}) as producer:
                registry.configure(producer=producer, topic=self._topic)
                self._launch(producer)
        except Exception as exc:
            self.error = exc
        finally:
            registry.producer, registry.topic = None, None

    def _launch(self, producer: Producer) -> None:
        chaos = self._chaos
        draw = random.Random(f"operations {chaos.seed}")
        keys = max(6, chaos.operations // 8)
        began, made = time.monotonic(), 0
        while made < chaos.operations and not self._stop.is_set():
            burst = min(draw.randint(1, max(2, chaos.operations // 25)), chaos.operations - made)
            operations = [make_operation(draw, keys, chaos.slow) for _ in range(burst)]
            made += burst
            try:
                with producer.batch(timeout=LAUNCH_S):
                    for operation in operations:
                        operation.launch()
                self.launched += [operation.uuid for operation in operations]
            except DeliveryError:
                self.uncertain += [operation.uuid for operation in operations]
            due = began + chaos.seconds * made / chaos.operations
            self._stop.wait(max(0.0, due - time.monotonic()))


def make_operation(draw: random.Random, keys: int, slow: float) -> Outer:
    """An operation of the app, with a key that others have too, most of its tasks short."""
    key = f"k{draw.randrange(keys)}"
    seconds = [round(0.004 * draw.random(), 4) for _ in range(3)]
    if draw.random() < slow:
        seconds[draw.randrange(3)] = round(draw.uniform(0.5, 2), 2)
    operation = Outer(params={"key": key, "s": seconds}).build()
    operation.key = key
    return operation


class NodeKiller:
    """kill -9 of nodes of the broker, one at a time: the next one only when all copies are in sync again."""

    def __init__(self, kafka: ApacheKafka, say: Callable[[str], object]) -> None:
        self._kafka = kafka
        self._say = say
        self._starting: threading.Thread | None = None
        self._due: tuple[float, int] | None = None
        self._rests_until = 0.0
        self._error: Exception | None = None

    def kill(self, node: int, for_s: float) -> bool:
        """False: one is down, or is not in sync yet."""
        if self.busy or time.monotonic() < self._rests_until:
            return False
        self._kafka.kill(node)
        self._due = time.monotonic() + for_s, node
        return True

    @property
    def busy(self) -> bool:
        """One is down, or has not caught up."""
        return self._due is not None or self._is_starting

    @property
    def _is_starting(self) -> bool:
        return self._starting is not None and self._starting.is_alive()

    def turn(self) -> None:
        """Start the dead one again when it is time."""
        if self._error is not None:
            raise self._error
        if self._due is not None and time.monotonic() >= self._due[0]:
            node, self._due = self._due[1], None
            self._starting = threading.Thread(target=self._start, args=[node], name="chaos-node", daemon=True)
            self._starting.start()

    def _start(self, node: int) -> None:
        try:
            began = time.monotonic()
            self._kafka.start_node(node)
            self._rests_until = time.monotonic() + NODE_REST_S
            self._say(f"node {node} is back, in sync after {time.monotonic() - began:.1f} s")
        except Exception as exc:
            self._error = exc

    def restore(self) -> None:
        """Start what is dead, when it is time, and wait until all copies are in sync."""
        while self._due is not None:
            time.sleep(0.1)
            self.turn()
        if self._starting is not None:
            self._starting.join(NODE_S)
        if self._error is not None:
            raise self._error


def repeat_command(chaos: Chaos, broker: str) -> str:
    """The command that makes this run again."""
    words = [f"--seed {chaos.seed} --operations {chaos.operations} --minutes {chaos.seconds / 60:.4g}"]
    words.append(f"--delivery {chaos.delivery} --protocol {chaos.protocol} --broker {broker} --pace {chaos.pace_s:g}")
    if chaos.named is not None:
        words.append("--named" if chaos.named else "--no-named")
    if not chaos.brokers:
        words.append("--no-node-kills")
    return f"{Path(sys.executable).name} -m tests.chaos {' '.join(words)}"
