"""The workers of a run: started, killed, paused, ended, and watched, so that none ends unseen."""

import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tests.apache_kafka import Keeper
from tests.processes import ROOT

__all__ = ["Fleet", "Settings", "catches"]

Delivery = Literal["exactly_once", "at_least_once"]
Protocol = Literal["classic", "consumer"]

#: A worker that does not react to SIGTERM yet is still starting.
STARTING_S = 30.0
#: A worker that ends by itself is started again at most so often.
RESTARTS = 5
TAIL_LINES = 25


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How the workers run."""

    bootstrap: str
    topic: str
    group: str
    delivery: Delivery
    #: Protocol of the group: "consumer" is KIP-848.
    protocol: Protocol
    #: Session timeout of the group in seconds; with KIP-848 the broker's setting, which is told here.
    session_s: float
    #: Workers have names of their own (--name): static members, stable transactional ids.
    named: bool
    logs: Path
    #: What a worker gets to end its running tasks when it is asked to stop, --drain.
    drain_s: float = 5.0
    #: What it may take beyond that, to settle (a settle thread that hangs is given up after 20 s) and to leave.
    limit_s: float = 30.0
    app: str = "tests.chaos.app:registry"
    log_level: str = "warning"

    @property
    def properties(self) -> dict[str, str]:
        """librdkafka properties of the workers."""
        if self.protocol == "consumer":
            return {"group.protocol": "consumer"}
        session_ms = round(self.session_s * 1000)
        return {"session.timeout.ms": str(session_ms), "heartbeat.interval.ms": str(session_ms // 6)}

    def command(self, slot: str) -> list[str]:
        """`kser worker` of this slot."""
        words = ["env", f"PYTHONPATH={ROOT}", "PYTHONUNBUFFERED=1", sys.executable, "-m", "kser", "worker", self.app]
        words += ["--bootstrap-servers", self.bootstrap, "--topics", self.topic, "--group", self.group]
        words += ["--delivery", self.delivery, "--drain", str(self.drain_s), "--log-level", self.log_level]
        words += ["--name", slot] if self.named else []
        for name, value in self.properties.items():
            words += ["-X", f"{name}={value}"]
        return words


@dataclass(slots=True)
class _Slot:
    name: str
    lives: int = 0
    pid: int = 0
    #: "down" (nobody wants it), "due" (to be started ``at``), "up", "paused" (until ``at``), "ending" (until ``at``).
    state: str = "down"
    at: float = 0.0
    #: What follows once it has ended: seconds until it is started again; None: it stays away.
    again_s: float | None = None
    asked_at: float = 0.0
    faults: int = 0

    @property
    def life(self) -> str:
        return f"{self.name}.{self.lives}"


class Fleet:
    """The workers. One thread owns it: it calls turn() again and again, and orders in between.

    Every process goes with the one that made the fleet, also when that is killed (tests/keeper.py).

    Args:
        settings: how they run; another one may be set at any time, and counts for what is started then.
        say: takes a line for people.
    """

    def __init__(self, settings: Settings, say: Callable[[str], object]) -> None:
        self.settings = settings
        self._say = say
        self._keeper = Keeper()
        self._slots: dict[str, _Slot] = {}
        #: What a worker did that it must not do.
        self.faults: list[str] = []
        #: Seconds that each worker took to end after SIGTERM.
        self.took_s: list[float] = []

    # -- orders ------------------------------------------------------------------------------------------------------

    def start(self, name: str) -> None:
        """Start the worker of this slot, now."""
        slot = self._slots.setdefault(name, _Slot(name))
        slot.lives += 1
        log = self.settings.logs / f"{name}.log"
        with log.open("a") as out:
            out.write(f"--- life {slot.lives} of {name}, started {time.strftime('%H:%M:%S')}\n")
        slot.pid = self._keeper.call("spawn", slot.life, self.settings.command(name), str(log))
        slot.state, slot.again_s = "up", None

    def kill(self, name: str, again_s: float) -> bool:
        """kill -9; it is started again after ``again_s``. False: there is nobody to kill."""
        slot = self._slots.get(name)
        if slot is None or slot.state not in ("up", "paused", "ending") or self._ended_alone(slot):
            return False
        self._send(slot, signal.SIGKILL)
        self._wait(slot)
        # One that was to leave for good is gone for good.
        again = slot.again_s if slot.state == "ending" else again_s
        slot.state, slot.at = ("down", 0.0) if again is None else ("due", time.monotonic() + again)
        return True

    def terminate(self, name: str, again_s: float | None) -> bool:
        """SIGTERM; it has to end with exit code 0 in time, and is started again after ``again_s`` (None: not at all).

        False: there is nobody who would hear it.
        """
        slot = self._slots.get(name)
        if slot is None or slot.state != "up" or self._ended_alone(slot) or not catches(slot.pid, signal.SIGTERM):
            return False
        self._send(slot, signal.SIGTERM)
        slot.state, slot.again_s, slot.asked_at = "ending", again_s, time.monotonic()
        slot.at = slot.asked_at + self.settings.drain_s + self.settings.limit_s
        return True

    def ask(self, name: str) -> None:
        """SIGTERM, and nothing more: how it ends is the caller's business."""
        self._send(self._slots[name], signal.SIGTERM)

    def pause(self, name: str, for_s: float) -> bool:
        """SIGSTOP, and SIGCONT after ``for_s``. False: there is nobody to stop."""
        slot = self._slots.get(name)
        if slot is None or slot.state != "up" or self._ended_alone(slot):
            return False
        self._send(slot, signal.SIGSTOP)
        slot.state, slot.at = "paused", time.monotonic() + for_s
        return True

    def turn(self) -> None:
        """Do what is due, see who has ended."""
        for slot in self._slots.values():
            if slot.state == "due" and time.monotonic() >= slot.at:
                self.start(slot.name)
            elif slot.state == "paused" and time.monotonic() >= slot.at:
                self._go_on(slot)
            elif slot.state == "ending":
                self._ending(slot)
            elif slot.state == "up":
                self._ended_alone(slot)

    def end(self) -> None:
        """SIGTERM to all and wait for their end: each has to end with exit code 0 in time."""
        self.settle_down()
        until = time.monotonic() + STARTING_S
        while any(slot.state in ("up", "ending") for slot in self._slots.values()):
            for slot in self._slots.values():
                if slot.state == "up" and not self.terminate(slot.name, None) and time.monotonic() > until:
                    self._fault(slot, f"does not catch SIGTERM {STARTING_S:g} s after the end")
                    self.kill(slot.name, 0)
                    slot.state = "down"
                elif slot.state == "ending":
                    slot.again_s = None
            self.turn()
            time.sleep(0.02)

    def settle_down(self) -> None:
        """No more pauses, no more waiting for a start: all that should be there is."""
        for slot in self._slots.values():
            if slot.state == "paused":
                self._go_on(slot)
            elif slot.state == "due":
                self.start(slot.name)

    def close(self) -> None:
        """kill -9 to what is left. A second call does nothing."""
        self._keeper.close()

    # -- what is seen ------------------------------------------------------------------------------------------------

    def exit_code(self, name: str) -> int | None:
        """How the present life of this slot ended; None while it runs."""
        code: int | None = self._keeper.call("poll", self._slots[name].life)
        return code

    @property
    def running(self) -> list[str]:
        """Slots whose process runs."""
        return [name for name, slot in self._slots.items() if slot.state in ("up", "paused", "ending")]

    def log_tail(self, name: str) -> str:
        """The last lines of a worker's log."""
        log = self.settings.logs / f"{name}.log"
        return "\n".join(log.read_text(errors="replace").splitlines()[-TAIL_LINES:]) if log.exists() else ""

    # -- inside ------------------------------------------------------------------------------------------------------

    def _send(self, slot: _Slot, number: signal.Signals) -> None:
        self._keeper.call("signal", slot.life, number)

    def _go_on(self, slot: _Slot) -> None:
        self._send(slot, signal.SIGCONT)
        slot.state = "up"
        self._say(f"{slot.name} goes on")

    def _wait(self, slot: _Slot) -> int:
        until = time.monotonic() + 10
        while (code := self.exit_code(slot.name)) is None:
            if time.monotonic() > until:
                raise AssertionError(f"pid {slot.pid} has not ended 10 s after kill -9")
            time.sleep(0.01)
        return code

    def _ending(self, slot: _Slot) -> None:
        code = self.exit_code(slot.name)
        took_s = time.monotonic() - slot.asked_at
        if code is None:
            if time.monotonic() < slot.at:
                return
            self._fault(slot, f"ignores SIGTERM: it runs {took_s:.1f} s after it")
            self._send(slot, signal.SIGKILL)
            self._wait(slot)
        else:
            self.took_s.append(took_s)
            if code:
                self._fault(slot, f"ended with exit code {code}, {took_s:.1f} s after SIGTERM")
        again = slot.again_s
        slot.state, slot.at = ("down", 0.0) if again is None else ("due", time.monotonic() + again)

    def _ended_alone(self, slot: _Slot) -> bool:
        code = self.exit_code(slot.name)
        if code is None:
            return False
        slot.faults += 1
        self._fault(slot, f"ended by itself with exit code {code}")
        slot.state, slot.at = ("due", time.monotonic() + 1) if slot.faults <= RESTARTS else ("down", 0.0)
        return True

    def _fault(self, slot: _Slot, what: str) -> None:
        text = f"worker {slot.name} (life {slot.lives}) {what}"
        self.faults.append(text)
        self._say(f"FAULT: {text}; the end of its log:\n{self.log_tail(slot.name)}")


def catches(pid: int, number: signal.Signals) -> bool:
    """Whether this process has a handler for this signal, or its parent is no Linux and cannot say: then True."""
    status = Path(f"/proc/{pid}/status")
    try:
        lines: Sequence[str] = status.read_text().splitlines()
    except FileNotFoundError:
        return not Path("/proc/self/status").exists()
    caught = next((line.split()[1] for line in lines if line.startswith("SigCgt:")), "0")
    return bool(int(caught, 16) >> (number - 1) & 1)
