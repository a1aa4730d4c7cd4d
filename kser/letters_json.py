"""Dead letters and replays as JSON: what commands print and the REST API answers. Secrets are masked."""

import base64
from datetime import UTC, datetime
from typing import Any

from kser.errors import ValidationError
from kser.letters import DeadLetter
from kser.masking import mask, mask_text
from kser.redrive import Replay
from kser.schemas import parse

__all__ = ["content_as_json", "header_text", "letter_as_json", "outcome_as_json"]


def letter_as_json(letter: DeadLetter) -> dict[str, Any]:
    """The facts of a letter, without its value."""
    return {
        "id": letter.id,
        "at": datetime.fromtimestamp(letter.at / 1000, UTC).isoformat(timespec="milliseconds"),
        "entrypoint": letter.entrypoint,
        "uuid": letter.uuid,
        "operation": letter.operation,
        "run": letter.run,
        "position": letter.position,
        "error_type": letter.error_type,
        "error": letter.error,
        "attempt": letter.attempt,
        "redrive": letter.redrive,
        "replayed": letter.replayed,
        "worker": letter.worker,
        "origin": {
            "topic": letter.origin_topic,
            "partition": letter.origin_partition,
            "offset": letter.origin_offset,
        },
        "key": _text(letter.key),
        "left_out": letter.left_out,
        "unreadable": letter.unreadable,
    }


def content_as_json(letter: DeadLetter) -> dict[str, Any]:
    """The rest: traceback, headers, and the value as masked JSON, or in base64 when it is none."""
    try:
        value = {"value": mask(parse(letter.value or b""))}
    except ValidationError:
        value = {"value_base64": None if letter.value is None else base64.b64encode(letter.value).decode()}
    return {"trace": letter.trace, "headers": [[name, header_text(name, raw)] for name, raw in letter.headers], **value}


def outcome_as_json(outcome: Replay) -> dict[str, Any]:
    """What became of a replay."""
    record = outcome.record
    return {
        "id": outcome.letter.id,
        "status": outcome.status,
        "reason": outcome.reason,
        "entrypoint": outcome.entrypoint,
        "uuid": outcome.letter.uuid,
        "operation": outcome.letter.operation,
        "run": outcome.run,
        "position": outcome.position,
        "topic": record.topic if record is not None else None,
        "partition": record.partition if record is not None else None,
    }


def header_text(name: str, raw: bytes | None) -> str | None:
    """The value of a header as text, masked when its name looks secret, or when names in it do."""
    if raw is None:
        return None
    return mask_text(str(mask({name: raw.decode("utf-8", "backslashreplace")})[name]))


def _text(raw: bytes | None) -> str | None:
    return None if raw is None else raw.decode("utf-8", "backslashreplace")
