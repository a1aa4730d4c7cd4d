"""Files that steer a consumer from outside: pause it, end it, see what it runs.

Environment variables, read each time: LOCK_FILE (the pause file), TERMINATE_FILE and RUNNING_FILE are full paths;
LOCK_PATH is the directory of those that are not set, as ``kser-{host}-{pid}-pause.lock``, ``...-terminate.lock`` and
``...-run.lock``. Its default is ``$XDG_RUNTIME_DIR/kser``, else ``kser-{uid}`` in the directory for temporary files. A
directory that cannot be made or written turns the feature off; a failure to write never fails a message.
"""

import contextlib
import logging
import os
import socket
import tempfile
import time
from pathlib import Path

__all__ = ["LockFiles", "runtime_directory"]

logger = logging.getLogger(__name__)

#: Seconds between two looks at the files.
LOOK_EVERY_S = 0.2
#: A task is written to the running file when it has been running for this long.
_WRITE_EVERY_S = 0.5


class LockFiles:
    """The three files of this process. One thread owns it.

    At the start a terminate file is removed, and a pause file is obeyed. Only the running file is this process's own:
    it is removed at the end; the others are left to whoever made them.
    """

    def __init__(self) -> None:
        self._looked = 0.0
        self._wrote = 0.0
        self._paused = False
        self._terminate = False
        self._running = ""
        self._refused = False
        stale = self._path("TERMINATE_FILE", "terminate")
        if stale is not None and _exists(stale):
            logger.warning("Terminate file %s is left from an earlier run: removed", stale)
            with contextlib.suppress(OSError):
                stale.unlink()

    @property
    def paused(self) -> bool:
        """True while the pause file is there."""
        self._look()
        return self._paused

    @property
    def terminate(self) -> bool:
        """True once the terminate file is there."""
        self._look()
        return self._terminate

    @property
    def due(self) -> bool:
        """Whether the running file may be written again: what runs need not be looked up before."""
        return time.monotonic() - self._wrote >= _WRITE_EVERY_S

    def running(self, what: str) -> None:
        """Note what is being run, ``entrypoint[uuid]``, or "" for nothing. Short tasks may never be seen there."""
        now = time.monotonic()
        if what == self._running or now - self._wrote < _WRITE_EVERY_S:
            return
        self._wrote, self._running = now, what
        path = self._path("RUNNING_FILE", "run")
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            path.write_text(what, encoding="utf-8", errors="backslashreplace")
        except OSError as exc:
            if not self._refused:
                logger.warning("Running file %s cannot be written (%s): going on without", path, exc.strerror)
            self._refused = True

    def close(self) -> None:
        """Remove the running file."""
        path = self._path("RUNNING_FILE", "run")
        if path is None or not self._wrote:
            return
        with contextlib.suppress(OSError):
            # RUNNING_FILE may name one file for several processes: another one's is left to it.
            if path.read_text(encoding="utf-8", errors="backslashreplace") == self._running:
                path.unlink()

    def _look(self) -> None:
        now = time.monotonic()
        if now - self._looked < LOOK_EVERY_S:
            return
        self._looked = now
        self._paused = _exists(self._path("LOCK_FILE", "pause"))
        self._terminate = self._terminate or _exists(self._path("TERMINATE_FILE", "terminate"))

    @staticmethod
    def _path(variable: str, kind: str) -> Path | None:
        if full := os.environ.get(variable):
            return Path(full)
        directory = os.environ.get("LOCK_PATH") or runtime_directory()
        return Path(directory) / f"kser-{socket.gethostname()}-{os.getpid()}-{kind}.lock"


def runtime_directory() -> str:
    """Where files of running processes go when LOCK_PATH does not say: $XDG_RUNTIME_DIR/kser, else a temporary one."""
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        return str(Path(runtime) / "kser")
    user = os.getuid() if hasattr(os, "getuid") else os.environ.get("USERNAME", "user")
    return str(Path(tempfile.gettempdir()) / f"kser-{user}")


def _exists(path: Path | None) -> bool:
    try:
        return path is not None and path.exists()
    except OSError:
        return False
