"""Events of the sequence: their form, their identity, and what readers make of them."""

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kser import Result, ValidationError
from kser.events import MAX_BYTES, Event, EventType, OperationView, events_topic, follow, read
from kser.results import dump
from kser.tracebacks import TracebackInfo
from kser.transport import Record

STARTED, DONE, FAILED, ENDED = (
    EventType.OPERATION_STARTED,
    EventType.STEP_DONE,
    EventType.STEP_FAILED,
    EventType.OPERATION_ENDED,
)


def event(type_=DONE, uuid="u", **fields):
    return Event(type=type_, uuid=uuid, entrypoint="shop.Step", **fields)


def of(*events):
    return [
        Record("g.events", 0, n, b"k", e.to_bytes() if isinstance(e, Event) else e, [], 0) for n, e in enumerate(events)
    ]


class Pages:
    """A Reader that gives these lists of records, then nothing."""

    def __init__(self, *pages):
        self.pages = list(pages)

    def poll(self, timeout_s, max_records=500):
        if self.pages:
            return self.pages.pop(0)
        time.sleep(min(timeout_s, 0.01))
        return []


def test_the_topic_of_a_group():
    assert events_topic("shop") == "shop.events"


def test_the_form_on_the_wire():
    told = event(operation="op", parent="inner", run=2, position=3, status="SUCCESS", note="n",
                 result=Result(uuid="u", stdout="out", retval={"a": 1}), params={"order": 7})  # fmt: skip
    data = json.loads(told.to_bytes("w1"))
    at = data.pop("at")
    assert data == {
        "v": 1, "type": "step.done", "uuid": "u", "entrypoint": "shop.Step", "operation": "op", "parent": "inner",
        "run": 2, "position": 3, "phase": 1, "status": "SUCCESS", "worker": "w1", "params": {"order": 7}, "note": "n",
        "result": {"uuid": "u", "retcode": 0, "stdout": "out", "stderr": "", "retval": {"a": 1}},
    }  # fmt: skip
    assert abs(at - time.time() * 1000) < 60_000


def test_what_is_empty_is_left_out():
    data = json.loads(event().to_bytes())
    assert not {"params", "note", "result"} & set(data)
    assert Event.loads(event().to_bytes()).result is None


def test_params_are_masked():
    data = json.loads(event(params={"password": "p", "order": 1}).to_bytes())
    assert data["params"] == {"password": "********", "order": 1}


text = st.text(st.characters(), max_size=8)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | text | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@given(
    st.builds(
        Event,
        type=st.sampled_from([STARTED, DONE, FAILED, ENDED]),
        uuid=text,
        entrypoint=text,
        operation=st.none() | text,
        parent=st.none() | text,
        run=st.integers(1, 9),
        position=st.integers(0, 99),
        status=st.sampled_from(["RUNNING", "SUCCESS", "FAILED"]),
        result=st.none() | st.builds(Result, retcode=st.integers(), stdout=text, retval=st.dictionaries(text, values)),
        params=st.just({}),
        note=text,
        at=st.integers(1, 2**45),
        worker=text,
        attempt=st.integers(1, 9),
        began=st.integers(0, 2**45),
        trace=st.none() | st.builds(TracebackInfo, exception=text, cut=st.just(0), cause=st.none(), how=st.just("")),
    )
)
@settings(deadline=None)
def test_what_is_written_is_read(told):
    found = Event.loads(told.to_bytes())
    assert found._replace(result=None) == told._replace(result=None)
    assert (found.result and dump(found.result)) == (told.result and dump(told.result))
    assert found.identity == told.identity


@pytest.mark.parametrize(
    "value",
    [
        object(),
        {1, 2},
        b"bytes",
        {(1, 2): 3},
        pytest.param(10**6000, id="huge"),
        float("nan"),
        "\udcff",
        Exception("x"),
    ],
)
def test_writing_never_fails_and_what_was_written_is_read(value):
    result = Result(uuid="r", retval={"odd": value, "plain": 1})
    found = Event.loads(event(result=result, params={"odd": value}).to_bytes())
    assert found.result.retval["plain"] == 1
    assert "odd" in found.result.retval


def test_circles_and_deep_nesting_are_written():
    circle, deep = {}, 1
    circle["self"] = circle
    for _ in range(900):
        deep = [deep]
    found = Event.loads(event(result=Result(retval={"c": circle, "d": deep}), params={"c": circle}).to_bytes())
    assert set(found.result.retval) == {"c", "d"}


def test_a_result_that_is_too_large_is_told_with_a_note_instead():
    told = event(result=Result(1, "o" * 10_000, "e" * 10_000, {"big": "x" * MAX_BYTES}), params={"p": "y" * 5000})
    raw = told.to_bytes()
    found = Event.loads(raw)
    assert len(raw) < 20_000
    assert (found.result.retcode, len(found.result.stdout), len(found.result.stderr)) == (1, 4096, 4096)
    assert f"the limit is {MAX_BYTES}" in found.result.retval["truncated"]
    assert found.identity == told.identity


def test_params_that_a_task_changes_meanwhile_are_left_out():
    """One that was given up, over its time, may still be at work with them."""

    class Grows(dict):
        def items(self):
            for item in super().items():
                self[len(self)] = "more"
                yield item

    told = event(result=Result(stdout="x"), params={"rows": Grows(a=1)})
    found = Event.loads(told.to_bytes())
    assert (found.params, found.result.stdout) == ({}, "x")


def test_large_params_are_left_out_before_a_result_is_cut():
    told = event(result=Result(0, "out", "", {"big": "x" * 1000}), params={"p": "y" * MAX_BYTES})
    found = Event.loads(told.to_bytes())
    assert (found.params, found.result.retval) == ({}, {"big": "x" * 1000})


@pytest.mark.parametrize("params", [None, 5, object(), [1]])
def test_params_that_a_task_has_replaced_by_something_else_are_left_out(params):
    assert "params" not in json.loads(event(params=params).to_bytes())


@pytest.mark.parametrize(
    "raw", [None, b"", b"{", b"[]", b"5", b"null", b"{}", b'{"type": "x"}', b"\xff",
            b'{"type": "x", "uuid": "u", "entrypoint": "e", "result": {"odd": 1}}',
            b'{"type": "x", "uuid": "u", "entrypoint": "e", "result": 5}'],
)  # fmt: skip
def test_what_is_no_event_is_refused(raw):
    with pytest.raises(ValidationError):
        Event.loads(raw)


def test_an_event_of_a_newer_release_is_read():
    data = json.loads(event().to_bytes()) | {"v": 9, "type": "step.paused", "more": {"x": 1}}
    found = Event.loads(json.dumps(data).encode())
    assert (found.type, found.phase) == ("step.paused", 1)


# -- identity --------------------------------------------------------------------------------------------------------


def test_a_repetition_is_the_same_event_whoever_tells_it_when():
    one = event(operation="op", position=3, at=1, worker="a")
    again = event(operation="op", position=3, at=2, worker="b", result=Result(stdout="differs"))
    assert one.identity == again.identity
    assert len({e.identity for e in (
        one, one._replace(position=4), one._replace(run=2), one._replace(uuid="v"), one._replace(type=FAILED),
        one._replace(operation="other"), one._replace(type=ENDED),
    )}) == 7  # fmt: skip


def test_events_are_keyed_by_the_root_operation():
    assert event(operation="root", parent="inner").key == "root"
    assert event().key == "u"


def test_phases_order_the_events_of_one_position():
    order = sorted([event(ENDED), event(DONE), event(STARTED)], key=lambda e: e.phase)
    assert [e.type for e in order] == [STARTED, DONE, ENDED]
    assert event(FAILED).phase == event(EventType.MESSAGE_REJECTED).phase == 1


@pytest.mark.parametrize(
    ("told", "ends"),
    [
        (event(DONE), True),  # a lone task
        (event(FAILED), True),
        (event(DONE, operation="op"), False),
        (event(ENDED, uuid="op", operation="op"), True),
        (event(ENDED, uuid="inner", operation="op", parent="op"), False),
        (event(STARTED, uuid="op", operation="op"), False),
    ],
)
def test_what_ends_an_operation_or_a_lone_task(told, ends):
    assert told.ends is ends


# -- readers ---------------------------------------------------------------------------------------------------------


def test_read_passes_over_what_is_no_event():
    found = list(read(of(event(uuid="a"), b"nonsense", None, event(uuid="b"))))
    assert [e.uuid for e in found] == ["a", "b"]


def test_follow_gives_each_event_once_and_ends_in_time():
    first, again = event(uuid="a", at=1), event(uuid="a", at=2, worker="other")
    begun = time.monotonic()
    found = list(follow(Pages(of(first, event(uuid="b")), [], of(again, event(uuid="c"))), timeout_s=0.2))
    assert [e.uuid for e in found] == ["a", "b", "c"]
    assert time.monotonic() - begun < 5
    assert list(follow(Pages(of(first)), timeout_s=0)) == []


def test_a_view_of_an_operation():
    view = OperationView("op")
    assert (view.status, view.ended) == ("PENDING", False)
    result = Result(stdout="all done")
    steps = [event(uuid=f"s{n}", operation="op", position=n, status="SUCCESS") for n in range(2)]
    assert view.apply(event(STARTED, uuid="op", operation="op", status="RUNNING"))
    assert (view.status, view.entrypoint) == ("RUNNING", "shop.Step")
    assert [view.apply(e) for e in (steps[0], steps[0]._replace(worker="again"), steps[1])] == [True, False, True]
    assert not view.apply(event(uuid="x", operation="another"))
    assert view.apply(event(ENDED, uuid="inner", operation="op", parent="op", position=2, status="FAILED"))
    assert (view.status, view.ended) == ("RUNNING", False)  # that was a nested one
    assert view.apply(event(ENDED, uuid="op", operation="op", position=2, status="SUCCESS", result=result))
    assert (view.status, view.ended, view.result, [e.uuid for e in view.steps]) == (
        "SUCCESS",
        True,
        result,
        ["s0", "s1"],
    )


def test_a_view_of_a_lone_task():
    view = OperationView("u")
    view.apply(event(FAILED, status="FAILED", result=Result(1)))
    assert (view.status, view.ended, view.entrypoint) == ("FAILED", True, "shop.Step")
