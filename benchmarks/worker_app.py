"""The task that benchmarks/worker.py lets a worker run: it does nothing."""

from kser import OperationRegistry, Task

registry = OperationRegistry()


@registry.subscribe(name="noop")
class Noop(Task):
    def run(self):
        pass
