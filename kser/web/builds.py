"""What the storage knows beside operations: builds, logs, progress, workers."""

from typing import Any

from kser.masking import mask
from kser.web.blueprint import ApiBlueprint
from kser.web.schemas import (
    AfterQuery,
    BuildQuery,
    BuildSchema,
    BuildsSchema,
    LogLinesSchema,
    LogQuery,
    ProgressSchema,
    TimelineSchema,
    WorkersSchema,
)
from kser.web.site import site

__all__ = ["builds", "logs", "workers"]

builds = ApiBlueprint("builds", __name__, description="Builds of jobs: the same executions, as jobs see them")
logs = ApiBlueprint("logs", __name__, description="What was told of executions: events, logs, progress")
workers = ApiBlueprint("workers", __name__, description="The fleet")


@builds.route("/api/1/builds")
@builds.arguments(BuildQuery, location="query")
@builds.response(200, BuildsSchema)
def list_builds(query: dict[str, Any]) -> dict[str, Any]:
    """The builds of a job by date, the newest first unless ``order`` is asc."""
    return {"builds": [mask(build) for build in site().storage.get_job_builds(**query)]}


@builds.route("/api/1/builds/<int:build_id>")
@builds.response(200, BuildSchema)
def show_build(build_id: int) -> Any:
    """One build: configuration, what it gave, or why it failed."""
    return mask(site().storage.get_build(build_id))


@builds.route("/api/1/builds/<int:build_id>", methods=["DELETE"])
@builds.response(204)
def delete_build(build_id: int) -> None:
    """Delete a build, with its progress, logs and events."""
    site().storage.delete_build(build_id)


@logs.route("/api/1/operations/<uuid>/timeline")
@logs.arguments(AfterQuery, location="query")
@logs.response(200, TimelineSchema)
def show_timeline(query: dict[str, Any], uuid: str) -> dict[str, Any]:
    """What was told of an operation and all in it, or of a task, as far as it is stored."""
    history = site().history
    history.get_operation(uuid)  # raises NotFound: else an unknown one would be one that nothing was told of
    return {"events": [mask(event.to_json()) for event in history.list_events(uuid, **query)]}


@logs.route("/api/1/operations/<uuid>/logs")
@logs.arguments(LogQuery, location="query")
@logs.response(200, LogLinesSchema)
def show_logs(query: dict[str, Any], uuid: str) -> dict[str, Any]:
    """What an operation and all in it, or a task, logged. To follow, ask again with ``after``."""
    history = site().history
    history.get_operation(uuid)
    return {"logs": [mask(line.to_json()) for line in history.list_logs(uuid, **query)]}


@logs.route("/api/1/logs")
@logs.arguments(LogQuery, location="query")
@logs.response(200, LogLinesSchema)
def show_all_logs(query: dict[str, Any]) -> dict[str, Any]:
    """What everything logged. To follow, ask again with ``after``."""
    return {"logs": [mask(line.to_json()) for line in site().history.list_logs(**query)]}


@logs.route("/api/1/operations/<uuid>/progress")
@logs.response(200, ProgressSchema)
def show_progress(uuid: str) -> dict[str, Any]:
    """How far an operation or a task has come, as a tree."""
    return site().history.get_progress(uuid).to_json()


@workers.route("/api/1/workers")
@workers.response(200, WorkersSchema)
def list_workers() -> dict[str, Any]:
    """The workers that told of themselves, and what each runs."""
    return {"workers": [worker.to_json() for worker in site().history.list_workers()]}
