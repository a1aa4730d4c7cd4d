"""schemathesis against the served OpenAPI document: whatever the document allows, and some that it does not."""

import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance

from kser import Operation, OperationRegistry, Task
from kser.storage import get_storage_from_url
from kser.transport.memory import MemoryTransport
from kser.web import WebSettings, create_app
from kser.worker.topics import ensure_group_topics

registry = OperationRegistry()


@registry.subscribe
class Charge(Task):
    REQUIRED_FIELDS = ("amount",)


@registry.subscribe
class Order(Operation):
    def build_tasks(self, **params):
        return [Charge(params={"amount": 1})]


def served():
    """The API, with something to be found in it."""
    transport, storage = MemoryTransport(), get_storage_from_url("memory:")
    ensure_group_topics(transport.admin(), "shop", ["shop"])
    build = storage.create_build("nightly", {}, {})
    storage.start_build(build)
    storage.log_message(build, 30, "slow")
    app = create_app(
        transport,
        storage=storage,
        registry=registry,
        settings=WebSettings(group="shop", topic="shop", stream_s=0.02, timeout_s=2),
    )
    app.testing = False  # so that a fault is answered as in service
    return app


schema = schemathesis.openapi.from_wsgi("/api/1/openapi.json", served())


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
