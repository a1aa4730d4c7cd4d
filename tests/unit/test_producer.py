"""Contracts K-93 to K-97 and K-99: producers, on a sink in memory. Traps T-04, T-06, T-17, T-18."""

import logging
import threading
import time

import pytest

from kser import (
    ConfigurationError,
    DeliveryError,
    Message,
    Operation,
    OperationRegistry,
    Result,
    Task,
    TransportError,
    ValidationError,
)
from kser.producer import max_message_bytes
from kser.results import is_success
from kser.sequencing.sequencer import MAX_MESSAGE_BYTES
from tests.unit.fakes import HOLD, FakeSink, Producer

U = "872c3be0-51ac-457f-a4d9-12c2f7667b80"


@pytest.fixture(autouse=True)
def _info(caplog):
    caplog.set_level(logging.INFO, logger="kser")


def kmsg(uuid="u", **fields):
    return Message(uuid=uuid, entrypoint="__main__.DiceRoll", **fields)


def dead():
    """A broker that never answers."""
    return Producer(FakeSink(answer=lambda record: HOLD))


def refusing(*uuids, error=None):
    """A broker that refuses these messages."""
    failing = {uuid.encode() for uuid in uuids}
    return Producer(
        FakeSink(answer=lambda record: (error or TransportError("not for you")) if record.key in failing else None)
    )


# -- one message -----------------------------------------------------------------------------------------------------


def test_k93_k94_a_message_that_is_confirmed(caplog):
    producer = Producer()
    result = producer.send("dice", kmsg(U))
    (record,) = producer.sink.records
    assert (result.retcode, result.uuid) == (0, U)
    assert result.stdout == f"Message __main__.DiceRoll[{U}] sent in dice"
    assert (record.topic, record.key, record.headers) == ("dice", U.encode(), ())
    assert Message.loads(record.value).dump() == kmsg(U).dump()
    (logged,) = caplog.records
    assert logged.getMessage() == (
        f"Producer.Success: __main__.DiceRoll[{U}]: Message __main__.DiceRoll[{U}] sent in dice"
    )
    assert (logged.levelname, logged.name) == ("INFO", "kser.producer")
    assert (logged.kmsg["uuid"], logged.kresult["retcode"]) == (U, 0)


def test_k93_the_arguments_of_send_and_bulk_send():
    producer = Producer()
    assert is_success(producer.send("t", kmsg(), 5))
    assert is_success(producer.send("t", kmsg(), timeout=5))
    assert is_success(producer.bulk_send("t", [kmsg()], timeout=5))
    assert is_success(producer.bulk_send("t", [kmsg()], 5))


def test_k95_a_message_that_the_broker_refuses(caplog):
    result = refusing("u", error=TransportError("not for you", extra={"topic": "t"})).send("t", kmsg())
    assert (result.retcode, result.stderr, result.stdout, result.uuid) == (503, "not for you", "", "u")
    assert result.retval["error"]["name"] == "TransportError"
    (logged,) = caplog.records
    assert logged.getMessage() == "Producer.Failed: __main__.DiceRoll[u]: not for you"
    assert (logged.levelname, logged.error["msgid"]) == ("ERROR", "ERR-50301")


def test_k95_a_message_that_the_client_cannot_take():
    producer = Producer(FakeSink(refuse=lambda record: TransportError("queue full")))
    result = producer.send("t", kmsg())
    assert (result.retcode, result.stderr) == (503, "queue full")
    assert producer._opened == set()


def test_k96_t17_a_dead_broker_is_a_failed_result_within_the_timeout():
    producer = dead()
    begun = time.monotonic()
    result = producer.send("t", kmsg(), timeout=0.2)
    assert 0.15 < time.monotonic() - begun < 5
    assert (result.retcode, result.uuid) == (504, "u")
    assert "was not confirmed by the broker within 0.2 s" in result.stderr
    assert result.retval["error"]["extra"]["uuids"] == ["u"]
    assert producer.sink.dropped == 1


def test_k96_a_confirmation_that_comes_after_the_timeout_changes_nothing():
    held = []
    sink = FakeSink(answer=lambda record: HOLD)
    sink.drop_queued = lambda: held.extend(sink._open)
    result = Producer(sink).send("t", kmsg(), timeout=0.05)
    held[0][1](None)
    assert result.retcode == 504


def test_k96_it_waits_for_the_confirmation_and_no_longer():
    answers = []
    sink = FakeSink(answer=lambda record: None if answers else HOLD)
    timer = threading.Timer(0.1, lambda: answers.append(True))
    timer.start()
    result = Producer(sink).send("t", kmsg(), timeout=30)
    timer.join(5)
    assert is_success(result)
    assert answers


@pytest.mark.parametrize(
    ("message", "retcode", "said"),
    [
        (kmsg(params={"a": "x" * 1_000_000}), 413, f"the limit is {MAX_MESSAGE_BYTES}"),
        (kmsg(params={"a": object()}), 400, "params['a'] is of type object"),
        (kmsg(result=Result(retval={"a": float("nan")})), 400, "result.retval['a'] is nan"),
    ],
)
def test_what_cannot_be_sent_is_refused_before_anything_leaves(message, retcode, said):
    producer = Producer()
    result = producer.send("t", message)
    assert (result.retcode, result.uuid) == (retcode, "u")
    assert said in result.stderr
    assert producer.sink.records == []


def test_a_message_without_a_uuid_is_refused():
    """str(None) would be a uuid that all such messages share."""
    producer = Producer()
    result = producer.send("t", Message(None, "e"))
    assert result.retcode == 400
    assert "uuid='', give a text that is not empty" in result.stderr
    assert producer.sink.records == []


def test_a_message_that_is_too_large_is_told_with_the_cure():
    result = Producer().send("t", kmsg(params={"a": "x" * 1_000_000}))
    error = result.retval["error"]["extra"]
    assert (error["limit"], error["size"] > 1_000_000) == (MAX_MESSAGE_BYTES, True)
    assert "pass a reference" in result.stderr
    assert "nest operations" in result.stderr


def test_the_limit_is_a_setting(monkeypatch):
    assert max_message_bytes() == 900 * 1024
    monkeypatch.setenv("KSER_MAX_MESSAGE_BYTES", "2000")
    producer = Producer()
    assert producer.send("t", kmsg(params={"a": "x" * 2000})).retcode == 413
    assert is_success(producer.send("t", kmsg(params={"a": "x" * 1000})))


@pytest.mark.parametrize("value", ["many", "100", "-5", "1.5"])
def test_a_limit_that_cannot_be_is_refused_with_its_name(monkeypatch, value):
    monkeypatch.setenv("KSER_MAX_MESSAGE_BYTES", value)
    with pytest.raises(ConfigurationError, match="KSER_MAX_MESSAGE_BYTES="):
        Producer()


@pytest.mark.parametrize("topic", ["", None, 5, [], b"t"])
def test_without_a_topic_it_fails(topic):
    result = Producer().send(topic, kmsg())
    assert (result.retcode, "No topic for message" in result.stderr) == (400, True)


@pytest.mark.parametrize("topic", ["a b", "a\0b", "\ud800", "..", "x" * 250])
def test_a_topic_that_kafka_would_not_take_is_refused_with_the_rule(topic):
    producer = Producer()
    result = producer.send(topic, kmsg())
    assert (result.retcode, result.uuid) == (400, "u")
    assert "is no topic name: take 1 to 249 of the letters" in result.stderr
    assert producer.bulk_send(topic, [kmsg()]).retcode == 400
    assert producer.sink.records == []


# -- wrong arguments -------------------------------------------------------------------------------------------------


class Unshowable:
    def __repr__(self):
        raise RuntimeError("no repr")


@pytest.mark.parametrize(
    ("value", "said"),
    [(5, "5 is a int"), (None, "None is a NoneType"), ({"uuid": "u"}, "{'uuid': 'u'} is a dict"),
     (Unshowable(), "cannot be shown"), ("x" * 5000, "...")],
)  # fmt: skip
def test_what_is_no_message_is_a_failed_result_that_says_what_to_give(value, said, caplog):
    producer = Producer()
    result = producer.send("t", value)
    assert (result.retcode, bool(result.uuid)) == (400, True)
    assert said in result.stderr
    assert "give Message(" in result.stderr
    assert len(result.stderr) < 400
    assert caplog.records[-1].levelname == "ERROR"
    with pytest.raises(DeliveryError) as caught, producer.batch():
        inside = producer.send("t", value)
        assert inside.retcode == 400
    assert caught.value.extra["uuids"] == [inside.uuid]
    assert producer.sink.records == []


@pytest.mark.parametrize("key", [5, b"a", True, ["a"], 0, b""])
def test_a_key_that_is_no_text_is_refused_with_what_to_give(key):
    producer = Producer()
    result = producer.send("t", kmsg(), key=key)
    assert (result.retcode, result.uuid) == (400, "u")
    assert f"key={key!r} of message __main__.DiceRoll[u]: give a str" in result.stderr
    assert producer.sink.records == []


@pytest.mark.parametrize("key", [5, b"a"])
@pytest.mark.parametrize("of", ["operation", "task"])
@pytest.mark.parametrize("level", [logging.INFO, logging.CRITICAL])
def test_so_is_one_that_a_task_or_an_operation_has(key, of, level, caplog):
    caplog.set_level(level, logger="kser")
    producer = Producer()
    registry = OperationRegistry(producer=producer, topic="t")
    step = registry.subscribe(type("Step", (Task,), {}))
    plain = registry.subscribe(type("Plain", (Operation,), {}))
    operation = plain(tasks=[step(), step()])
    (operation if of == "operation" else operation.tasks[0]).key = key
    with pytest.raises(DeliveryError), producer.batch():
        assert operation.launch().retcode == 400
    assert operation.status == "PENDING"


@pytest.mark.parametrize("timeout", [None, "5", float("nan"), -1, -0.001, True, [], 10**400, 1j])
def test_a_timeout_that_is_no_time_is_refused_with_what_to_give(timeout):
    producer = Producer()
    for result in (producer.send("t", kmsg(), timeout), producer.bulk_send("t", [kmsg()], timeout)):
        assert result.retcode == 400
        assert "timeout=" in result.stderr
        assert "give a number of seconds, 0 or more" in result.stderr
    with pytest.raises(ValidationError, match="give a number of seconds"), producer.batch(timeout):
        pass
    with pytest.raises(ValidationError, match="give a number of seconds"):
        producer.close(timeout)
    assert producer.sink.records == []
    with producer.batch():
        pass


@pytest.mark.parametrize("timeout", [0.5, 1, 10**9, float("inf")])
def test_any_number_of_seconds_will_do(timeout):
    producer = Producer()
    assert is_success(producer.send("t", kmsg(), timeout))
    assert is_success(producer.bulk_send("t", [kmsg()], timeout))
    with producer.batch(timeout):
        producer.send("t", kmsg())


@pytest.mark.parametrize("kmsgs", [5, None, kmsg()])
def test_a_bulk_of_what_cannot_be_iterated_is_a_failed_result(kmsgs):
    result = Producer().bulk_send("t", kmsgs)
    assert result.retcode == 400
    assert "give a list" in result.stderr


def test_a_bulk_sends_what_is_a_message_and_names_what_is_none():
    producer = Producer()
    result = producer.bulk_send("t", [kmsg("a"), 5, kmsg("b")])
    assert (result.retcode, result.stdout) == (400, "2 message(s) sent")
    assert "1 of 3 message(s) not sent, the first because: bulk_send(), at index 1: 5 is a int" in result.stderr
    assert (len(result.retval["failed"]), result.retval["sent"]) == (1, ["a", "b"])
    assert [r.key for r in producer.sink.records] == [b"a", b"b"]


@pytest.mark.parametrize("raised", [ValueError("mine"), KeyboardInterrupt(), TransportError("of kser")])
def test_an_iterable_that_raises_passes_after_what_was_handed_over_is_settled(raised, caplog):
    answers, producer = [], refusing("b")
    answer = producer.sink.answer
    producer.sink.answer = lambda record: answer(record) if answers else HOLD

    def source():
        yield kmsg("a")
        yield kmsg("b")
        answers.append(True)
        raise raised

    with pytest.raises(type(raised)) as caught:
        producer.bulk_send("t", source())
    assert caught.value is raised
    assert raised.__notes__ == ["bulk_send(): 2 message(s) came before this; not sent of these: ['b']"]
    assert [r.getMessage() for r in caplog.records] == [
        "Producer.Success: __main__.DiceRoll[a]: Message __main__.DiceRoll[a] sent in t",
        "Producer.Failed: __main__.DiceRoll[b]: not for you",
    ]
    assert producer._opened == set()


def test_a_message_whose_uuid_was_spoilt_is_named_at_the_end_of_a_batch():
    producer, spoilt = Producer(), kmsg("u")
    spoilt.uuid = 5
    with pytest.raises(DeliveryError) as caught, producer.batch():
        assert producer.send("t", spoilt).retcode == 400
    assert caught.value.extra["uuids"] == ["5"]
    assert producer.bulk_send("t", [spoilt, kmsg("b")]).retval == {"failed": ["5"], "sent": ["b"]}


def test_k99_the_key_is_the_one_given_else_that_of_the_operation_else_the_uuid():
    producer = Producer()
    registry = OperationRegistry(producer=producer, topic="t")
    step = registry.subscribe(type("Step", (Task,), {}))
    producer.send("t", kmsg("lone"))
    producer.send("t", kmsg(), key="given \udcff")
    Operation(uuid="op", tasks=[step(), step()]).launch()
    Operation(key="customer", tasks=[step()]).launch()
    Operation(uuid="sent", tasks=[step()]).send()
    assert [r.key for r in producer.sink.records] == [b"lone", b"given \xed\xb3\xbf", b"op", b"customer", b"sent"]


def test_t04_what_ends_the_process_while_waiting_is_not_swallowed():
    sink = FakeSink()

    def interrupted(timeout_s):
        raise KeyboardInterrupt

    sink.poll = sink.flush = interrupted
    with pytest.raises(KeyboardInterrupt):
        Producer(sink).send("t", kmsg())


def test_a_producer_closes_its_sink():
    with Producer() as producer:
        producer.send("t", kmsg())
    assert producer.sink.closed


# -- hooks -----------------------------------------------------------------------------------------------------------


class Hooked(Producer):
    seen: list = []  # noqa: RUF012

    @classmethod
    def onmessage(cls, kmsg):
        cls.seen.append(("onmessage", kmsg.uuid))
        kmsg.metadata["stamped"] = True
        return kmsg

    @classmethod
    def onsuccess(cls, kmsg, result):
        cls.seen.append(("onsuccess", kmsg.uuid, result.retcode))
        return result

    @classmethod
    def onerror(cls, kmsg, result):
        cls.seen.append(("onerror", kmsg.uuid, result.retcode))
        return Result(uuid=kmsg.uuid, retcode=9, stderr="changed")


def test_k95_the_hooks_are_called_and_what_they_give_counts():
    Hooked.seen.clear()
    sink = FakeSink(answer=lambda record: TransportError("no") if record.key == b"bad" else None)
    producer = Hooked(sink)
    good, bad = producer.send("t", kmsg("good")), producer.send("t", kmsg("bad"))
    assert Hooked.seen == [
        ("onmessage", "good"), ("onsuccess", "good", 0), ("onmessage", "bad"), ("onerror", "bad", 503),
    ]  # fmt: skip
    assert (good.retcode, bad.retcode, bad.stderr) == (0, 9, "changed")
    assert all(Message.loads(r.value).metadata == {"stamped": True} for r in sink.records)


@pytest.mark.parametrize("logged", [True, False])
def test_k95_the_hooks_are_called_in_batches_and_bulks_too(caplog, logged):
    caplog.set_level(logging.INFO if logged else logging.CRITICAL, logger="kser")
    for send in ("batch", "bulk"):
        Hooked.seen.clear()
        producer = Hooked()
        if send == "bulk":
            producer.bulk_send("t", [kmsg("a"), kmsg("b")])
        else:
            with producer.batch():
                producer.send("t", kmsg("a"))
                producer.send("t", kmsg("b"))
        assert [entry[:2] for entry in Hooked.seen if entry[0] != "onmessage"] == [
            ("onsuccess", "a"),
            ("onsuccess", "b"),
        ]


@pytest.mark.parametrize("hook", ["onmessage", "onsuccess", "onerror"])
def test_k79_a_hook_that_raises_changes_nothing_and_is_logged(hook, caplog):
    def broken(cls, *args):
        raise ValueError("hook broke")

    made = type("Producer", (Producer,), {hook: classmethod(broken)})
    sink = FakeSink(answer=lambda record: TransportError("no") if record.key == b"bad" else None)
    producer = made(sink)
    assert (producer.send("t", kmsg("good")).retcode, producer.send("t", kmsg("bad")).retcode) == (0, 503)
    assert producer.bulk_send("t", [kmsg("good"), kmsg("bad")]).retval["failed"] == ["bad"]
    assert any(f"Producer.{hook}() raised" in r.getMessage() and r.exc_info for r in caplog.records)


def test_hooks_may_be_static_methods():
    class Static(Producer):
        @staticmethod
        def onsuccess(kmsg, result):
            return Result(uuid=kmsg.uuid, stdout="static")

    assert Static().send("t", kmsg()).stdout == "static"


# -- many ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("convert", [list, tuple, iter, lambda m: (x for x in m)])
def test_k97_t18_bulk_send_takes_any_iterable(convert):
    producer = Producer()
    result = producer.bulk_send("t", convert([kmsg(str(n)) for n in range(3)]))
    assert (result.retcode, result.stdout) == (0, "3 message(s) sent")
    assert [r.key for r in producer.sink.records] == [b"0", b"1", b"2"]


def test_k97_nothing_to_send_is_a_success():
    assert Producer().bulk_send("t", []).stdout == "0 message(s) sent"


def test_k97_a_partial_failure_names_what_was_not_sent():
    producer = refusing("b")
    result = producer.bulk_send("t", [kmsg("a"), kmsg("b"), kmsg("c", params={"x": object()}), kmsg("d")])
    assert (result.retcode, result.stdout) == (503, "2 message(s) sent")
    assert result.retval == {"failed": ["b", "c"], "sent": ["a", "d"]}
    assert result.stderr == "2 of 4 message(s) not sent, the first because: not for you"


def test_k97_a_dead_broker_fails_the_bulk_within_its_timeout():
    begun = time.monotonic()
    result = dead().bulk_send("t", [kmsg("a"), kmsg("b")], timeout=0.1)
    assert time.monotonic() - begun < 5
    assert (result.retcode, result.retval["failed"]) == (504, ["a", "b"])


def test_in_a_batch_a_send_is_202_and_becomes_final_in_place():
    answers = []
    sink = FakeSink(answer=lambda record: None if answers else HOLD)
    producer = Producer(sink)
    with producer.batch() as inside:
        assert inside is producer
        given = [producer.send("t", kmsg(str(n))) for n in range(3)]
        assert [r.retcode for r in given] == [202] * 3
        assert not any(is_success(r) for r in given)
        assert "not yet confirmed" in given[0].stdout
        answers.append(True)
    assert [(r.retcode, r.uuid) for r in given] == [(0, "0"), (0, "1"), (0, "2")]
    assert given[0].stdout == "Message __main__.DiceRoll[0] sent in t"
    assert len(sink.records) == 3


@pytest.mark.parametrize("level", [logging.INFO, logging.CRITICAL])
def test_the_end_of_a_batch_raises_with_the_uuids_that_failed(caplog, level):
    caplog.set_level(level, logger="kser")
    producer, given = refusing("1", "3"), []
    with pytest.raises(DeliveryError, match=r"3 of 5 messages of the batch") as caught, producer.batch(timeout=5):
        for n in range(4):
            given.append(producer.send("t", kmsg(str(n))))
        given.append(producer.send("t", kmsg("too large", params={"a": "x" * 1_000_000})))
        assert given[-1].retcode == 413
    assert sorted(caught.value.extra["uuids"]) == ["1", "3", "too large"]
    assert [r.retcode for r in given] == [0, 503, 0, 503, 413]
    assert (given[1].stderr, given[1].uuid) == ("not for you", "1")


def test_the_end_of_a_batch_says_why_the_first_was_not_sent():
    """A message that is too large was refused at once, with its size, the limit and the cure: no matter of time."""
    producer = Producer()
    said = rf"1 of 2 .*: large; .* the limit is {MAX_MESSAGE_BYTES}: put "
    with pytest.raises(DeliveryError, match=said), producer.batch():
        producer.send("t", kmsg("small"))
        producer.send("t", kmsg("large", params={"a": "x" * 1_000_000}))
    producer = refusing("1")
    with pytest.raises(DeliveryError, match=r"1 of 1 .*: 1; the first because: .+"), producer.batch():
        producer.send("t", kmsg("1"))


def test_a_batch_on_a_dead_broker_ends_within_its_timeout():
    producer, begun = dead(), time.monotonic()
    with pytest.raises(DeliveryError, match=r"within 0\.2 s") as caught, producer.batch(timeout=0.2):
        results = [producer.send("t", kmsg(str(n))) for n in range(20)]
    assert time.monotonic() - begun < 5
    assert len(caught.value.extra["uuids"]) == 20
    assert "..." in caught.value.message
    assert {r.retcode for r in results} == {504}


def test_an_exception_in_the_block_passes_after_what_was_handed_over_is_settled():
    producer, given = refusing("1"), []
    with pytest.raises(ValueError, match="mine"), producer.batch():
        given += [producer.send("t", kmsg("0")), producer.send("t", kmsg("1"))]
        raise ValueError("mine")
    assert [r.retcode for r in given] == [0, 503]
    assert is_success(producer.send("t", kmsg("2")))


def test_one_batch_at_a_time_in_a_thread():
    producer = Producer()
    with producer.batch(), pytest.raises(ConfigurationError, match="open in this thread already"), producer.batch():
        pass
    with producer.batch():
        pass


def test_a_batch_belongs_to_its_thread():
    producer, others = Producer(), []
    with producer.batch():
        thread = threading.Thread(target=lambda: others.append(producer.send("t", kmsg("other")).retcode))
        thread.start()
        thread.join(5)
        assert others == [0]


def test_launches_join_a_batch():
    """DESIGN.md 9: for sends and launches alike."""
    answers = []
    producer = Producer(FakeSink(answer=lambda record: None if answers else HOLD))
    registry = OperationRegistry(producer=producer, topic="t")
    step = registry.subscribe(type("Step", (Task,), {}))
    operation = Operation(tasks=[step(), step()])
    with producer.batch():
        launched = operation.launch()
        sent = Operation(tasks=[step()]).send()
        assert (launched.retcode, sent.result.retcode) == (202, 202)
        assert operation.launch().retcode == 409
        answers.append(True)
    assert (launched.retcode, sent.result.retcode, operation.status) == (0, 0, "RUNNING")


def test_threads_may_share_a_producer():
    """Each waits for its own message, whoever serves the callback; a dead topic of one does not fail the others."""
    sink = FakeSink(answer=lambda record: HOLD if record.topic == "dead" else None)
    producer, outcomes = Producer(sink), {}
    barrier = threading.Barrier(8)

    def work(n):
        barrier.wait(5)
        topic = "dead" if n == 0 else "t"
        outcomes[n] = [producer.send(topic, kmsg(f"{n}-{i}"), timeout=0.3 if n == 0 else 10).retcode for i in range(3)]

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert outcomes == {0: [504] * 3} | {n: [0] * 3 for n in range(1, 8)}
    assert len(sink.records) == 24


def test_a_timeout_of_one_thread_does_not_drop_what_another_waits_for():
    release = []
    sink = FakeSink(answer=lambda record: None if record.topic == "slow" and release else HOLD)
    producer, outcome = Producer(sink), []
    slow = threading.Thread(target=lambda: outcome.append(producer.send("slow", kmsg("slow"), timeout=20).retcode))
    slow.start()
    end = time.monotonic() + 5
    while not sink.records and time.monotonic() < end:
        time.sleep(0.002)
    assert producer.send("dead", kmsg("dead"), timeout=0.1).retcode == 504
    assert sink.dropped == 0
    release.append(True)
    slow.join(10)
    assert outcome == [0]


def test_a_message_handed_over_while_another_thread_gives_up_is_not_dropped_with_it():
    """Between looking whether anybody else has something queued, and dropping it."""
    outcome, begun, dropped = [], [], []

    class Late(FakeSink):
        def drop_queued(self):
            thread = threading.Thread(target=lambda: outcome.append(producer.send("t", kmsg("late"), timeout=10)))
            begun.append(thread)
            thread.start()
            thread.join(0.3)  # it hands its message over now, unless it has to wait for the end of this
            super().drop_queued()
            dropped.append(True)

    producer = Producer(Late(answer=lambda record: None if dropped and record.topic == "t" else HOLD))
    assert producer.send("dead", kmsg("dead"), timeout=0.05).retcode == 504
    begun[0].join(10)
    assert [r.retcode for r in outcome] == [0]
    assert producer.sink.dropped == 1


def test_a_thread_that_has_begun_and_handed_over_nothing_yet_is_not_dropped_either():
    go_on, begun, outcome = threading.Event(), threading.Event(), []

    class Slow(Message):
        def dumps(self):
            begun.set()
            assert go_on.wait(10)
            return super().dumps()

    sink = FakeSink(answer=lambda record: HOLD if record.topic == "dead" else None)
    producer = Producer(sink)
    thread = threading.Thread(target=lambda: outcome.append(producer.send("t", Slow("late", "e"), timeout=10)))
    thread.start()
    assert begun.wait(10)
    assert producer.send("dead", kmsg("dead"), timeout=0.05).retcode == 504
    go_on.set()
    thread.join(10)
    assert ([r.retcode for r in outcome], sink.dropped) == ([0], 0)


def test_closing_while_a_thread_waits_gives_it_a_failed_result():
    class Closing(FakeSink):
        def flush(self, timeout_s):
            if self.closed:
                raise TransportError("The producer is closed: make a new one")
            return super().flush(timeout_s)

        def drop_queued(self):
            raise TransportError("The producer is closed: make a new one")

    sink, outcome = Closing(answer=lambda record: HOLD), []
    producer = Producer(sink)
    thread = threading.Thread(target=lambda: outcome.append(producer.send("t", kmsg(), timeout=30)))
    thread.start()
    end = time.monotonic() + 5
    while not sink.records and time.monotonic() < end:
        time.sleep(0.002)
    producer.close()
    thread.join(10)
    assert [(r.retcode, "The producer is closed" in r.stderr) for r in outcome] == [(504, True)]


def test_a_message_whose_own_dumps_raises_is_a_failed_result():
    class Locked(Message):
        def dumps(self):
            raise RuntimeError("no key")

    producer = Producer()
    result = producer.send("t", Locked("u", "e"))
    assert (result.retcode, "no key" in result.stderr, producer.sink.records) == (400, True, [])
    assert producer.bulk_send("t", [Locked("u", "e")]).retval["failed"] == ["u"]
