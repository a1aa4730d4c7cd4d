"""Task.init_by_id(): a task from the storage, for people and tools. K-33."""

import pytest

from kser import ConfigurationError, NotFound, Operation, OperationRegistry, Task
from kser.sequencing.task import UnregisteredTask
from kser.storage import get_storage_from_url
from kser.storage.memory import MemoryStorage
from kser.storage.projection import Projection
from tests.recording import Tape


@pytest.fixture
def registry():
    made = OperationRegistry()

    @made.subscribe(name="shop.Order")
    class Order(Operation):
        pass

    @made.subscribe(name="shop.Task")
    class Step(Task):
        pass

    made.Order, made.Step = Order, Step
    return made


def record(storage):
    tape = Tape()
    tape.operation("op", 3, failed=1)
    projection = Projection(storage.database, "c", "shop")
    projection.positions(tape.partitions)
    projection.apply(tape.records)


def test_an_operation_comes_with_its_status_params_result_and_tasks(registry):
    storage = MemoryStorage()
    record(storage)
    registry.configure(storage=storage)
    found = registry.Order.init_by_id("op")
    assert type(found) is registry.Order
    assert (found.uuid, found.status, found.params, found.result.retcode) == ("op", "FAILED", {"of": "op"}, 500)
    assert [(type(task), task.uuid, task.status) for task in found.tasks] == [
        (registry.Step, "op/0", "SUCCESS"),
        (registry.Step, "op/1", "FAILED"),
    ]
    assert found.tasks[0].result.retval == {"by": "op/0"}
    storage.close()


def test_without_a_registry_the_variable_names_the_storage(tmp_path, monkeypatch):
    url = f"sqlite:///{tmp_path}/kser.db"
    storage = get_storage_from_url(url)
    storage.install()
    record(storage)
    storage.close()
    monkeypatch.setenv("KSER_STORAGE", url)
    found = Task.init_by_id("op/1")
    assert isinstance(found, UnregisteredTask)
    assert (found.path, found.status) == ("shop.Task", "FAILED")


def test_the_class_that_asks_is_the_one_when_it_has_the_name(monkeypatch, tmp_path):
    class Own(Task):
        WIRE_NAME = "shop.Task"

    storage = MemoryStorage()
    record(storage)
    registry = OperationRegistry(storage=storage)
    registry.subscribe(Own)
    assert type(Own.init_by_id("op/0")) is Own
    storage.close()


def test_no_storage_is_told_with_what_to_do(registry):
    with pytest.raises(ConfigurationError, match=r"Set KSER_STORAGE to a URL such as sqlite:///kser.db"):
        registry.Step.init_by_id("x")


def test_what_the_storage_does_not_know_is_not_found(registry):
    storage = MemoryStorage()
    registry.configure(storage=storage)
    with pytest.raises(NotFound, match="Nothing is known of x"):
        registry.Step.init_by_id("x")
    storage.close()
