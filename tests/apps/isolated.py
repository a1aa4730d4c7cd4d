"""Isolated tasks that do what a test wants to see survived."""

import ctypes
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from kser import Operation, OperationRegistry, Result, Task
from kser.progress import report_progress

registry = OperationRegistry(topic="work")
logger = logging.getLogger("tests.isolated")


@registry.subscribe(name="iso.Noop", isolate=True)
class Noop(Task):
    def run(self):
        return Result(retval={"pid": os.getpid(), "attempt": self.attempt, **self.params})


@registry.subscribe(name="iso.Chain", isolate=True)
class Chain(Operation):
    def build_tasks(self, **params):
        return [Noop(params={"n": 1}), Noop(params={"n": 2})]


@registry.subscribe(name="iso.Sender", isolate=True)
class Sender(Task):
    def run(self):
        Noop(params=self.params).send()


@registry.subscribe(name="iso.Sleep", isolate=True)
class Sleep(Task):
    """Sleeps, after having told its process id and those of what it started; ``gil`` keeps the GIL meanwhile."""

    def run(self):
        grandchild = subprocess.Popen(["sleep", "300"])
        tell(self.params["tell"], os.getpid(), grandchild.pid)
        if self.params.get("gil"):
            ctypes.PyDLL(None).sleep(300)
        time.sleep(self.params.get("seconds", 300))
        grandchild.kill()
        grandchild.wait()


@registry.subscribe(name="iso.Hurried", isolate=True, timeout=1)
class Hurried(Sleep):
    """Has a second, and takes longer."""


@registry.subscribe(name="iso.Patient", isolate=True)
class Patient(Task):
    """Ends when it is told to, and says why."""

    def run(self):
        tell(self.params["tell"], os.getpid())
        while self.heartbeat():
            time.sleep(0.01)
        return Result(retval={"aborted": self.aborted})


@registry.subscribe(name="iso.Coroutine", isolate=True)
class Coroutine(Task):
    """Notices nothing by itself: it is cancelled."""

    async def run(self):
        import asyncio

        tell(self.params["tell"], os.getpid())
        await asyncio.sleep(300)


@registry.subscribe(name="iso.Beats", isolate=True)
class Beats(Task):
    def run(self):
        for _ in range(self.params["count"]):
            assert self.heartbeat()
            time.sleep(0.02)


@registry.subscribe(name="iso.Crash", isolate=True)
class Crash(Task):
    """Ends its process in the way that ``how`` says."""

    def run(self):
        match self.params["how"]:
            case "segfault":
                ctypes.string_at(0)
            case "exit":
                os._exit(3)
            case "closed":
                os.closerange(3, 256)
                time.sleep(300)
            case "forked":
                if os.fork():
                    os._exit(5)
                time.sleep(300)
            case number:
                os.kill(os.getpid(), getattr(signal, number))


@registry.subscribe(name="iso.Fork", isolate=True)
class Fork(Task):
    """A copy of the process comes back from run(), and a second one can be terminated."""

    def run(self):
        copy = os.fork()
        if not copy:
            return Result(stdout="the copy")
        os.waitpid(copy, 0)
        other = multiprocessing.get_context("fork").Process(target=time.sleep, args=[300])
        other.start()
        time.sleep(0.2)
        other.terminate()
        other.join(20)
        return Result(stdout="the original", retval={"exitcode": other.exitcode})


@registry.subscribe(name="iso.Loud", isolate=True)
class Loud(Task):
    def run(self):
        print("printed", "x" * 100_000)
        sys.stdout.buffer.write(b"\x00\x00\x00\x05bytes\n")
        os.write(2, b"to stderr\n")
        logger.debug("not wanted")
        logger.warning("said %s", self.params["what"], extra={"order": {"id": 7}, "path": Path("a/b")})
        try:
            raise ZeroDivisionError
        except ZeroDivisionError:
            logger.exception("it failed")


@registry.subscribe(name="iso.Tells", isolate=True)
class Tells(Task):
    """Tells how far it is, logs, and fails three calls deep."""

    def run(self):
        for n in range(500):
            report_progress("rows::read", n + 1, 500, f"row {n}")
        try:
            raise ZeroDivisionError("kept")
        except ZeroDivisionError:
            logger.exception("it failed")
        self.log("half of %s", logging.WARNING, "it")
        self.deep(password="hunter2hunter2")

    def deep(self, password):
        order = "A7"
        raise ValueError(f"no {order}")


@registry.subscribe(name="iso.Sees", isolate=True)
class Sees(Task):
    """What the process has: open files, signals, its session."""

    def run(self):
        files = [str(fd.readlink()) for fd in Path("/proc/self/fd").iterdir() if fd.is_symlink()]
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        started = subprocess.run(
            [sys.executable, "-c", "import signal as s; print(s.getsignal(2).__name__, int(s.getsignal(15)))"],
            capture_output=True,
            text=True,
        )
        return Result(
            retval={
                "files": files,
                "session": os.getsid(0) == os.getpid(),
                "signals": started.stdout.strip(),
                "argv": sys.argv,
                "directory": str(Path.cwd()),
            }
        )


@registry.subscribe(name="iso.Count", isolate=True)
class Count(Task):
    """Computes for a while, without letting go of the GIL."""

    def run(self):
        total = 0
        for n in range(self.params["to"]):
            total += n
        return Result(retval={"total": total})


def tell(path, *words):
    """Write a whole line at once, under the name that is waited for."""
    made = Path(f"{path}.{os.getpid()}")
    made.write_text(" ".join(map(str, words)))
    made.rename(path)
