"""Several worker processes of one parent, with children that are small scripts."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from kser.worker import processes as module
from kser.worker.processes import Processes
from tests.brokers import has_ended
from tests.processes import environment
from tests.unit.test_worker import wait_for

#: Makes a file named after its pid, and writes there each byte it is told to stop with. Ends after so many, or with
#: stdin.
POLITE = """
import os, pathlib, signal, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
path = pathlib.Path(sys.argv[1], str(os.getpid()))
path.touch()
for _ in range(int(sys.argv[2]) if len(sys.argv) > 2 else 1):
    if not (said := os.read(0, 1)):
        break
    with path.open("ab") as file:
        file.write(said)
"""

#: Argument 1: the child's script, 2: its folder, 3: what it waits for.
PARENT = """
import sys
from kser.worker.processes import Processes
sys.exit(Processes([[sys.executable, "-c", *sys.argv[1:]]] * 2, end_s=5).run())
"""


@pytest.fixture
def running():
    """``running(commands)`` is a parent in a thread of this process, that thread, and where its exit code appears."""
    made = []

    def start(commands, *, end_s=5, **options):
        processes, codes = Processes(commands, end_s=end_s, **options), []
        thread = threading.Thread(target=lambda: codes.append(processes.run()), daemon=True)
        thread.start()
        made.append((processes, thread))
        return processes, thread, codes

    yield start
    for processes, thread in made:
        processes.stop()
        thread.join(20)
        assert not thread.is_alive()


@pytest.fixture
def parent(tmp_path):
    """A process, with a group of its own, that is the parent of two polite children, which wait for ``wants`` bytes."""
    made = []

    def start(wants=1):
        command = [sys.executable, "-c", PARENT, POLITE, str(tmp_path), str(wants)]
        made.append(subprocess.Popen(command, env=environment(), process_group=0))
        wait_for(lambda: len(pids(tmp_path)) == 2)
        return made[-1]

    yield start
    for process in made:
        process.kill()
        process.wait(10)


def pids(tmp_path):
    return [int(path.name) for path in tmp_path.iterdir()]


def told(tmp_path):
    return [len(path.read_bytes()) for path in tmp_path.iterdir()]


def polite(tmp_path, *more):
    return [sys.executable, "-c", POLITE, str(tmp_path), *more]


def script(text):
    return [sys.executable, "-c", text]


# -- stopping --------------------------------------------------------------------------------------------------------


def test_all_are_started_and_ended_together(running, tmp_path):
    processes, thread, codes = running([polite(tmp_path)] * 3)
    wait_for(lambda: len(pids(tmp_path)) == 3)
    processes.stop()
    thread.join(10)
    assert codes == [0]
    assert all(has_ended(pid) for pid in pids(tmp_path))


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_one_signal_asks_each_child_once_though_the_whole_group_gets_it(parent, tmp_path, signum):
    """As Ctrl-C in a terminal, and systemd when it stops a unit: told twice, a child would not drain."""
    process = parent()
    os.killpg(process.pid, signum)
    for pid in pids(tmp_path):
        if signum == signal.SIGTERM:
            os.kill(pid, signum)  # systemd does not care for sessions
    assert process.wait(10) == 0
    assert told(tmp_path) == [1, 1]


def test_a_second_signal_is_passed_on_too(parent, tmp_path):
    process = parent(wants=2)
    process.terminate()
    wait_for(lambda: told(tmp_path) == [1, 1])
    assert process.poll() is None
    process.terminate()
    assert process.wait(10) == 0
    assert told(tmp_path) == [2, 2]


def test_a_child_that_does_not_end_in_time_is_killed_and_the_exit_code_tells(running, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(module, "_MARGIN_S", 0.2)
    processes, thread, codes = running([polite(tmp_path, "9"), polite(tmp_path)], end_s=0.1)
    wait_for(lambda: len(pids(tmp_path)) == 2)
    processes.stop()
    thread.join(10)
    assert codes == [1]
    assert "Process 0 did not end in time: killed" in caplog.text
    assert "Process 1" not in caplog.text
    assert all(has_ended(pid) for pid in pids(tmp_path))


def test_the_exit_code_is_that_of_a_child_that_left_tasks(running, tmp_path):
    leaves = script("import sys; sys.stdin.buffer.read(1); sys.exit(4)")
    processes, thread, codes = running([polite(tmp_path), leaves])
    wait_for(lambda: pids(tmp_path))
    processes.stop()
    thread.join(10)
    assert codes == [4]


def test_a_child_that_a_signal_ends_before_it_listens_has_ended_well(running, tmp_path):
    """systemd's SIGTERM may come while the child still imports the tasks: nothing was taken, nothing is lost."""
    (tmp_path / "pids").mkdir()
    code = f"""
import os, pathlib, time
folder = pathlib.Path({str(tmp_path)!r})
(folder / "up").touch()
os.read(0, 1)
(folder / "pids" / str(os.getpid())).touch()
time.sleep(60)
"""
    processes, thread, codes = running([script(code)])
    wait_for(lambda: (tmp_path / "up").exists())
    processes.stop()
    wait_for(lambda: pids(tmp_path / "pids"))
    os.kill(pids(tmp_path / "pids")[0], signal.SIGTERM)
    thread.join(10)
    assert codes == [0]


def test_a_child_ends_with_its_parent_however_that_ends(parent, tmp_path):
    """Its standard input ends with the parent, which is what it listens to."""
    process = parent()
    process.kill()
    process.wait(10)
    wait_for(lambda: all(has_ended(pid) for pid in pids(tmp_path)))
    assert told(tmp_path) == [0, 0]


# -- starting again --------------------------------------------------------------------------------------------------


def test_a_child_that_dies_is_started_again(running, tmp_path, caplog):
    processes, thread, codes = running([polite(tmp_path)] * 2)
    wait_for(lambda: len(pids(tmp_path)) == 2)
    os.kill(pids(tmp_path)[0], signal.SIGKILL)
    wait_for(lambda: len(pids(tmp_path)) == 3)
    assert "was ended by SIGKILL; it is started again in 1 s" in caplog.text
    processes.stop()
    thread.join(10)
    assert codes == [0]


def test_the_wait_before_a_start_doubles_up_to_a_minute_and_is_short_again_after_a_minute_of_life():
    child = module._Child(0, [])
    waits = []
    for lived in [0, 0, 0, 0, 0, 0, 0, 59, 61, 0]:
        now = time.monotonic()
        child.started = now - lived
        child.again("died")
        waits.append(round(child.due - now))
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60, 1, 2]


def test_a_child_that_cannot_be_started_is_tried_again_and_the_others_run(running, tmp_path, caplog):
    later = tmp_path / "later"
    (tmp_path / "pids").mkdir()
    processes, thread, codes = running([[str(later)], polite(tmp_path / "pids")])
    wait_for(lambda: pids(tmp_path / "pids"))
    assert "Process 0 cannot be started (No such file or directory); it is started again in 1 s" in caplog.text
    later.write_text(f"#!/bin/sh\necho > {tmp_path}/pids/0\nread line\n")
    later.chmod(0o700)
    wait_for(lambda: 0 in pids(tmp_path / "pids"))
    processes.stop()
    thread.join(10)
    assert codes == [0]


@pytest.mark.parametrize("code", [1, 2, 3])
def test_one_that_ends_as_failed_or_misused_ends_all_and_is_not_started_again(running, tmp_path, code):
    """A bad option must not loop."""
    began = time.monotonic()
    _, thread, codes = running([polite(tmp_path), script(f"import sys; sys.exit({code})")])
    thread.join(10)
    assert codes == [code]
    assert time.monotonic() - began < 8
    assert all(has_ended(pid) for pid in pids(tmp_path))
