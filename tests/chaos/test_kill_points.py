"""kill -9 at each step of settling, once: after a restart nothing is lost, and exactly once nothing is doubled."""

from functools import partial

import pytest

from tests.chaos.conftest import names
from tests.chaos.killer import AT_LEAST_ONCE, EXACTLY_ONCE, LETTING_GO, NOTING
from tests.chaos.stage import Stage
from tests.kafka_proxy import KafkaProxy

pytestmark = [pytest.mark.apache, pytest.mark.chaos]

#: Records taken before the worker may be killed: some are settled by then, some of the operations are under way.
AFTER = 9


def at(point, kafka, logs, *, delivery="exactly_once", protocol="classic", named=True, after=AFTER):
    """Killed at ``point``; the next life of the worker finishes."""
    with Stage(kafka, logs, delivery=delivery, protocol=protocol, named=named) as stage:
        stage.launch()
        stage.start(point, after)
        stage.wait_killed()
        stage.start()
        stage.wait_done()
        stage.check()


def on_assign(kafka, logs, *, delivery):
    """The second life is killed when it takes over what the first, killed as well, had committed."""
    first = "after commit" if delivery == "exactly_once" else "after storing offsets"
    with Stage(kafka, logs, delivery=delivery) as stage:
        stage.launch()
        stage.start(first, AFTER)
        stage.wait_killed()
        stage.start("after reading committed")
        stage.wait_killed()
        stage.start()
        stage.wait_done()
        stage.check()


def letting_go(point, kafka, logs, *, delivery):
    """Asked to stop, and killed when all is settled and it notes that nobody works on the partitions any more."""
    with Stage(kafka, logs, delivery=delivery) as stage:
        stage.launch()
        stage.start(point, 1)
        stage.wait_some(3)
        stage.terminate()
        stage.wait_killed()
        stage.start()
        stage.wait_done()
        stage.check()


def at_each_in_turn(kafka, logs):
    """One life after the other is killed, each at another point, while operations come."""
    with Stage(kafka, logs, named=False) as stage:
        for number, point in enumerate(["after commit", "after produce", "after reading committed", "before commit"]):
            stage.launch(seed=number)
            stage.start(point, 0 if point == "after reading committed" else 3)
            stage.wait_killed()
        stage.start()
        stage.wait_done()
        stage.check()


def commit_is_out(kafka, logs, *, heard):
    """The commit request is out, or with ``heard`` even done, and the worker dies before the answer."""
    with KafkaProxy(kafka.bootstrap_servers) as proxy, Stage(kafka, logs, via=proxy.bootstrap_servers) as stage:

        def kill(_port):
            stage.fleet.kill("worker", 3600)

        lose = proxy.lose_answer if heard else proxy.lose_request
        rule = lose("EndTxn", first=6, then=kill)
        stage.launch()
        stage.start()
        stage.wait_killed()
        assert rule.hits == 1
        stage.start()
        stage.wait_done()
        stage.check()


SCENARIOS = {
    **{f"exactly once, {point}": partial(at, point) for point in EXACTLY_ONCE},
    **{f"at least once, {point}": partial(at, point, delivery="at_least_once") for point in AT_LEAST_ONCE},
    **{
        f"KIP-848, {point}": partial(at, point, protocol="consumer", named=False)
        for point in ("after send_offsets", "after commit")
    },
    "exactly once, on assign": partial(on_assign, delivery="exactly_once"),
    "at least once, on assign": partial(on_assign, delivery="at_least_once"),
    **{f"exactly once, {point}": partial(at, point, after=1) for point in NOTING},
    **{f"at least once, {point}": partial(at, point, delivery="at_least_once", after=1) for point in NOTING},
    **{f"exactly once, {point}": partial(letting_go, point, delivery="exactly_once") for point in LETTING_GO},
    **{f"at least once, {point}": partial(letting_go, point, delivery="at_least_once") for point in LETTING_GO},
    "exactly once, one after the other": at_each_in_turn,
    "the commit is done and its answer never comes": partial(commit_is_out, heard=True),
    "the commit is out and never arrives": partial(commit_is_out, heard=False),
}


@pytest.mark.parametrize("scenario", names(SCENARIOS))
def test_nothing_is_lost_or_doubled_when_the_worker_is_killed(ensemble, scenario):
    ensemble.result(scenario)
