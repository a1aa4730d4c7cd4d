"""One long task and short ones, each of which notes that it ran in the file named by RUNS.

The long one kills its worker (-9) at its end when the file named by KILL exists, which it removes before.
"""

import os
import signal
import time
from pathlib import Path

from kser import OperationRegistry, Task

registry = OperationRegistry()


def note(line):
    with Path(os.environ["RUNS"]).open("a") as file:
        file.write(line + "\n")


@registry.subscribe
class Long(Task):
    def run(self):
        note(f"begin long {time.time()}")
        end = time.monotonic() + self.params["seconds"]
        while time.monotonic() < end:
            time.sleep(0.1)
            assert self.heartbeat()
        kill = Path(os.environ["KILL"])
        if kill.exists():
            kill.unlink()
            note("killed long")
            os.kill(os.getpid(), signal.SIGKILL)
        note(f"end long {time.time()}")


@registry.subscribe
class Short(Task):
    def run(self):
        note(f"short {self.params['n']} {time.time()}")
