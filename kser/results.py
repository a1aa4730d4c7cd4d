"""Results: the success rule, the merge, and how an exception becomes one. The only importer of cdumay_result."""

import math
from typing import Any

import orjson
from cdumay_result import Result, ResultSchema
from marshmallow import ValidationError as SchemaError

from kser.errors import Error, InternalError, ValidationError
from kser.stacks import format_exception
from kser.tracebacks import hide, secret_values

__all__ = [
    "ACCEPTED",
    "Result",
    "ResultSchema",
    "dump",
    "forward",
    "from_exception",
    "is_success",
    "json_safe",
    "merge",
    "shown",
]

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


def forward(result: Result, uuid: str, retcode: int = 0) -> Result:
    """merge() with an empty Result of this retcode on the one side or the other."""
    return Result(retcode, result.stdout, result.stderr, {**result.retval}, uuid)


def from_exception(exc: BaseException, uuid: str) -> Result:
    """A failed Result that tells ``exc``.

    ``retcode`` is the error's code, ``stderr`` its message, ``retval["error"]`` a dict of code, name, message, msgid,
    extra and stack (the traceback as text). An exception that is no Error of kser becomes an InternalError, code 500;
    its class is in ``extra["type"]``. Values of variables whose name looks secret are masked in all of it, see
    kser.tracebacks.secret_values(). Never raises, whatever the exception carries.
    """
    error = _as_error(exc, uuid)
    detail = {
        "code": error.code,
        "name": error.name,
        "message": str(error.message),
        "msgid": error.msgid,
        "extra": json_safe(error.extra),
        "stack": format_exception(exc),
    }
    if secrets := secret_values(exc):
        detail = hide(detail, secrets)
    code = error.code if isinstance(error.code, int) and error.code else 1
    return Result(retcode=code, stderr=detail["message"], retval={"error": detail}, uuid=str(uuid))


def _as_error(exc: BaseException, uuid: str) -> Error:
    if isinstance(exc, Error):
        return exc
    # Without a stack= each of these writes down the one of the exception that is being handled; here nobody reads it.
    if isinstance(exc, SchemaError):
        fields = exc.messages if isinstance(exc.messages, dict) else {"_schema": exc.messages}
        return ValidationError(f"Invalid field(s) value: {', '.join(map(str, fields))}", extra=fields, stack="")
    name = type(exc).__name__
    try:
        text = str(exc) or name
    except Exception:  # noqa: BLE001 - user code: an exception that cannot even say what it is
        text = f"{name} whose text cannot be had"
    if not isinstance(exc, Exception) and text != name:
        text = f"{name}: {text}"  # SystemExit: its text alone is a number
    return InternalError(text, extra={"uuid": uuid, "type": name}, stack="")


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
    """``value`` as plain JSON data; what JSON has no form for is replaced by its repr(). Never raises."""
    try:
        return orjson.loads(orjson.dumps(value, default=shown, option=orjson.OPT_NON_STR_KEYS))
    except (TypeError, ValueError):
        return _plain(value, ())


def shown(value: Any) -> str:
    """repr(), or a text that says that there is none."""
    try:
        return repr(value)
    except Exception:  # noqa: BLE001 - user code
        return f"<{type(value).__name__} that cannot be shown>"


#: Nesting beyond this is replaced by text: what writes JSON recurses too.
_DEEPEST = 200
#: Python refuses to write larger whole numbers in decimal digits.
_LARGEST_BITS = 10_000


def _plain(value: Any, around: tuple[int, ...]) -> Any:
    """json_safe() of what orjson refuses: circles, deep nesting, odd keys, large numbers, lone surrogates."""
    if value is None or isinstance(value, (str, bool)):
        return value if value is None or isinstance(value, bool) else str(value)
    if isinstance(value, int):
        return int(value) if value.bit_length() <= _LARGEST_BITS else shown(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, (dict, list, tuple, set, frozenset)):
        if id(value) in around or len(around) > _DEEPEST:
            return "..."
        around = (*around, id(value))
        if isinstance(value, dict):
            return {k if isinstance(k, str) else shown(k): _plain(v, around) for k, v in value.items()}
        return [_plain(v, around) for v in value]
    return shown(value)
