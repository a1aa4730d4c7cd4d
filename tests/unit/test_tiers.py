"""Delays by tiers: a record's way through them, as pure functions."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kser import headers as names
from kser.errors import MessageTooLargeError, TransportError, ValidationError
from kser.transport import OutRecord, Record
from kser.worker.tiers import (
    MAX_DELAY_S,
    SHORTEST_S,
    coordinates,
    dead_letter,
    due_ms,
    onward,
    tier_for,
    tier_of,
    tier_topic,
    tier_topics,
    to_tier,
)
from kser.worker.topic_plan import TIERS, TopicPlan

GROUP, ORIGIN, T0 = "shop", "orders", 1_700_000_000_000
DAY_MS = 24 * 3600 * 1000
#: A name that is not one of kser's, and those of kser's that are none of the tiers' business.
OTHERS = ["user", "x", names.ATTEMPT, names.WAITING, names.REASON, names.CLAIM, names.REDRIVE, names.FIRST_FAILURE]

headers = st.lists(st.tuples(st.sampled_from(OTHERS), st.none() | st.binary(max_size=8)), max_size=6)
payloads = st.none() | st.binary(max_size=16)


def stored(out: OutRecord, at_ms: int = T0, partition: int = 0, offset: int = 7) -> Record:
    """What a broker makes of a record that is written at this time."""
    return Record(out.topic, partition, offset, out.key, out.value, tuple(out.headers), at_ms)


def in_tier(tier: str = "10s", *given: tuple[str, bytes | None], value: bytes | None = b"v") -> Record:
    return Record(tier_topic(GROUP, tier), 3, 42, b"k", value, given, T0)


def travel(out: OutRecord, late, at_ms: int = T0) -> tuple[OutRecord, int, list[tuple[str, int]]]:
    """All hops: the end, its time, topics and lateness. ``late()``: by how many ms the relay is late at the next."""
    hops = []
    while (tier := tier_of(GROUP, out.topic)) is not None:
        lateness = late()
        record = stored(out, at_ms)
        at_ms = due_ms(record, TIERS[tier]) + lateness
        hops.append((out.topic, lateness))
        out = onward(record, GROUP, at_ms)
    return out, at_ms, hops


@pytest.mark.parametrize(
    ("delay_ms", "tier"),
    [
        (0, None),
        (9_999, None),  # the worker parks it
        (10_000, "10s"),
        (59_999, "10s"),
        (60_000, "1m"),
        (600_000, "10m"),
        (3_599_999, "10m"),
        (3_600_000, "1h"),
        (400 * DAY_MS, "1h"),
    ],
)
def test_a_delay_goes_to_the_largest_tier_that_is_not_longer(delay_ms, tier):
    assert tier_for(delay_ms) == tier


def test_the_topics_of_the_tiers_are_those_that_are_made():
    plan = TopicPlan(group=GROUP, tasks={ORIGIN: 1})
    assert set(tier_topics(GROUP)) == {topic.name for topic in plan.topics if topic.kind.delay_s}
    assert {tier_of(GROUP, topic.name): topic.kind.delay_s for topic in plan.topics if topic.kind.delay_s} == TIERS
    assert tier_of(GROUP, ORIGIN) is None
    assert tier_of("other", tier_topic(GROUP, "1m")) is None


@given(
    delay_ms=st.integers(SHORTEST_S * 1000, 2 * 3600 * 1000)
    | st.integers(SHORTEST_S * 1000, DAY_MS)
    | st.integers(SHORTEST_S * 1000, 40 * DAY_MS),
    lateness=st.lists(st.integers(0, 30_000) | st.just(0) | st.integers(0, 5 * 3600 * 1000), min_size=1, max_size=7),
    key=payloads,
    value=payloads,
    given_headers=headers,
)
@example(delay_ms=400 * DAY_MS - 1, lateness=[0], key=b"k", value=b"v", given_headers=[])
@example(delay_ms=399 * DAY_MS + 17, lateness=[20, 7000, 0], key=None, value=None, given_headers=[("user", None)])
@settings(max_examples=60, deadline=None)
def test_any_delay_ends_at_its_origin_in_time_with_all_that_it_had(delay_ms, lateness, key, value, given_headers):
    """Its hops and the rest that is parked are never less than the delay, and late by the relay's last lateness."""
    turn = iter(range(10**9))
    out, came_ms, hops = travel(
        to_tier(GROUP, ORIGIN, key, value, given_headers, delay_ms), lambda: lateness[next(turn) % len(lateness)]
    )
    run_ms = max(came_ms, names.number(out.headers, names.NOT_BEFORE, 0))
    assert run_ms >= T0 + delay_ms
    assert run_ms - came_ms < SHORTEST_S * 1000
    assert run_ms - (T0 + delay_ms) <= hops[-1][1]  # what was late before has been made up for
    assert (out.topic, out.key, out.value, out.partition) == (ORIGIN, key, value, None)
    kept = [header for header in out.headers if header[0] not in (names.NOT_BEFORE, names.GROUP)]
    assert kept == given_headers
    assert names.text(out.headers, names.GROUP) == GROUP
    assert {topic for topic, _ in hops} <= set(tier_topics(GROUP))


@given(delay_ms=st.integers(0, SHORTEST_S * 1000 - 1))
def test_what_is_shorter_than_the_smallest_tier_is_refused(delay_ms):
    with pytest.raises(ValidationError, match="fits into no tier"):
        to_tier(GROUP, ORIGIN, b"k", b"v", [], delay_ms)


def test_what_is_longer_than_ten_years_is_refused():
    assert to_tier(GROUP, ORIGIN, b"k", b"v", [], MAX_DELAY_S * 1000).topic == tier_topic(GROUP, "1h")
    with pytest.raises(ValidationError, match="fits into no tier"):
        to_tier(GROUP, ORIGIN, b"k", b"v", [], MAX_DELAY_S * 1000 + 1)


@pytest.mark.parametrize("origin", ["", "a b", "x" * 250, "..", "shop.retry.10s"])
def test_nothing_is_delayed_that_could_not_be_put_back(origin):
    with pytest.raises(ValidationError, match=names.ORIGIN_TOPIC):
        to_tier(GROUP, origin, b"k", b"v", [], 10_000)


def test_the_headers_of_an_earlier_delay_are_replaced():
    old = [
        (names.REMAINING, b"1"),
        (names.DUE, b"2"),
        (names.NOT_BEFORE, b"3"),
        (names.ORIGIN_TOPIC, b"elsewhere"),
        (names.ORIGIN_OFFSET, b"4"),
        (names.GROUP, b"other"),
        ("user", b"u"),
        ("user", None),
    ]
    out = to_tier(GROUP, ORIGIN, b"k", b"v", old, 75_500)
    assert sorted(out.headers, key=lambda header: header[0]) == [
        (names.GROUP, b"shop"),
        (names.ORIGIN_TOPIC, b"orders"),
        (names.REMAINING, b"15500"),
        ("user", b"u"),
        ("user", None),
    ]


def test_a_hop_carries_when_it_is_due_and_the_way_back_only_what_is_left():
    first = to_tier(GROUP, ORIGIN, b"k", b"v", [], 75_500)
    second = onward(stored(first, T0), GROUP, T0 + 60_000)
    assert second.topic == tier_topic(GROUP, "10s")
    assert names.number(second.headers, names.DUE) == T0 + 75_500
    assert names.value_of(second.headers, names.REMAINING) is None
    back = onward(stored(second, T0 + 60_300), GROUP, T0 + 70_300)
    assert back == OutRecord(ORIGIN, b"k", b"v", ((names.GROUP, b"shop"), (names.NOT_BEFORE, b"%d" % (T0 + 75_500))))


def test_a_record_that_is_overdue_takes_no_hop_more():
    """The workers were off for a day: what would have waited two hours more goes back at once."""
    out = to_tier(GROUP, ORIGIN, b"k", b"v", [], 3 * 3600 * 1000)
    back = onward(stored(out), GROUP, T0 + DAY_MS)
    assert (back.topic, back.headers) == (ORIGIN, ((names.GROUP, b"shop"),))


def test_a_clock_that_is_slow_makes_no_delay_longer():
    out = to_tier(GROUP, ORIGIN, b"k", b"v", [], 20_000)
    assert onward(stored(out), GROUP, 0) == onward(stored(out), GROUP, T0 + 10_000)


@pytest.mark.parametrize(
    "origin", [None, (names.ORIGIN_TOPIC, None), (names.ORIGIN_TOPIC, b"\xff"), (names.ORIGIN_TOPIC, b"shop.retry.1h")]
)
def test_a_record_without_a_readable_origin_becomes_a_dead_letter(origin):
    given = [("user", b"u"), (names.REMAINING, b"0"), (names.ATTEMPT, b"2"), *([origin] if origin else [])]
    out = onward(in_tier("1m", *given), GROUP, T0 + 60_000, worker="w-1")
    assert (out.topic, out.key, out.value) == ("shop.dlq", b"k", b"v")
    found = dict(out.headers)
    assert len(found) == len(out.headers)
    assert names.ORIGIN_TOPIC in found[names.ERROR].decode()
    del found[names.ERROR]
    assert found == {
        "user": b"u",
        names.ATTEMPT: b"2",
        names.ORIGIN_TOPIC: b"shop.retry.1m",
        names.ORIGIN_PARTITION: b"3",
        names.ORIGIN_OFFSET: b"42",
        names.ORIGIN_TIMESTAMP: b"%d" % T0,
        names.ERROR_TYPE: b"ValidationError",
        names.AT: b"%d" % (T0 + 60_000),
        names.WORKER: b"w-1",
        names.GROUP: b"shop",
    }


@pytest.mark.parametrize(
    "numbers",
    [
        [],
        [(names.REMAINING, b"-1")],
        [(names.REMAINING, b"soon")],
        [(names.REMAINING, b"")],
        [(names.REMAINING, None)],
        [(names.REMAINING, b"1.5")],
        [(names.REMAINING, b"9" * 5000)],
        [(names.REMAINING, b"\xff")],
        [(names.DUE, b"tomorrow")],
        [(names.DUE, b"9" * 15)],  # in 31,000 years
        [(names.REMAINING, b"%d" % (MAX_DELAY_S * 1000 + 1))],
        [(names.REMAINING, b"0"), (names.DUE, b"x")],
    ],
)
def test_a_record_with_nonsense_numbers_becomes_a_dead_letter_that_can_be_replayed(numbers):
    """Its origin is the topic that it was for, and nothing is left of the numbers but the text of the error."""
    given = [("user", b"u"), (names.ORIGIN_TOPIC, b"orders"), *numbers]
    out = onward(in_tier("10s", *given), GROUP, T0 + 10_000)
    assert (out.topic, out.key, out.value) == ("shop.dlq", b"k", b"v")
    assert names.text(out.headers, names.ORIGIN_TOPIC) == ORIGIN
    assert dict(out.headers)["user"] == b"u"
    assert not {names.REMAINING, names.DUE, names.NOT_BEFORE} & {name for name, _ in out.headers}
    text = names.value_of(out.headers, names.ERROR)
    assert b"shop.retry.10s[3] at 42: " in text
    assert len(text) <= 1024


@given(st.lists(st.tuples(st.sampled_from([names.REMAINING, names.DUE, names.ORIGIN_TOPIC]), st.none() | st.binary())))
def test_whatever_is_in_the_headers_the_record_goes_somewhere(given_headers):
    record = in_tier("10m", *given_headers)
    out = onward(record, GROUP, T0 + 600_000)
    assert (out.key, out.value) == (record.key, record.value)
    assert tier_of(GROUP, out.topic) or out.topic in ("shop.dlq", names.text(given_headers, names.ORIGIN_TOPIC))


def test_a_record_of_another_topic_is_refused():
    with pytest.raises(ValidationError, match="no tier"):
        onward(in_tier()._replace(topic=ORIGIN), GROUP, T0)


def test_a_long_error_is_cut_between_characters():
    out = dead_letter(in_tier(), GROUP, TransportError("ä" * 2000), T0)
    text = names.value_of(out.headers, names.ERROR)
    assert 1000 < len(text) <= 1024
    assert text.decode().endswith("ä")


def test_coordinates_say_where_the_record_is_and_are_small():
    record = Record(tier_topic(GROUP, "1h"), 3, 42, b"k" * 2000, b"v" * 10**6, ((names.ORIGIN_TOPIC, b"orders"),), T0)
    out = coordinates(record, GROUP, MessageTooLargeError("A record", 10**6, 10), T0 + 5, "w")
    assert (out.topic, out.key, out.value) == ("shop.dlq", None, None)
    assert [names.text(out.headers, name) for name in (names.ORIGIN_TOPIC, names.ORIGIN_PARTITION)] == [
        "shop.retry.1h",
        "3",
    ]
    assert names.number(out.headers, names.ORIGIN_OFFSET) == 42
    assert names.text(out.headers, names.ERROR_TYPE) == "MessageTooLargeError"
    assert "1000000 bytes" in names.text(out.headers, names.REASON)
    assert sum(len(name) + len(value) for name, value in out.headers) < 2000
    assert coordinates(record._replace(key=b"k"), GROUP, TransportError("x"), T0).key == b"k"


def test_shorter_tiers_for_a_test_work_the_same():
    tiers = {"a": 0.5, "b": 2.0}
    out = to_tier(GROUP, ORIGIN, b"k", b"v", [], 2_700, tiers)
    assert out.topic == "shop.retry.b"
    hop = onward(stored(out), GROUP, T0 + 2_000, tiers)
    assert hop.topic == "shop.retry.a"
    back = onward(stored(hop, T0 + 2_000), GROUP, T0 + 2_500, tiers)
    assert (back.topic, names.number(back.headers, names.NOT_BEFORE)) == (ORIGIN, T0 + 2_700)
