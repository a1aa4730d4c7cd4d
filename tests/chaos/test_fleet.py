"""The fleet sees a worker that misbehaves, and takes all of its processes with it."""

import os
import signal
import subprocess
import sys

import pytest

from tests.brokers import has_ended
from tests.chaos.fleet import Fleet, Settings, catches
from tests.processes import ROOT, environment, wait_for

OBEDIENT = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(0)); time.sleep(60)"
STUBBORN = "import signal, time; signal.signal(15, lambda *_: None); [time.sleep(1) for _ in range(60)]"
FAILING = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(7)); time.sleep(60)"
MORTAL = "raise SystemExit(3)"


class Scripted(Settings):
    """Runs the program in ``app`` in place of a worker."""

    def command(self, slot):
        return [sys.executable, "-c", self.app]


def settings(tmp_path, app, limit_s=10.0):
    return Scripted(
        bootstrap="",
        topic="t",
        group="g",
        delivery="exactly_once",
        protocol="classic",
        session_s=3,
        named=True,
        logs=tmp_path,
        drain_s=0,
        limit_s=limit_s,
        app=app,
    )


@pytest.fixture
def fleet_of(tmp_path):
    made = []

    def make(app, **more):
        made.append(Fleet(settings(tmp_path, app, **more), lambda line: None))
        return made[-1]

    yield make
    for fleet in made:
        fleet.close()


def pid_of(fleet, name="w1"):
    return fleet._slots[name].pid


def until(fleet, condition, what):
    def seen():
        fleet.turn()
        return condition()

    wait_for(seen, 20, what)


def test_a_worker_that_ends_on_sigterm_is_no_fault_and_is_started_again(fleet_of):
    fleet = fleet_of(OBEDIENT)
    fleet.start("w1")
    first = pid_of(fleet)
    wait_for(lambda: fleet.terminate("w1", 0.0), 20, "the handler")
    until(fleet, lambda: pid_of(fleet) != first, "the next life")
    fleet.end()
    assert fleet.faults == []
    assert len(fleet.took_s) == 2
    assert fleet.running == []


def test_a_worker_that_ends_by_itself_is_a_fault(fleet_of):
    fleet = fleet_of(MORTAL)
    fleet.start("w1")
    until(fleet, lambda: fleet.faults, "the fault")
    assert fleet.faults == ["worker w1 (life 1) ended by itself with exit code 3"]


def test_a_worker_that_had_ended_by_itself_before_it_was_to_be_killed_is_a_fault(fleet_of):
    fleet = fleet_of(MORTAL)
    fleet.start("w1")
    wait_for(lambda: fleet.exit_code("w1") is not None, 20, "its end")
    assert not fleet.kill("w1", 1)
    assert "ended by itself" in fleet.faults[0]


def test_a_worker_that_ignores_sigterm_is_a_fault_and_is_ended(fleet_of):
    fleet = fleet_of(STUBBORN, limit_s=0.5)
    fleet.start("w1")
    pid = pid_of(fleet)
    fleet.end()
    assert "ignores SIGTERM" in fleet.faults[0]
    assert has_ended(pid)


def test_a_worker_that_fails_on_sigterm_is_a_fault(fleet_of):
    fleet = fleet_of(FAILING)
    fleet.start("w1")
    fleet.end()
    assert "ended with exit code 7" in fleet.faults[0]


def test_a_killed_worker_is_no_fault_and_comes_again(fleet_of):
    fleet = fleet_of(OBEDIENT)
    fleet.start("w1")
    first = pid_of(fleet)
    assert fleet.kill("w1", 0.0)
    assert has_ended(first)
    assert not fleet.kill("w1", 0.0)  # it is not back yet
    until(fleet, lambda: pid_of(fleet) != first, "the next life")
    fleet.end()
    assert fleet.faults == []


def test_a_paused_worker_goes_on_when_it_is_time(fleet_of):
    fleet = fleet_of(OBEDIENT)
    fleet.start("w1")
    assert fleet.pause("w1", 0.3)
    assert not fleet.pause("w1", 0.3)
    assert not fleet.terminate("w1", None)  # it would not hear it
    wait_for(lambda: "T" in state(pid_of(fleet)), 10, "the stop")
    until(fleet, lambda: "T" not in state(pid_of(fleet)), "going on")
    fleet.end()
    assert fleet.faults == []


def state(pid):
    told = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return told.stdout


def test_the_workers_go_when_the_run_is_killed(tmp_path):
    """kill -9 of the process that made the fleet: its workers do not outlive it, the stopped one included."""
    program = f"""
import sys, time
from pathlib import Path
from tests.chaos.test_fleet import OBEDIENT, pid_of, settings
from tests.chaos.fleet import Fleet
fleet = Fleet(settings(Path({str(tmp_path)!r}), OBEDIENT), print)
for name in ("w1", "w2"):
    fleet.start(name)
fleet.pause("w2", 60)
print(pid_of(fleet, "w1"), pid_of(fleet, "w2"), flush=True)
time.sleep(60)
"""
    child = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, env=environment(), stdout=subprocess.PIPE)
    with child:
        pids = [int(word) for word in child.stdout.readline().split()]
        assert len(pids) == 2
        os.kill(child.pid, signal.SIGKILL)
    wait_for(lambda: all(has_ended(pid) for pid in pids), 20, f"the end of {pids}")


def test_a_handler_is_seen_once_it_is_there():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    with child:
        assert not catches(child.pid, signal.SIGTERM)
        child.kill()
    assert not catches(child.pid, signal.SIGTERM)
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        assert catches(os.getpid(), signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, before)
