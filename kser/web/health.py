"""Health: whether broker and storage answer, for load balancers and people. Needs no token, and tells no details."""

import threading
import time
from importlib.metadata import version
from typing import Any, Final

import flask

from kser.errors import ConfigurationError, Error
from kser.events import events_topic
from kser.web.blueprint import ApiBlueprint
from kser.web.schemas import HealthSchema
from kser.web.site import Site, site

__all__ = ["HEALTH_PATH", "health"]

HEALTH_PATH: Final = "/api/1/health"
#: Longest wait for the broker, and how long what was found counts, in seconds.
_ASK_S: Final = 3.0
_COUNTS_S: Final = 2.0

health = ApiBlueprint("health", __name__, description="Is it well")


class _Look:
    """The last look at broker and storage, so that nobody makes the API ask them again and again."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._at = float("-inf")
        self._wrong = ""

    def wrong(self, here: Site) -> str:
        """What is wrong; "" when nothing is."""
        with self._lock:
            if time.monotonic() - self._at > _COUNTS_S:
                self._wrong = _ask(here)
                self._at = time.monotonic()
            return self._wrong


def _ask(here: Site) -> str:
    try:
        here.transport.admin().describe([events_topic(here.settings.group)], min(_ASK_S, here.settings.timeout_s))
    except Error:
        return "the broker does not answer"
    if here.has_storage:
        try:
            here.history.list_projections()
        except ConfigurationError:
            return "the storage has no tables of this release"
        except Error:
            return "the storage does not answer"
    return ""


@health.route(HEALTH_PATH)
@health.response(200, HealthSchema)
@health.alt_response(503, schema=HealthSchema, description="Broker or storage do not answer")
def show_health() -> tuple[dict[str, Any], int]:
    """Whether broker and storage answer: 200, or 503 with what is wrong. Needs no token."""
    look: _Look = flask.current_app.extensions.setdefault("kser_health", _Look())
    wrong = look.wrong(site())
    return {"status": wrong or "ok", "version": version("kser")}, 503 if wrong else 200
