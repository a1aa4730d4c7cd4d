"""The other side: it knows the operation, and of the task only its name and topic."""

from pathlib import Path

from kser import Operation, OperationRegistry
from kser.sequencing.task import UnregisteredTask

registry = OperationRegistry()


def roll(topic: str) -> UnregisteredTask:
    task = UnregisteredTask()
    task.entrypoint, task.topic = "split.Roll", topic
    return task


@registry.subscribe(name="split.Game")
class Game(Operation):
    def build_tasks(self, rolls, tell):
        return [roll(rolls), roll(rolls)]

    def set_status(self, status, result=None):
        super().set_status(status, result)
        with Path(self.params["tell"]).open("a") as log:
            log.write(f"status {status}\n")

    def onsuccess(self, result):
        with Path(self.params["tell"]).open("a") as log:
            log.write(f"onsuccess {result}\n")
        return result
