"""The process of one member of a worker of several processes: it loads the registry and is a Worker of its own.

Its standard input begins with the orders of its parent (kser.worker.members), a frame as kser.worker.child packs them.
After that each byte, and the end, mean what they mean to every process of kser.worker.processes.
"""

import logging
import marshal
import os
import sys
from typing import Any, Final, NoReturn

from kser import loading
from kser.errors import ConfigurationError, Error, FencedError, TransportError
from kser.worker.child import HEAD, leave, load, set_levels
from kser.worker.members import Place
from kser.worker.processes import FAILED, LEFT, MISUSE, TWIN
from kser.worker.shutdown import end_within, obey_stdin
from kser.worker.worker import Worker

__all__ = ["main"]

logger = logging.getLogger(__name__)

#: Of log lines, where neither the program nor its modules have set one up.
_FORMAT: Final = "%(asctime)s %(levelname)-8s %(process)d %(message)s"


def main() -> NoReturn:
    """Be a member, until asked to stop."""
    orders = _orders()
    sys.argv[:], sys.path[:] = orders["argv"], orders["path"]

    def be() -> NoReturn:
        """Called again by a script that is being imported and has come to the run() of its worker."""
        leave(_be(orders))

    loading.stop_at_guard(be)
    be()


def _orders() -> dict[str, Any]:
    """What the parent wrote first, and not one byte more."""
    told: dict[str, Any] = marshal.loads(_read(int.from_bytes(_read(HEAD), "big")))  # noqa: S302 - of the parent
    return told


def _read(size: int) -> bytes:
    found = b""
    while len(found) < size:
        more = os.read(0, size - len(found))
        if not more:
            os._exit(0)  # the parent has ended before it had said what to do
        found += more
    return found


def _be(orders: dict[str, Any]) -> int:
    """Run the worker; its exit code."""
    try:
        controller = load(orders)
        loading.stop_at_guard(None)
        if orders["logs"]:
            logging.basicConfig(format=_FORMAT)  # does nothing where a module has seen to it
        set_levels(orders)  # a module may have set them otherwise than the program did later
        return _run(Worker(controller, location=orders["location"], **orders["worker"], **_own(orders)))
    except FencedError as exc:
        logger.error("%s", exc.message)
        return TWIN
    except ConfigurationError as exc:
        logger.error("%s", exc.message)
        return MISUSE
    except Error as exc:
        logger.error("%s", exc.message)
    except Exception:
        logger.exception("The worker failed")
    return FAILED


def _own(orders: dict[str, Any]) -> dict[str, Any]:
    return Place(*orders["place"])._asdict()


def _run(worker: Worker) -> int:
    obey_stdin(lambda: worker.stopping, worker.stop)
    worker.on_drain = lambda: end_within(worker.end_s)
    try:
        worker.run()
    except TransportError as exc:
        if not worker.worn:
            raise
        logger.error("%s", exc.message)
        return LEFT
    if worker.stats["broken"]:
        return FAILED
    return LEFT if worker.left else 0
