"""The operations that the fault suite runs: five tasks, of which one is async, one sends and one is an operation.

Each task leaves in its result when it began and ended (``retval[its uuid] = [began, ended]``, time.monotonic(), which
all processes of one machine share), so that the committed events say in which order the records of a key were run.
"""

import asyncio
import time

from kser import Operation, OperationRegistry, Result, Task

registry = OperationRegistry()


class Timed(Task):
    """Takes ``params["s"]`` seconds."""

    def run(self):
        began = time.monotonic()
        time.sleep(self.params.get("s", 0))
        return self.took(began)

    def took(self, began):
        return Result(uuid=self.uuid, retval={self.uuid: [began, time.monotonic()]})


@registry.subscribe(name="chaos.Work")
class Work(Timed):
    pass


@registry.subscribe(name="chaos.Later")
class Later(Timed):
    async def run(self):
        began = time.monotonic()
        await asyncio.sleep(self.params.get("s", 0))
        return self.took(began)


@registry.subscribe(name="chaos.Sends")
class Sends(Timed):
    """Sends a message that belongs to no operation, in the lane of its own key."""

    def run(self):
        began = time.monotonic()
        sent = Lone(params={"of": self.uuid}).send(key=self.params["key"])
        assert sent.retcode == 202, sent
        return self.took(began)


@registry.subscribe(name="chaos.Lone")
class Lone(Timed):
    pass


@registry.subscribe(name="chaos.Inner")
class Inner(Operation):
    def build_tasks(self, **params):
        return [Work(params={})]


@registry.subscribe(name="chaos.Outer")
class Outer(Operation):
    """Params: ``key``, and ``s``, the seconds of each of its tasks that takes time, in order."""

    def build_tasks(self, key, s):
        return [
            Work(params={"s": s[0]}),
            Later(params={"s": s[1]}),
            Sends(params={"key": key}),
            Inner(params={}),
            Work(params={"s": s[2]}),
        ]
