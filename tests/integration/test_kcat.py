"""kcat, a foreign client, produces a message that a worker runs, and reads the events."""

import json
import shutil
import subprocess
import uuid

import pytest

from tests.needs import need
from tests.processes import new_topic, views, wait_for, worker

pytestmark = pytest.mark.apache


@pytest.fixture
def kcat():
    found = shutil.which("kcat") or shutil.which("kafkacat")
    if not found:
        need("kcat", "kcat is not installed (Debian: apt-get install kcat)")
    return found


def test_a_message_produced_by_kcat_is_run(kcat, apache, tmp_path):
    bootstrap = apache.bootstrap_servers
    topic, group, name = new_topic(bootstrap), f"g{uuid.uuid4().hex[:8]}", str(uuid.uuid4())
    line = json.dumps({"uuid": name, "entrypoint": "dice.Launch", "params": {}})  # no more than what is required
    produce = [kcat, "-P", "-b", bootstrap, "-t", topic, "-k", name]
    subprocess.run(produce, input=line.encode(), check=True, timeout=30)
    with worker(bootstrap, topic, group, tmp_path / "log", "w"):
        view = wait_for(lambda: (v := views(bootstrap, group).get(name)) and v.ended and v, 40, "the operation")
    assert view.status == "SUCCESS"
    assert len(view.steps) == 3
    consume = [kcat, "-C", "-b", bootstrap, "-t", f"{group}.events", "-e", "-q", "-f", "%k %s\\n"]
    shown = subprocess.run(consume, check=True, timeout=30, capture_output=True, text=True).stdout
    assert shown.count(f"{name} {{") == 5  # started, three steps, ended


def test_what_is_no_message_is_rejected_and_the_worker_goes_on(kcat, apache, tmp_path):
    """K-90, T-22: poison records are told, settled, and harm nobody."""
    bootstrap = apache.bootstrap_servers
    topic, group, name = new_topic(bootstrap), f"g{uuid.uuid4().hex[:8]}", str(uuid.uuid4())
    poison = b"\xff\xfe\x00not text"
    good = json.dumps({"uuid": name, "entrypoint": "dice.Roll"}).encode()
    for value in (poison, b"[1, 2]", b'{"uuid": 1}', good):
        subprocess.run([kcat, "-P", "-b", bootstrap, "-t", topic, "-D", "\x01"], input=value, check=True, timeout=30)
    subprocess.run([kcat, "-P", "-b", bootstrap, "-t", topic, "-Z", "-K", ":"], input=b"key:", check=True, timeout=30)
    with worker(bootstrap, topic, group, tmp_path / "log", "w") as running:
        found = wait_for(lambda: (v := views(bootstrap, group)).get(name) and len(v) == 5 and v, 40, "all five")
        assert running.poll() is None
    assert found[name].status == "SUCCESS"
    assert sorted(key for key in found if key != name) == [f"{topic}/0/{n}" for n in (0, 1, 2, 4)]
