"""The slot of a worker: what its transactional ids are made of, stable over restarts and never shared by two.

A restarted worker with the ids of its last life ends at once what that left open; with new ids it would block readers
until the transaction times out. Source: KAFKA.md section 2, rule 7.
"""

import contextlib
import hashlib
import logging
import os
import re
import socket
from pathlib import Path
from types import TracebackType
from typing import IO, Final, Self

from kser.errors import ConfigurationError
from kser.worker.lockfiles import runtime_directory

try:
    import fcntl
except ImportError:  # Windows: no lock that a killed process lets go of
    fcntl = None  # type: ignore[assignment]

__all__ = ["Slot", "take_slot"]

logger = logging.getLogger(__name__)

#: Workers of one group on one host that get a number of their own.
_MOST: Final = 1000


class Slot:
    """A slot that is held until release(), or until the process ends, however it ends."""

    def __init__(self, name: str, lock: IO[str] | None = None) -> None:
        #: The name of the slot.
        self.id = name
        self._lock = lock

    def release(self) -> None:
        """Let others have it. A second call does nothing."""
        lock, self._lock = self._lock, None
        if lock is not None:
            lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def take_slot(group: str, name: str | None = None) -> Slot:
    """A slot of this group on this host: the one named, else the host's name with the first free number.

    It is held by a lock on a file in LOCK_PATH, $XDG_RUNTIME_DIR/kser or the directory for temporary files, which the
    kernel lets go of when the process ends. Two hosts are kept apart by their names only, so a ``name`` must be unique
    in the group. Where files cannot be locked the slot is the host's name with the process id, with a warning.

    Raises ConfigurationError when another live process of this host holds ``name``.
    """
    host = socket.gethostname()
    directory = Path(os.environ.get("LOCK_PATH") or runtime_directory())
    wanted = [name] if name is not None else [f"{host}-{number}" for number in range(_MOST)]
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        for slot in wanted:
            lock = _locked(directory / _file_name(group, slot))
            if isinstance(lock, str):
                if name is not None:
                    raise ConfigurationError(
                        f"Another worker of group {group} has the name {name} on this host (process "
                        f"{lock or 'unknown'}): give each worker a name of its own, or end the other one",
                        extra={"group": group, "name": name, "pid": lock},
                    )
                continue
            return Slot(slot, lock)
    except OSError as exc:
        alone = name or f"{host}-{os.getpid()}"
        logger.warning(
            "No lock can be had in %s (%s): the slot of this worker is %s, and nothing keeps another process from it",
            directory,
            exc.strerror or exc,
            alone,
        )
        return Slot(alone)
    raise ConfigurationError(f"{_MOST} workers of group {group} run on this host: give this one a name (--name)")


def _locked(path: Path) -> IO[str] | str:
    """The open file with its lock, or the process id in it when another process has that."""
    if fcntl is None:
        raise OSError(0, "this system has no file locks that end with their process")
    lock = path.open("a+", encoding="ascii", errors="replace")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        with contextlib.closing(lock):
            lock.seek(0)
            return lock.read(20).strip()
    except OSError:
        lock.close()
        raise
    lock.seek(0)
    lock.truncate()
    lock.write(str(os.getpid()))
    lock.flush()
    return lock


def _file_name(group: str, slot: str) -> str:
    """A file of its own for each pair, whatever is in the two names."""
    shown = re.sub(r"[^A-Za-z0-9._-]+", "_", f"{group}.{slot}")[:80]
    digest = hashlib.sha256(f"{len(group)} {group} {slot}".encode()).hexdigest()[:12]
    return f"slot-{shown}-{digest}.lock"
