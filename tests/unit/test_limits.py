"""How much a task may tell: no flood, whatever is offered when, and the last progress of each group always comes."""

from collections import Counter
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from kser.worker.limits import ProgressLimiter, TokenBucket

moments = st.lists(st.floats(0, 5), max_size=200).map(sorted)
groups = st.sampled_from("abcd")


@given(moments=moments, rate=st.floats(0.1, 50), burst=st.integers(1, 50))
def test_within_any_time_no_more_passes_than_the_burst_and_the_rate(moments, rate, burst):
    bucket = TokenBucket(rate, burst)
    passed = [now for now in moments if bucket.take(now)]
    for first, start in enumerate(passed):
        for count, end in enumerate(passed[first:], 1):
            assert count <= burst + rate * (end - start) + 1e-6


@given(moments=moments, burst=st.integers(1, 50))
def test_what_comes_slowly_enough_always_passes(moments, burst):
    bucket = TokenBucket(1000, burst)
    spread = [now + n for n, now in enumerate(moments)]
    assert all(bucket.take(now) for now in spread)


#: (seconds since the step before, group that reports; None: it is looked at what is due)
steps = st.lists(st.tuples(st.floats(0, 1), groups | st.none()), max_size=150)


def play(steps, **settings):
    """What is offered and what is sent, (when, group, number) each; None is the time of the end."""
    limiter, now, offered, sent = ProgressLimiter(**settings), 0.0, [], []
    for n, (pause, group) in enumerate(steps):
        now += pause
        if group is None:
            sent += [(now, *report) for report in limiter.due(now)]
        elif limiter.offer(group, (group, n)):
            offered.append((group, n))
    sent += [(None, *report) for report in limiter.rest()]
    assert not limiter.waiting
    return offered, sent


@given(steps)
def test_the_last_report_of_each_group_is_sent_and_none_out_of_order_or_twice(steps):
    offered, sent = play(steps, every_s=0.5, rate=2, burst=3)
    assert dict(offered) == {group: n for _, group, n in sent}
    for group in {group for group, _ in offered}:
        numbers = [n for _, of, n in sent if of == group]
        assert numbers == sorted(set(numbers))
    assert {(group, n) for _, group, n in sent} <= set(offered)


@given(steps)
def test_a_group_is_told_once_in_a_while_and_all_of_them_not_too_often(steps):
    _, sent = play(steps, every_s=0.5, rate=2, burst=3)
    timed = [(at, group) for at, group, _ in sent if at is not None]
    for group in "abcd":
        at = [when for when, of in timed if of == group]
        assert all(later - earlier >= 0.5 for earlier, later in pairwise(at))
    for first, (start, _) in enumerate(timed):
        assert all(count <= 3 + 2 * (end - start) + 1e-6 for count, (end, _) in enumerate(timed[first:], 1))


@given(steps)
def test_of_what_remains_at_the_end_there_is_one_for_each_group(steps):
    _, sent = play(steps, every_s=0.5, rate=2, burst=3)
    assert max(Counter(group for at, group, _ in sent if at is None).values(), default=0) <= 1


def test_too_many_groups_are_refused_and_those_there_go_on():
    limiter = ProgressLimiter(most=2)
    assert [limiter.offer(group, group) for group in "abca"] == [True, True, False, True]
    assert limiter.due(0) == ["a", "b"]
    assert [limiter.offer(group, group) for group in "abc"] == [True, True, False]


def test_groups_take_turns_when_there_are_more_than_may_be_told():
    limiter = ProgressLimiter(every_s=0, rate=1, burst=1)
    told = []
    for now in range(6):
        for group in "abc":
            limiter.offer(group, group)
        told += limiter.due(now)
    assert told == list("abcabc")
