"""The recorder beside a command: kser.cli.recording."""

import threading

import pytest

from kser import OperationRegistry, Task, TransportError, Worker
from kser.cli import recording as module
from kser.cli.recording import recording
from kser.errors import ConfigurationError
from kser.schemas import Message
from kser.storage import get_storage_from_url
from kser.testing import eventually
from kser.transport import OutRecord
from kser.transport.memory import MemoryTransport

registry = OperationRegistry()


@registry.subscribe
class Roll(Task):
    def run(self):
        return None


@pytest.fixture
def storage():
    storage = get_storage_from_url("memory:")
    yield storage
    storage.close()


class Flaky(MemoryTransport):
    """A broker that does not answer at first."""

    def __init__(self, error):
        super().__init__()
        self.errors = [error]

    def admin(self):
        if self.errors:
            raise self.errors.pop()
        return super().admin()


def recorders():
    return [thread for thread in threading.enumerate() if thread.name == "kser-recorder"]


def test_what_happens_is_recorded_after_a_broker_that_was_away_has_come(storage, monkeypatch, caplog):
    monkeypatch.setattr(module, "_AGAIN_S", 0.01)
    transport = Flaky(TransportError("no broker answers"))
    with recording(transport, storage, "shop"):
        eventually(lambda: "starts again: no broker answers" in caplog.text)
        record = OutRecord("shop", b"u", Message("u", Roll.path).to_bytes())
        assert transport.sink().deliver([record]) == []
        Worker(registry, topics=["shop"], group="shop", transport=transport).run(until_idle=True)
        assert eventually(lambda: storage.history.count_operations(states=["SUCCESS"])) == 1
    assert not recorders()


def test_a_setting_that_cannot_be_is_told_and_the_block_goes_on(storage, caplog):
    with recording(Flaky(ConfigurationError("no such topic")), storage, "shop"):
        eventually(lambda: not recorders())
    assert "Nothing is recorded of group shop: no such topic" in caplog.text
