"""Results: the success rule, the merge, and how an exception becomes one. The only importer of cdumay_result."""

import traceback
from typing import Any

import orjson
from cdumay_result import Result, ResultSchema
from marshmallow import ValidationError as SchemaError

from kser.errors import Error, InternalError, ValidationError

__all__ = ["ACCEPTED", "Result", "ResultSchema", "dump", "from_exception", "is_success", "json_safe", "merge"]

#: retcode of a Result that says "handed over, not yet confirmed": inside a batch, and of what a task sends.
ACCEPTED = 202


def is_success(result: Result) -> bool:
    """The one success rule: retcode 0."""
    return result.retcode == 0


def merge(forwarded: Result, new: Result, uuid: str) -> Result:
    """A new Result: ``new`` over what an earlier task forwarded. Neither argument is changed.

    The retcode is that of ``new``; its retval entries win; stdout and stderr are taken from ``new`` unless empty.

    Args:
        forwarded: what came with the message.
        new: what run() returned.
        uuid: uuid of the task, and so of the merged Result.
    """
    return Result(
        retcode=new.retcode,
        stdout=new.stdout or forwarded.stdout,
        stderr=new.stderr or forwarded.stderr,
        retval={**forwarded.retval, **new.retval},
        uuid=uuid,
    )


def from_exception(exc: BaseException, uuid: str) -> Result:
    """A failed Result that tells ``exc``.

    ``retcode`` is the error's code, ``stderr`` its message, ``retval["error"]`` a dict of code, name, message, msgid,
    extra and stack (the traceback as text). An exception that is no Error of kser becomes an InternalError, code 500;
    its class is in ``extra["type"]``.
    """
    error = _as_error(exc, uuid)
    detail = {
        "code": error.code,
        "name": error.name,
        "message": error.message,
        "msgid": error.msgid,
        "extra": json_safe(error.extra),
        "stack": "".join(traceback.format_exception(exc)),
    }
    code = error.code if isinstance(error.code, int) and error.code else 1
    return Result(retcode=code, stderr=str(error.message), retval={"error": detail}, uuid=str(uuid))


def _as_error(exc: BaseException, uuid: str) -> Error:
    if isinstance(exc, Error):
        return exc
    if isinstance(exc, SchemaError):
        fields = dict(exc.messages_dict)
        return ValidationError(f"Invalid field(s) value: {', '.join(map(str, fields))}", extra=fields)
    return InternalError(str(exc) or type(exc).__name__, extra={"uuid": uuid, "type": type(exc).__name__})


def dump(result: Result) -> dict[str, Any]:
    """The Result as a dict of uuid, retcode, stdout, stderr, retval: its form on the wire."""
    return {
        "uuid": result.uuid,
        "retcode": result.retcode,
        "stdout": result.stdout,
        "stderr": result.stderr,
        "retval": result.retval,
    }


def json_safe(value: Any) -> Any:
    """``value`` as plain JSON data; what JSON has no form for is replaced by its repr()."""
    return orjson.loads(orjson.dumps(value, default=repr, option=orjson.OPT_NON_STR_KEYS))
