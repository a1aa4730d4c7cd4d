"""create_app(): the Flask program of the REST API."""

from typing import TYPE_CHECKING, Any, Final

from flask import Flask, Response, request
from flask_smorest import Api
from werkzeug.exceptions import HTTPException

from kser.errors import Error
from kser.http.guard import guard
from kser.http.problems import PROBLEM_TYPE, problem, problem_of, problem_of_http
from kser.http.wire import MAX_BODY_BYTES
from kser.operating import OperatingProducer
from kser.producer import BaseProducer
from kser.sequencing.registry import OperationRegistry
from kser.transport import Transport
from kser.web.builds import builds, logs, workers
from kser.web.health import HEALTH_PATH, health
from kser.web.letters import letters
from kser.web.messages import messages
from kser.web.operations import events, operations
from kser.web.schemas import ProblemSchema
from kser.web.site import KEY, Site, WebSettings

if TYPE_CHECKING:
    from kser.storage import StorageBase

__all__ = ["create_app"]

_PREFIX: Final = "/api/1"
#: What needs no token.
_OPEN: Final = frozenset({HEALTH_PATH, f"{_PREFIX}/openapi.json"})


class _Api(Api):
    """flask-smorest, with errors as problem+json, in answers and in the document."""

    ERROR_SCHEMA = ProblemSchema

    def _register_responses(self) -> None:
        before, self.DEFAULT_RESPONSE_CONTENT_TYPE = self.DEFAULT_RESPONSE_CONTENT_TYPE, PROBLEM_TYPE
        try:
            super()._register_responses()
        finally:
            self.DEFAULT_RESPONSE_CONTENT_TYPE = before

    def handle_http_exception(self, error: HTTPException) -> Response:
        """The answer to what Flask or webargs refused."""
        return problem_of_http(error)


def create_app(
    transport: Transport,
    *,
    storage: "StorageBase | None" = None,
    registry: OperationRegistry | None = None,
    producer: BaseProducer | None = None,
    settings: WebSettings | None = None,
) -> Flask:
    """The Flask program that serves the REST API below ``/api/1``, for any WSGI server; `kser web` runs it.

    Args:
        transport: the broker. The app's producer and readers are made of it.
        storage: what happened, as a recorder wrote it; None: what needs it answers 501. Whoever made it closes it.
        registry: the operations and tasks that can be launched, so that they are built and checked here; None: any name
            is sent, and the workers know which there are.
        producer: sends messages; default one of ``transport``. Whoever made it closes it.
        settings: see WebSettings.

    ``app.extensions["kser"].close()`` ends the streams, and closes the producer that was made here.
    """
    settings = settings or WebSettings()
    app = Flask("kser.web", static_folder=None)
    app.config.update(
        API_TITLE="kser",
        API_VERSION="1",
        OPENAPI_VERSION="3.0.3",
        OPENAPI_URL_PREFIX=_PREFIX,
        OPENAPI_JSON_PATH="openapi.json",
        MAX_CONTENT_LENGTH=MAX_BODY_BYTES,
    )
    app.json.sort_keys = False  # type: ignore[attr-defined]  # of the default provider
    app.extensions[KEY] = Site(
        transport,
        producer or OperatingProducer(transport),
        settings,
        storage=storage,
        registry=registry,
        owns_producer=producer is None,
    )
    check = guard(settings.token)

    @app.before_request
    def let_in() -> Response | None:
        if "\x00" in request.path:  # no database takes it as a text
            return problem(404, "Nothing has a name with a zero character")
        return None if request.path in _OPEN else check(request)

    app.register_error_handler(Error, problem_of)
    api = _Api(app, spec_kwargs=_document(settings))
    for blueprint in (operations, events, builds, logs, letters, workers, messages, health):
        api.register_blueprint(blueprint)
    return app


def _document(settings: WebSettings) -> dict[str, Any]:
    """What the OpenAPI document says beside its resources."""
    about = "Operations of kser: what happened and happens, and what can be done about it."
    document: dict[str, Any] = {"info": {"description": about}}
    if settings.token is not None:
        document["components"] = {"securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}}
        document["security"] = [{"token": []}]
    return document
