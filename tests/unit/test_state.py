"""Keyed state: who wins a key, through redelivery, crashes, hand-overs and expiry. Brokers are in memory."""

import json
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from threading import Barrier

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kser.errors import ConfigurationError, GroupError, TransportError, ValidationError
from kser.testing import FakeClock
from kser.transport import OutRecord, Partition, Position, TopicInfo, TopicSpec
from kser.transport.memory import MemoryTransport
from kser.worker.state import RETENTION_S, StateStore, Winner, owner_of, state_topic
from kser.worker.topic_plan import Feature
from kser.worker.topics import ensure_group_topics

DAY_S = 24 * 3600
P0, P1 = Partition("shop", 0), Partition("shop", 1)


class Desk:
    """A broker in memory with the task topic ``shop``, and stores that take its state over from each other."""

    def __init__(self, partitions=2, **options):
        self.clock = FakeClock()
        self.transport = MemoryTransport(clock=self.clock)
        self.transport.admin().create([TopicSpec(name="shop", partitions=partitions)])
        self.options = options
        self.sink = self.transport.sink()

    def store(self, *partitions, **options):
        """A new owner of these partitions."""
        store = StateStore(self.transport, "g", now_ms=self.clock.time_ms, **{**self.options, **options})
        store.load(partitions or (P0,), timeout_s=30)
        return store

    def settle(self, store, claim):
        assert self.sink.deliver(claim.records) == []
        store.settled(claim)

    def state(self, of=P0):
        """The keys in the topic, as compaction would leave them."""
        found = {}
        for record in self.transport.records(state_topic("g", of.topic)):
            if record.partition == of.partition:
                found[record.key.decode()] = record.value
        return {key: json.loads(value)["owner"] for key, value in found.items() if value is not None}


@pytest.fixture
def desk():
    return Desk()


# -- one owner ---------------------------------------------------------------------------------------------------------


def test_the_first_wins_and_others_are_told_who_and_when(desk):
    store = desk.store()
    won = store.claim(P0, "start:1", "shop/0/7")
    desk.clock.advance(5)
    lost = store.claim(P0, "start:1", "shop/0/8")
    assert won.won
    assert not lost.won
    assert lost.records == ()
    assert lost.winner == won.winner == Winner("shop/0/7", 1_700_000_000_000)
    assert store.get(P0, "start:1") == won.winner
    assert store.get(P0, "start:2") is None


def test_a_claim_is_one_record_into_the_same_partition_of_the_state_topic(desk):
    [record] = desk.store(P1).claim(P1, "start:1", "shop/1/7").records
    assert record == OutRecord("g.state.shop", b"start:1", record.value, partition=1)
    assert json.loads(record.value) == {"owner": "shop/1/7", "at": 1_700_000_000_000}


def test_the_record_that_won_wins_again_with_the_same_records_until_they_are_durable(desk):
    store = desk.store()
    claim = store.claim(P0, "k", "shop/0/7")
    desk.clock.advance(60)
    assert store.claim(P0, "k", "shop/0/7") is claim
    desk.settle(store, claim)
    again = store.claim(P0, "k", "shop/0/7")
    assert again.won
    assert again.records == ()
    assert again.winner == claim.winner


def test_keys_of_one_partition_say_nothing_of_another(desk):
    store = desk.store(P0, P1)
    assert store.claim(P0, "k", "shop/0/7").won
    assert store.claim(P1, "k", "shop/1/7").won
    assert len(store) == 2


def test_a_released_claim_frees_its_key_and_one_that_is_durable_is_not_released(desk):
    store = desk.store()
    first, second = store.claim(P0, "a", "shop/0/1"), store.claim(P0, "b", "shop/0/2")
    desk.settle(store, second)
    store.release(first)
    store.release(second)
    store.release(store.claim(P0, "b", "shop/0/9"))  # it lost
    assert store.claim(P0, "a", "shop/0/3").won
    assert store.claim(P0, "b", "shop/0/3").winner.owner == "shop/0/2"


def test_who_does_not_own_the_partition_cannot_ask_nor_claim(desk):
    store = desk.store(P0)
    for of in (P1, Partition("other", 0)):
        with pytest.raises(GroupError):
            store.claim(of, "k", "shop/1/7")
        with pytest.raises(GroupError):
            store.get(of, "k")
    claim = store.claim(P0, "k", "shop/0/7")
    store.drop([P0, P1])
    with pytest.raises(GroupError):
        store.claim(P0, "k", "shop/0/7")
    store.settled(claim)
    store.release(claim)
    assert len(store) == 0


def test_a_claim_of_an_earlier_assignment_changes_nothing_in_a_later_one(desk):
    store = desk.store()
    old = store.claim(P0, "k", "shop/0/7")
    store.drop([P0])
    store.load([P0])
    new = store.claim(P0, "k", "shop/0/8")
    assert new.won
    store.release(old)
    store.settled(old)
    assert store.claim(P0, "k", "shop/0/9").winner.owner == "shop/0/8"
    store.release(new)
    assert store.get(P0, "k") is None


def test_of_many_threads_that_claim_a_key_at_once_one_wins(desk):
    store, threads = desk.store(), 8
    together = Barrier(threads)

    def claims(number):
        together.wait(20)
        return [store.claim(P0, f"k{n}", f"shop/0/{number}").won for n in range(200)]

    with ThreadPoolExecutor(threads) as pool:
        won = list(pool.map(claims, range(threads)))
    assert [sum(column) for column in zip(*won, strict=True)] == [1] * 200


@pytest.mark.parametrize("key", ["ü" * 40, "k" * 256, "k" * 257, "x" * 100_000, "\ud800"])
def test_a_key_may_be_any_text_and_a_long_one_takes_no_more_room(desk, key):
    store = desk.store()
    claim = store.claim(P0, key, "shop/0/1")
    assert len(claim.records[0].key) <= 256
    desk.settle(store, claim)
    again = desk.store()
    assert again.get(P0, key).owner == "shop/0/1"
    assert again.get(P0, key + "k") is None


def test_an_empty_key_is_refused(desk):
    with pytest.raises(ValidationError):
        desk.store().claim(P0, "", "shop/0/1")


def test_a_retention_of_nothing_is_refused(desk):
    with pytest.raises(ConfigurationError):
        StateStore(desk.transport, "g", retention_s=0)


# -- the next owner ----------------------------------------------------------------------------------------------------


def test_the_next_owner_knows_what_was_settled_and_nothing_else(desk):
    store = desk.store(P0, P1)
    desk.settle(store, store.claim(P0, "settled", "shop/0/1"))
    desk.settle(store, store.claim(P1, "of another partition", "shop/1/1"))
    store.claim(P0, "not settled", "shop/0/2")
    heir = desk.store(P0)
    assert heir.get(P0, "settled") == Winner("shop/0/1", 1_700_000_000_000)
    assert len(heir) == 1
    assert heir.claim(P0, "settled", "shop/0/1").won
    assert heir.claim(P0, "settled", "shop/0/1").records == ()
    assert not heir.claim(P0, "settled", "shop/0/3").won
    assert heir.claim(P0, "not settled", "shop/0/3").won


def test_a_value_of_no_known_form_counts_as_claimed_by_somebody_until_it_expires(desk, caplog):
    desk.store()
    for value in (b"", b"{}", b"[1]", b"\xff", b'{"owner": 1, "at": 2}', b'{"owner": "o", "at": "x"}', b"null", b"7"):
        desk.sink.produce(OutRecord("g.state.shop", b"k" + value, value, partition=0))
    desk.sink.produce(OutRecord("g.state.shop", None, b"{}", partition=0))
    desk.sink.produce(
        OutRecord("g.state.shop", b"newer", b'{"v":2,"at":1700000000000,"owner":"shop/0/9"}', partition=0)
    )
    store = desk.store()
    assert len(store) == 9
    assert "9 records" in caplog.text
    assert not store.claim(P0, "k{}", "shop/0/1").won
    assert store.get(P0, "newer").owner == "shop/0/9"
    desk.clock.advance(RETENTION_S)
    assert store.claim(P0, "k{}", "shop/0/1").won


def test_a_load_that_fails_leaves_the_partitions_unowned(desk):
    desk.store()
    zombie = desk.transport.sink("tx")
    zombie.begin()
    zombie.produce(OutRecord("g.state.shop", b"k", b"v", partition=1))
    store = StateStore(desk.transport, "g")
    with pytest.raises(TransportError) as caught:
        store.load([P0, P1], timeout_s=1)
    assert caught.value.retriable
    with pytest.raises(GroupError):
        store.get(P0, "k")


# -- expiry ------------------------------------------------------------------------------------------------------------


def test_a_key_is_free_again_when_its_time_is_over(desk):
    store = desk.store(retention_s=DAY_S)
    desk.settle(store, store.claim(P0, "k", "shop/0/1"))
    desk.clock.advance(DAY_S - 1)
    assert not store.claim(P0, "k", "shop/0/2").won
    desk.clock.advance(1)
    assert store.get(P0, "k") is None
    desk.settle(store, store.claim(P0, "k", "shop/0/2"))
    assert desk.store(retention_s=DAY_S).get(P0, "k").owner == "shop/0/2"


def test_each_claim_takes_two_expired_keys_out_of_the_topic_the_oldest_first(desk):
    store = desk.store(retention_s=DAY_S)
    for n in range(6):
        desk.settle(store, store.claim(P0, f"old{n}", f"shop/0/{n}"))
        desk.clock.advance(1)
    desk.clock.advance(DAY_S - 2)  # the last of them has a second left
    claims = [store.claim(P0, f"new{n}", f"shop/0/1{n}") for n in range(3)]
    assert [[(r.key, r.value) for r in claim.records[1:]] for claim in claims] == [
        [(b"old0", None), (b"old1", None)],
        [(b"old2", None), (b"old3", None)],
        [(b"old4", None)],
    ]
    for claim in claims:
        desk.settle(store, claim)
    assert sorted(desk.state()) == ["new0", "new1", "new2", "old5"]
    assert len(store) == 4
    assert len(desk.store()) == 4


def test_a_topic_of_many_keys_shrinks_to_those_of_the_retention(desk):
    store = desk.store(retention_s=100)
    for n in range(1000):
        desk.settle(store, store.claim(P0, f"k{n}", f"shop/0/{n}"))
        desk.clock.advance(1)
        if n % 300 == 299:
            store = desk.store(retention_s=100)
    assert len(desk.state()) <= 102
    assert len(store) <= 102


def test_a_key_that_is_being_taken_out_is_not_claimed_before_that_is_durable(desk):
    """Else its new record might be written first, and be taken out."""
    store = desk.store(retention_s=DAY_S)
    desk.settle(store, store.claim(P0, "old", "shop/0/1"))
    desk.clock.advance(DAY_S)
    taking = store.claim(P0, "new", "shop/0/2")
    assert [record.key for record in taking.records] == [b"new", b"old"]
    assert not store.claim(P0, "old", "shop/0/3").won
    desk.settle(store, taking)
    desk.settle(store, store.claim(P0, "old", "shop/0/4"))
    assert desk.state() == {"new": "shop/0/2", "old": "shop/0/4"}


def test_what_a_released_claim_was_to_take_out_goes_with_a_later_one(desk):
    store = desk.store(retention_s=DAY_S)
    for n in range(3):
        desk.settle(store, store.claim(P0, f"old{n}", f"shop/0/{n}"))
    desk.clock.advance(DAY_S)
    store.release(store.claim(P0, "new", "shop/0/7"))
    assert [record.key for record in store.claim(P0, "new", "shop/0/8").records] == [b"new", b"old0", b"old1"]
    assert store.claim(P0, "old2", "shop/0/9").won


def test_the_age_of_a_key_is_that_of_its_last_claim_after_a_load_too(desk):
    store = desk.store(retention_s=DAY_S)
    for key in ("a", "b"):
        desk.settle(store, store.claim(P0, key, "shop/0/1"))
    desk.clock.advance(DAY_S)
    desk.settle(store, store.claim(P0, "a", "shop/0/2"))  # takes b along
    desk.clock.advance(1)
    desk.settle(store, store.claim(P0, "c", "shop/0/3"))
    desk.clock.advance(DAY_S - 1)
    heir = desk.store(retention_s=DAY_S)
    assert [record.key for record in heir.claim(P0, "d", "shop/0/4").records] == [b"d", b"a"]


# -- topics ------------------------------------------------------------------------------------------------------------


def test_a_missing_state_topic_is_made_like_its_task_topic():
    desk = Desk(partitions=5)
    store = desk.store(Partition("shop", 4))
    assert desk.transport.admin().describe(["g.state.shop"])["g.state.shop"].partitions == 5
    assert store.claim(Partition("shop", 4), "k", "shop/4/1").won


def test_where_it_may_not_be_made_claims_are_refused_with_what_to_do_and_lookups_find_nothing(desk):
    store = desk.store(P0, create=False)
    assert store.get(P0, "k") is None
    with pytest.raises(ConfigurationError, match=r"g\.state\.shop.*kser topics create --group g --topics shop"):
        store.claim(P0, "k", "shop/0/1")
    ensure_group_topics(desk.transport.admin(), "g", ["shop"], features=frozenset({Feature.STATE}))
    store.load([P0])
    assert store.claim(P0, "k", "shop/0/1").won


@pytest.mark.parametrize(
    ("tasks", "states", "cure"),
    [(6, 4, "--delete --topic g.state.shop"), (4, 6, "--alter --topic shop --partitions 6")],
)
@pytest.mark.parametrize("when", ["start", "assignment"])
def test_another_number_of_partitions_than_the_task_topic_has_is_refused_with_what_to_do(tasks, states, cure, when):
    transport = MemoryTransport()
    transport.admin().create(
        [TopicSpec(name="shop", partitions=tasks), TopicSpec(name="g.state.shop", partitions=states)]
    )
    with pytest.raises(ConfigurationError) as caught:
        if when == "start":
            ensure_group_topics(transport.admin(), "g", ["shop"], features=frozenset({Feature.EVENTS, Feature.STATE}))
        else:
            StateStore(transport, "g").load([P0])
    assert f"Topic g.state.shop: {states} partitions, and shop has {tasks}: " in caught.value.message
    assert cure in caught.value.message
    assert [found["topic"] for found in caught.value.extra["findings"]] == ["g.state.shop"]


def test_partitions_added_to_the_task_topic_are_noticed_at_the_next_assignment(desk):
    store = desk.store(P0)
    desk.transport.add_partitions("shop", 3)
    with pytest.raises(ConfigurationError, match="partitions were added"):
        store.load([Partition("shop", 2)])


class Embedded:
    """A broker that makes topics by itself, with four partitions, and takes no orders."""

    def __init__(self, **partitions):
        self.partitions = partitions

    def admin(self):
        return self

    def can_create(self, timeout_s=10):
        return False

    def describe(self, names, timeout_s=10):
        return {
            n: TopicInfo(name=n, partitions=self.partitions[n], replication=1) for n in names if n in self.partitions
        }

    def read(self, partitions, timeout_s=60):
        assert partitions == []
        return iter(())


def test_on_the_embedded_broker_a_state_topic_comes_with_its_first_claim_if_that_makes_it_right():
    right, wrong = StateStore(Embedded(shop=4), "g"), StateStore(Embedded(shop=6), "g")
    right.load([P0])
    wrong.load([P0])
    assert right.claim(P0, "k", "shop/0/1").won
    with pytest.raises(ConfigurationError, match=r"would get 4 partitions.*kser broker --group g --topic shop:"):
        wrong.claim(P0, "k", "shop/0/1")


# -- by chance ---------------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("claim"), st.integers(0, 9), st.integers(0, 2)),
            st.tuples(st.just("settle"), st.integers(0, 20)),
            st.tuples(st.just("release"), st.integers(0, 20)),
            st.just(("crash",)),
            st.just(("wait",)),
        ),
        max_size=60,
    )
)
def test_a_key_has_one_winner_until_its_time_is_over_whatever_happens(steps):
    """Against a model: the durable winners, and those in flight. Each record claims one key; a crash redelivers it."""
    desk = Desk(partitions=1, retention_s=DAY_S)
    store = desk.store()
    #: key -> owner and when; claims that may still be settled or released, and what is under way out.
    durable, flying, keys_of = {}, [], {}
    for step, *arguments in steps:
        now = desk.clock.time_ms()
        if step == "claim":
            record, key = f"shop/0/{arguments[0]}", f"k{arguments[1]}"
            key = keys_of.setdefault(record, key)
            claim = store.claim(P0, key, record)
            held = {c.winner.owner for c in flying if c.key.decode() == key}
            owner, at = durable.get(key, (None, 0))
            going = any(key.encode() in c.expired for c in flying)
            fresh = {c.winner.owner for c in flying if c.key.decode() == key and c.winner.at_ms > now - DAY_S * 1000}
            if fresh:
                assert claim.won == (record in fresh)
            elif record == owner or record in held:
                assert claim.won
            elif owner is not None and (going or at > now - DAY_S * 1000):
                assert not claim.won
                assert claim.winner == (owner, at)
            elif not going:
                assert claim.won
            if claim.won and claim.records and claim not in flying:
                flying.append(claim)
        elif step in ("settle", "release") and flying:
            claim = flying.pop(arguments[0] % len(flying))
            if step == "settle":
                desk.settle(store, claim)
                durable[claim.key.decode()] = claim.winner
                for gone in claim.expired:
                    durable.pop(gone.decode(), None)
            else:
                store.release(claim)
        elif step == "crash":
            store, flying = desk.store(), []
            assert {key: owner for key, (owner, _) in durable.items()} == desk.state()
            assert len(store) == len(durable)
        elif step == "wait":
            desk.clock.advance(DAY_S * 0.6)


#: Where a worker is killed while it settles a batch: the number of things that it has done.
KILLS = ("claimed", "begun", "produced", "offsets", "committed")


class Shop:
    """Workers of one partition, one after the other, that buy once for each key; killed where a test says."""

    def __init__(self, keys, delivery):
        self.clock = FakeClock()
        self.transport = MemoryTransport(clock=self.clock)
        self.transport.admin().create([TopicSpec(name=name, partitions=1) for name in ("shop", "bought")])
        self.exactly_once = delivery == "exactly_once"
        sink = self.transport.sink()
        assert sink.deliver([OutRecord("shop", b"k", key.encode()) for key in keys]) == []
        self.names = count()

    def on_assign(self, partitions):
        [committed] = self.source.committed(partitions)
        self.store.load(partitions)
        self.base = max(committed.offset, 0)

    def on_revoke(self, partitions):
        self.store.drop(partitions)

    on_lost = on_revoke

    def run(self, batch, kills, same_id):
        """One worker until it is killed, or has nothing left to do: then True."""
        self.store = StateStore(self.transport, "g", now_ms=self.clock.time_ms)
        self.source = self.transport.source("g")
        self.source.subscribe(["shop"], self)
        sink = self.transport.sink(
            ("tx" if same_id else f"tx{next(self.names)}") if self.exactly_once else None,
        )
        if self.exactly_once:
            sink.begin()
            sink.abort()
        while records := self.source.poll(20, batch):
            kill = next(kills, None)
            if kill == "claimed" and self._claims(records) is not None:
                return self._die()
            claims = self._claims(records)
            effects = [
                OutRecord("bought", record.value, owner_of(record).encode())
                for record, claim in zip(records, claims, strict=True)
                if claim.won
            ]
            state = [out for claim in claims for out in claim.records]
            steps = self._steps(sink, state, effects, Position("shop", 0, records[-1].offset + 1))
            for name, step in zip(KILLS[1:], steps, strict=True):
                step()
                if kill == name:
                    return self._die()
            for claim in claims:
                self.store.settled(claim)
        self.source.close()
        return True

    def _claims(self, records):
        return [self.store.claim(record.of, record.value.decode(), owner_of(record)) for record in records]

    def _steps(self, sink, state, effects, position):
        if self.exactly_once:
            return (
                sink.begin,
                lambda: sink.produce_all([*state, *effects]),
                lambda: sink.send_offsets([position], self.source.member()),
                sink.commit,
            )
        return (
            lambda: None,
            lambda: sink.deliver(state),
            lambda: sink.deliver(effects),
            lambda: self.source.commit([position]),
        )

    def _die(self):
        self.clock.advance(7)  # it is put out of the group; a transaction of its is open for 3 s more
        return False


@settings(max_examples=120, deadline=None)
@given(
    keys=st.lists(st.sampled_from("abcde"), min_size=1, max_size=25),
    batch=st.integers(1, 6),
    kills=st.lists(st.sampled_from([None, *KILLS]), max_size=12),
    same_id=st.booleans(),
)
@pytest.mark.parametrize("delivery", ["exactly_once", "at_least_once"])
def test_workers_that_are_killed_anywhere_run_one_record_for_each_key(delivery, keys, batch, kills, same_id):
    shop, left = Shop(keys, delivery), iter(kills)
    for _ in range(len(kills) + 2):
        if shop.run(batch, left, same_id):
            break
    else:
        pytest.fail("the records were never settled")
    bought = defaultdict(Counter)
    for record in shop.transport.records("bought"):
        bought[record.key.decode()][record.value.decode()] += 1
    assert bought.keys() == set(keys)
    assert {key: len(owners) for key, owners in bought.items()} == dict.fromkeys(set(keys), 1)
    if delivery == "exactly_once":
        assert all(owners.total() == 1 for owners in bought.values())
    state = {record.key.decode(): record.value for record in shop.transport.records("g.state.shop")}
    assert {key: json.loads(value)["owner"] for key, value in state.items()} == {
        key: next(iter(owners)) for key, owners in bought.items()
    }


@pytest.mark.parametrize("subject", ["op-1", "x" * 400])
def test_what_was_run_again_is_kept_for_ever_and_takes_nothing_else_along(desk, subject):
    store = desk.store(retention_s=30 * DAY_S)
    desk.settle(store, store.claim(P0, f"again:{subject}:1:2:0", "shop/0/1"))
    desk.settle(store, store.claim(P0, "start:1", "shop/0/2"))
    desk.clock.advance(400 * DAY_S)
    for owner in (store, desk.store(retention_s=30 * DAY_S)):
        assert owner.get(P0, f"again:{subject}:1:2:0").owner == "shop/0/1"
        assert not owner.claim(P0, f"again:{subject}:1:2:0", "shop/0/9").won
        assert owner.get(P0, "start:1") is None
    claim = desk.store().claim(P0, "start:2", "shop/0/10")
    desk.settle(store, claim)
    assert [record.value for record in claim.records if record.key == b"start:1"] == [None]
    assert len([key for key in desk.state() if key.startswith("again:")]) == 1
