"""How often cycles of objects are looked for, in processes through which very many records go."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

__all__ = ["collecting_rarely"]

#: New objects after which the youngest are looked through.
_THRESHOLD: Final = 25_000
#: What Python has by default: anything else somebody has chosen.
_USUAL_THRESHOLDS: Final = frozenset({700, 2000})


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
