"""The slot of a worker: what its transactional ids are made of, stable over restarts and never shared by two.

A restarted worker with the ids of its last life ends at once what that left open; with new ids it would block readers
until the transaction times out. Source: KAFKA.md section 2, rule 7.
"""

import hashlib
import logging
import os
import re
import socket
from pathlib import Path
from types import TracebackType
from typing import Final, Self

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

    def __init__(self, name: str, lock: int | None = None) -> None:
        #: The name of the slot.
        self.id = name
        self._lock = lock
        if lock is not None:
            _held.add(self)

    def release(self) -> None:
        """Let others have it. A second call does nothing."""
        if self._lock is not None:
            fcntl.flock(self._lock, fcntl.LOCK_UN)  # whoever may have a copy of the descriptor
        self.forget()

    def forget(self) -> None:
        """Close the file, and leave the lock to the process that this one is a copy of."""
        lock, self._lock = self._lock, None
        if lock is not None:
            _held.discard(self)
            os.close(lock)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


#: The slots of this process.
_held: set[Slot] = set()


def _forked() -> None:
    """In a copy of this process, which a task has forked: the slots are not its own.

    It would hold their locks for as long as it lives, and a killed worker could not come back under its name.
    """
    for slot in tuple(_held):
        slot.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


def take_slot(group: str, name: str | None = None) -> Slot:
    """A slot of this group on this host: the one named, else the host's name with the first free number.

    It is held by a lock on a file in LOCK_PATH, $XDG_RUNTIME_DIR/kser or the directory for temporary files, which the
    kernel lets go of when the process ends. Two hosts are kept apart by their names only, so a ``name`` must be unique
    in the group. Where files cannot be locked (a directory that cannot be written, Windows) the slot is ``name``, else
    the host's name with the process id, with a warning.

    Raises ConfigurationError when another live process of this host holds ``name``.
    """
    host = socket.gethostname()
    directory = Path(os.environ.get("LOCK_PATH") or runtime_directory())
    wanted = [name] if name is not None else [f"{host}-{number}" for number in range(_MOST)]
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        for slot in wanted:
            lock = _locked(directory / _file_name(group, slot))
            if isinstance(lock, int):
                return Slot(slot, lock)
            if name is not None:
                raise ConfigurationError(
                    f"Another worker of group {group} has the name {name} on this host (process "
                    f"{lock or 'unknown'}): give each worker a name of its own, or end the other one",
                    extra={"group": group, "name": name, "pid": lock},
                )
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


def _locked(path: Path) -> int | str:
    """The descriptor of the file with its lock, or the process id in it when somebody else has that."""
    if fcntl is None:
        raise OSError(0, "this system has no file locks that end with their process")
    # No link is followed: in a directory that another user has made before, it might lead to a file of this one.
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(lock, 20).decode("ascii", "replace").strip()
            os.close(lock)
            return holder
        os.ftruncate(lock, 0)
        os.write(lock, str(os.getpid()).encode())
    except OSError:
        os.close(lock)
        raise
    return lock


def _file_name(group: str, slot: str) -> str:
    """A file of its own for each pair, whatever is in the two names."""
    shown = re.sub(r"[^A-Za-z0-9._-]+", "_", f"{group}.{slot}")[:80]
    digest = hashlib.sha256(f"{len(group)} {group} {slot}".encode()).hexdigest()[:12]
    return f"slot-{shown}-{digest}.lock"
