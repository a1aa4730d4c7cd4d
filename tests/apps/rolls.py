"""A worker's side that knows the task and not the operation."""

from kser import OperationRegistry, Result, Task

registry = OperationRegistry()


@registry.subscribe(name="split.Roll")
class Roll(Task):
    def run(self):
        return Result(stdout="You made a 2")
