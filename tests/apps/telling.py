"""A task that tells how far it is until the file named by STOP exists, and then fails three calls deep."""

import logging
import os
import time
from pathlib import Path

from kser import OperationRegistry, Task
from kser.progress import report_progress

registry = OperationRegistry()
logger = logging.getLogger("tests.telling")


@registry.subscribe(name="telling.Import")
class Import(Task):
    def run(self):
        logger.info("reading %s", self.params["file"])
        n = 0
        while not Path(os.environ["STOP"]).exists():
            n += 1
            report_progress(("rows", "read"), n, 10_000, f"row {n}")
            self.heartbeat()
            time.sleep(0.001)
        self.store({"rows": n, "password": "hunter2hunter2"})

    def store(self, settings):
        self.connect(settings["password"])

    def connect(self, password):
        attempts = 3
        raise ConnectionError(f"refused after {attempts} attempts")
