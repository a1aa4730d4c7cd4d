"""A process that owns other processes and a temporary folder, and takes both with it when its owner is gone.

A script, never imported: the test run starts it and speaks with it in JSON lines over stdin and stdout. When the run
ends in whatever way, kill -9 included, stdin ends (or the parent changes) and the keeper kills what it started and
removes the folder. When the keeper itself is killed, the kernel kills what it started (Linux, PR_SET_PDEATHSIG). That
signal comes when the *thread* that started the process ends, which is why a test run cannot ask for it directly: the
keeper has one thread only, and that one lives as long as it does.

1. It first says ``{"ok": FOLDER}``.
2. ``{"call": "spawn", "args": [NAME, COMMAND, LOG]}`` starts a process, output to the file LOG; the answer is its pid.
3. ``{"call": "signal", "args": [NAME, NUMBER]}`` sends it a signal.
4. ``{"call": "poll", "args": [NAME]}`` answers its exit code, null while it runs.
5. ``{"call": "close", "args": []}`` ends everything; the answer comes when it is done.

Each answer is ``{"ok": VALUE}`` or ``{"error": TEXT}``.
"""

import ctypes
import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

OWNER_CHECK_S = 0.5
#: A folder younger than this may belong to a keeper that has not locked it yet.
STALE_AFTER_S = 60
PR_SET_PDEATHSIG = 1


def die_with_keeper() -> Callable[[], None] | None:
    """What a new process runs before its program, so that it does not outlive this one."""
    if not sys.platform.startswith("linux"):
        return None
    prctl, keeper = ctypes.CDLL(None).prctl, os.getpid()

    def prepare() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != keeper:  # it died before the call above
            os._exit(1)

    return prepare


class Keeper:
    def __init__(self, prefix: str) -> None:
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.prepare = die_with_keeper()
        remove_stale(prefix)
        self.folder = Path(tempfile.mkdtemp(prefix=prefix))
        self.lock = os.open(self.folder / "lock", os.O_CREAT | os.O_RDWR)
        fcntl.flock(self.lock, fcntl.LOCK_EX)

    def spawn(self, name: str, command: list[str], log: str) -> int:
        if name in self.processes and self.processes[name].poll() is None:
            raise FileExistsError(f"{name} runs already, pid {self.processes[name].pid}")
        with Path(log).open("ab") as output:
            self.processes[name] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, preexec_fn=self.prepare
            )
        return self.processes[name].pid

    def signal(self, name: str, number: int) -> None:
        self.processes[name].send_signal(number)

    def poll(self, name: str) -> int | None:
        return self.processes[name].poll()

    def close(self) -> None:
        for process in self.processes.values():
            process.kill()
        for process in self.processes.values():
            process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


def remove_stale(prefix: str) -> None:
    """Remove what a keeper that was killed left behind: a folder whose lock nobody holds."""
    for lock in Path(tempfile.gettempdir()).glob(f"{prefix}*/lock"):
        try:
            if time.time() - lock.stat().st_mtime < STALE_AFTER_S:
                continue
            descriptor = os.open(lock, os.O_RDWR)
        except OSError:  # another keeper was faster, or it is another user's
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.parent, ignore_errors=True)
        except BlockingIOError:
            pass
        finally:
            os.close(descriptor)


def lines(owner: int) -> Iterator[bytes]:
    """What the owner writes, line by line, until it closes its end or is gone."""
    buffer = b""
    while True:
        readable, _, _ = select.select([0], [], [], OWNER_CHECK_S)
        if not readable:
            # A process that the owner forked holds the other end of stdin too, and would keep it open for ever.
            if os.getppid() != owner:
                return
            continue
        chunk = os.read(0, 65536)
        if not chunk:
            return
        *complete, buffer = (buffer + chunk).split(b"\n")
        yield from complete


def answer(**fields: Any) -> None:
    os.write(1, json.dumps(fields).encode() + b"\n")


def serve(keeper: Keeper, owner: int) -> None:
    answer(ok=str(keeper.folder))
    for line in lines(owner):
        request = json.loads(line)
        try:
            value = getattr(keeper, request["call"])(*request["args"])
        except OSError as error:
            answer(error=str(error))
        else:
            answer(ok=value)
        if request["call"] == "close":
            return


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the owner
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    owner, prefix = int(sys.argv[1]), sys.argv[2]
    keeper = Keeper(prefix)
    try:
        serve(keeper, owner)
    except BrokenPipeError:
        pass
    finally:
        keeper.close()


if __name__ == "__main__":
    main()
