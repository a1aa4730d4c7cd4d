import pytest
from hypothesis import given, strategies as st


def test_a(apache, make_topic):
    assert make_topic(apache, 3)


def test_a2(apache, make_topic):
    assert make_topic(apache, 3)


def test_e(embedded, make_topic):
    assert make_topic(embedded, 3)


@given(st.integers())
def test_h(x):
    pass
