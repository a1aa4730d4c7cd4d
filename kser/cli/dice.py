"""The dice game: what `kser demo` plays."""

import random
import time
from typing import Any

from kser.results import Result
from kser.sequencing.operation import Operation
from kser.sequencing.registry import OperationRegistry
from kser.sequencing.task import Task

__all__ = ["DiceLaunch", "DiceRoll", "registry"]

registry = OperationRegistry()


@registry.subscribe
class DiceRoll(Task):
    """One roll. It takes 0.1 to 0.4 s, times the parameter ``pace`` (default 1)."""

    def run(self) -> Result:
        """Roll."""
        time.sleep(random.uniform(0.1, 0.4) * self.params.get("pace", 1))  # noqa: S311 - a game
        launch = random.randint(1, 6)  # noqa: S311
        return Result(uuid=self.uuid, stdout=f"You made a {launch}", retval={"roll": launch})


@registry.subscribe
class DiceLaunch(Operation):
    """Three rolls, one after the other."""

    def build_tasks(self, **params: Any) -> list[Task]:
        """Three rolls."""
        return [DiceRoll(params=params), DiceRoll(params=params), DiceRoll(params=params)]
