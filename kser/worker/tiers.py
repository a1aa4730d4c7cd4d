"""Delays by tiers: which topic a record waits in, when it is due there, and where it goes then.

A tier is a topic in which every record waits equally long, `{group}.retry.{10s,1m,10m,1h}`: so it is in the order in
which its records are due. A delay is made of hops: each into the largest tier that is not longer than what is left.
What is left at the end, less than the smallest tier, is for the worker that gets the record: header NOT_BEFORE.

When a record is due is counted from the timestamp that the broker gave it (LogAppendTime), never from a worker's
clock, and from the first hop on it is fixed: header DUE. So hops that are late do not add up.

Functions here are pure. ``tiers`` are the delays of the tiers in seconds, by name.
"""

from collections.abc import Iterable, Mapping
from typing import Final

from kser import headers as names
from kser.errors import Error, ValidationError
from kser.transport import Header, OutRecord, Record
from kser.transport.names import is_topic_name
from kser.worker.topic_plan import KINDS, TIERS, Feature

__all__ = [
    "MAX_DELAY_S",
    "SHORTEST_S",
    "coordinates",
    "dead_letter",
    "dead_letter_topic",
    "due_ms",
    "onward",
    "recall",
    "tier_for",
    "tier_of",
    "tier_topic",
    "tier_topics",
    "to_tier",
]

#: A shorter wait fits into no tier: the worker parks the record.
SHORTEST_S: Final = min(TIERS.values())
#: The longest delay there is: ten years. What is longer was not meant.
MAX_DELAY_S: Final = 3653 * 24 * 3600

#: Longest ERROR header of a dead letter, in bytes.
_ERROR_BYTES: Final = 1024
#: A longer key is left out of a dead letter that says no more than where its record is.
_KEY_BYTES: Final = 1024
#: No number in a header has more digits: milliseconds since the epoch have 13.
_DIGITS: Final = 15
_DEAD_LETTERS: Final = next(kind.pattern for kind in KINDS if kind.feature is Feature.DEAD_LETTERS)
#: What belongs to a stay in the tiers.
_OF_THE_STAY: Final = frozenset({names.REMAINING, names.DUE, names.NOT_BEFORE})
_ORIGIN: Final = frozenset({names.ORIGIN_TOPIC, names.ORIGIN_PARTITION, names.ORIGIN_OFFSET, names.ORIGIN_TIMESTAMP})
_FAILURE: Final = frozenset({names.ERROR_TYPE, names.ERROR, names.TRACE, names.AT, names.WORKER})


def tier_topic(group: str, tier: str) -> str:
    """The topic of a tier."""
    return f"{group}.retry.{tier}"


def tier_topics(group: str, tiers: Mapping[str, float] = TIERS) -> list[str]:
    """The topics of all tiers."""
    return [tier_topic(group, tier) for tier in tiers]


def tier_of(group: str, topic: str, tiers: Mapping[str, float] = TIERS) -> str | None:
    """The tier that this topic is for the group; None when it is none."""
    tier = topic.removeprefix(tier_topic(group, ""))
    return tier if tier in tiers and len(tier) < len(topic) else None


def dead_letter_topic(group: str) -> str:
    """The topic of the group's dead letters."""
    return _DEAD_LETTERS.format(group=group)


def tier_for(delay_ms: int, tiers: Mapping[str, float] = TIERS) -> str | None:
    """The largest tier that is not longer than the delay; None when the delay is shorter than each of them."""
    fitting = [tier for tier, delay_s in tiers.items() if _ms(delay_s) <= delay_ms]
    return max(fitting, key=lambda tier: tiers[tier], default=None)


def to_tier(
    group: str,
    origin_topic: str,
    key: bytes | None,
    value: bytes | None,
    headers: Iterable[Header],
    delay_ms: int,
    tiers: Mapping[str, float] = TIERS,
) -> OutRecord:
    """The record that waits: its first hop.

    Args:
        group: whose tiers; only workers of this group run the record from now on.
        origin_topic: where the relay puts it in the end.
        key: as it is.
        value: as it is.
        headers: all of them are kept, but those of another delay and of another origin, which are replaced.
        delay_ms: from SHORTEST_S to MAX_DELAY_S.
        tiers: the delays.

    Raises ValidationError when the delay is shorter than each tier, or longer than MAX_DELAY_S, or when the relay could
    not put the record there.
    """
    tier = tier_for(delay_ms, tiers)
    if tier is None or delay_ms > MAX_DELAY_S * 1000:
        raise ValidationError(
            f"A delay of {delay_ms} ms fits into no tier: it has to be {min(tiers.values()):g} s to {MAX_DELAY_S} s"
        )
    _checked_origin(group, origin_topic, tiers)
    kept = _without(headers, _OF_THE_STAY | _ORIGIN | {names.GROUP})
    ours: list[Header] = [
        (names.ORIGIN_TOPIC, origin_topic.encode()),
        (names.GROUP, group.encode()),
        (names.REMAINING, _number(delay_ms - _ms(tiers[tier]))),
    ]
    return OutRecord(tier_topic(group, tier), key, value, (*kept, *ours))


def due_ms(record: Record, delay_s: float) -> int:
    """When a record's time is over in a tier of this delay: milliseconds since the epoch, of the broker's clock."""
    return record.timestamp_ms + _ms(delay_s)


def onward(record: Record, group: str, now_ms: int, tiers: Mapping[str, float] = TIERS, worker: str = "") -> OutRecord:
    """What is written for a record of a tier that is due: its next hop, or the record back in its origin.

    One of which it cannot be told where it has to go, or when, goes to the dead letters of the group.

    Args:
        record: of one of the group's tiers.
        group: whose tiers.
        now_ms: milliseconds since the epoch. Is it later than the record was due here, the rest of its delay is
            shorter; is the clock slow, the record's own time counts.
        tiers: the delays.
        worker: whose relay it is, for a dead letter.

    Raises ValidationError when the record is of no such tier.
    """
    tier = tier_of(group, record.topic, tiers)
    if tier is None:
        raise ValidationError(f"{record.topic} is no tier of group {group}: the relay cannot tell how long it waits")
    here_ms = due_ms(record, tiers[tier])
    try:
        origin = _checked_origin(group, names.text(record.headers, names.ORIGIN_TOPIC), tiers)
        at_ms = _due_at(record, here_ms)
    except ValidationError as error:
        return dead_letter(record, group, error, now_ms, tiers, worker)
    left_ms = at_ms - max(now_ms, here_ms)
    if (following := tier_for(left_ms, tiers)) is not None:
        kept = _without(record.headers, _OF_THE_STAY)
        return OutRecord(tier_topic(group, following), record.key, record.value, (*kept, (names.DUE, _number(at_ms))))
    kept = _without(record.headers, _OF_THE_STAY | _ORIGIN)
    if left_ms > 0:
        kept = (*kept, (names.NOT_BEFORE, _number(at_ms)))
    return OutRecord(origin, record.key, record.value, kept)


def recall(record: Record, group: str, tiers: Mapping[str, float] = TIERS) -> OutRecord:
    """The record back in its origin before its time, with the rest of its delay: for one whose operation was aborted.

    Raises ValidationError when it cannot be told where it has to go, or when it is due.
    """
    origin = _checked_origin(group, names.text(record.headers, names.ORIGIN_TOPIC), tiers)
    at_ms = _due_at(record, due_ms(record, tiers[tier_of(group, record.topic, tiers) or ""]))
    kept = _without(record.headers, _OF_THE_STAY | _ORIGIN)
    mine = ((names.NOT_BEFORE, _number(at_ms)), (names.RECALLED, b"1"))
    return OutRecord(origin, record.key, record.value, (*kept, *mine))


def dead_letter(
    record: Record, group: str, error: Error, now_ms: int, tiers: Mapping[str, float] = TIERS, worker: str = ""
) -> OutRecord:
    """The dead letter of a record that can wait in a tier no longer, nor go where it should.

    Its origin is the topic that it was to go to, so that a replay sends it there; the tier, when that is not readable.
    """
    try:
        _checked_origin(group, names.text(record.headers, names.ORIGIN_TOPIC), tiers)
    except ValidationError:
        kept = (*_without(record.headers, _OF_THE_STAY | _ORIGIN | _FAILURE | {names.GROUP}), *_place(record))
    else:
        kept = _without(record.headers, _OF_THE_STAY | _FAILURE | {names.GROUP})
    return OutRecord(
        dead_letter_topic(group), record.key, record.value, (*kept, *_failure(record, group, error, now_ms, worker))
    )


def coordinates(record: Record, group: str, error: Error, now_ms: int, worker: str = "") -> OutRecord:
    """A dead letter for a record of which not even the dead letter was taken: it says where the record is.

    Tiers keep their records for ever, so its origin is the very record in the tier. It has no value.
    """
    key = record.key if len(record.key or b"") <= _KEY_BYTES else None
    size = len(record.value or b"")
    where = f"Its value of {size} bytes is not in here: read {record.topic}[{record.partition}] at {record.offset}"
    kept = (*_place(record), (names.REASON, where.encode()))
    return OutRecord(dead_letter_topic(group), key, None, (*kept, *_failure(record, group, error, now_ms, worker)))


# -- inside ------------------------------------------------------------------------------------------------------------


def _ms(seconds: float) -> int:
    return round(seconds * 1000)


def _number(value: int) -> bytes:
    return b"%d" % value


def _without(headers: Iterable[Header], gone: frozenset[str]) -> tuple[Header, ...]:
    return tuple(header for header in headers if header[0] not in gone)


def _checked_origin(group: str, topic: str, tiers: Mapping[str, float]) -> str:
    """The topic a record goes back to. Raises ValidationError when there is no such topic."""
    if not is_topic_name(topic):
        raise ValidationError(f"Header {names.ORIGIN_TOPIC}={topic[:250]!r} names no topic: where to put the record?")
    if tier_of(group, topic, tiers) is not None:
        raise ValidationError(f"Header {names.ORIGIN_TOPIC}={topic} is a tier: from there it would come back for ever")
    return topic


def _due_at(record: Record, here_ms: int) -> int:
    """When the whole delay is over. Raises ValidationError when the headers do not tell."""
    if names.value_of(record.headers, names.DUE) is not None:
        at_ms = _readable(record, names.DUE)
    else:
        at_ms = here_ms + _readable(record, names.REMAINING)
    if at_ms - here_ms > MAX_DELAY_S * 1000:
        raise ValidationError(
            f"The record waits until {at_ms} ms since the epoch, that is longer than {MAX_DELAY_S} s: nobody meant that"
        )
    return at_ms


def _readable(record: Record, name: str) -> int:
    """The number in this header. Raises ValidationError."""
    value = names.value_of(record.headers, name)
    if value is None:
        raise ValidationError(f"There is no header {names.DUE} and no {names.REMAINING}: how long was it to wait?")
    if not value.isdigit() or len(value) > _DIGITS:
        raise ValidationError(f"Header {name}={names.text(record.headers, name)[:250]!r} is no number of milliseconds")
    return int(value)


def _place(record: Record) -> tuple[Header, ...]:
    return (
        (names.ORIGIN_TOPIC, record.topic.encode()),
        (names.ORIGIN_PARTITION, _number(record.partition)),
        (names.ORIGIN_OFFSET, _number(record.offset)),
        (names.ORIGIN_TIMESTAMP, _number(record.timestamp_ms)),
    )


def _failure(record: Record, group: str, error: Error, now_ms: int, worker: str) -> tuple[Header, ...]:
    text = f"{record.topic}[{record.partition}] at {record.offset}: {error.message}"
    return (
        (names.ERROR_TYPE, type(error).__name__.encode()),
        (names.ERROR, text.encode()[:_ERROR_BYTES].decode(errors="ignore").encode()),
        (names.AT, _number(now_ms)),
        (names.WORKER, worker.encode()),
        (names.GROUP, group.encode()),
    )
