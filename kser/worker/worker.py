"""Worker: runs the tasks of a registry, with all its settings."""

import logging
import math
import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Final, Literal, get_args

from kser import loading, loghandler
from kser.control import WorkerNote, control_topic
from kser.controller import Controller
from kser.errors import ConfigurationError, TransportError
from kser.producer import max_message_bytes
from kser.sequencing.itinerary import VERSION
from kser.sequencing.registry import OperationRegistry
from kser.transport import EMBEDDED_CLUSTERS, TopicAdmin, Transport
from kser.transport.names import TOPIC_NAME_RULE, is_topic_name
from kser.worker.control import Aborted, ControlWatch
from kser.worker.dispatch import Ordering
from kser.worker.health import HealthServer, HealthStatus
from kser.worker.interpreter import collecting_rarely, quick_turns
from kser.worker.loop import Loop
from kser.worker.members import check_config, member_processes, places, raise_for
from kser.worker.pool import IsolatedPool
from kser.worker.processes import LEFT, Processes
from kser.worker.relay import Relay
from kser.worker.runner import Runner
from kser.worker.shutdown import stopping_on_signals
from kser.worker.slots import take_slot
from kser.worker.telemetry import TelemetrySender
from kser.worker.topic_plan import WORKER_FEATURES, Feature
from kser.worker.topics import ensure_group_topics

__all__ = ["Delivery", "Events", "LostOffset", "Worker"]

logger = logging.getLogger(__name__)

Delivery = Literal["exactly_once", "at_least_once"]
LostOffset = Literal["stop", "earliest", "latest"]
Events = Literal["none", "sequence", "all"]

#: The topics that each of these needs beside the others.
_TOLD_IN: Final[dict[str, frozenset[Feature]]] = {
    "none": frozenset(),
    "sequence": frozenset({Feature.EVENTS}),
    "all": frozenset({Feature.EVENTS, Feature.TELEMETRY}),
}

#: Longest wait for what was told to the group before the worker started, in seconds.
_TOLD_S: Final = 60.0
#: How late a stop is heard meanwhile, in seconds.
_LOOK_S: Final = 0.2
#: What a worker may take to end beyond the budget of its tasks and two batches that hang, in seconds: letting go of its
#: partitions (5), the consumer, the producers, what people tell and the relay (10 each), the child processes (5), and
#: what a busy machine may add.
_CLOSE_S: Final = 80.0
#: What each process of several is given as it is here.
_SETTINGS: Final = (
    "topics",
    "group",
    "delivery",
    "ordering",
    "concurrency",
    "coroutines",
    "isolated",
    "max_abandoned",
    "drain_s",
    "max_in_flight",
    "max_poll_records",
    "max_bytes",
    "settle_limit_s",
    "on_lost_offset",
    "create_topics",
    "events",
    "wait_s",
    "control",
    "health_host",
)
#: Longest wait for the last telemetry, in seconds.
_TELEMETRY_END_S: Final = 5.0


class Worker:
    """Runs the tasks of a registry.

    Args:
        registry: an OperationRegistry, or a Controller.
        topics: topics to take messages from.
        group: consumer group; also names the group's own topics, ``{group}.events``.
        config: librdkafka properties, at least ``bootstrap.servers``; not needed with ``transport``.
        transport: the broker, when it is not Kafka by ``config``.
        name: the slot of this worker. It makes it a static member of the group, so that a restart moves no partition.
            Default: the host's name and the first free number.
        delivery: "exactly_once": what follows from a message and its offset are one transaction. "at_least_once": the
            first is confirmed before the second is committed. Default: exactly once, but at least once on the embedded
            broker, which has no transactions.
        ordering: what is run one after the other: messages of a "key", of a "partition", or "none".
        concurrency: threads that run tasks.
        coroutines: ``async def`` tasks side by side.
        isolated: child processes for tasks with ``isolate=True``.
        processes: members of the group that run() starts, each a process of its own that loads the registry. Not with
            ``transport``, nor with functions in ``config``. ``name`` and ``health_port`` are counted up: w-0, w-1.
        max_abandoned: threads that may be given up because their task ignores its timeout; one more, and the worker
            drains and ends.
        drain_s: seconds that running tasks get to end when the worker is asked to stop or a partition is taken away.
        max_in_flight: messages taken and not run, beyond which no more are fetched.
        max_poll_records: messages taken from the client at a time.
        max_bytes: bytes of messages taken and not settled, beyond which no more are fetched.
        settle_limit_s: seconds after which a batch that is being settled is given up and a new producer asks what
            became of it.
        on_lost_offset: what to do when the committed offset does not exist any more: "stop", or go on at the
            "earliest" or "latest" message there is.
        create_topics: make the group's topics when they are missing; else refuse to start.
        events: what is told: "none"; "sequence": what became of operations and tasks, in ``{group}.events``; "all":
            also what goes on, in ``{group}.telemetry``: tasks that run, their progress and log lines, and this worker.
        wait_s: seconds that a message which this worker cannot run waits for one that can before it fails, while a new
            release is rolled out. It is looked at again every 10 s.
        relay: also move delayed messages back to their topics when they are due. At least one worker of the group has
            to; several share it.
        control: obey what people tell the group: kser abort, kser pause, kser resume.
        location: MODULE_OR_FILE:REGISTRY where child processes find the registry; default: where it is found here.
        health_port: port for /healthz and /readyz; None: none.
        health_host: address that port listens on; "0.0.0.0" for probes from outside, as in Kubernetes.

    Raises ConfigurationError for values that cannot be.
    """

    def __init__(
        self,
        registry: OperationRegistry | Controller | type[Controller],
        *,
        topics: Sequence[str],
        group: str = "kser",
        config: Mapping[str, Any] | None = None,
        transport: Transport | None = None,
        name: str | None = None,
        delivery: Delivery | None = None,
        ordering: Ordering = "key",
        concurrency: int = 16,
        coroutines: int = 256,
        isolated: int = 2,
        processes: int = 1,
        max_abandoned: int = 16,
        drain_s: float = 30,
        max_in_flight: int = 4000,
        max_poll_records: int = 500,
        max_bytes: int = 64 * 1024 * 1024,
        settle_limit_s: float = 20,
        on_lost_offset: LostOffset = "stop",
        create_topics: bool = True,
        events: Events = "all",
        wait_s: float = 900,
        relay: bool = True,
        control: bool = True,
        location: str | None = None,
        health_port: int | None = None,
        health_host: str = "127.0.0.1",
    ) -> None:
        _check_names(topics, group, name)
        if transport is None and not config:
            raise ConfigurationError("No broker: give config={'bootstrap.servers': 'host:port'}")
        _one_of("delivery", delivery, (*get_args(Delivery), None))
        _one_of("ordering", ordering, get_args(Ordering))
        _one_of("events", events, get_args(Events))
        _one_of("on_lost_offset", on_lost_offset, get_args(LostOffset))
        _whole(1, concurrency=concurrency, coroutines=coroutines, isolated=isolated, max_in_flight=max_in_flight)
        _whole(1, processes=processes, max_poll_records=max_poll_records, max_bytes=max_bytes)
        _whole(0, max_abandoned=max_abandoned)
        _at_least(0, drain_s=drain_s, wait_s=wait_s)
        _at_least(1, settle_limit_s=settle_limit_s)
        if health_port is not None:
            _whole(1, health_port=health_port)
            if health_port > 65535:
                raise ConfigurationError(f"health_port={health_port!r}: give a port from 1 to 65535, or None")
        if processes > 1:
            if transport is not None:
                raise ConfigurationError(
                    f"transport with processes={processes}: an object cannot be given to another process; give config, "
                    "or processes=1"
                )
            check_config(config or {}, processes)
        self.controller = registry.controller if isinstance(registry, OperationRegistry) else registry
        self.topics = list(topics)
        self.group = group
        #: Name in events and logs; the slot once run() has taken it.
        self.name = name or f"{socket.gethostname()}-{os.getpid()}"
        #: What was asked for, and once run() knows the broker, what is done.
        self.delivery = delivery
        self.ordering: Ordering = ordering
        self.concurrency = concurrency
        self.coroutines = coroutines
        self.isolated = isolated
        self.processes = processes
        self.max_abandoned = max_abandoned
        self.drain_s = drain_s
        self.max_in_flight = max_in_flight
        self.max_poll_records = max_poll_records
        self.max_bytes = max_bytes
        self.settle_limit_s = settle_limit_s
        self.on_lost_offset: LostOffset = on_lost_offset
        self.create_topics = create_topics
        self.events: Events = events
        self.wait_s = wait_s
        self.relay = relay
        self.control = control
        self.health_port = health_port
        self.health_host = health_host
        self._location = location
        #: What became of the records so far: done, failed, rejected, foreign, discarded, skipped, came again.
        self.stats: Counter[str] = Counter()
        #: Records that were running when run() returned: their next owner runs them again. Of several processes 1 when
        #: there were any; the log has them all.
        self.left = 0
        self._static = name is not None
        self._registry = registry
        self._config = dict(config or {})
        self._transport = transport
        self._loop: Loop | None = None
        #: Called when run() begins to stop; must not raise.
        self.on_drain: Callable[[], object] = lambda: None
        self._relay: Relay | None = None
        self._watch: ControlWatch | None = None
        self._several: Processes | None = None
        self._stop = 0

    def run(self, *, until_idle: bool = False) -> None:
        """Take and run messages until stop(), SIGTERM, SIGINT or the terminate file. Blocks.

        Args:
            until_idle: return as well once a whole turn (0.2 s) with partitions assigned brought nothing, for tests and
                scripts. On the memory transport that means that everything sent is done.

        On the way out what runs gets ``drain_s`` seconds to end, all that ended is settled, and the group is left. What
        did not end is run by the next owner.

        With ``processes`` this one is their parent: it starts one that dies again, and ends all when one ends by what
        no restart cures. ``stats`` and status() are of each process, and not told here.

        Raises:
            TransportError: no broker answered at the start, or the client cannot go on.
            FencedError: another worker has this one's name.
            OffsetLostError: a committed offset does not exist any more, and ``on_lost_offset`` is "stop".
            ConfigurationError: a setting is wrong, or topics are missing; ``until_idle`` with several processes; a
                registry that another process cannot load.
        """
        loading.guard()
        if self.processes > 1:
            self._run_several(until_idle)
            return
        transport = self._transport or self._connect()
        admin = transport.admin()
        try:
            delivery = self._choose_delivery(admin)
            self._ensure_topics(admin)
        except TransportError as exc:
            if not self._stop:
                raise
            logger.info("Asked to stop before it had begun: %s", exc.message)
            return
        limit = max_message_bytes()
        with stopping_on_signals(self.stop), take_slot(self.group, self.name if self._static else None) as slot:
            self.name, self.delivery = slot.id, delivery
            settings: dict[str, Any] = {
                "group": self.group,
                "worker": self.name,
                "limit": limit,
                "events": self.events != "none",
                "dead_letters": True,
                "wait_s": self.wait_s,
            }
            runner = Runner(self.controller, **settings)
            pool = self._pool(settings)
            health = None
            telemetry = TelemetrySender(self, transport) if self.events == "all" else None
            try:
                if self.control:
                    self._watch = ControlWatch(transport, self.group, note=self._note)
                    runner.who_could_run = self._watch.who_could_run
                    self._watch.start()
                    if not self._is_told(self._watch):
                        return
                self._loop = Loop(
                    self,
                    transport,
                    runner,
                    delivery,
                    pool,
                    static=self._static,
                    watch=self._watch,
                    telemetry=telemetry,
                )
                if telemetry is not None:
                    telemetry.start()
                if self.health_port is not None:
                    health = HealthServer(self.health_port, self.status, self.health_host)
                    health.start()
                if self.relay:
                    aborted = Aborted(self._watch, runner) if self._watch is not None else None
                    self._relay = Relay(
                        transport,
                        self.group,
                        self.name,
                        delivery,
                        on_lost_offset=self.on_lost_offset,
                        aborted=aborted,
                    )
                    self._relay.start()
                logs = loghandler.installed() if telemetry is not None else nullcontext()
                with quick_turns(), collecting_rarely(), logs:
                    self._loop.run(until_idle=until_idle)
            finally:
                self.drains()
                if self._watch is not None:
                    self._watch.stop(10)
                if self._relay is not None and not self._relay.stop(10):
                    logger.warning("The relay of delayed messages did not end within 10 s and is left behind")
                if health is not None:
                    health.stop()
                if telemetry is not None and not telemetry.stop(_TELEMETRY_END_S):
                    logger.warning("The producer of telemetry did not end in time and is left behind")
                if pool is not None:
                    pool.stop(5)

    def _run_several(self, until_idle: bool) -> None:
        if until_idle:
            raise ConfigurationError(f"until_idle with processes={self.processes}: give processes=1")
        location = self._location or loading.location_of(self._registry, "it is to run in several processes")
        settings = {name: getattr(self, name) for name in _SETTINGS} | {"config": self._config}
        members = places(self.processes, self.name if self._static else None, self.health_port, relay=self.relay)
        several = self._several = member_processes(loading.absolute(location), settings, members, end_s=self.end_s)
        if self._stop and not several.stopping:  # before there was anybody to tell
            several.stop()
        code = several.run()
        self.left = int(code == LEFT)
        raise_for(code)

    def _is_told(self, watch: ControlWatch) -> bool:
        """Wait until all is known that was told to the group; False when asked to stop meanwhile."""
        end = time.monotonic() + _TOLD_S
        while not self._stop:  # asked so early it does not even join: a client that leaves at once has hung
            if watch.wait_ready(_LOOK_S):
                return True
            if time.monotonic() >= end:
                raise TransportError(
                    f"What was told to group {self.group} could not be read within {_TOLD_S:g} s: is topic "
                    f"{control_topic(self.group)} well?"
                )
        return False

    def stop(self) -> None:
        """Ask run() to end. The first time it drains, the second time it waits for no task. From any thread."""
        self._stop += 1
        if self._several is not None:
            self._several.stop()

    @property
    def stopping(self) -> int:
        """How often stop() was called, or a signal asked the same."""
        return self._stop if self._several is None else max(self._stop, self._several.stopping)

    @property
    def end_s(self) -> float:
        """Longest that run() takes to return once it was asked to stop, in seconds; more is a hang of a client."""
        return self.drain_s + 2 * self.settle_limit_s + _CLOSE_S

    def drains(self) -> None:
        """Called by the loop when it begins to stop: its companions can do so meanwhile."""
        self.on_drain()
        if self._watch is not None:
            self._watch.stop(0)
        if self._relay is not None:
            self._relay.stop(0)

    @property
    def worn(self) -> bool:
        """Whether run() ended because more threads were given up than may be: a new process can go on."""
        return self._loop is not None and self._loop.worn

    @property
    def state(self) -> str:
        """Where it stands: "starting", "running" or "draining". From any thread."""
        return self._loop.state if self._loop is not None else "starting"

    def status(self) -> HealthStatus:
        """How it is doing. From any thread."""
        if self._loop is None:
            return HealthStatus(worker=self.name, group=self.group, reasons=("not running",))
        return self._loop.status()

    # -- inside ------------------------------------------------------------------------------------------------------

    def _connect(self) -> Transport:
        from kser.confluent.transport import ConfluentTransport  # here: it loads the Kafka client

        return ConfluentTransport(self._config)

    def _choose_delivery(self, admin: TopicAdmin) -> Delivery:
        embedded = admin.cluster_id().startswith(EMBEDDED_CLUSTERS)
        if embedded and self.delivery == "exactly_once":
            raise ConfigurationError(
                "delivery exactly_once cannot be had on the embedded broker, whose transactions hide nothing and fence "
                "nobody: use at_least_once here, or a real Kafka"
            )
        return self.delivery or ("at_least_once" if embedded else "exactly_once")

    def _ensure_topics(self, admin: TopicAdmin) -> None:
        ensure_group_topics(
            admin,
            self.group,
            self.topics,
            create=self.create_topics,
            features=(WORKER_FEATURES - _TOLD_IN["all"]) | _TOLD_IN[self.events],
            servers=self._config.get("bootstrap.servers"),
        )

    def _note(self, now_ms: int) -> WorkerNote:
        """What it tells of itself."""
        return WorkerNote.of(self.name, self.controller.ENTRYPOINTS, VERSION, now_ms)

    def _pool(self, settings: Mapping[str, Any]) -> IsolatedPool | None:
        """The children for isolated tasks, and for those that may have crashed a worker."""
        try:
            location = self._location or loading.location_of(self._registry)
            return IsolatedPool(location, self.isolated, settings=settings, reports=self.events == "all")
        except ConfigurationError:
            if any(cls.isolate for cls in self.controller.ENTRYPOINTS.values()):
                raise
            return None  # what may have crashed a worker then runs in this process, one at a time


def _one_of(name: str, value: Any, allowed: Sequence[Any]) -> None:
    if value not in allowed:
        raise ConfigurationError(f"{name}={value!r}: give one of {', '.join(map(repr, allowed))}")


def _at_least(least: int, **values: float) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value < math.inf:
            raise ConfigurationError(f"{name}={value!r}: give a number not below {least}")


def _whole(least: int, **values: int) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigurationError(f"{name}={value!r}: give a whole number not below {least}")


def _check_names(topics: Sequence[str], group: str, name: str | None) -> None:
    if isinstance(topics, str) or not topics:
        raise ConfigurationError(f"topics={topics!r}: give a list with at least one topic")
    for topic in topics:
        if not isinstance(topic, str) or not (topic.startswith("^") or is_topic_name(topic)):
            raise ConfigurationError(f"topics: {topic!r} {TOPIC_NAME_RULE}")
    if len(set(topics)) < len(topics):
        raise ConfigurationError(f"topics={topics!r}: name each topic once")
    if not group:
        raise ConfigurationError("group is empty: name the consumer group")
    if not is_topic_name(control_topic(group)):
        raise ConfigurationError(
            f"group={group!r}: its topics begin with it, and {control_topic(group)!r} {TOPIC_NAME_RULE}"
        )
    if name is not None and (not isinstance(name, str) or not name or ";" in name):
        raise ConfigurationError(f"name={name!r}: give a text without a semicolon, or None")
