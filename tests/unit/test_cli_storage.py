"""The commands of the storage, in this process; the broker is in memory. J-23."""

import json
import sys
import threading
from datetime import UTC, datetime, timedelta

import pytest
from click.testing import CliRunner

from kser.cli.connection import Drivers
from kser.cli.main import cli
from kser.errors import ConfigurationError
from kser.storage import StorageBase, get_storage_from_url
from kser.storage import recorder as recorder_module
from kser.storage.memory import MemoryStorage
from kser.storage.recorder import Recorder
from kser.testing import eventually
from kser.transport import OutRecord
from kser.transport.memory import MemoryTransport
from tests.recording import Tape

SERVERS = ("--bootstrap-servers", "127.0.0.1:1")


class Builds(MemoryStorage):
    """A storage without a history."""

    history = StorageBase.history

    @classmethod
    def from_url(cls, url):
        return cls()


@pytest.fixture
def broker():
    return MemoryTransport()


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path}/kser.db"


@pytest.fixture
def run(broker):
    def invoke(*args, **options):
        drivers = Drivers(lambda config: broker, lambda config: None)
        return CliRunner().invoke(cli, [str(arg) for arg in args], obj=drivers, **options)

    return invoke


@pytest.fixture
def storage(url):
    opened = get_storage_from_url(url)
    opened.install()
    yield opened
    opened.close()


def test_what_is_not_there_is_not_uninstalled_and_no_file_is_made(run, tmp_path):
    done = run("uninstall", "--storage", f"sqlite:///{tmp_path}/missing.db")
    assert done.exit_code == 2
    assert f"There is no storage {tmp_path}/missing.db" in done.output
    assert not list(tmp_path.iterdir())


def test_tables_are_installed_upgraded_and_dropped(run, url):
    for _ in range(2):
        done = run("install", "--storage", url)
        assert (done.exit_code, done.output) == (0, f"Installed: {url}\n")
    done = run("db", "upgrade", "--storage", url, "--format", "json")
    assert json.loads(done.output) == {"storage": url, "before": "0004", "version": "0004"}
    assert "has version 0004 already" in run("db", "upgrade", "--storage", url).output
    for _ in range(2):
        assert run("uninstall", "--storage", url).output == f"Uninstalled: {url}\n"
    assert "from version none to 0004" in run("db", "upgrade", "--storage", url).output


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["install"], "No storage is named: add --storage sqlite:///kser.db, or set KSER_STORAGE"),
        (["prune", "--all"], "No storage is named"),
        (["recorder", *SERVERS], "No storage is named"),
        (["recorder", "--storage", "memory:"], "No broker is named"),
        (["install", "--storage", "oracle://x"], "Unknown storage 'oracle://x'"),
        (["install", "--storage", "x://u:secret@h"], "x://u:********@h"),
        (["prune", "--storage", "memory:"], "Say which log records"),
        (["prune", "--storage", "memory:", "--max-age", "1y"], "'1y': write seconds, or a number with s, m, h, d or w"),
        (["prune", "--storage", "sqlite:///empty.db", "--all"], "There is no storage empty.db"),
        (["operations", "list", "--storage", "sqlite:///empty.db"], "make it with kser install --storage"),
        (["logs", "x", "--storage", "sqlite:///other.db"], "kser install --storage URL"),
        (["operations", "list", "--storage", "memory:", "--limit", str(1 << 70)], "of 63 bits at most"),
        (["prune", "--storage", "memory:", "--build", str(1 << 70)], "A number is too large for storage memory:"),
        (["recorder", "--storage", f"{__name__}:Builds+x:", *SERVERS], "Builds keeps builds only"),
    ],
)
def test_misuse_is_told_in_one_line_that_says_what_to_do(run, args, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.db").touch()
    done = run(*args)
    assert done.exit_code == 2
    (line,) = done.stderr.splitlines()
    assert said in line
    assert "secret" not in line
    assert not (tmp_path / "empty.db").exists()


def test_a_database_that_is_away_is_a_failure_in_one_line(run):
    done = run("install", "--storage", "sqlite:////nowhere/at/all.db")
    assert done.exit_code == 1
    (line,) = done.stderr.splitlines()
    assert "unable to open database file" in line


def test_the_variable_names_the_storage(run, url):
    assert run("install", env={"KSER_STORAGE": url}).exit_code == 0


def test_a_storage_of_ones_own_is_found_in_the_directory_of_now(run, tmp_path, monkeypatch):
    (tmp_path / "kser_own_storage.py").write_text(
        "from kser.storage.memory import MemoryStorage\n\n\nclass Own(MemoryStorage):\n"
        "    @classmethod\n    def from_url(cls, url):\n        return cls('memory:')\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    done = run("operations", "list", "--storage", "kser_own_storage:Own+x:")
    assert (done.exit_code, done.stderr) == (0, "")


def test_log_records_are_pruned_by_age_level_job_and_build(run, url, storage):
    one, other = storage.create_build("one", {}, {}), storage.create_build("other", {}, {})
    old = datetime.now(UTC) - timedelta(days=2)
    for build in (one, other):
        storage.log_message(build, 10, "old", created=old)
        storage.log_message(build, 40, "new")

    def prune(*args):
        done = run("prune", "--storage", url, "--format", "json", *args)
        return json.loads(done.output)["deleted"]

    assert prune("--max-age", "3d") == prune("--max-age", "9" * 30 + "w") == 0
    assert prune("--max-age", "1.5d", "--job", "one", "--level", "debug") == 1
    assert prune("--build", other, "--level", "WARNING") == 1
    assert run("prune", "--storage", url, "--all").output == "2 log record(s) deleted\n"


def test_the_recorder_records_until_it_is_stopped(run, broker, url, monkeypatch):
    tape, began = Tape(), []
    tape.operation("op", 2)
    broker.sink().deliver([OutRecord(r.topic, r.key, r.value) for r in tape.records])
    real = Recorder.run
    monkeypatch.setattr(Recorder, "run", lambda self, **options: (began.append(self), real(self, **options)))

    def stop():
        eventually(lambda: began and began[0].recorded == 6)
        began[0].stop()

    stopper = threading.Thread(target=stop)
    stopper.start()
    done = run("recorder", "--group", "shop", "--storage", url, *SERVERS)
    stopper.join()
    assert done.exit_code == 0, done.output
    assert f"Recording group shop into {url}" in done.stderr
    assert "6 record(s) stored" in done.stderr
    storage = get_storage_from_url(url)
    assert storage.history.get_operation("op").status == "SUCCESS"
    storage.close()


def test_the_recorder_refuses_before_it_says_that_it_records(run, url, tmp_path):
    done = run("recorder", "--group", "a/b", "--storage", url, *SERVERS)
    assert done.exit_code == 2
    assert done.stderr.startswith("kser: error: 'a/b.events' cannot be a topic")
    assert not list(tmp_path.iterdir())  # and no database was made


def test_what_is_refused_at_the_start_of_recording_is_told_instead(run, url, monkeypatch):
    def refuse(*_, **__):
        raise ConfigurationError("Topic shop.events is not kept for long enough")

    monkeypatch.setattr(recorder_module, "ensure_group_topics", refuse)
    done = run("recorder", "--group", "shop", "--storage", url, *SERVERS)
    assert done.exit_code == 2
    assert done.stderr == "kser: error: Topic shop.events is not kept for long enough\n"


from kser.storage import StorageBase  # noqa: E402
