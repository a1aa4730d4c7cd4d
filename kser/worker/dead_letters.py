"""dead_letter(): the record in ``{group}.dlq`` that keeps a message which failed for good. Pure, no I/O.

It has the key and the bytes of the original record, its headers, and headers that say what failed, where and why. It
can always be produced: what does not fit into the largest record is left out, the dearest last. See dead_letter().
"""

import json
from typing import Any, Final

from kser import headers as names
from kser import results
from kser.masking import mask_text
from kser.results import Result
from kser.schemas import Message
from kser.sequencing.itinerary import METADATA_KEY
from kser.transport import Header, OutRecord, Record

__all__ = ["LEAST_BYTES", "LEFT_OUT", "MAX_BYTES", "OWN_HEADERS", "TOO_LARGE", "dead_letter"]

#: Header of a dead letter that is not whole: "headers" when those of the message are not in it, "value" when its value
#: is not.
LEFT_OUT: Final = "kser-left-out"
#: ``"kser"`` in the JSON object that takes the place of a value which is left out.
TOO_LARGE: Final = "value too large"
#: Largest dead letter where nobody says otherwise: the 1,000,000 bytes that a client takes, less what is around it.
MAX_BYTES: Final = 1_000_000 - 1024
#: No dead letter needs more than this once all that can be left out is.
LEAST_BYTES: Final = 8192

#: All headers that belong to a delivery. Of the original record's only those that dead_letter() says are kept.
OWN_HEADERS: Final = frozenset(
    value for name, value in vars(names).items() if name.isupper() and isinstance(value, str)
) | {LEFT_OUT}

_ERROR_BYTES: Final = 1024
_TRACE_BYTES: Final = 8 * 1024
#: Longest name of a topic or group, and longest text that is no more than a name.
_NAME_BYTES: Final = 249
#: Longest object that tells where a value is, beyond which it names the place only.
_PLACE_BYTES: Final = 2048
#: What the client counts for a header beside its name and value, and for the record beside its parts; at most.
_HEADER_BYTES: Final = 12
_RECORD_BYTES: Final = 128
#: Of a longer text only so much is looked at, in characters.
_LONG_TEXT: Final = 64 * 1024


def dead_letter(
    record: Record,
    topic: str,
    *,
    error: Result | BaseException,
    kmsg: Message | None = None,
    attempt: int = 1,
    group: str,
    worker: str = "",
    now_ms: int,
    max_bytes: int = MAX_BYTES,
) -> OutRecord:
    """The dead letter of a record. Never raises, whatever is in the record and in the error.

    Headers of the message itself are kept. Of kser's own the record's REDRIVE and FIRST_FAILURE are; the others are of
    a delivery that is over. Added are ORIGIN_TOPIC, _PARTITION, _OFFSET and _TIMESTAMP, ATTEMPT, AT, WORKER, GROUP,
    ERROR_TYPE, ERROR (1 KB at most) and TRACE (8 KB at most), in which what looks secret is masked.

    What has more than ``max_bytes`` goes without TRACE, then without ERROR, then without the message's headers, then
    with a JSON object in place of the value, ``{"kser": "value too large", "topic", "partition", "offset", "size"}``
    and, where they are known, ``uuid``, ``entrypoint``, ``operation``, ``run`` and ``position``. LEFT_OUT says so.

    Args:
        record: what was not done.
        topic: that of the dead letters.
        error: why not: the failed Result, or the exception.
        kmsg: the message in the record, when it could be read.
        attempt: which attempt was the last.
        group: of the worker.
        worker: its name.
        now_ms: milliseconds since the epoch.
        max_bytes: largest record, with key and headers, as the client counts it; LEAST_BYTES or more.
    """
    result = error if isinstance(error, Result) else results.from_exception(error, kmsg.uuid if kmsg else "")
    kind, said, stack = _described(result)
    essential: list[Header] = [
        (names.ORIGIN_TOPIC, _cut(record.topic, _NAME_BYTES)),
        (names.ORIGIN_PARTITION, _number(record.partition)),
        (names.ORIGIN_OFFSET, _number(record.offset)),
        (names.ORIGIN_TIMESTAMP, _number(record.timestamp_ms)),
        (names.ATTEMPT, _number(attempt)),
        (names.AT, _number(now_ms)),
        (names.WORKER, _cut(worker, _NAME_BYTES)),
        (names.GROUP, _cut(group, _NAME_BYTES)),
        (names.ERROR_TYPE, _cut(kind, _NAME_BYTES)),
    ]
    essential += [
        (name, _number(there))
        for name in (names.FIRST_FAILURE, names.REDRIVE)
        if (there := names.number(record.headers, name)) > 0
    ]
    told: Header = (names.ERROR, _cut(said, _ERROR_BYTES))
    traced: list[Header] = [(names.TRACE, _without_middle(stack, _TRACE_BYTES))] if stack else []
    users = [header for header in record.headers if header[0] not in OWN_HEADERS]

    key, value = record.key, record.value
    for headers in (
        [*users, *essential, told, *traced],
        [*users, *essential, told],
        [*users, *essential],
        [*essential, told, (LEFT_OUT, b"headers")] if users else essential,
    ):
        if _size(key, value, headers) <= max_bytes:
            return OutRecord(topic, key, value, headers)
    where = f"{record.topic}[{record.partition}] at {record.offset}"
    why = f"Its value of {len(value or b'')} bytes is not in here: read {where}"
    essential += [(LEFT_OUT, b"value"), (names.REASON, _cut(why, 2 * _NAME_BYTES))]
    place = _place(record, kmsg)
    full, short = [*essential, told, *traced], [*essential, told]
    for at, headers in ((key, full), (key, short), (key, essential)):
        if _size(at, place, headers) <= max_bytes:
            return OutRecord(topic, at, place, headers)
    return OutRecord(topic, None, place, short)


# -- inside ------------------------------------------------------------------------------------------------------------


def _described(result: Result) -> tuple[str, str, str]:
    """Type, text and traceback of the error in a Result."""
    error = result.retval.get("error") if isinstance(result.retval, dict) else None
    detail: dict[str, Any] = error if isinstance(error, dict) else {}
    extra = detail.get("extra")
    kind = (extra.get("type") if isinstance(extra, dict) else None) or detail.get("name")
    said = _text(detail.get("message")) or _text(result.stderr)
    return (
        _text(kind) or f"retcode {_text(result.retcode)}",
        mask_text(said[:_LONG_TEXT]),
        mask_text(_shorter(_text(detail.get("stack")))),
    )


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return "" if value is None else results.shown(value)


def _shorter(text: str) -> str:
    return text if len(text) <= _LONG_TEXT else text[: _LONG_TEXT // 2] + "\n...\n" + text[-_LONG_TEXT // 2 :]


def _cut(text: str, limit: int) -> bytes:
    """The beginning of the text in UTF-8, whole characters."""
    raw = text.encode("utf-8", "backslashreplace")
    return raw if len(raw) <= limit else raw[: limit - 3].decode("utf-8", "ignore").encode() + b"..."


def _without_middle(text: str, limit: int) -> bytes:
    """The text in UTF-8, whole characters; the middle of a traceback says least, and its end most."""
    raw = text.encode("utf-8", "backslashreplace")
    if len(raw) <= limit:
        return raw
    gap = b"\n...\n"
    head = limit // 4
    tail = limit - head - len(gap)
    return raw[:head].decode("utf-8", "ignore").encode() + gap + raw[-tail:].decode("utf-8", "ignore").encode()


def _number(value: int) -> bytes:
    """As text. No number here has more digits than 64 bits give: what is larger came from a header that lies."""
    return b"%d" % max(min(value, 2**63 - 1), -1)


def _size(key: bytes | None, value: bytes | None, headers: list[Header]) -> int:
    """Bytes of a record as the client counts them, or a few more."""
    return (
        _RECORD_BYTES
        + len(key or b"")
        + len(value or b"")
        + sum(len(name.encode("utf-8", "surrogatepass")) + len(raw or b"") + _HEADER_BYTES for name, raw in headers)
    )


def _place(record: Record, kmsg: Message | None) -> bytes:
    """The JSON object that takes the place of a value."""
    place: dict[str, Any] = {
        "kser": TOO_LARGE,
        "topic": record.topic[:_NAME_BYTES],
        "partition": record.partition,
        "offset": record.offset,
        "size": len(record.value or b""),
    }
    full = json.dumps(place | _identity(kmsg))
    return full.encode() if len(full) <= _PLACE_BYTES else json.dumps(place).encode()


def _identity(kmsg: Message | None) -> dict[str, Any]:
    if kmsg is None:
        return {}
    identity: dict[str, Any] = {"uuid": kmsg.uuid, "entrypoint": kmsg.entrypoint}
    try:
        itinerary = kmsg.metadata[METADATA_KEY]
        around = {"operation": itinerary["ops"][0]["uuid"]}
        around |= {name: itinerary[name] for name in ("run", "position")}
    except (KeyError, TypeError, IndexError):
        return identity  # of no operation, or not readable
    # What travelled may be anything, and anything deep cannot be written.
    return identity | {name: value for name, value in around.items() if isinstance(value, (str, int))}
