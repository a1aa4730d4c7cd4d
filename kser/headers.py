"""Names and values of the Kafka headers that belong to a delivery, not to its message. ASCII; numbers as text.

Source: KAFKA.md section 4.
"""

from collections.abc import Iterable
from typing import Final

__all__ = [
    "AT",
    "ATTEMPT",
    "CLAIM",
    "DUE",
    "ERROR",
    "ERROR_TYPE",
    "FIRST_FAILURE",
    "GROUP",
    "NOT_BEFORE",
    "ORIGIN_OFFSET",
    "ORIGIN_PARTITION",
    "ORIGIN_TIMESTAMP",
    "ORIGIN_TOPIC",
    "REASON",
    "RECALLED",
    "REDRIVE",
    "REMAINING",
    "SUSPECT",
    "TRACE",
    "WAITING",
    "WORKER",
    "Headers",
    "number",
    "text",
    "value_of",
]

Headers = tuple[tuple[str, bytes | None], ...]

#: Group whose worker sent it: only workers of this group run it. Services' producers write none.
GROUP: Final = "kser-group"
#: Which attempt it is, from 1.
ATTEMPT: Final = "kser-attempt"
#: When it is to run, in milliseconds since the epoch, as whoever sent it said. Run at once by who does not know it.
NOT_BEFORE: Final = "kser-not-before"
#: In a tier: milliseconds still to wait after this tier, on the first hop.
REMAINING: Final = "kser-remaining"
#: In a tier, from the second hop on: when it is due, in milliseconds since the epoch by the broker's clock.
DUE: Final = "kser-due"
#: Its operation was aborted while it was in a tier, so that it came out before its time. Once, so that it does not go
#: round and round between a relay that knows of the abort and a worker that does not.
RECALLED: Final = "kser-recalled"
#: Since when, in milliseconds since the epoch, it waits for somebody who knows its entrypoint or itinerary.
WAITING: Final = "kser-waiting"
#: Why it waits.
REASON: Final = "kser-reason"
#: It may be what crashed workers: whoever takes it runs it apart from everything else.
SUSPECT: Final = "kser-suspect"
#: The first writer of this key runs it; whoever comes later with the same key is dropped (kser.worker.state).
CLAIM: Final = "kser-claim"
#: How often it came back from the dead letters.
REDRIVE: Final = "kser-redrive"
#: Where it came from.
ORIGIN_TOPIC: Final = "kser-origin-topic"
ORIGIN_PARTITION: Final = "kser-origin-partition"
ORIGIN_OFFSET: Final = "kser-origin-offset"
ORIGIN_TIMESTAMP: Final = "kser-origin-timestamp"
#: Of a dead letter: what failed, when (milliseconds since the epoch), and where.
ERROR_TYPE: Final = "kser-error-type"
ERROR: Final = "kser-error"
TRACE: Final = "kser-trace"
AT: Final = "kser-at"
WORKER: Final = "kser-worker"
#: When its first attempt failed, milliseconds since the epoch.
FIRST_FAILURE: Final = "kser-first-failure"


def value_of(headers: Iterable[tuple[str, bytes | None]], name: str) -> bytes | None:
    """The value of the last header of this name, None when there is none."""
    found = None
    for key, value in headers:
        if key == name:
            found = value
    return found


def text(headers: Iterable[tuple[str, bytes | None]], name: str) -> str:
    """The header as text, "" when there is none. What is no UTF-8 is shown with backslashes."""
    return (value_of(headers, name) or b"").decode("utf-8", "backslashreplace")


def number(headers: Iterable[tuple[str, bytes | None]], name: str, default: int = 0) -> int:
    """The header as a whole number; ``default`` when there is none, or it is no number."""
    found = value_of(headers, name)
    if not found:
        return default
    try:
        return int(found)
    except ValueError:
        return default
