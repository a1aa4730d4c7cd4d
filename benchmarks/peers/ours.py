"""kser's worker for produce_to_done.py: arguments bootstrap, topic, group, and what is told (Worker's events)."""

import sys
import time

from kser import OperationRegistry, Result, Task, Worker

registry = OperationRegistry()


@registry.subscribe(name="noop")
class Noop(Task):
    def run(self):
        hit(self.params["i"], self.params["n"])
        return Result(uuid=self.uuid)


def hit(i: int, n: int) -> None:
    if i < 0 or i == n - 1 or n == 1:
        print(i, time.monotonic_ns(), flush=True)
    elif i == 0:
        print(0, time.monotonic_ns(), flush=True)


if __name__ == "__main__":
    bootstrap, topic, group, events = sys.argv[1:5]
    Worker(registry, topics=[topic], group=group, config={"bootstrap.servers": bootstrap}, events=events).run()
