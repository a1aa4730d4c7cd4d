"""Dead letters: list, show, send back, delete."""

from typing import Any

from kser.dead_letters import DeadLetter, DeadLetters
from kser.errors import ValidationError
from kser.letters_json import content_as_json, letter_as_json, outcome_as_json
from kser.web.blueprint import ApiBlueprint
from kser.web.schemas import (
    GroupQuery,
    LetterQuery,
    LetterSchema,
    LettersSchema,
    PurgedSchema,
    PurgeSchema,
    ReplaySchema,
    ReplaysSchema,
)
from kser.web.site import site

__all__ = ["letters"]

letters = ApiBlueprint("dead-letters", __name__, description="Messages that failed for good, or cannot be read")


@letters.route("/api/1/dead-letters")
@letters.arguments(LetterQuery, location="query")
@letters.response(200, LettersSchema)
def list_letters(query: dict[str, Any]) -> dict[str, Any]:
    """The dead letters of a group, the newest first."""
    found = site().letters(query.pop("group")).search(**query)
    return {"letters": [letter_as_json(letter) for letter in found.letters], "total": found.total}


@letters.route("/api/1/dead-letters/<int:partition>:<int:offset>")
@letters.arguments(GroupQuery, location="query")
@letters.response(200, LetterSchema)
def show_letter(query: dict[str, Any], partition: int, offset: int) -> dict[str, Any]:
    """One dead letter: what failed, where, why, and the message."""
    letter = site().letters(query["group"]).show(f"{partition}:{offset}")
    return letter_as_json(letter) | content_as_json(letter)


@letters.route("/api/1/dead-letters/replay", methods=["POST"])
@letters.arguments(GroupQuery, location="query")
@letters.arguments(ReplaySchema)
@letters.response(200, ReplaysSchema)
def replay_letters(query: dict[str, Any], body: dict[str, Any]) -> dict[str, Any]:
    """Send messages back to where they failed, and their operations go on from there.

    Whoever else replays the same one meanwhile: it is run once. ``dry_run`` says what would be done.
    """
    here = site().letters(query["group"])
    chosen = _chosen(here, body, replayed=False)
    outcomes = here.replay(chosen, dry_run=body["dry_run"], force=body["force"], params=body["params"])
    return {"outcomes": [outcome_as_json(outcome) for outcome in outcomes]}


@letters.route("/api/1/dead-letters/purge", methods=["POST"])
@letters.arguments(GroupQuery, location="query")
@letters.arguments(PurgeSchema)
@letters.response(200, PurgedSchema)
def purge_letters(query: dict[str, Any], body: dict[str, Any]) -> dict[str, Any]:
    """Delete dead letters for good.

    Kafka deletes the oldest records of a partition, up to one of them: one stays when an older one in its partition is
    not to be deleted. ``dry_run`` says what would be done.
    """
    here = site().letters(query["group"])
    plan = here.purge(_chosen(here, body, replayed=None), force=body["force"], dry_run=body["dry_run"])
    return {
        "deleted": [letter.id for letter in plan.deleted],
        "kept": [letter.id for letter in plan.kept],
        "others": plan.others,
        "dry_run": body["dry_run"],
    }


def _chosen(here: DeadLetters, body: dict[str, Any], *, replayed: bool | None) -> list[DeadLetter]:
    """Those that are named, or match. Raises ValidationError when it is neither, or both."""
    ids, matching = body["ids"], body["matching"]
    if (ids is None) == (matching is None):
        raise ValidationError("Say which dead letters: give ids, or matching; an empty matching means all of them")
    return here.several(ids) if ids is not None else here.list(**{"replayed": replayed, **matching})
