"""What requests hold and answers tell: the contract that the OpenAPI document shows."""

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Final

from marshmallow import Schema, fields, validate
from marshmallow import ValidationError as SchemaError

from kser.http.wire import OutcomeSchema, check_topic
from kser.status import Status

__all__ = [
    "AbortSchema",
    "AfterQuery",
    "BuildQuery",
    "BuildSchema",
    "BuildsSchema",
    "EntrypointsSchema",
    "ExecutionSchema",
    "ExecutionsSchema",
    "FollowQuery",
    "GroupQuery",
    "HealthSchema",
    "LaunchSchema",
    "LaunchedSchema",
    "LetterQuery",
    "LetterSchema",
    "LettersSchema",
    "LogLinesSchema",
    "LogQuery",
    "OperationQuery",
    "ProblemSchema",
    "ProgressSchema",
    "PurgeSchema",
    "PurgedSchema",
    "ReplaySchema",
    "ReplaysSchema",
    "ResumeSchema",
    "TimelineSchema",
    "ToldSchema",
    "WorkersSchema",
]

#: Entries of one page.
_MOST: Final = 500
_LARGEST: Final = 2**53 - 1


def _check_text(value: str) -> None:
    """Databases and brokers take neither zero characters nor half surrogates."""
    if "\x00" in value or any("\ud800" <= sign <= "\udfff" for sign in value):
        raise SchemaError("It has a character that is no text")


def _text(*, required: bool = False, least: int = 0, note: str = "", **more: Any) -> fields.String:
    if not required:
        more.setdefault("load_default", None)
    rules: list[Callable[[Any], Any]] = [validate.Length(min=least, max=1000), _check_text]
    return fields.String(required=required, validate=rules, metadata={"description": note}, **more)


def _moment(note: str) -> fields.AwareDateTime:
    return fields.AwareDateTime(
        format="iso",
        default_timezone=UTC,
        load_default=None,
        validate=validate.Range(datetime(1970, 1, 2, tzinfo=UTC), datetime(9999, 1, 1, tzinfo=UTC)),
        metadata={"description": note},
    )


def _number(default: int, least: int, most: int, note: str) -> fields.Integer:
    return fields.Integer(
        load_default=default, validate=validate.Range(least, most), metadata={"description": note}, strict=False
    )


def _name(note: str) -> fields.String:
    rules: list[Callable[[Any], Any]] = [validate.Regexp("^[a-zA-Z0-9._-]{1,249}$"), check_topic]
    return fields.String(load_default=None, allow_none=True, validate=rules, metadata={"description": note})


def _changed() -> fields.Dict:
    note = {"description": "Changed parameters"}
    return fields.Dict(keys=fields.String(), load_default=None, allow_none=True, metadata=note)


def _ids() -> fields.List:
    rule = validate.Regexp("^[0-9]{1,10}:[0-9]{1,18}$")
    return fields.List(fields.String(validate=rule), load_default=None, validate=validate.Length(1, 1000))


class ProblemSchema(Schema):
    """What went wrong (RFC 9457)."""

    type = fields.String(required=True)
    title = fields.String(required=True)
    status = fields.Integer(required=True)
    detail = fields.String(required=True, metadata={"description": "What happened, and what to do"})
    code = fields.String(metadata={"description": "Number of the error in kser"})
    errors = fields.Dict(metadata={"description": "Field -> what is wrong with it"})
    extra = fields.Dict()
    results = fields.List(fields.Nested(OutcomeSchema))


# -- queries -----------------------------------------------------------------------------------------------------------


class GroupQuery(Schema):
    """Which group is meant."""

    group = _name("Consumer group; default the one of this API")


class FollowQuery(GroupQuery):
    """How a stream goes on."""

    follow = fields.Boolean(
        load_default=True,
        metadata={
            "description": "Go on as something happens, and wait for an operation that nothing is told of yet; false: "
            "end with what there is, and 404 when that is nothing"
        },
    )


class PageQuery(Schema):
    """Which part of a list."""

    limit = _number(50, 1, _MOST, "At most so many")
    offset = _number(0, 0, 10_000_000, "Leave out so many")


class OperationQuery(PageQuery):
    """Which operations."""

    state = fields.List(
        fields.String(validate=validate.OneOf([str(status) for status in Status])),
        load_default=list,
        metadata={"description": "Status; several mean any of them"},
    )
    entrypoint = _text(note="Name of the class in messages")
    since = _moment("Begun then or later")
    until = _moment("Begun before that")
    text = _text(note="Text in its uuid, entrypoint, error or parameters")
    kind = fields.String(load_default=None, validate=validate.OneOf(["operation", "task"]))
    group = _text(note="Group of the workers that told of it")


class LetterChoice(Schema):
    """Which dead letters, of those that were not replayed."""

    task = _text(note="Name of the task, or of its class alone, or a pattern (shop.*)")
    error = _text(note="Part of the error's type or text, in any case")
    since = _moment("Failed then or later")
    until = _moment("Failed before that")
    operation = _text(least=1, note="uuid of an operation or message, or its beginning")


class LetterFilter(LetterChoice):
    """Which dead letters."""

    replayed = fields.Boolean(load_default=None, metadata={"description": "Only those that were, or were not"})


class LetterQuery(LetterFilter, GroupQuery):
    """Which dead letters, the newest first."""

    limit = _number(50, 1, _MOST, "At most so many")


class AfterQuery(Schema):
    """What came later than what the caller has."""

    after = _number(0, 0, _LARGEST, "Only what was stored after the one with this id")
    limit = _number(200, 1, _MOST, "At most so many")


class LogQuery(AfterQuery):
    """Which log records."""

    min_level = fields.Integer(
        load_default=None,
        validate=validate.Range(0, 1000),
        metadata={"description": "Of this level and above, as in logging: 30 is WARNING"},
    )


class BuildQuery(Schema):
    """Which builds of a job."""

    job_id = _text(required=True, least=1, note="The job")
    started = fields.Boolean(load_default=None)
    finished = fields.Boolean(load_default=None)
    success = fields.Boolean(load_default=None)
    skipped = fields.Boolean(load_default=None)
    order = fields.String(load_default="desc", validate=validate.OneOf(["asc", "desc"]))
    limit = _number(50, 1, _MOST, "At most so many")


# -- bodies ------------------------------------------------------------------------------------------------------------


class LaunchSchema(Schema):
    """What is to be launched."""

    entrypoint = _text(required=True, least=1, note="Name of an operation or a task")
    params = fields.Dict(keys=fields.String(), load_default=dict)
    topic = _name("Where to")
    key = _text(least=1, allow_none=True, note="Message key: what has the same stays in order")
    idempotency_key = _text(least=1, allow_none=True, note="What it is for: of all with the same one, one is started")


class AbortSchema(Schema):
    """Why it is aborted."""

    why = _text(load_default="", note="For people")
    run = fields.Integer(load_default=None, allow_none=True, validate=validate.Range(1, 2**31 - 1))


class ResumeSchema(Schema):
    """Where it goes on, and with what."""

    params = _changed()
    step = _text(least=1, allow_none=True, note="Name or position of the step; default the failed one")
    dry_run = fields.Boolean(load_default=False)


class ReplaySchema(Schema):
    """Which dead letters are sent back: by their ids, or those that match and were not replayed yet."""

    ids = _ids()
    matching = fields.Nested(LetterChoice, load_default=None)
    params = _changed()
    force = fields.Boolean(load_default=False)
    dry_run = fields.Boolean(load_default=False)


class PurgeSchema(Schema):
    """Which dead letters are deleted for good: by their ids, or those that match."""

    ids = _ids()
    matching = fields.Nested(LetterFilter, load_default=None)
    force = fields.Boolean(load_default=False, metadata={"description": "Delete what lies before them, too"})
    dry_run = fields.Boolean(load_default=False)


# -- answers -----------------------------------------------------------------------------------------------------------


class ExecutionSchema(Schema):
    """An operation or a task, in its newest run. Values under names that look secret are masked."""

    uuid = fields.String()
    id = fields.Integer()
    kind = fields.String()
    entrypoint = fields.String()
    status = fields.String()
    started = fields.String(allow_none=True)
    ended = fields.String(allow_none=True)
    duration_s = fields.Float(allow_none=True)
    error = fields.String(allow_none=True)
    run = fields.Integer()
    position = fields.Integer()
    attempt = fields.Integer()
    worker = fields.String(allow_none=True)
    operation = fields.String(allow_none=True)
    parent = fields.String(allow_none=True)
    job_id = fields.String()
    created = fields.String(allow_none=True)
    params = fields.Raw(allow_none=True)
    result = fields.Raw(allow_none=True)
    exception = fields.Raw(allow_none=True)
    traceback = fields.Raw(allow_none=True)
    group = fields.String(allow_none=True)
    note = fields.String(allow_none=True)
    tasks = fields.List(fields.Nested(lambda: ExecutionSchema()))


class ExecutionsSchema(Schema):
    """A page of operations, the newest first."""

    operations = fields.List(fields.Nested(ExecutionSchema))
    total = fields.Integer()
    limit = fields.Integer()
    offset = fields.Integer()


class TimelineEventSchema(Schema):
    """One thing that was told."""

    id = fields.Integer()
    type = fields.String()
    uuid = fields.String()
    entrypoint = fields.String()
    operation = fields.String(allow_none=True)
    run = fields.Integer()
    position = fields.Integer()
    attempt = fields.Integer()
    phase = fields.Integer()
    status = fields.String()
    at = fields.String(allow_none=True)
    worker = fields.String()
    data = fields.Raw(metadata={"description": "The record"})


class TimelineSchema(Schema):
    """What was told, in order."""

    events = fields.List(fields.Nested(TimelineEventSchema))


class LogLineSchema(Schema):
    """One log record."""

    id = fields.Integer()
    build_id = fields.Integer()
    uuid = fields.String()
    entrypoint = fields.String()
    created = fields.String()
    level = fields.Integer()
    level_name = fields.String()
    logger = fields.String()
    message = fields.String()
    exception = fields.Raw(allow_none=True)
    traceback = fields.Raw(allow_none=True)
    worker = fields.String(allow_none=True)


class LogLinesSchema(Schema):
    """Log records, in the order they were stored."""

    logs = fields.List(fields.Nested(LogLineSchema))


class ProgressSchema(Schema):
    """How far something has come, and what is in it."""

    name = fields.String(allow_none=True)
    current = fields.Integer()
    total = fields.Integer()
    percent = fields.Float()
    label = fields.String()
    status_line = fields.String(allow_none=True)
    children = fields.List(fields.Nested(lambda: ProgressSchema()))


class BuildSchema(Schema):
    """A build of a job. Values under names that look secret are masked."""

    id = fields.Integer()
    uuid = fields.String()
    job_id = fields.String()
    start_time = fields.DateTime(allow_none=True)
    end_time = fields.DateTime(allow_none=True)
    started = fields.Boolean()
    finished = fields.Boolean()
    success = fields.Boolean(allow_none=True)
    skipped = fields.Boolean(allow_none=True)
    job_config = fields.Raw(allow_none=True)
    build_config = fields.Raw(allow_none=True)
    retval = fields.Raw(allow_none=True)
    exception = fields.Raw(allow_none=True)
    exception_tb = fields.Raw(allow_none=True)


class BuildsSchema(Schema):
    """Builds of a job."""

    builds = fields.List(fields.Nested(BuildSchema))


class RunningSchema(Schema):
    """What a worker runs."""

    uuid = fields.String()
    entrypoint = fields.String()
    seconds = fields.Float(metadata={"description": "for how long"})
    heartbeat_s_ago = fields.Float(
        allow_none=True, metadata={"description": "seconds since it told that it is alive; null: it never did"}
    )


class WorkerSchema(Schema):
    """A worker."""

    name = fields.String()
    group = fields.String()
    hostname = fields.String(allow_none=True)
    pid = fields.Integer(allow_none=True)
    versions = fields.Dict()
    started = fields.String(allow_none=True)
    seen = fields.String()
    state = fields.String(
        metadata={"description": "starting, running, draining, stopped (it said so) or gone (not heard of for long)"}
    )
    running = fields.List(fields.Nested(RunningSchema))


class WorkersSchema(Schema):
    """The fleet."""

    workers = fields.List(fields.Nested(WorkerSchema))


class LaunchedSchema(Schema):
    """What is on its way."""

    uuid = fields.String()
    entrypoint = fields.String()
    topic = fields.String()
    detail = fields.String()


class ToldSchema(Schema):
    """What was told to the workers."""

    uuid = fields.String()
    run = fields.Integer(allow_none=True)
    detail = fields.String()


class EntrypointSchema(Schema):
    """A class that can be launched."""

    name = fields.String()
    aliases = fields.List(fields.String())
    kind = fields.String()
    required = fields.List(fields.String())
    about = fields.String()


class EntrypointsSchema(Schema):
    """The classes of the registry."""

    entrypoints = fields.List(fields.Nested(EntrypointSchema))


class OriginSchema(Schema):
    """Where a message was."""

    topic = fields.String()
    partition = fields.Integer()
    offset = fields.Integer()


class LetterSchema(Schema):
    """A message that failed for good. Values under names that look secret are masked."""

    id = fields.String(metadata={"description": "partition:offset"})
    at = fields.String()
    entrypoint = fields.String()
    uuid = fields.String()
    operation = fields.String(allow_none=True)
    run = fields.Integer()
    position = fields.Integer()
    error_type = fields.String()
    error = fields.String()
    attempt = fields.Integer()
    redrive = fields.Integer()
    replayed = fields.Boolean()
    worker = fields.String()
    origin = fields.Nested(OriginSchema)
    key = fields.String(allow_none=True)
    left_out = fields.String()
    unreadable = fields.String()
    trace = fields.String()
    headers = fields.List(fields.List(fields.String(allow_none=True)))
    value = fields.Raw(allow_none=True)
    value_base64 = fields.String(allow_none=True)


class LettersSchema(Schema):
    """Dead letters, the newest first."""

    letters = fields.List(fields.Nested(LetterSchema))
    total = fields.Integer()


class ReplayedSchema(Schema):
    """What became of one dead letter that was to be sent back."""

    id = fields.String()
    status = fields.String(metadata={"description": "sent, ready (a dry run), refused or failed"})
    reason = fields.String()
    entrypoint = fields.String()
    uuid = fields.String()
    operation = fields.String(allow_none=True)
    run = fields.Integer(allow_none=True)
    position = fields.Integer()
    topic = fields.String(allow_none=True)
    partition = fields.Integer(allow_none=True)


class ReplaysSchema(Schema):
    """What became of them, in the order in which they are sent."""

    outcomes = fields.List(fields.Nested(ReplayedSchema))


class PurgedSchema(Schema):
    """What is deleted, or would be."""

    deleted = fields.List(fields.String())
    kept = fields.List(fields.String(), metadata={"description": "An older one in the same partition was not chosen"})
    others = fields.Integer(metadata={"description": "How many of them were not chosen"})
    dry_run = fields.Boolean()


class HealthSchema(Schema):
    """How the API is doing."""

    status = fields.String(metadata={"description": "ok, or what is wrong"})
    version = fields.String()
