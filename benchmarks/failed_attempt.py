"""What one failed attempt costs of the CPU, in microseconds: the task, its log lines, its event, its dead letter.

The exception comes from three calls deep, each with a few local variables. Logging is as ``kser worker`` sets it up,
to /dev/null. The same task that ends well is beside it.
"""

import argparse
import cProfile
import logging
import pstats
import sys
import time
import uuid
from pathlib import Path

from common import show

from kser import OperationRegistry, Retry, Task, context
from kser.cli import logs
from kser.transport import Record
from kser.worker.runner import Runner

registry = OperationRegistry()


def outer(order):
    total = order["amount"] * 2
    lines = [{"sku": n, "price": n * 1.5} for n in range(5)]
    return middle(total, lines)


def middle(total, lines):
    settings = {"host": "db.example.org", "port": 5432, "api_token": "tttttttt"}
    return inner(total, settings)


def inner(total, settings):
    url = f"https://{settings['host']}/orders"
    raise ConnectionError(f"{url} is not there, total {total}")


@registry.subscribe(name="good")
class Good(Task):
    def run(self):
        pass


@registry.subscribe(name="bad")
class Bad(Task):
    def run(self):
        outer(self.params)


@registry.subscribe(name="bad.retried")
class Retried(Bad):
    retry = Retry(attempts=3, backoff_s=1)


def cost(runner, name, number):
    """Microseconds of CPU, the least of five rounds."""
    message = registry.controller.TRANSPORT(str(uuid.uuid4()), name, {"amount": 6, "customer": "ann"})
    record = Record("t", 0, 0, b"k", message.to_bytes(), (), 0)
    rounds = []
    for _ in range(5):
        start = time.process_time()
        for _ in range(number):
            with context.controlling(context.Control()):
                runner.run(record)
        rounds.append((time.process_time() - start) / number * 1e6)
    return min(rounds)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--number", type=int, default=500)
    parser.add_argument("--profile", action="store_true", help="show where the time goes instead")
    options = parser.parse_args()
    out, sys.stderr = sys.stderr, Path("/dev/null").open("w")  # noqa: SIM115 - closed with the process
    kinds = {
        "with events and dead letters": Runner(registry.controller, "g", "w", dead_letters=True),
        "without": Runner(registry.controller, "g", "w", events=False),
    }
    try:
        for level in ("info", "error"):
            logs.configure(level)
            for kind, runner in kinds.items():
                for name in ("good", "bad", "bad.retried"):
                    if options.profile:
                        profile = cProfile.Profile()
                        profile.runcall(cost, runner, name, options.number)
                        print(f"=== {name} {kind}, log level {level}")
                        pstats.Stats(profile).sort_stats("tottime").print_stats(25)
                    else:
                        show(f"{name} {kind}, log level {level}", cost(runner, name, options.number), "us")
    finally:
        sys.stderr = out
        logging.shutdown()


if __name__ == "__main__":
    main()
