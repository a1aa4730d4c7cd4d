"""A small stage for one fault at a time: a topic, a few operations, a worker that is told what to do, the judge."""

import json
import random
import sys
import threading
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Self

from kser.confluent.producer import Producer
from kser.events import events_topic
from tests.apache_kafka import ApacheKafka
from tests.chaos.app import registry
from tests.chaos.fleet import Fleet, Settings
from tests.chaos.harness import OPEN_S, make_operation
from tests.chaos.judge import Facts, Verdict, judge
from tests.chaos.killer import Options
from tests.chaos.topics import Observer, Tail, committed, partitions_of, read_all, set_session, wait_stable
from tests.processes import ROOT, wait_for

__all__ = ["Stage", "StageSettings"]

OPERATIONS = 6
PARTITIONS = 2
KEYS = 6
SESSION_S = 3.0
#: Operations are launched by the one registry that a process has.
_LAUNCHING = threading.Lock()
NAME = "worker"


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSettings(Settings):
    """A worker of tests/chaos/killer.py."""

    point: str | None = None
    after: int = 0
    settle_limit_s: float = 20
    #: librdkafka properties beside those that every worker has.
    client: Mapping[str, str] = field(default_factory=dict)

    def command(self, slot: str) -> list[str]:
        """The worker, with the fault it is to have."""
        options = Options(
            bootstrap=self.bootstrap,
            topic=self.topic,
            group=self.group,
            delivery=self.delivery,
            properties={**self.properties, **self.client},
            name=slot if self.named else None,
            drain_s=self.drain_s,
            settle_limit_s=self.settle_limit_s,
            point=self.point,
            after=self.after,
            log_level=self.log_level,
        )
        words = ["env", f"PYTHONPATH={ROOT}", "PYTHONUNBUFFERED=1", sys.executable, "-m", "tests.chaos.killer"]
        return [*words, json.dumps(options._asdict())]


class Stage:
    """One worker and its operations; everything ends with the block.

    Args:
        kafka: the broker; launching and judging go to it directly.
        logs: folder for the worker's log.
        delivery: of the worker.
        protocol: of its group.
        named: it is a static member.
        via: addresses that the worker gets; default those of ``kafka``.
        client: librdkafka properties of the worker.
    """

    def __init__(
        self,
        kafka: ApacheKafka,
        logs: Path,
        *,
        delivery: str = "exactly_once",
        protocol: str = "classic",
        named: bool = True,
        via: str | None = None,
        client: Mapping[str, str] | None = None,
    ) -> None:
        self.kafka = kafka
        self.topic = self.group = f"stage-{uuid.uuid4().hex[:8]}"
        logs = logs / self.topic
        logs.mkdir()
        self.settings = StageSettings(
            bootstrap=via or kafka.bootstrap_servers,
            topic=self.topic,
            group=self.group,
            delivery=delivery,  # type: ignore[arg-type]
            protocol=protocol,  # type: ignore[arg-type]
            session_s=SESSION_S,
            named=named,
            logs=logs,
            client=client or {},
        )
        self.launched: list[str] = []
        self.fleet = Fleet(self.settings, lambda line: None)
        kafka.create_topic(self.topic, PARTITIONS)
        # Or a worker would make it, through a proxy that may lose the answer.
        kafka.create_topic(events_topic(self.group), PARTITIONS)
        if protocol == "consumer":
            set_session(kafka.admin, self.group, SESSION_S)
        self.facts = Facts()
        self.tail = Tail(kafka.bootstrap_servers, self.topic, events_topic(self.group), self.facts)
        self.observer = Observer(kafka.bootstrap_servers, self.group, self.topic, events_topic(self.group))

    def __enter__(self) -> Self:
        self.observer.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.fleet.close()
        self.observer.stop()
        self.tail.close()

    def launch(self, operations: int = OPERATIONS, seed: int = 1) -> None:
        """Launch operations; returns when the broker has them."""
        draw = random.Random(seed)
        with _LAUNCHING, Producer({"bootstrap.servers": self.kafka.bootstrap_servers, "log_level": 0}) as producer:
            registry.configure(producer=producer, topic=self.topic)
            try:
                made = [make_operation(draw, KEYS, 0) for _ in range(operations)]
                with producer.batch():
                    for operation in made:
                        operation.launch()
            finally:
                registry.producer, registry.topic = None, None
        self.launched += [operation.uuid for operation in made]

    def start(self, point: str | None = None, after: int = 0, settle_limit_s: float = 20) -> None:
        """Start the worker, which is killed at ``point`` once it has taken ``after`` records."""
        self.fleet.settings = replace(self.settings, point=point, after=after, settle_limit_s=settle_limit_s)
        self.fleet.start(NAME)

    def wait_some(self, events: int, within_s: float = 60) -> None:
        """Wait until so much has been settled."""

        def come() -> bool:
            self.tail.read(0.1)
            return len(self.facts.events) >= events

        wait_for(come, within_s, f"{events} events:\n{self.log()}")

    def terminate(self) -> None:
        """SIGTERM; how it ends is not looked at."""
        self.fleet.ask(NAME)

    def wait_killed(self, within_s: float = 45) -> None:
        """Wait until the worker was killed at its point."""
        code = wait_for(lambda: self.fleet.exit_code(NAME), within_s, f"the death of the worker:\n{self.log()}")
        assert code == -9, f"exit code {code}:\n{self.log()}"

    def wait_done(self, within_s: float = 90) -> None:
        """Wait until everything has come; the worker has to do it by itself."""
        until = time.monotonic() + within_s
        looked = -1
        while True:
            self.tail.read(0.1)
            size = len(self.facts.messages) + len(self.facts.events)
            if size != looked:
                looked = size
                if not judge(self.facts, self.launched).lost:
                    return
            code = self.fleet.exit_code(NAME)
            assert code is None, f"the worker ended by itself with exit code {code}:\n{self.log()}"
            if time.monotonic() > until:
                told = judge(self.facts, self.launched).told("exactly_once")
                raise AssertionError(f"not done within {within_s} s: {told}\n{self.log()}")

    def wait_log(self, text: str, within_s: float = 60) -> None:
        """Wait until the worker's log has this text."""
        wait_for(lambda: text in self.whole_log(), within_s, f"{text!r} in the log:\n{self.log()}")

    def log(self) -> str:
        """The end of the worker's log."""
        return self.fleet.log_tail(NAME)

    def whole_log(self) -> str:
        """All of the worker's log."""
        return (self.settings.logs / f"{NAME}.log").read_text(errors="replace")

    def verdict(self) -> Verdict:
        """End the worker by SIGTERM and judge what is in the topics."""
        self.fleet.end()
        self.observer.stop()
        bootstrap, events = self.kafka.bootstrap_servers, events_topic(self.group)
        topics = {name: partitions_of(self.kafka.admin, name) for name in (self.topic, events)}
        held = wait_stable(self.kafka.admin, topics, OPEN_S)
        facts = read_all(bootstrap, self.topic, events)
        stored = committed(bootstrap, self.group, self.topic)
        verdict = judge(facts, self.launched, stored, self.observer.seen)
        verdict.unfinished += [f"a transaction is never ended: {text}" for text in held]
        verdict.processes += self.fleet.faults
        return verdict

    def check(self) -> Verdict:
        """verdict(), and raise AssertionError when something is wrong."""
        verdict = self.verdict()
        told = verdict.told(self.settings.delivery)
        assert not verdict.faults(self.settings.delivery), f"{told}\n{self.whole_log()[-6000:]}"
        return verdict
