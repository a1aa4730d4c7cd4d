"""schemathesis against the served OpenAPI document: whatever the document allows, and some that it does not."""

import time

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance

from kser import Operation, OperationRegistry, Task
from kser.storage import get_storage_from_url
from kser.storage.projection import Projection
from kser.transport import OutRecord
from kser.transport.memory import MemoryTransport
from kser.web import WebSettings, create_app
from kser.worker.topics import ensure_group_topics
from tests.recording import Tape, result

registry = OperationRegistry()


@registry.subscribe
class Charge(Task):
    REQUIRED_FIELDS = ("amount",)


@registry.subscribe
class Order(Operation):
    def build_tasks(self, **params):
        return [Charge(params={"amount": 1})]


#: Of what is stored: an operation that failed, one in another, a task at the ends of all numbers, one of an odd name.
UUIDS = ("order", "inner", "inner-1", "extreme", "ü 'x' \\N 100%")
_LARGEST, _LARGEST_BIG = 2**31 - 1, 2**63 - 1


def told():
    """What workers told, of everything that there is a view of; numbers as large and as small as they may be."""
    tape = Tape()
    tape.operation("order", 3, failed=2)
    inside = {"operation": "order", "parent": "inner", "run": 1, "position": 3}
    tape.event("operation.started", "inner", "shop.Inner", **inside | {"parent": "order"}, params={"token": "x" * 20})
    tape.event("step.retrying", "inner-1", status="PENDING", result=result("inner-1", 1), note="again", **inside)
    tape.event("step.done", "inner-1", status="SUCCESS", result=result("inner-1"), params={"a": None}, **inside)
    ends = {"run": _LARGEST, "position": _LARGEST, "attempt": _LARGEST}
    tape.telemetry("task.started", "extreme", began=_LARGEST_BIG, at=_LARGEST_BIG, **ends)
    tape.event("step.failed", "extreme", status="FAILED", result=result("extreme", 2**70), at=2**62, **ends)
    for group, current, total in (([], _LARGEST_BIG, -_LARGEST_BIG), (["a", "b"], -_LARGEST_BIG, 0), (["a"], 0, 1)):
        tape.telemetry("task.progress", "extreme", group=group, current=current, total=total, n=_LARGEST_BIG, **ends)
    for level in (0, 30, _LARGEST):
        tape.telemetry("task.log", "extreme", level=level, logger="", message="\x00ü", n=level, at=_LARGEST_BIG, **ends)
    tape.telemetry("task.log", "inner-1", level=40, logger="shop", message="no", exception={"name": "E"}, **inside)
    tape.event("message.waiting", UUIDS[-1], "", status="PENDING", note="nobody")
    now_ms = int(time.time() * 1000)
    tape.worker("usual", at=now_ms, running=[{"uuid": "order", "entrypoint": "shop.Task", "seconds": 1e300}])
    tape.worker("gone", at=0, started=0, interval_s=0)
    tape.worker("late", at=253_370_764_799_999, started=253_370_764_799_999, interval_s=86_400, pid=None, host=None)
    tape.worker("odd", at=now_ms, running=None, state="", version=7, group="")
    return tape


def served():
    """The API, with something to be found in it."""
    transport, storage = MemoryTransport(), get_storage_from_url("memory:")
    ensure_group_topics(transport.admin(), "shop", ["shop"])
    build = storage.create_build("nightly", {}, {})
    storage.start_build(build)
    storage.log_message(build, 30, "slow")
    tape = told()
    assert transport.sink().deliver([OutRecord(each.topic, each.key, each.value) for each in tape.records]) == []
    projection = Projection(storage.database, "c", "shop")
    projection.positions(tape.partitions)
    projection.apply(tape.records)
    app = create_app(
        transport,
        storage=storage,
        registry=registry,
        settings=WebSettings(group="shop", topic="shop", stream_s=0.02, timeout_s=2),
    )
    app.testing = False  # so that a fault is answered as in service
    return app


schema = schemathesis.openapi.from_wsgi("/api/1/openapi.json", served())


@schema.hook
def map_path_parameters(context, path_parameters):
    """Of most names that are made up one that there is."""
    made_up = (path_parameters or {}).get("uuid")
    if isinstance(made_up, str) and (number := sum(made_up.encode("utf-8", "replace")) % (len(UUIDS) + 1)) < len(UUIDS):
        return {**path_parameters, "uuid": UUIDS[number]}
    return path_parameters


@schema.parametrize()
@settings(
    max_examples=10,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_no_request_is_a_server_error_and_every_answer_is_as_documented(case):
    # What the document allows may still be wrong: no such entrypoint, both of two ways to say which.
    case.call_and_validate(excluded_checks=[positive_data_acceptance])


@pytest.mark.parametrize("uuid", UUIDS)
@pytest.mark.parametrize("view", ["", "/timeline", "/logs", "/progress", "/events"])
def test_what_is_stored_is_shown_as_documented(view, uuid):
    case = schema[f"/api/1/operations/{{uuid}}{view}"]["GET"].Case(path_parameters={"uuid": uuid})
    assert case.call_and_validate().status_code == 200


@pytest.mark.parametrize(("path", "what", "number"), [
    ("operations", "operations", 3), ("logs", "logs", 4), ("workers", "workers", 4),
])  # fmt: skip
def test_lists_of_what_is_stored_are_as_documented(path, what, number):
    answer = schema[f"/api/1/{path}"]["GET"].Case().call_and_validate()
    assert len(answer.json()[what]) >= number
