"""Errors as HTTP answers: problem+json (RFC 9457), never a traceback."""

import json
import logging
from http import HTTPStatus
from typing import Any, Final

from flask import Response
from werkzeug.exceptions import HTTPException

from kser.errors import (
    AbortedError,
    ConfigurationError,
    Error,
    NotFound,
    NotImplemented,  # noqa: A004 - the published name
    TransportError,
    ValidationError,
)
from kser.masking import mask
from kser.results import Result, json_safe

__all__ = ["PROBLEM_TYPE", "problem", "problem_of", "problem_of_http", "problem_of_result", "status_of"]

logger = logging.getLogger(__name__)

PROBLEM_TYPE: Final = "application/problem+json"
#: Statuses that an error's own code may choose.
_OWN: Final = frozenset({404, 409, 410, 413, 429, 503, 504})


def problem(status: int, detail: str, headers: dict[str, str] | None = None, **members: Any) -> Response:
    """An answer that tells one problem.

    Args:
        status: HTTP status; also in the document, beside its ``title``.
        detail: what happened, and what to do, in one line.
        headers: of the answer.
        members: more for the document, such as ``errors``: field -> list of what is wrong with it.
    """
    document = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status, "detail": detail}
    return Response(json.dumps(json_safe(document | members)), status, headers=headers, content_type=PROBLEM_TYPE)


def status_of(error: Error) -> int:
    """The HTTP status that means this error."""
    code = error.code if isinstance(error.code, int) else 0
    if code in _OWN:
        return code
    match error:
        case NotFound():
            return HTTPStatus.NOT_FOUND
        case TransportError():
            return HTTPStatus.SERVICE_UNAVAILABLE
        case ValidationError():
            return HTTPStatus.UNPROCESSABLE_ENTITY
        case ConfigurationError() | AbortedError():
            return HTTPStatus.CONFLICT
        case NotImplemented():
            return HTTPStatus.NOT_IMPLEMENTED
    return HTTPStatus.INTERNAL_SERVER_ERROR


def problem_of(error: Error) -> Response:
    """The answer that tells an error of kser."""
    status = status_of(error)
    if status == HTTPStatus.INTERNAL_SERVER_ERROR:
        logger.error("A request failed: %s", error.message, exc_info=error)
    extra = {name: value for name, value in error.extra.items() if name != "errors"} if error.extra else {}
    return problem(status, str(error.message), code=error.msgid, **({"extra": mask(extra)} if extra else {}))


def problem_of_result(result: Result, **members: Any) -> Response:
    """The answer that tells a failed Result."""
    status = result.retcode if result.retcode in _OWN else {400: 422}.get(result.retcode, 500)
    return problem(status, str(result.stderr), **members)


def problem_of_http(error: HTTPException) -> Response:
    """The answer that tells what Flask or webargs refused."""
    if error.response is not None:
        return problem(error.response.status_code, "The request was refused")
    status = error.code or 500
    data = getattr(error, "data", None) or {}
    if status == HTTPStatus.INTERNAL_SERVER_ERROR:
        if getattr(error, "original_exception", None) is None:  # else Flask has logged that
            logger.error("A request failed", exc_info=error)
        return problem(status, "Something went wrong here; the log of the server says what")
    headers = {name: value for name, value in error.get_headers() if name not in ("Content-Type", "Content-Length")}
    headers |= data.get("headers") or {}
    messages = data.get("messages")
    if messages is None:
        return problem(status, str(error.description or HTTPStatus(status).phrase), headers)
    errors = _fields(messages)
    return problem(status, f"Not accepted: {', '.join(errors)}", headers, errors=errors)


def _fields(messages: Any) -> dict[str, Any]:
    """What webargs tells, {"json": {"params": [...]}}, without the level of where it was."""
    found: dict[str, Any] = {}
    for fields in messages.values() if isinstance(messages, dict) else [messages]:
        found |= fields if isinstance(fields, dict) else {"body": fields}
    return {str(name): told for name, told in found.items()}
