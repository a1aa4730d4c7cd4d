"""How Python itself behaves in processes through which very many records go."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

__all__ = ["collecting_rarely", "quick_turns"]

#: New objects after which the youngest are looked through.
_THRESHOLD: Final = 25_000
#: What Python has by default: anything else somebody has chosen.
_USUAL_THRESHOLDS: Final = frozenset({700, 2000})
#: How long a thread that wants its turn waits for a busy one, in seconds.
_TURN_S: Final = 0.0005


@contextmanager
def collecting_rarely() -> Iterator[None]:
    """Within the block cycles are looked for less often, unless the program has a mind of its own.

    A record makes dozens of objects, none of them in a cycle, and looking cost a fifth of the time.
    """
    thresholds = gc.get_threshold()
    if thresholds[0] in _USUAL_THRESHOLDS:
        gc.set_threshold(_THRESHOLD, *thresholds[1:])
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)


@contextmanager
def quick_turns(turn_s: float = _TURN_S) -> Iterator[None]:
    """Within the block threads take turns more often: one that wants its turn waits ``turn_s`` for a busy one.

    The clients of Kafka and of databases give Python's lock away while they work, and wait for their turn after each
    call: beside one busy thread 500 confirmed records took 200 ms with Python's 5 ms, and 5 ms with 0.2 ms.
    """
    turn = sys.getswitchinterval()
    sys.setswitchinterval(min(turn, turn_s))
    try:
        yield
    finally:
        sys.setswitchinterval(turn)
