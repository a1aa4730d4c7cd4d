"""Whether a failed task is tried again, and when."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kser import OperationRegistry, Retry, Task
from kser.errors import ConfigurationError


def test_delays_grow_up_to_the_longest_and_end_with_the_attempts():
    retry = Retry(attempts=6, backoff_s=2, factor=3, jitter=0, max_s=50)
    assert [retry.delay_s(n, ValueError(), "u") for n in range(1, 7)] == [2, 6, 18, 50, 50, None]


@given(
    attempt=st.integers(1, 10_000),
    factor=st.floats(1, 1e6),
    backoff=st.floats(0, 1e9),
    jitter=st.floats(0, 1),
    longest=st.floats(0, 1e9),
    uuid=st.text(),
)
def test_a_delay_stays_within_its_jitter_and_is_the_same_when_the_message_is_redelivered(
    attempt, factor, backoff, jitter, longest, uuid
):
    retry = Retry(attempts=20_000, backoff_s=backoff, factor=factor, jitter=jitter, max_s=longest)
    delay = retry.delay_s(attempt, None, uuid)
    assert 0 <= delay <= longest * (1 + jitter) * 1.000001
    assert delay == retry.delay_s(attempt, None, uuid)


def test_what_failed_together_does_not_come_back_together():
    assert len({Retry(jitter=0.5).delay_s(1, None, f"u{n}") for n in range(50)}) > 40


@pytest.mark.parametrize(
    ("retry", "cause", "again"),
    [
        (Retry(), ValueError(), True),
        (Retry(), None, True),
        (Retry(), SystemExit(), False),
        (Retry(retry_on=[OSError]), ConnectionError(), True),
        (Retry(retry_on=[OSError]), ValueError(), False),
        (Retry(retry_on=[OSError]), None, False),
        (Retry(retry_on=OSError), ConnectionError(), True),
        (Retry(give_up_on=[KeyError]), KeyError(), False),
        (Retry(retry_on=[LookupError], give_up_on=[KeyError]), IndexError(), True),
        (Retry(attempts=1), ValueError(), False),
    ],
)
def test_only_what_the_policy_names_is_tried_again(retry, cause, again):
    assert (retry.delay_s(1, cause, "u") is not None) is again


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"attempts": 0}, "attempts=0"),
        ({"attempts": True}, "attempts=True"),
        ({"attempts": 1.5}, r"attempts=1\.5"),
        ({"backoff_s": -1}, "backoff_s=-1"),
        ({"backoff_s": float("nan")}, "backoff_s=nan"),
        ({"backoff_s": "2"}, "backoff_s='2'"),
        ({"factor": 0.5}, r"factor=0\.5"),
        ({"jitter": 2}, "jitter=2"),
        ({"max_s": None}, "max_s=None"),
        ({"retry_on": [5]}, r"retry_on=\[5\]"),
        ({"give_up_on": "ValueError"}, "give_up_on='ValueError'"),
    ],
)
def test_a_policy_that_cannot_be_is_refused(setting, said):
    with pytest.raises(ConfigurationError, match=said):
        Retry(**setting)


def test_a_registry_refuses_options_that_are_no_policy():
    registry = OperationRegistry()
    with pytest.raises(ConfigurationError, match="retry=5"):
        registry.task(retry=5)
    with pytest.raises(ConfigurationError, match="order='fifo'"):
        registry.subscribe(order="fifo")


def test_outside_of_a_worker_a_failure_is_final():
    """There is nobody who would run it again: the hooks are called at once."""
    seen = []

    class Flaky(Task):
        retry = Retry()

        def run(self):
            raise ValueError("no")

        def onerror(self, result):
            seen.append(result.retcode)

    assert Flaky().execute().retcode == 500
    assert seen == [500]
