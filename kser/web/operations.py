"""Operations: what there is, one with its tasks, what was told of it; launch, abort, resume."""

import uuid as uuids
from http import HTTPStatus
from typing import Any

import flask

from kser import control, results
from kser.dead_letters import DeadLetters
from kser.entry import Entrypoint, wire_name
from kser.errors import Error, InternalError, NotFound, StatusError, ValidationError
from kser.http.problems import problem_of_result
from kser.launching import build, launch
from kser.loading import find_class, names_of
from kser.masking import mask
from kser.schemas import Message
from kser.sequencing.operation import Operation
from kser.web.blueprint import ApiBlueprint
from kser.web.schemas import (
    AbortSchema,
    EntrypointsSchema,
    ExecutionSchema,
    ExecutionsSchema,
    FollowQuery,
    GroupQuery,
    LaunchedSchema,
    LaunchSchema,
    OperationQuery,
    ResumeSchema,
    ToldSchema,
)
from kser.web.site import site

__all__ = ["events", "operations"]

operations = ApiBlueprint("operations", __name__, description="Operations, and tasks that belong to none")
events = ApiBlueprint("events", __name__, description="What happens, as server-sent events")

#: Of the body's events, each of which is described by the schema.
_STREAM = {
    "content_type": "text/event-stream",
    "schema": {"type": "object", "properties": {name: {"type": "string"} for name in ("id", "event", "data")}},
}


@operations.route("/api/1/operations")
@operations.arguments(OperationQuery, location="query")
@operations.response(200, ExecutionsSchema)
def list_operations(query: dict[str, Any]) -> dict[str, Any]:
    """Operations, and tasks that belong to none, the newest first."""
    limit, offset = query.pop("limit"), query.pop("offset")
    chosen = {"states": tuple(query.pop("state")), **query}
    history = site().history
    found = history.list_operations(**chosen, limit=limit, offset=offset)
    return {
        "operations": [mask(execution.to_json()) for execution in found],
        "total": history.count_operations(**chosen),
        "limit": limit,
        "offset": offset,
    }


@operations.route("/api/1/operations/<uuid>")
@operations.response(200, ExecutionSchema)
def show_operation(uuid: str) -> Any:
    """One operation with its tasks, or one task: parameters, result, error."""
    return mask(site().history.get_operation(uuid).to_json(details=True))


@operations.route("/api/1/operations", methods=["POST"])
@operations.arguments(LaunchSchema)
@operations.response(202, LaunchedSchema)
def launch_operation(body: dict[str, Any]) -> Any:
    """Launch an operation, or send a task, by its name.

    With a registry it is built here, and its parameters are checked; else a worker that knows the name builds it.
    """
    here = site()
    if here.registry is not None:
        made = _built(body)
        uuid, name = made.uuid, made.path
        topic, result = launch(
            made, here.producer, body["topic"], here.settings.timeout_s, here.registry.topic or here.settings.topic
        )
    else:
        uuid, name = str(uuids.uuid4()), body["entrypoint"]
        topic = body["topic"] or here.settings.topic or ""
        if not topic:
            raise ValidationError("No topic is named: give one, or start the API with a topic to launch to")
        if body["idempotency_key"]:
            raise ValidationError("idempotency_key takes a registry, so that the API can build what is launched")
        kmsg = Message(uuid, name, body["params"])
        result = here.producer.send(topic, kmsg, here.settings.timeout_s, key=body["key"])
    if not results.is_success(result):
        return problem_of_result(result)
    told = {"uuid": uuid, "entrypoint": name, "topic": topic, "detail": f"{name}[{uuid}] is on its way in {topic}"}
    return told, HTTPStatus.ACCEPTED, {"Location": flask.url_for("operations.show_operation", uuid=uuid)}


def _built(body: dict[str, Any]) -> Entrypoint:
    registry = site().registry
    assert registry is not None
    try:
        return build(find_class(registry, body["entrypoint"]), body["params"], body["key"], body["idempotency_key"])
    except InternalError as exc:  # the user's own code, given these parameters
        raise ValidationError(str(exc.message)) from exc


@operations.route("/api/1/operations/<uuid>/abort", methods=["POST"])
@operations.arguments(GroupQuery, location="query")
@operations.arguments(AbortSchema, required=False)
@operations.response(202, ToldSchema)
def abort_operation(query: dict[str, Any], body: dict[str, Any], uuid: str) -> Any:
    """Tell the workers that an operation, or a task of none, is to end. Doing it again changes nothing."""
    here = site()
    group = here.group(query["group"])
    answer = control.abort(
        uuid,
        group=group,
        transport=here.transport,
        run=body["run"],
        why=body["why"],
        timeout_s=here.settings.timeout_s,
    )
    if answer.abort is None:
        raise StatusError(f"{uuid} cannot be aborted: {answer.note}", extra={"uuid": uuid})
    note = f" ({answer.note})" if answer.note else ""
    return {
        "uuid": uuid,
        "run": answer.abort.run,
        "detail": f"The workers of group {group} are told that {uuid} is aborted, up to run {answer.abort.run}{note}",
    }


@operations.route("/api/1/operations/<uuid>/resume", methods=["POST"])
@operations.arguments(GroupQuery, location="query")
@operations.arguments(ResumeSchema, required=False)
@operations.response(202, ToldSchema)
def resume_operation(query: dict[str, Any], body: dict[str, Any], uuid: str) -> Any:
    """Begin a new run of a failed operation at the step that failed it, with the results it had."""
    letters: DeadLetters = site().letters(query["group"])
    outcome = letters.resume(uuid, params=body["params"], step=body["step"], dry_run=body["dry_run"])
    verb = "would be" if body["dry_run"] else "is"
    return {
        "uuid": uuid,
        "run": outcome.run,
        "detail": f"{uuid} {verb} resumed{'' if outcome.run is None else f' as run {outcome.run}'}, at "
        f"{outcome.entrypoint or 'its task'} (position {outcome.position})",
    }


@operations.route("/api/1/entrypoints")
@operations.response(200, EntrypointsSchema)
def list_entrypoints() -> dict[str, Any]:
    """What can be launched: the operations and tasks of the registry."""
    registry = site().registry
    if registry is None:
        raise NotFound("No registry is served here: any name can be launched, and the workers know which there are")
    return {
        "entrypoints": [
            {
                "name": names[0],
                "aliases": names[1:],
                "kind": "operation" if issubclass(cls, Operation) else "task",
                "required": [str(name) for name in cls.REQUIRED_FIELDS],
                "about": ((cls.__dict__.get("__doc__") or "").strip().splitlines() or [""])[0],
            }
            for cls, names in sorted(names_of(registry).items(), key=lambda it: wire_name(it[0]))
        ]
    }


# -- streams -----------------------------------------------------------------------------------------------------------


@events.route("/api/1/operations/<uuid>/events")
@events.arguments(FollowQuery, location="query")
@events.response(200, **_STREAM, description="Server-sent events: one for each record, then `end`")
def stream_operation(query: dict[str, Any], uuid: str) -> flask.Response:
    """What happened to an operation so far, and then what happens until it has ended, as server-sent events.

    An event's name is the record's type, its data the record as JSON. The header Last-Event-ID leaves out what came
    before that one. An operation that nothing is told of yet is waited for, unless ``follow`` is false: then it is 404.
    """
    return _stream(query, _root_of(uuid))


@events.route("/api/1/events")
@events.arguments(GroupQuery, location="query")
@events.response(200, **_STREAM, description="Server-sent events: one for each record")
def stream_group(query: dict[str, Any]) -> flask.Response:
    """What happens in a group from now on, as server-sent events."""
    return _stream({**query, "follow": True}, None)


def _stream(query: dict[str, Any], uuid: str | None) -> flask.Response:
    here = site()
    after = flask.request.headers.get("Last-Event-ID", "")
    gone = flask.request.environ.get("waitress.client_disconnected", lambda: False)
    stream = here.streams.open(here.group(query["group"]), uuid, follow=query["follow"], after=after, gone=gone)
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return flask.Response(stream, content_type="text/event-stream", headers=headers)


def _root_of(uuid: str) -> str:
    """The operation that a step belongs to, when the storage knows it: that one's events tell of the step."""
    here = site()
    if not here.has_storage:
        return uuid
    try:
        return here.history.get_operation(uuid).operation or uuid
    except Error:
        return uuid
