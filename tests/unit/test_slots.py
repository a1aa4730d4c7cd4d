"""Slots of workers: stable, never shared by two live processes, free again however their holder ended."""

import os
import signal
import socket
import subprocess
import sys

import pytest

from kser.errors import ConfigurationError
from kser.worker.slots import take_slot
from tests.processes import environment


@pytest.fixture(autouse=True)
def directory(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCK_PATH", str(tmp_path / "locks"))
    return tmp_path / "locks"


HOLD = """
import sys
from kser.worker.slots import take_slot
slot = take_slot(sys.argv[1], sys.argv[2] or None)
print(slot.id, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder():
    held = []

    def hold(group, name=""):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, group, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment()
        )
        held.append(process)
        return process, process.stdout.readline().decode().strip()

    yield hold
    for process in held:
        process.kill()
        process.wait(10)
        process.stdin.close()
        process.stdout.close()


def test_workers_of_one_host_get_numbers_and_a_freed_one_is_taken_again(holder):
    host = socket.gethostname()
    _, first = holder("g")
    with take_slot("g") as second:
        assert (first, second.id) == (f"{host}-0", f"{host}-1")
    with take_slot("g") as again:
        assert again.id == f"{host}-1"


def test_a_slot_is_free_after_its_holder_was_killed(holder):
    process, slot = holder("g", "db-0")
    assert slot == "db-0"
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    with take_slot("g", "db-0") as mine:
        assert mine.id == "db-0"


def test_a_name_that_a_live_process_holds_is_refused_with_its_process(holder):
    process, _ = holder("g", "db-0")
    with pytest.raises(ConfigurationError, match=rf"name db-0 on this host \(process {process.pid}\)"):
        take_slot("g", "db-0")


def test_groups_do_not_share_slots_whatever_their_names(holder):
    holder("a.b", "c")
    with take_slot("a", "b.c") as one, take_slot("a.b.c", "") as two:
        assert (one.id, two.id) == ("b.c", "")


def test_a_directory_that_cannot_be_had_is_told_and_the_worker_starts(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("LOCK_PATH", str(tmp_path / "file"))
    with take_slot("g") as slot:
        assert slot.id == f"{socket.gethostname()}-{os.getpid()}"
    assert "No lock can be had" in caplog.text
