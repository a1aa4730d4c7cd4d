"""The endpoint that takes posted messages: a blueprint for any Flask program."""

import json
from collections.abc import Callable, Sequence
from contextlib import suppress

from flask import Blueprint, Request, Response, request
from marshmallow import ValidationError as SchemaError
from werkzeug.exceptions import HTTPException

from kser.errors import DeliveryError, Error, ValidationError
from kser.http.guard import guard
from kser.http.problems import problem, problem_of, problem_of_http, problem_of_result
from kser.http.wire import MAX_BODY_BYTES, MESSAGES_PATH, MessagesSchema, Posted, failure_of, outcomes, posted
from kser.producer import BaseProducer
from kser.results import Result, is_success
from kser.schemas import parse

__all__ = ["Take", "answer", "endpoint", "handing_to"]

#: What takes the messages of one request: a Result for each, in their order.
Take = Callable[[Sequence[Posted]], list[Result]]

_SCHEMA = MessagesSchema()


def endpoint(take: Take, *, token: str | None = None, name: str = "kser_messages") -> Blueprint:
    """A blueprint with the one resource ``POST /api/1/messages``, to be registered in a Flask program.

    Args:
        take: gets the messages of a request; called in the thread of the request.
        token: what callers have to send; None: only callers on this machine are let in.
        name: of the blueprint.

    It answers 401 or 403 to whom may not, 400 and 422 to what is no request, 413 to one that is too large.
    """
    blueprint = Blueprint(name, __name__)
    check = guard(token)

    @blueprint.before_request
    def let_in() -> Response | None:
        return check(request)

    @blueprint.post(MESSAGES_PATH)
    def messages() -> Response:
        return answer(take(_read(request)))

    @blueprint.errorhandler(Error)
    def told(error: Error) -> Response:
        return problem_of(error)

    @blueprint.errorhandler(SchemaError)
    def refused(error: SchemaError) -> Response:
        return problem(422, f"Not accepted: {', '.join(map(str, error.messages_dict))}", errors=error.messages_dict)

    blueprint.register_error_handler(HTTPException, problem_of_http)
    return blueprint


def answer(results: Sequence[Result]) -> Response:
    """200 with what became of each message; when one failed, the problem of the first, with the same."""
    document = outcomes(results)
    failed = failure_of(results)
    if failed is None:
        return Response(json.dumps(document), 200, content_type="application/json")
    several = sum(not is_success(result) for result in results)
    told = Result(retcode=failed.retcode, stderr=f"{several} of {len(results)} messages not taken: {failed.stderr}")
    return problem_of_result(told, **document)


def handing_to(producer: BaseProducer, timeout_s: float = 10) -> Take:
    """Sends the messages of a request on, and waits until all are confirmed, for up to ``timeout_s`` seconds."""

    def take(messages: Sequence[Posted]) -> list[Result]:
        taken: list[Result] = []
        with suppress(DeliveryError), producer.batch(timeout_s):  # the Results say which
            for topic, kmsg, key, headers in messages:
                taken.append(producer.send(topic, kmsg, key=key, headers=headers))
        return taken

    return take


def _read(asked: Request) -> list[Posted]:
    asked.max_content_length = MAX_BODY_BYTES
    if not asked.is_json:
        raise ValidationError("Send the header Content-Type: application/json, and a JSON object")
    return posted(_SCHEMA.load(parse(asked.get_data(cache=False))))
