"""The short form of the fault suite; the long one is `make chaos`. docs/chaos.md says what is done and judged."""

import os
import random

import pytest

from tests.chaos.harness import EMBEDDED_SESSION_S, Chaos, repeat_command, run

# The harness gives up by itself, and says why, long before that.
pytestmark = [pytest.mark.chaos, pytest.mark.timeout(300)]

OPERATIONS = 120
SECONDS = 9.0
PACE_S = 1.5


def seed() -> int:
    """Another one in each run; a run that failed says which, and CHAOS_SEED gives it again."""
    return int(os.environ.get("CHAOS_SEED") or random.randrange(10**6))


def disturb(broker, tmp_path, name, *, delivery, protocol, **more):
    chaos = Chaos(
        seed=seed(),
        operations=OPERATIONS,
        seconds=SECONDS,
        delivery=delivery,
        protocol=protocol,
        pace_s=PACE_S,
        slow=0.05,
        **more,
    )
    # Each line is printed as it comes: of a run that hangs as well, the test's report has them.
    outcome = run(chaos, broker, logs=tmp_path, out=print)
    told = outcome.verdict.told(delivery)
    assert not outcome.verdict.faults(delivery), f"{told}\nto repeat it: {repeat_command(chaos, name)}"
    assert outcome.verdict.operations == OPERATIONS
    assert outcome.done, outcome.log


@pytest.mark.apache
@pytest.mark.parametrize(
    ("delivery", "protocol", "named"),
    [
        ("exactly_once", "classic", True),
        ("exactly_once", "consumer", False),
        ("at_least_once", "classic", False),
    ],
)
def test_nothing_is_lost_and_exactly_once_nothing_doubled_while_workers_and_brokers_are_killed(
    apache3, tmp_path, delivery, protocol, named
):
    disturb(apache3, tmp_path, "apache", delivery=delivery, protocol=protocol, named=named)


@pytest.mark.embedded
def test_at_least_once_on_the_embedded_broker_nothing_is_lost(embedded, tmp_path):
    disturb(
        embedded,
        tmp_path,
        "embedded",
        delivery="at_least_once",
        protocol="consumer",
        session_s=EMBEDDED_SESSION_S,
        brokers=False,
        named=False,
    )
