"""The tasks that benchmarks let a worker run: one that does nothing, one that takes its time, and some that fail."""

import time

from kser import OperationRegistry, Retry, Task

registry = OperationRegistry()


@registry.subscribe(name="noop")
class Noop(Task):
    def run(self):
        pass


@registry.subscribe(name="good")
class Good(Task):
    """Takes ``params["s"]`` seconds."""

    def run(self):
        if self.params["s"]:
            time.sleep(self.params["s"])


class _Bad(Task):
    def run(self):
        raise ConnectionError("not there")


#: They fail at every attempt, 1 s, 10 s and 1 min apart.
BAD = [
    registry.subscribe(name=f"bad.{seconds}", retry=Retry(attempts=3, backoff_s=seconds, factor=1))(
        type(f"Bad{seconds}", (_Bad,), {})
    )
    for seconds in (1, 10, 60)
]
