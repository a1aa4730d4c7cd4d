"""``python -m tests.chaos --help``: the long form of the fault suite."""

import argparse
import contextlib
import random
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import NoReturn

from kser.confluent.embedded import EmbeddedBroker
from tests import kafka_jars
from tests.apache_kafka import ApacheKafka, KafkaUnavailableError
from tests.chaos.harness import EMBEDDED_SESSION_S, Chaos, repeat_command, run

#: A run of so many operations is the long form, which shows something only with so many of these.
LONG = 20_000
LEAST_KILLS = 30
KILLS = ("kill", "broker")


def main(arguments: list[str] | None = None) -> int:
    """Run it; 0 when nothing is wrong, 1 when something is."""
    options = parse(arguments)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _end)
    embedded = options.broker == "embedded"
    chaos = Chaos(
        seed=options.seed,
        operations=options.operations,
        seconds=options.minutes * 60,
        delivery=options.delivery,
        protocol=options.protocol,
        session_s=EMBEDDED_SESSION_S if embedded else options.session,
        pace_s=options.pace,
        brokers=options.node_kills and not embedded,
        named=options.named,
        log_level=options.log_level,
    )
    logs = Path(options.logs or tempfile.mkdtemp(prefix=f"kser-chaos-{options.seed}-"))
    logs.mkdir(parents=True, exist_ok=True)
    try:
        with broker(options.broker) as running:
            outcome = run(chaos, running, logs=logs, out=lambda line: print(line, flush=True))
    except KafkaUnavailableError as error:
        print(f"Apache Kafka cannot run here: {error}; {kafka_jars.CURE}", file=sys.stderr)
        return 1
    done = ", ".join(f"{number} x {what}" for what, number in sorted(outcome.done.items()))
    print(f"done in {outcome.seconds:.0f} s: {done or 'nothing'}")
    kills = sum(outcome.done.get(what, 0) for what in KILLS)
    too_few = chaos.operations >= LONG and kills < LEAST_KILLS
    print(f"{kills} kills of workers and nodes{f': at least {LEAST_KILLS} are wanted' if too_few else ''}")
    if outcome.verdict.faults(chaos.delivery) or too_few:
        print(f"FAILED. To repeat it: {repeat_command(chaos, options.broker)}\nlogs of the workers: {logs}")
        return 1
    if not options.logs:
        shutil.rmtree(logs, ignore_errors=True)
    print("passed")
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos",
        description="Run operations on three workers and a broker of three nodes while both are killed, and judge.",
        epilog="example: python -m tests.chaos --operations 20000 --minutes 20 --protocol consumer --seed 7",
    )
    parser.add_argument("--operations", type=int, default=20000, help="how many operations (20000)")
    parser.add_argument("--minutes", type=float, default=20, help="how long they are launched and disturbed (20)")
    parser.add_argument("--delivery", choices=("exactly_once", "at_least_once"), default="exactly_once")
    parser.add_argument("--protocol", choices=("classic", "consumer"), default="classic", help="group protocol")
    parser.add_argument("--broker", choices=("apache", "embedded"), default="apache", help="embedded: no node kills")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="of plan and operations (drawn)")
    parser.add_argument("--pace", type=float, default=8, help="mean seconds between two faults (8)")
    parser.add_argument("--session", type=float, default=3, help="session timeout of the group in seconds (3)")
    parser.add_argument("--node-kills", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--named", action=argparse.BooleanOptionalAction, default=None, help="static members (drawn)")
    parser.add_argument("--log-level", default="warning", help="of the workers")
    parser.add_argument("--logs", help="folder for the logs of the workers (a new one, removed if all is well)")
    options = parser.parse_args(arguments)
    if options.operations < 1 or options.minutes <= 0 or options.pace <= 0 or options.session < 3:
        parser.error("--operations, --minutes and --pace must be above 0, --session not below 3")
    return options


@contextlib.contextmanager
def broker(kind: str) -> Iterator[ApacheKafka | EmbeddedBroker]:
    """A broker of its own."""
    if kind == "embedded":
        with EmbeddedBroker() as embedded:
            yield embedded
    else:
        with ApacheKafka(3) as kafka:
            yield kafka


def _end(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
