"""Contracts K-87 to K-89: the files that steer a consumer. Traps T-05, T-24."""

import os
import socket
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from kser.worker import lockfiles
from kser.worker.lockfiles import LockFiles


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
    """Looks and writes happen at each call, not a few times a second."""
    monkeypatch.setattr(lockfiles, "LOOK_EVERY_S", 0)
    monkeypatch.setattr(lockfiles, "_WRITE_EVERY_S", 0)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCK_PATH", str(tmp_path))
    return tmp_path


def own(folder, kind):
    return folder / f"kser-{socket.gethostname()}-{os.getpid()}-{kind}.lock"


def test_k88_names_have_host_and_process_in_them(folder):
    files = LockFiles()
    own(folder, "pause").touch()
    assert files.paused
    own(folder, "pause").unlink()
    assert not files.paused
    own(folder, "terminate").touch()
    assert files.terminate
    files.running("shop.Charge[u]")
    assert own(folder, "run").read_text() == "shop.Charge[u]"


def test_k89_the_variables_are_full_paths_and_read_each_time(folder, tmp_path, monkeypatch):
    files = LockFiles()
    assert not files.paused
    monkeypatch.setenv("LOCK_FILE", str(tmp_path / "stop it"))
    (tmp_path / "stop it").touch()
    assert files.paused
    monkeypatch.delenv("LOCK_FILE")
    assert not files.paused
    monkeypatch.setenv("TERMINATE_FILE", str(tmp_path / "end"))
    (tmp_path / "end").touch()
    assert files.terminate
    monkeypatch.setenv("RUNNING_FILE", str(tmp_path / "deep" / "er" / "running"))
    files.running("x")
    assert (tmp_path / "deep" / "er" / "running").read_text() == "x"


def test_k88_a_pause_file_found_at_the_start_is_obeyed(folder):
    own(folder, "pause").touch()
    assert LockFiles().paused
    assert own(folder, "pause").exists()


def test_k88_t05_a_terminate_file_found_at_the_start_is_removed_and_not_obeyed(folder, caplog):
    own(folder, "terminate").touch()
    files = LockFiles()
    assert not files.terminate
    assert not own(folder, "terminate").exists()
    assert "is left from an earlier run: removed" in caplog.text


def test_a_terminate_file_once_seen_is_obeyed_though_it_goes(folder):
    files = LockFiles()
    own(folder, "terminate").touch()
    assert files.terminate
    own(folder, "terminate").unlink()
    assert files.terminate


def test_k88_t05_files_of_other_processes_are_left_alone(folder):
    others = [
        folder / f"kser-{socket.gethostname()}-{os.getpid() + 1}-{kind}.lock" for kind in ("pause", "run", "terminate")
    ]
    for path in others:
        path.write_text("theirs")
    files = LockFiles()
    files.running("mine")
    assert not files.paused
    assert not files.terminate
    files.close()
    del files
    assert [path.read_text() for path in others] == ["theirs"] * 3
    assert not own(folder, "run").exists()


def test_the_running_file_tells_what_runs_and_goes_at_the_end(folder):
    files = LockFiles()
    files.running("")
    assert not own(folder, "run").exists()  # nothing ran yet: nothing is written
    files.running("a[1]")
    files.running("")
    assert own(folder, "run").read_text() == ""
    own(folder, "pause").touch()
    files.close()
    assert not own(folder, "run").exists()
    assert own(folder, "pause").exists()  # whoever made it removes it
    files.close()


def test_any_text_can_be_what_runs(folder):
    """JSON may bring lone surrogates into a uuid: they must not end the worker."""
    LockFiles().running("shop.Charge[\ud800 é]")
    assert own(folder, "run").read_text() == "shop.Charge[\\ud800 é]"


def test_short_tasks_are_not_all_written(folder, monkeypatch):
    monkeypatch.setattr(lockfiles, "_WRITE_EVERY_S", 60)
    files = LockFiles()
    files.running("first")
    files.running("second")
    assert own(folder, "run").read_text() == "first"


def test_the_files_are_looked_at_a_few_times_a_second_only(folder, monkeypatch):
    monkeypatch.setattr(lockfiles, "LOOK_EVERY_S", 60)
    files = LockFiles()
    assert not files.paused
    own(folder, "pause").touch()
    assert not files.paused


def test_k88_t05_a_directory_that_is_missing_is_made_and_one_that_cannot_be_is_done_without(
    tmp_path, monkeypatch, caplog
):
    monkeypatch.setenv("LOCK_PATH", str(tmp_path / "new" / "one"))
    files = LockFiles()
    assert not files.paused
    files.running("x")
    assert own(tmp_path / "new" / "one", "run").read_text() == "x"
    assert stat.S_IMODE((tmp_path / "new" / "one").stat().st_mode) == 0o700

    (tmp_path / "file").touch()
    monkeypatch.setenv("LOCK_PATH", str(tmp_path / "file" / "below"))
    files = LockFiles()
    assert not files.paused
    assert not files.terminate
    for n in range(3):
        files.running(f"x{n}")
    files.close()
    assert caplog.text.count("cannot be written") == 1


@pytest.mark.parametrize("path", ["x" * 5000, "/proc/nowhere/x", "/dev/null/x"])
def test_k88_a_path_that_can_not_be_is_no_reason_to_fail(monkeypatch, path):
    real = {"LOCK_PATH": path, "LOCK_FILE": path, "TERMINATE_FILE": path, "RUNNING_FILE": path}
    monkeypatch.setattr(os, "environ", {**os.environ, **real})
    files = LockFiles()
    assert not files.paused
    assert not files.terminate
    files.running("x")
    files.close()


def test_k88_the_default_directory_is_the_users_own(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    files = LockFiles()
    files.running("x")
    assert own(tmp_path / "kser", "run").read_text() == "x"
    files.close()
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert LockFiles._path("LOCK_FILE", "pause").parent == Path(tempfile.gettempdir()) / f"kser-{os.getuid()}"


def test_k12_t24_importing_makes_no_file_and_sets_no_variable(tmp_path):
    code = (
        "import os; before = dict(os.environ)\n"
        "import kser.worker, kser.worker.lockfiles\n"
        "assert dict(os.environ) == before\n"
    )
    env = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, env=env)
    assert list(tmp_path.iterdir()) == []
