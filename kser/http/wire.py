"""What is posted to ``/api/1/messages``, and what the answer holds: the schemas, and the way from one to the other.

    {"messages": [{"topic": "shop", "message": {"entrypoint": "shop.Charge", "params": {}}}]}

``message`` is the envelope as in Kafka; without a uuid it gets a random one. Beside it there may be ``key`` and
``headers`` of the record. The answer tells of each message, in their
order: ``{"results": [{"uuid", "retcode", "stdout", "stderr"}]}``, with status 200 when all of them are taken.
"""

import uuid as uuids
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

from marshmallow import EXCLUDE, Schema, fields, validate
from marshmallow import ValidationError as SchemaError

from kser.headers import Headers
from kser.results import Result, is_success
from kser.schemas import Message, MessageSchema
from kser.transport.names import TOPIC_NAME_RULE, is_topic_name

__all__ = [
    "MAX_BODY_BYTES",
    "MAX_MESSAGES",
    "MESSAGES_PATH",
    "MessagesSchema",
    "OutcomeSchema",
    "OutcomesSchema",
    "Posted",
    "check_topic",
    "failure_of",
    "outcomes",
    "posted",
]

MESSAGES_PATH: Final = "/api/1/messages"
#: Messages of one request.
MAX_MESSAGES: Final = 1000
#: Largest request body that is read.
MAX_BODY_BYTES: Final = 16 * 1024 * 1024


def check_topic(name: str) -> None:
    """Raise marshmallow's ValidationError unless this can be the name of a topic."""
    if not is_topic_name(name):
        raise SchemaError(f"{name!r} {TOPIC_NAME_RULE}")


def _check_header(pair: list[str | None]) -> None:
    if pair and pair[0] is None:
        raise SchemaError("A header has a name")


class EnvelopeSchema(MessageSchema):
    """A message. Only its entrypoint is required; it gets a random uuid when it has none."""

    uuid = fields.String(load_default=None, allow_none=True, validate=validate.Length(min=1))


class PostedSchema(Schema):
    """A message and where it goes."""

    topic = fields.String(
        required=True,
        validate=check_topic,
        metadata={"description": "Kafka topic", "minLength": 1, "maxLength": 249, "pattern": "^[a-zA-Z0-9._-]+$"},
    )
    message = fields.Nested(EnvelopeSchema, required=True)
    key = fields.String(
        load_default=None,
        allow_none=True,
        metadata={"description": "Record key; default the message's operation, else its uuid"},
    )
    headers = fields.List(
        fields.List(fields.String(allow_none=True), validate=[validate.Length(equal=2), _check_header]),
        load_default=list,
        metadata={"description": "Record headers, [name, text or null] each"},
    )


class MessagesSchema(Schema):
    """Messages, which are sent in this order."""

    messages = fields.List(
        fields.Nested(PostedSchema), required=True, validate=validate.Length(min=1, max=MAX_MESSAGES)
    )


class OutcomeSchema(Schema):
    """What became of one message: retcode 0 when it is taken, else stderr says why not."""

    class Meta:
        """A newer server may tell more."""

        unknown = EXCLUDE

    uuid = fields.String(required=True)
    retcode = fields.Integer(required=True)
    stdout = fields.String(required=True)
    stderr = fields.String(required=True)


class OutcomesSchema(Schema):
    """What became of the messages, in their order."""

    class Meta:
        """A newer server may tell more."""

        unknown = EXCLUDE

    results = fields.List(fields.Nested(OutcomeSchema), required=True)


class Posted(NamedTuple):
    """One message of a request."""

    topic: str
    kmsg: Message
    #: Record key; None: the message's own.
    key: str | None = None
    headers: Headers = ()


def posted(data: Mapping[str, Any]) -> list[Posted]:
    """The messages in what MessagesSchema loaded."""
    return [
        Posted(
            item["topic"],
            Message(**{**item["message"], "uuid": item["message"]["uuid"] or str(uuids.uuid4())}),
            item["key"],
            tuple((name, None if text is None else text.encode("utf-8")) for name, text in item["headers"]),
        )
        for item in data["messages"]
    ]


def outcomes(results: Sequence[Result]) -> dict[str, Any]:
    """The answer's document. Of a Result's retval nothing is told: that of a failed one holds a traceback."""
    return {
        "results": [
            {"uuid": str(it.uuid), "retcode": it.retcode, "stdout": it.stdout, "stderr": it.stderr} for it in results
        ]
    }


def failure_of(results: Sequence[Result]) -> Result | None:
    """The first of them that failed; None when all went well."""
    return next((result for result in results if not is_success(result)), None)
