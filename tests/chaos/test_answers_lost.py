"""Answers and requests that get lost between worker and broker: it goes on by itself, nothing is lost or doubled."""

import threading
from functools import partial

import pytest

from tests.apache_kafka import ApacheKafka
from tests.chaos.conftest import names
from tests.chaos.stage import Stage
from tests.kafka_proxy import KafkaProxy, wait_hit

pytestmark = [pytest.mark.apache, pytest.mark.chaos]

#: How many of them pass before the fault: by then the worker is at work.
FIRST = 5
#: The settle thread is given up after this time, in seconds, where that is what is tested.
SETTLE_LIMIT_S = 4
#: How long the client waits for an answer where that is to be short: longer than the worker waits for its note.
REQUEST_MS = "7000"


def lost(kafka, logs, *, api, what, first=FIRST, cut=False, delivery="exactly_once", protocol="classic", settles=20.0):
    """One request, or one answer, gets lost."""
    with (
        KafkaProxy(kafka.bootstrap_servers) as proxy,
        Stage(kafka, logs, delivery=delivery, protocol=protocol, via=proxy.bootstrap_servers) as stage,
    ):
        lose = proxy.lose_answer if what == "answer" else proxy.lose_request
        rule = lose(api, first=first, cut=cut)
        stage.launch()
        stage.start(settle_limit_s=settles)
        wait_hit(rule)
        stage.launch(seed=2)  # they come while it does not know
        stage.wait_done()
        stage.check()
        assert rule.hits == 1


def note_lost(kafka, logs, *, what, cut=False):
    """That partitions are being worked on is committed first, and would set back what is committed after it."""
    client = {"socket.timeout.ms": REQUEST_MS}
    with (
        KafkaProxy(kafka.bootstrap_servers) as proxy,
        Stage(kafka, logs, delivery="at_least_once", via=proxy.bootstrap_servers, client=client) as stage,
    ):
        lose = proxy.lose_answer if what == "answer" else proxy.lose_request
        rule = lose("OffsetCommit", cut=cut)
        stage.launch()
        stage.start()
        wait_hit(rule)
        stage.launch(seed=2)
        stage.wait_done()
        stage.check()
        assert rule.hits == 1


def nothing_beside_transactions(kafka, logs):
    """Exactly once: a commit of the consumer may come late, and is sent as whatever member there is by then."""
    with KafkaProxy(kafka.bootstrap_servers) as proxy, Stage(kafka, logs, via=proxy.bootstrap_servers) as stage:
        rule = proxy.lose_request("OffsetCommit", count=None)
        for _ in range(2):  # it lets go of its partitions, and another life of it takes them over
            stage.launch()
            stage.start()
            stage.wait_done()
            stage.fleet.end()
        stage.check()
        assert rule.hits == 0
        assert "crashed" not in stage.whole_log()


def hangs(kafka, logs, *, api, protocol="classic"):
    """Answers are held for ever, the settle thread is given up, and a new one goes on (KAFKA.md finding 11)."""
    with (
        KafkaProxy(kafka.bootstrap_servers) as proxy,
        Stage(kafka, logs, protocol=protocol, via=proxy.bootstrap_servers) as stage,
    ):
        rule = proxy.lose_answer(api, first=FIRST, count=None)
        stage.launch()
        stage.start(settle_limit_s=SETTLE_LIMIT_S)
        wait_hit(rule)
        stage.wait_log("has been settling for over")
        rule.end()
        stage.launch(seed=2)
        stage.wait_done()
        stage.check()


def hangs_at_the_end(kafka, logs):
    """A worker whose settling hangs for good still obeys SIGTERM; the next one finishes."""
    with KafkaProxy(kafka.bootstrap_servers) as proxy, Stage(kafka, logs, via=proxy.bootstrap_servers) as stage:
        rule = proxy.lose_answer("AddOffsetsToTxn", first=FIRST, count=None)
        stage.launch()
        stage.start(settle_limit_s=SETTLE_LIMIT_S)
        wait_hit(rule)
        stage.fleet.end()
        assert not stage.fleet.faults, stage.log()
        rule.end()
        stage.start()
        stage.wait_done()
        stage.check()


def connections_cut(kafka, logs, *, delivery):
    """All connections break, again and again, under load."""
    with (
        KafkaProxy(kafka.bootstrap_servers) as proxy,
        Stage(kafka, logs, delivery=delivery, via=proxy.bootstrap_servers) as stage,
    ):
        stage.start()
        cut = 0
        for seed in range(6):
            stage.launch(seed=seed)
            stage.wait_done() if seed == 0 else stage.tail.read(0.1 * seed)
            cut += proxy.cut_all()
        assert cut > 6
        stage.wait_done()
        stage.check()


SCENARIOS = {
    # The broker has committed, and nobody is told: the committed offsets know (finding 9).
    "commit done, no answer": partial(lost, api="EndTxn", what="answer"),
    "commit done, no answer, KIP-848": partial(lost, api="EndTxn", what="answer", protocol="consumer"),
    "commit done, no answer, given up": partial(lost, api="EndTxn", what="answer", settles=SETTLE_LIMIT_S),
    "commit done, connection cut": partial(lost, api="EndTxn", what="answer", cut=True),
    # The broker was never asked.
    "commit never asked for": partial(lost, api="EndTxn", what="request"),
    "commit never asked for, given up": partial(lost, api="EndTxn", what="request", settles=SETTLE_LIMIT_S),
    "commit never asked for, connection cut": partial(lost, api="EndTxn", what="request", cut=True),
    # finding 11
    "offsets of the transaction hang": partial(hangs, api="AddOffsetsToTxn"),
    "storing offsets in the transaction hangs": partial(hangs, api="TxnOffsetCommit"),
    "storing offsets in the transaction hangs, KIP-848": partial(hangs, api="TxnOffsetCommit", protocol="consumer"),
    "settling hangs when it is asked to stop": hangs_at_the_end,
    "at least once, offsets stored, no answer": partial(
        lost, api="OffsetCommit", what="answer", first=1, delivery="at_least_once"
    ),
    "at least once, offsets stored, connection cut": partial(
        lost, api="OffsetCommit", what="answer", first=1, cut=True, delivery="at_least_once"
    ),
    "nothing is committed beside transactions": nothing_beside_transactions,
    "at least once, work noted, no answer": partial(note_lost, what="answer"),
    "at least once, work never noted": partial(note_lost, what="request"),
    "at least once, work noted, connection cut": partial(note_lost, what="answer", cut=True),
    "records stored, connection cut": partial(lost, api="Produce", what="answer", cut=True),
    "at least once, records stored, connection cut": partial(
        lost, api="Produce", what="answer", cut=True, delivery="at_least_once"
    ),
    "all connections cut": partial(connections_cut, delivery="exactly_once"),
    "at least once, all connections cut": partial(connections_cut, delivery="at_least_once"),
}


#: They wait for the client to give a request up.
LONG = ("at least once, work noted, no answer", "at least once, work never noted")


@pytest.mark.parametrize("scenario", names(SCENARIOS, LONG))
def test_a_worker_goes_on_by_itself(ensemble, scenario):
    ensemble.result(scenario)


@pytest.mark.parametrize("done", [True, False], ids=["done", "not done"])
def test_the_coordinator_is_killed_with_a_commit_in_its_hands(apache3: ApacheKafka, tmp_path, done):
    """The request is out, the broker dies, the answer never comes: whether it was committed, others know."""
    with (
        KafkaProxy(apache3.bootstrap_servers) as proxy,
        Stage(apache3, tmp_path, via=proxy.bootstrap_servers) as stage,
    ):
        ports = [int(address.rpartition(":")[2]) for address in apache3.bootstrap_servers.split(",")]
        dead = threading.Event()

        def kill(port):
            apache3.kill(ports.index(port) + 1)
            dead.set()

        lose = proxy.lose_answer if done else proxy.lose_request
        lose("EndTxn", first=FIRST, then=kill, cut=True)
        stage.launch()
        stage.start()
        assert dead.wait(30)
        stage.launch(seed=2)
        stage.wait_done()
        apache3.restore()
        stage.check()
