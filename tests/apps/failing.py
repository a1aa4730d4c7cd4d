"""Tasks that fail in all ways, noting each attempt in the file RUNS; on a worker."""

import os
import signal
import time

from kser import Operation, OperationRegistry, Retry, Task

registry = OperationRegistry()


def note(text: str) -> None:
    descriptor = os.open(os.environ["RUNS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(descriptor, f"{text} {os.getpid()}\n".encode())
    finally:
        os.close(descriptor)


@registry.subscribe
class Good(Task):
    def run(self):
        note(f"good {self.params['n']} {self.attempt}")


@registry.subscribe
class Aborts(Task):
    """Ends its process, as a library does that has lost its mind."""

    def run(self):
        note(f"aborts {self.attempt}")
        os.abort()


@registry.subscribe
class Killed(Task):
    """Is ended from outside, as by the kernel when memory is short."""

    def run(self):
        note(f"killed {self.attempt}")
        os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(10)


class Failing(Task):
    """Fails at each attempt below ``params["until"]``."""

    def run(self):
        note(f"{type(self).__name__} {self.params['n']} {self.attempt}")
        if self.attempt < self.params.get("until", 1000):
            raise ConnectionError(f"attempt {self.attempt}")


@registry.subscribe(retry=Retry(attempts=3, backoff_s=1, factor=1, jitter=0.1))
class Soon(Failing):
    """Tried again after about 1 s."""


@registry.subscribe(retry=Retry(attempts=3, backoff_s=10, factor=1, jitter=0.1))
class Later(Failing):
    """Tried again after about 10 s."""


@registry.subscribe(retry=Retry(attempts=2, backoff_s=60, factor=1, jitter=0))
class MuchLater(Failing):
    """Tried again after 1 min, which is spent in a tier."""


@registry.subscribe
class Fifth(Operation):
    """Five steps, of which the third fails unless ``params["well"]``."""

    def build_tasks(self, well=False, **params):
        return [
            *(Good(params={"n": f"{self.uuid}.{n}"}) for n in (1, 2)),
            Failing3(params={"well": well, "n": f"{self.uuid}.3"}),
            *(Good(params={"n": f"{self.uuid}.{n}"}) for n in (4, 5)),
        ]


@registry.subscribe
class Failing3(Task):
    """Fails unless told otherwise."""

    def run(self):
        note(f"third {self.params['n']} {self.attempt}")
        if not self.params.get("well"):
            raise ValueError("the third step")


def die_in_worker() -> None:
    if "RUNS" in os.environ:
        note("dies")
        os.abort()


@registry.subscribe
class Unmakable(Task):
    """Ends its process before it is there."""

    def postinit(self):
        die_in_worker()


@registry.subscribe
class Unbuildable(Operation):
    """Ends its process while it is built."""

    def build_tasks(self, **params):
        die_in_worker()
        return [Good(params={"n": 0})]
