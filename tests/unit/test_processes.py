"""Several worker processes of one parent, with children that are small scripts."""

import os
import signal
import subprocess
import sys
import threading
import time

from kser.worker.processes import Processes
from tests.processes import environment
from tests.unit.test_worker import wait_for

#: Writes its pid, ends with 0 at SIGTERM, with the end of stdin too.
POLITE = """
import os, signal, sys, pathlib
signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
pathlib.Path(sys.argv[1], str(os.getpid())).touch()
sys.stdin.read()
"""

PARENT = """
import sys
from kser.worker.processes import Processes
Processes([[sys.executable, "-c", sys.argv[1], sys.argv[2]]], drain_s=5).run()
"""


def running(commands, **options):
    processes, codes = Processes(commands, drain_s=5, **options), []
    thread = threading.Thread(target=lambda: codes.append(processes.run()), daemon=True)
    thread.start()
    return processes, thread, codes


def pids(tmp_path):
    return [int(path.name) for path in tmp_path.iterdir()]


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_all_are_started_and_ended_together(tmp_path):
    processes, thread, codes = running([[sys.executable, "-c", POLITE, str(tmp_path)]] * 3)
    wait_for(lambda: len(pids(tmp_path)) == 3)
    processes.stop()
    thread.join(10)
    assert codes == [0]
    assert not any(alive(pid) for pid in pids(tmp_path))


def test_a_child_that_dies_is_started_again(tmp_path, caplog):
    processes, thread, codes = running([[sys.executable, "-c", POLITE, str(tmp_path)]] * 2)
    wait_for(lambda: len(pids(tmp_path)) == 2)
    os.kill(pids(tmp_path)[0], signal.SIGKILL)
    wait_for(lambda: len(pids(tmp_path)) == 3)
    assert "was ended by SIGKILL; it is started again in 1 s" in caplog.text
    processes.stop()
    thread.join(10)
    assert codes == [0]


def test_one_that_ends_as_misused_ends_all_and_is_not_started_again(tmp_path):
    """A bad option must not loop."""
    wrong = [sys.executable, "-c", "import sys; sys.exit(2)"]
    began = time.monotonic()
    _, thread, codes = running([[sys.executable, "-c", POLITE, str(tmp_path)], wrong])
    thread.join(10)
    assert codes == [2]
    assert time.monotonic() - began < 8
    assert not any(alive(pid) for pid in pids(tmp_path))


def test_a_child_ends_with_its_parent_however_that_ends(tmp_path):
    """Its standard input ends with the parent, which is what it listens to."""
    parent = subprocess.Popen([sys.executable, "-c", PARENT, POLITE, str(tmp_path)], env=environment())
    wait_for(lambda: pids(tmp_path))
    parent.kill()
    parent.wait(10)
    wait_for(lambda: not alive(pids(tmp_path)[0]))
