"""Message: the envelope that travels through Kafka, and the schema that says what it may hold.

The schema (marshmallow) is the contract. Reading and writing take a short cut with orjson when everything has exactly
the expected types, and leave the rest to the schema and to the standard library; tests/unit/test_message_properties.py
proves that both ways give the same.
"""

import json
from enum import Enum
from typing import Any, Self
from uuid import UUID

import orjson
from marshmallow import EXCLUDE, Schema, fields, validate
from marshmallow import ValidationError as SchemaError

from kser import results
from kser.errors import ValidationError
from kser.results import Result, ResultSchema

__all__ = ["Message", "MessageSchema", "parse", "parse_plain", "plain_bytes"]

# A whole number of 19 digits or more may not fit into 64 bits: orjson would read it as a float. Found by turning every
# digit into a zero first, which is ten times faster than a regular expression.
_DIGITS = bytes.maketrans(b"123456789", b"000000000")
_BIG_NUMBER = b"0" * 19
_STRICT = orjson.OPT_PASSTHROUGH_DATETIME | orjson.OPT_PASSTHROUGH_DATACLASS
_RESULT_TYPES = {"uuid": str, "retcode": int, "stdout": str, "stderr": str, "retval": dict}


class MessageSchema(Schema):
    """What a message on the wire looks like: uuid and entrypoint are required, null means absent for the rest."""

    class Meta:
        """Unknown keys are ignored: a newer producer may know more."""

        unknown = EXCLUDE

    uuid = fields.String(required=True, validate=validate.Length(min=1))
    entrypoint = fields.String(required=True, validate=validate.Length(min=1))
    params = fields.Dict(load_default=None, allow_none=True)
    result = fields.Nested(ResultSchema, load_default=None, allow_none=True)
    metadata = fields.Dict(load_default=None, allow_none=True)


_SCHEMA = MessageSchema()


class Message:
    """The envelope: which task to run, with what, and what the tasks before it gave.

    Args:
        uuid: identifies the task; the same through every redelivery.
        entrypoint: name the task class is registered under, by default ``module.Class``.
        params: JSON object the task reads as ``self.params``.
        result: Result (or a dict of its fields) forwarded from the task before; default an empty one.
        metadata: JSON object for the context of the task. The key ``kser`` is the itinerary of its operation.
    """

    def __init__(
        self,
        uuid: str,
        entrypoint: str,
        params: dict[str, Any] | None = None,
        result: Result | dict[str, Any] | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        # None is no uuid: "None" would be one that many messages share. Whoever sends it says what is missing.
        self.uuid = uuid if type(uuid) is str else "" if uuid is None else str(uuid)
        self.entrypoint = entrypoint
        self.params = params or {}
        if not result:
            self.result = Result(uuid=self.uuid)
        elif isinstance(result, Result):
            self.result = result
        elif isinstance(result, dict):
            self.result = _load_result(self.uuid, result)
        else:
            raise ValidationError(
                f"result={results.shown(result)} of message {entrypoint}[{uuid}]: give a Result or its fields",
                extra={"uuid": self.uuid, "field": "result"},
            )
        self.metadata = metadata or {}

    @classmethod
    def loads(cls, json_data: str | bytes) -> Self:
        """The message written as ``json_data``.

        Raises:
            ValidationError: it is no JSON object, or fields are missing or of a wrong type; ``extra`` maps each field
                to a list of what is wrong with it (``_schema`` for the whole).
        """
        data = parse(json_data)
        if type(data) is dict:
            uuid, entrypoint = data.get("uuid"), data.get("entrypoint")
            params, result, metadata = data.get("params"), data.get("result"), data.get("metadata")
            if (
                type(uuid) is str
                and uuid
                and type(entrypoint) is str
                and entrypoint
                and (params is None or type(params) is dict)
                and (metadata is None or type(metadata) is dict)
            ):
                if result is None:
                    return cls(uuid, entrypoint, params, None, metadata)
                if type(result) is dict:
                    loaded = _whole_result(result)
                    if loaded is not None:
                        return cls(uuid, entrypoint, params, loaded, metadata)
                    if _is_plain_result(result):
                        return cls(uuid, entrypoint, params, _load_result(uuid, result), metadata)
        try:
            return cls(**_SCHEMA.load(data))
        except SchemaError as exc:
            raise ValidationError("Failed to load message", extra=dict(exc.messages_dict)) from None

    def dump(self) -> dict[str, Any]:
        """The message as a dict of uuid, entrypoint, params, result and metadata. Its values are not copied."""
        return {
            "uuid": self.uuid,
            "entrypoint": self.entrypoint,
            "params": self.params,
            "result": results.dump(self.result),
            "metadata": self.metadata,
        }

    def dumps(self) -> str:
        """The message as JSON text, as kser 0.8 writes it.

        Raises ValidationError naming the field that JSON has no form for.
        """
        try:
            return json.dumps(self.dump(), allow_nan=False, default=_as_orjson)
        except (TypeError, ValueError, RecursionError):
            raise self._not_json() from None

    def to_bytes(self) -> bytes:
        """The message as compact UTF-8 JSON: what is sent. Raises as dumps() does."""
        if type(self).dumps is not Message.dumps:  # an overridden dumps() decides: encryption hooks in there
            return self.dumps().encode()
        raw = plain_bytes(self.uuid, self.entrypoint, self.params, self.result, self.metadata)
        return raw if raw is not None else self.dumps().encode()

    def sent_as(self, transport: "type[Message]") -> "Message":
        """This message as one of class ``transport``, the Controller.TRANSPORT that will read it.

        A message that is of a class of its own stays what it is: whoever made it chose how it is written.
        """
        if type(self) is not Message or transport is Message:
            return self
        return transport(self.uuid, self.entrypoint, self.params, self.result, self.metadata)

    def _not_json(self) -> ValidationError:
        for name, value in (
            ("uuid", self.uuid),
            ("entrypoint", self.entrypoint),
            ("params", self.params),
            ("result", {k: v for k, v in results.dump(self.result).items() if k != "retval"}),
            ("result.retval", self.result.retval),
            ("metadata", self.metadata),
        ):
            where, why = _find_unwritable(name, value)
            if where:
                return ValidationError(
                    f"Message {self.entrypoint}[{self.uuid}] cannot be written as JSON: {where} is {why}; "
                    "use text, numbers, booleans, None, lists and dicts",
                    extra={"uuid": self.uuid, "entrypoint": self.entrypoint, "field": where},
                )
        return ValidationError(
            f"Message {self.entrypoint}[{self.uuid}] cannot be written as JSON: it is nested too deep",
            extra={"uuid": self.uuid, "entrypoint": self.entrypoint, "field": "params"},
        )

    def __str__(self) -> str:
        return str(self.dump())

    def __repr__(self) -> str:
        return f"Message<uuid='{self.uuid}', entrypoint='{self.entrypoint}', result={self.result}>"


def plain_bytes(
    uuid: str, entrypoint: str, params: dict[str, Any], result: Result | None, metadata: dict[str, Any]
) -> bytes | None:
    """What Message.to_bytes() gives for a message of these, when it takes nothing but orjson; else None.

    Result None: an empty one.
    """
    try:
        raw = orjson.dumps(
            {
                "uuid": uuid,
                "entrypoint": entrypoint,
                "params": params,
                "result": {"uuid": uuid, "retcode": 0, "stdout": "", "stderr": "", "retval": {}}
                if result is None
                else {
                    "uuid": result.uuid,
                    "retcode": result.retcode,
                    "stdout": result.stdout,
                    "stderr": result.stderr,
                    "retval": result.retval,
                },
                "metadata": metadata,
            },
            option=_STRICT,
        )
    except TypeError:
        return None
    # orjson writes null for NaN and infinity, which would lose them without a word
    return raw if b"null" not in raw else None


def _as_orjson(value: Any) -> Any:
    """What orjson makes of the values that the standard library refuses, so that both write the same."""
    if isinstance(value, UUID):
        return str(value)
    if isinstance(value, Enum):
        return value.value
    raise TypeError(f"Object of type {type(value).__name__} is not JSON serializable")


def parse(json_data: str | bytes) -> Any:
    """The JSON data in a text or in UTF-8 bytes. Raises ValidationError when it is none.

    Reads what kser and its predecessors write: whole numbers of any size, lone surrogates.
    """
    if not isinstance(json_data, (str, bytes, bytearray, memoryview)):
        raise ValidationError("Failed to load message", extra={"_schema": [f"Not text: {type(json_data).__name__}"]})
    try:
        return parse_plain(json_data.encode() if isinstance(json_data, str) else bytes(json_data))
    except (ValueError, TypeError):
        pass  # the standard library reads more (NaN, lone surrogates, deeper nesting) and has the last word
    try:
        return json.loads(json_data if isinstance(json_data, (str, bytes, bytearray)) else bytes(json_data))
    except (ValueError, TypeError, RecursionError) as exc:
        raise ValidationError("Failed to load message", extra={"_schema": [f"Not a JSON object: {exc}"]}) from None


def parse_plain(raw: bytes) -> Any:
    """What parse() gives for most of what it reads, in UTF-8; ValueError for the rest, and for what is no JSON."""
    if _BIG_NUMBER in raw.translate(_DIGITS):
        raise ValueError("a number may be too large")
    return orjson.loads(raw)


def _load_result(uuid: str, fields: dict[str, Any]) -> Result:
    return Result(**fields) if "uuid" in fields else Result(**fields, uuid=uuid)


def _whole_result(result: dict[str, Any]) -> Result | None:
    """The Result in a dict of its five fields and no others, each of its type; None for any other dict."""
    if len(result) != 5:
        return None
    uuid, retcode, retval = result.get("uuid"), result.get("retcode"), result.get("retval")
    stdout, stderr = result.get("stdout"), result.get("stderr")
    if (
        type(uuid) is str
        and type(retcode) is int
        and type(stdout) is str
        and type(stderr) is str
        and type(retval) is dict
    ):
        return Result(retcode, stdout, stderr, retval, uuid)
    return None


def _is_plain_result(result: dict[str, Any]) -> bool:
    for name, value in result.items():
        expected = _RESULT_TYPES.get(name)
        if type(value) is not expected:
            return False
    return True


def _find_unwritable(where: str, value: Any, depth: int = 0) -> tuple[str, str]:
    """Path and description of the first value JSON has no form for; ("", "") when there is none."""
    if depth > 500:
        return where, "nested too deep"
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, (str, int, float, bool, type(None))):
                return f"{where} key {key!r}", f"of type {type(key).__name__}"
            found = _find_unwritable(f"{where}[{key!r}]", item, depth + 1)
            if found[0]:
                return found
        return "", ""
    if isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            found = _find_unwritable(f"{where}[{index}]", item, depth + 1)
            if found[0]:
                return found
        return "", ""
    try:
        json.dumps(value, allow_nan=False, default=_as_orjson)
    except ValueError:
        return where, results.shown(value)
    except TypeError:
        return where, f"of type {type(value).__name__}"
    return "", ""
