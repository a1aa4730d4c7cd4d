"""A member of a KIP-848 group that may have missed what its coordinator told it: when it joins anew."""

import logging
from concurrent.futures import Future
from types import SimpleNamespace

import pytest
from confluent_kafka import ConsumerGroupState, KafkaError, KafkaException

from kser.confluent.membership import HeartbeatLog, Watch

STABLE = ConsumerGroupState.STABLE
#: What the client makes of "Assigning" and "Reconciling", which it does not know.
RESTLESS = ConsumerGroupState.UNKNOWN
FAILURE = KafkaException(KafkaError(KafkaError._TIMED_OUT))
SILENCE = object()


class Brokers:
    """Tell the state of a group again and again; their clock is turned by hand."""

    def __init__(self, state):
        self.state = state
        self.now = 1000.0
        self.asked_at = []
        self.watch = Watch("g", self.ask, lambda: self.now)

    def ask(self):
        self.asked_at.append(self.now)
        future = Future()
        if isinstance(self.state, Exception):
            future.set_exception(self.state)
        elif self.state is not SILENCE:
            groups = [SimpleNamespace(group_id="other", state=RESTLESS)]
            if self.state is not None:
                groups.append(SimpleNamespace(group_id="g", state=self.state))
            future.set_result(SimpleNamespace(valid=groups))
        return future

    def wait(self, seconds):
        """After how many seconds the member is to join anew; None: not within so many."""
        start = self.now
        while self.now - start <= seconds:
            if self.watch.due and self.watch.look():
                return self.now - start
            self.now += 0.1
        return None


def test_nobody_is_asked_while_no_heartbeat_is_lost():
    brokers = Brokers(RESTLESS)
    assert brokers.wait(600) is None
    assert brokers.asked_at == []


def test_a_group_that_does_not_come_to_rest_after_a_lost_heartbeat_is_joined_anew_within_30_seconds():
    brokers = Brokers(RESTLESS)
    brokers.watch.lost()
    assert 20 <= brokers.wait(600) <= 27


def test_a_group_at_rest_is_left_alone_and_no_more_asked_for_after_a_while():
    brokers = Brokers(STABLE)
    brokers.watch.lost()
    assert brokers.wait(40) is None
    asked = len(brokers.asked_at)
    assert asked >= 5
    assert brokers.wait(600) is None
    assert len(brokers.asked_at) == asked


def test_a_rebalance_that_ends_is_waited_for():
    brokers = Brokers(RESTLESS)
    brokers.watch.lost()
    assert brokers.wait(18) is None
    brokers.state = STABLE
    assert brokers.wait(600) is None


def test_rest_in_between_starts_the_wait_anew():
    brokers = Brokers(RESTLESS)
    brokers.watch.lost()
    assert brokers.wait(15) is None
    brokers.state = STABLE
    assert brokers.wait(6) is None
    brokers.state = RESTLESS
    assert brokers.wait(600) >= 20


def test_a_request_that_the_coordinator_takes_up_late_is_noticed_too():
    brokers = Brokers(STABLE)
    brokers.watch.lost()
    assert brokers.wait(25) is None
    brokers.state = RESTLESS
    assert brokers.wait(600) is not None


def test_each_lost_heartbeat_makes_it_look_for_longer():
    brokers = Brokers(STABLE)
    for _ in range(5):
        brokers.watch.lost()
        assert brokers.wait(20) is None
    brokers.state = RESTLESS
    assert brokers.wait(600) is not None


@pytest.mark.parametrize("nothing", [None, FAILURE], ids=["coordinator does not answer", "nobody answers"])
def test_who_knows_nothing_decides_nothing_and_goes_on_asking(nothing):
    brokers = Brokers(nothing)
    brokers.watch.lost()
    assert brokers.wait(60) is None
    assert len(brokers.asked_at) >= 10
    brokers.state = RESTLESS
    assert brokers.wait(600) is not None


def test_silence_in_between_does_not_count_as_rest():
    brokers = Brokers(RESTLESS)
    brokers.watch.lost()
    assert brokers.wait(10) is None
    brokers.state = FAILURE
    assert brokers.wait(6) is None
    brokers.state = RESTLESS
    assert brokers.wait(600) <= 12


def test_brokers_that_cannot_be_asked_are_asked_again():
    brokers = Brokers(RESTLESS)
    refusals = [KafkaException(KafkaError(KafkaError._STATE))] * 3

    def ask():
        if refusals:
            raise refusals.pop()
        return brokers.ask()

    brokers.watch = Watch("g", ask, lambda: brokers.now)
    brokers.watch.lost()
    assert brokers.wait(600) > 30


def test_an_answer_that_does_not_come_is_not_waited_for():
    brokers = Brokers(SILENCE)
    brokers.watch.lost()
    assert brokers.wait(60) is None
    assert len(brokers.asked_at) == 1


def test_a_member_that_has_joined_anew_starts_without_a_past():
    brokers = Brokers(RESTLESS)
    brokers.watch.lost()
    assert brokers.wait(600) is not None
    brokers.watch.start_over()
    assert brokers.wait(600) is None


def test_the_clients_log_tells_of_each_heartbeat_that_was_given_up(caplog):
    caplog.set_level(logging.INFO, "kser.confluent")
    lost = []
    log = HeartbeatLog(lambda: lost.append(1))
    line = "GroupCoordinator/1: Timed out ConsumerGroupHeartbeatRequest in flight (after 5000ms, timeout #0)"
    for _ in range(3):  # more often than it is logged
        log.log(logging.INFO, "%s [%s] %s", "REQTMOUT", "kser#consumer-1", line)
    assert len(lost) == 3
    assert caplog.text.count("Timed out ConsumerGroupHeartbeatRequest") == 1
    log.log(logging.INFO, "%s [%s] %s", "REQTMOUT", "kser#consumer-1", "Timed out OffsetCommitRequest in flight")
    log.log(logging.INFO, "%s [%s] %s", "FAIL", "kser#consumer-1", "ConsumerGroupHeartbeat")
    log.log(logging.INFO, "no arguments")
    assert len(lost) == 3
