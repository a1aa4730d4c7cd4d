"""Controller.run of the original kser on raw JSON, without its lock file. Runs in its own environment."""

import json
import os
import statistics
import time
import uuid

os.environ["RUNNING_FILE"] = "/dev/null"
os.environ["LOCK_PATH"] = "/tmp"

from cdumay_result import Result

from kser.controller import Controller
from kser.entry import Entrypoint


class Noop(Entrypoint):
    def run(self):
        return Result(uuid=self.uuid)


class Unlocked(Controller):
    @classmethod
    def start_processing(cls, kmsg):
        pass

    @classmethod
    def stop_processing(cls):
        pass


Unlocked.register(Noop.path, Noop)
u = str(uuid.uuid4())
raw = json.dumps(
    {
        "uuid": u,
        "entrypoint": Noop.path,
        "params": {"i": 1, "t0": 0},
        "result": {"uuid": u, "retcode": 0, "stdout": "", "stderr": "", "retval": {}},
        "metadata": {},
    }
)
assert Unlocked.run(raw).retcode == 0
rounds = []
for _ in range(5):
    start = time.perf_counter()
    for _ in range(2000):
        Unlocked.run(raw)
    rounds.append((time.perf_counter() - start) / 2000)
print(statistics.median(rounds) * 1e6)
