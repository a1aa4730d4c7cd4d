"""Properties of the merge of Results (K-22, DESIGN.md 9)."""

import copy
import functools

from hypothesis import given, settings
from hypothesis import strategies as st

from kser import Result
from kser.results import dump, merge

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
made = st.builds(
    Result,
    retcode=st.integers(-2, 600),
    stdout=st.sampled_from(["", "a", "b"]),
    stderr=st.sampled_from(["", "c", "d"]),
    retval=st.dictionaries(st.sampled_from("abcde"), values, max_size=4),
    uuid=st.sampled_from(["u1", "u2"]),
)


@given(made, made)
@settings(deadline=None)
def test_a_merge_is_a_new_result_and_its_arguments_stay_as_they_are(old, new):
    before = copy.deepcopy(dump(old)), copy.deepcopy(dump(new))
    merged = merge(old, new, "m")
    assert merged is not old
    assert merged is not new
    assert merged.retval is not old.retval
    assert merged.retval is not new.retval
    merged.retval["added"] = True
    merged.stdout += "more"
    assert (dump(old), dump(new)) == before


@given(made, made)
@settings(deadline=None)
def test_the_new_one_wins_where_it_says_something(old, new):
    merged = merge(old, new, "m")
    assert merged.uuid == "m"
    assert merged.retcode == new.retcode
    assert merged.retval == old.retval | new.retval
    assert merged.stdout == (new.stdout if new.stdout else old.stdout)
    assert merged.stderr == (new.stderr if new.stderr else old.stderr)


@given(made, made, made)
@settings(deadline=None)
def test_the_merge_is_associative(a, b, c):
    left = merge(merge(a, b, "x"), c, "m")
    right = merge(a, merge(b, c, "y"), "m")
    assert dump(left) == dump(right)


@given(made)
@settings(deadline=None)
def test_an_empty_result_adds_nothing_and_takes_nothing_away(result):
    assert dump(merge(Result(), result, result.uuid)) == dump(result)
    assert dump(merge(result, Result(retcode=result.retcode), result.uuid)) == dump(result)


@given(st.lists(made, min_size=1, max_size=5))
@settings(deadline=None)
def test_a_chain_of_steps_ends_with_the_last_retcode_and_every_value(chain):
    end = functools.reduce(lambda so_far, new: merge(so_far, new, new.uuid), chain, Result())
    assert end.retcode == chain[-1].retcode
    assert end.retval == functools.reduce(lambda a, b: a | b.retval, chain, {})
