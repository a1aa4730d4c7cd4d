"""The dice game, with a roll that can be slowed down and a file that tells when one has begun."""

import os
import time
from pathlib import Path

from kser import Operation, OperationRegistry, Result, Task

registry = OperationRegistry()


@registry.subscribe(name="dice.Roll")
class Roll(Task):
    def run(self):
        if path := self.params.get("tell"):
            with Path(path).open("a") as log:
                log.write(f"{self.uuid} {os.getpid()} {self.params.get('n')}\n")
        time.sleep(self.params.get("sleep", 0))
        if self.params.get("fail"):
            raise ValueError("the die rolled off the table")
        return Result(stdout="You made a 4", retval={f"roll{self.params.get('n', 0)}": 4})


@registry.subscribe(name="dice.Launch")
class Launch(Operation):
    def build_tasks(self, **params):
        return [Roll(params={**params, "n": n}) for n in range(3)]


@registry.subscribe(name="dice.Evening")
class Evening(Operation):
    """Two games one after the other: nested operations."""

    def build_tasks(self, **params):
        return [Launch(params=params), Launch(params=params)]
