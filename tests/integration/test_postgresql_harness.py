"""The tests' own PostgreSQL leaves nothing behind, however its owner ends. tests/postgresql.py."""

import signal
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest

from tests.brokers import has_ended
from tests.needs import POSTGRESQL, need
from tests.postgresql import CURE, PostgreSQL, unavailable
from tests.processes import ROOT, environment, wait_for

OWNER = """
import sys, time
from tests.postgresql import PostgreSQL
server = PostgreSQL()
with server.connect() as connection:
    folder = connection.execute("SHOW data_directory").fetchone()[0]
print(folder, server.port, flush=True)
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def available():
    if reason := unavailable():
        need(POSTGRESQL, reason, cure=CURE)


def test_one_that_is_stopped_is_gone_with_its_data():
    with PostgreSQL() as server:
        with server.connect() as connection:
            assert connection.execute("SELECT current_database()").fetchone() == ("kser test/%",)
            data = Path(connection.execute("SHOW data_directory").fetchone()[0])
        assert data.exists()
    assert not data.parent.exists()
    with pytest.raises(psycopg.OperationalError):
        server.connect()
    server.stop()  # a second time: nothing


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_one_whose_owner_is_killed_is_gone_with_its_data(number):
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER], cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True
    )
    try:
        folder, _ = owner.stdout.readline().split()
        postmaster = int((Path(folder) / "postmaster.pid").read_text().splitlines()[0])
        owner.send_signal(number)
        owner.wait(10)
        wait_for(lambda: has_ended(postmaster), 20, "the end of PostgreSQL")
        wait_for(lambda: not Path(folder).parent.exists(), 20, "the end of its data")
    finally:
        owner.kill()
        owner.wait(10)
        owner.stdout.close()
