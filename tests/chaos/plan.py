"""What is done to workers and brokers, and when: all of it follows from the seed."""

import random
from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["SLOTS", "Step", "plan"]

#: The workers that are always there, but for what is done to them.
SLOTS = ("w1", "w2", "w3")
#: One round: each kind of fault comes once, a kill -9 twice, in an order that the seed gives.
ROUND = ("kill", "kill", "terminate", "pause", "add", "broker")


class Step(NamedTuple):
    """One thing to do."""

    #: Seconds after the start.
    at_s: float
    #: "kill" (-9) a worker, "terminate" it (SIGTERM), "pause" it (SIGSTOP), "add" one, kill -9 a "broker".
    what: str
    #: The worker's slot, or the number of the node.
    target: str
    #: Seconds until the killed one is started again, the paused one goes on, the added one is asked to leave.
    for_s: float

    def __str__(self) -> str:
        return f"{self.at_s:7.1f} s  {self.what} {self.target} for {self.for_s:.1f} s"


def plan(seed: int, seconds: float, *, pace_s: float, session_s: float, nodes: int) -> Sequence[Step]:
    """What to do in ``seconds``.

    Args:
        seed: the same seed with the same other arguments gives the same plan.
        seconds: nothing is done after that.
        pace_s: mean time between two steps.
        session_s: the session timeout of the group: pauses are longer.
        nodes: nodes of the broker that may be killed; 0: none.
    """
    draw = random.Random(f"plan {seed}")
    steps: list[Step] = []
    at_s = draw.uniform(0.2, 0.5) * pace_s
    while True:
        kinds = [kind for kind in ROUND if nodes or kind != "broker"]
        draw.shuffle(kinds)
        for kind in kinds:
            if at_s > seconds:
                return steps
            steps.append(Step(round(at_s, 2), kind, *_aim(draw, kind, session_s, nodes)))
            at_s += draw.uniform(0.5, 1.5) * pace_s


def _aim(draw: random.Random, kind: str, session_s: float, nodes: int) -> tuple[str, float]:
    """Target and duration, drawn in this order for every kind, so that plans differ by the seed only."""
    slot, span = draw.choice(SLOTS), draw.random()
    if kind == "broker":
        # Shorter and longer than broker.session.timeout.ms: one that is back at once is never missed by the others.
        return str(draw.randint(1, nodes)), round(0.5 + 6 * span, 2)
    if kind == "pause":
        return slot, round(session_s * (1.3 + span / 2), 2)
    if kind == "add":
        return "extra", round(session_s * (0.7 + span), 2)
    return slot, round(1.5 * span, 2)
