import logging
logging.basicConfig(
    level=logging.INFO, format="%(asctime)s %(levelname)-8s %(message)s"
)

import os
import random

from cdumay_result import Result
from kser.sequencing.operation import Operation
from kser.sequencing.registry import OperationRegistry
from kser.sequencing.task import Task

oregistry = OperationRegistry()


@oregistry.subscribe
class DiceRoll(Task):
    def run(self):
        launch = random.randint(1, 6)
        return Result(uuid=self.uuid, stdout="You made a {}".format(launch))


@oregistry.subscribe
class DiceLaunch(Operation):
    def build_tasks(self, **kwargs):
        return [DiceRoll(), DiceRoll(), DiceRoll()]


if __name__ == '__main__':
    from flask import Flask
    from kser.python_kafka.consumer import Consumer

    app = Flask(__name__)
    oregistry.init_app(app)
    cons = Consumer(
        {"bootstrap_servers": os.environ.get("KSER_BOOTSTRAP_SERVERS", "127.0.0.1:9092"), "group_id": "dice"},
        [os.environ.get("KSER_TOPIC", "dice")],
    )
    cons.REGISTRY = oregistry.controller
    cons.run()
