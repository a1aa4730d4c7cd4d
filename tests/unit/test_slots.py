"""Slots of workers: stable, never shared by two live processes, free again however their holder ended."""

import os
import signal
import socket
import subprocess
import sys

import pytest

from kser.errors import ConfigurationError
from kser.worker import slots
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
#: The same, after it has forked a process that does not end by itself; tells its id instead of the slot.
FORK = """
import os, time
from kser.worker import slots
taken = slots.take_slot
def take_slot(*args):
    slot = taken(*args)
    slot.read, said = os.pipe()
    child = os.fork()
    if not child:
        os.write(said, b"x")
        time.sleep(60)
        os._exit(0)
    os.read(slot.read, 1)
    slot.id = child
    return slot
slots.take_slot = take_slot
"""


@pytest.fixture
def holder():
    held = []

    def hold(group, name="", code=HOLD):
        process = subprocess.Popen(
            [sys.executable, "-c", code, group, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment()
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


def test_a_slot_is_free_after_its_holder_was_killed_though_a_task_of_it_has_forked(holder, tmp_path):
    """multiprocessing forks on Linux: such a process may live on, and must not keep the worker from coming back."""
    process, pid = holder("g", "db-0", FORK + HOLD)
    process.kill()
    process.wait(10)
    try:
        with take_slot("g", "db-0") as mine:
            assert mine.id == "db-0"
    finally:
        os.kill(int(pid), signal.SIGKILL)


def test_a_fork_takes_nothing_away_from_its_parent(holder):
    process, pid = holder("g", "db-0", FORK + HOLD)
    try:
        with pytest.raises(ConfigurationError, match=rf"process {process.pid}"):
            take_slot("g", "db-0")
    finally:
        os.kill(int(pid), signal.SIGKILL)


def test_two_workers_of_one_process_do_not_share_a_slot():
    with take_slot("g") as one, take_slot("g") as two:
        assert one.id != two.id
        with pytest.raises(ConfigurationError, match=rf"process {os.getpid()}"):
            take_slot("g", one.id)
        one.release()
        one.release()
        take_slot("g", one.id).release()


def test_a_link_planted_in_the_directory_is_not_followed(directory, tmp_path, caplog):
    """/tmp/kser-0 may have been made by somebody else, and the file of a slot is emptied."""
    with take_slot("g", "db-0"):
        [path] = directory.iterdir()
    (tmp_path / "precious").write_text("kept")
    path.unlink()
    path.symlink_to(tmp_path / "precious")
    with take_slot("g", "db-0") as slot:
        assert slot.id == "db-0"
    assert "No lock can be had" in caplog.text
    assert (tmp_path / "precious").read_text() == "kept"


def test_without_file_locks_a_worker_starts_with_its_process_id(monkeypatch, caplog):
    """Windows."""
    monkeypatch.setattr(slots, "fcntl", None)
    with take_slot("g") as slot, take_slot("g", "db-0") as named:
        assert (slot.id, named.id) == (f"{socket.gethostname()}-{os.getpid()}", "db-0")
    assert "this system has no file locks" in caplog.text
