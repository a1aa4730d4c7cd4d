"""The original kser's consumer for produce_to_done.py, without its lock file: arguments bootstrap, topic, group."""

import os
import sys
import time

os.environ["RUNNING_FILE"] = "/dev/null"
os.environ["LOCK_PATH"] = "/tmp"

from cdumay_result import Result

from kser.confluent.consumer import Consumer
from kser.controller import Controller
from kser.entry import Entrypoint


class Noop(Entrypoint):
    def run(self):
        i, n = self.params["i"], self.params["n"]
        if i in (0, n - 1) or i < 0:
            print(i, time.monotonic_ns(), flush=True)
        return Result(uuid=self.uuid)


Controller.start_processing = classmethod(lambda cls, kmsg: None)
Controller.stop_processing = classmethod(lambda cls: None)
Controller.register("noop", Noop)
bootstrap, topic, group = sys.argv[1:4]
Consumer({"bootstrap.servers": bootstrap, "group.id": group, "auto.offset.reset": "earliest"}, [topic]).run()
