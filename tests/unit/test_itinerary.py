"""The itinerary: what travels with a message of an operation. Pure data."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kser import ItineraryError, Message, Result
from kser.sequencing.itinerary import (
    MAX_DEPTH,
    METADATA_KEY,
    End,
    Entry,
    Frame,
    Itinerary,
    key_bytes,
    message_key,
)

A, B, C = ({"uuid": name, "entrypoint": "shop.Step", "params": {"n": name}} for name in "abc")


def frame(uuid="op", *tasks, **fields):
    return Frame(uuid, "shop.Op", {"p": 1}, tasks=list(tasks), **fields)


def kmsg(metadata=None, uuid="u"):
    return Message(uuid, "e", metadata=metadata)


# -- on the wire -----------------------------------------------------------------------------------------------------


def test_the_form_on_the_wire():
    """As the module's docstring has it; what is empty is left out."""
    itinerary = Itinerary((frame("root", B, topic="t", key="k", metadata={"m": 1}), frame("inner")), 3, 2, new=True)
    assert itinerary.dump() == {
        "v": 1,
        "run": 2,
        "position": 3,
        "new": True,
        "ops": [
            {"uuid": "root", "entrypoint": "shop.Op", "params": {"p": 1}, "topic": "t", "key": "k",
             "metadata": {"m": 1}, "tasks": [B]},
            {"uuid": "inner", "entrypoint": "shop.Op", "params": {"p": 1}, "tasks": []},
        ],
    }  # fmt: skip
    assert Itinerary(children=[A], key="k", end=End(C, "FAILED")).dump() == {
        "v": 1, "run": 1, "position": 0, "ops": [], "key": "k", "tasks": [A], "end": {"task": C, "status": "FAILED"},
    }  # fmt: skip


def test_a_message_without_an_itinerary_belongs_to_no_operation():
    assert Itinerary.of(kmsg()) is None
    assert Itinerary.of(kmsg({"other": 1})) is None
    assert Itinerary.of(kmsg({METADATA_KEY: None})) is None


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (5, "expected an object, found int"),
        ([], "expected an object, found list"),
        ({}, "'v' is missing"),
        ({"v": "1"}, "'v' is a str, expected int"),
        ({"v": True}, "'v' is a bool, expected int"),
        ({"v": 1, "ops": {}}, "'ops' is a dict, expected list"),
        ({"v": 1, "ops": [5]}, "expected an object, found int"),
        ({"v": 1, "ops": [{"uuid": "u"}]}, "'entrypoint' is missing"),
        ({"v": 1, "ops": [{"uuid": 5, "entrypoint": "e"}]}, "'uuid' is a int, expected str"),
        ({"v": 1, "ops": [{"uuid": "u", "entrypoint": "e", "params": []}]}, "'params' is a list, expected dict"),
        ({"v": 1, "ops": [{"uuid": "u", "entrypoint": "e", "tasks": {}}]}, "'tasks' is a dict, expected list"),
        ({"v": 1, "position": "3"}, "'position' is a str, expected int"),
        ({"v": 1, "run": 1.5}, "'run' is a float, expected int"),
        ({"v": 1, "new": 1}, "'new' is a int, expected bool"),
        ({"v": 1, "tasks": {}}, "'tasks' is a dict, expected list"),
        ({"v": 1, "ops": [A], "end": {"task": A}}, "'status' is missing"),
        ({"v": 1, "ops": [A], "end": {"status": "SUCCESS"}}, "'task' is missing"),
        ({"v": 1, "end": {"task": A, "status": "SUCCESS"}}, "an end without an operation"),
    ],
)
def test_what_cannot_be_read_is_named(data, said):
    with pytest.raises(ItineraryError, match=said) as caught:
        Itinerary.of(kmsg({METADATA_KEY: data}))
    assert caught.value.code == 400
    assert caught.value.extra["uuid"] == "u"
    assert caught.value.extra["entrypoint"] == "e"


@pytest.mark.parametrize("version", [0, 2, 99])
def test_a_version_this_release_does_not_know_is_refused_with_what_to_do(version):
    with pytest.raises(
        ItineraryError, match=rf"Itinerary of version {version}: .* reads 1; update the worker"
    ) as caught:
        Itinerary.load({"v": version})
    assert caught.value.extra == {"version": version, "reads": [1]}


def test_an_entry_has_defaults_and_is_checked():
    entry = Entry.load({"uuid": "u", "entrypoint": "e"})
    assert (entry.params, entry.topic, entry.key, entry.metadata, entry.tasks) == ({}, None, None, {}, None)
    assert entry.params is not Entry.load({"uuid": "u", "entrypoint": "e"}).params
    for wrong in (5, None, [], {"uuid": "u"}, {"uuid": "u", "entrypoint": 5}, {**A, "tasks": "x"}, {**A, "key": 5}):
        with pytest.raises(ItineraryError):
            Entry.load(wrong)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["v", "ops", "uuid", "entrypoint", "tasks", "end", "task", "params"]), inner)
    ),
    max_leaves=10,
)


@given(json_values | st.fixed_dictionaries({"v": st.just(1)}, optional={"ops": json_values, "end": json_values}))
@settings(deadline=None)
def test_anything_is_read_or_refused_with_an_itinerary_error_and_always_has_a_key(data):
    message = kmsg({METADATA_KEY: data})
    assert isinstance(message_key(message), str)
    assert isinstance(key_bytes(message_key(message)), bytes)
    try:
        found = Itinerary.of(message)
    except ItineraryError:
        return
    assert found is None or Itinerary.load(found.dump()) == found


# -- steps -----------------------------------------------------------------------------------------------------------


def test_steps_take_the_tasks_one_by_one_and_change_nothing_behind():
    start = Itinerary((frame("op", A, B),), 0, new=True)
    entry, first = start.step()
    assert (entry.uuid, first.frames[0].tasks, first.new) == ("a", [B], True)
    entry, second = first.passed().step()
    assert (entry.uuid, second.frames[0].tasks, second.position, second.new) == ("b", [], 1, False)
    assert second.passed().step() is None
    assert start.frames[0].tasks == [A, B]


def test_a_step_carries_the_children_and_the_key_of_its_own_task_only():
    start = Itinerary((frame("op", {**A, "tasks": [C], "key": "k"}, B),))
    _, first = start.step()
    assert (first.children, first.key) == ([C], "k")
    _, second = first.step()
    assert (second.children, second.key) == (None, None)


def test_entering_and_leaving():
    around = Itinerary((frame("root", B),), 4, children=(A,), key="k")
    inside = around.enter(frame("inner", C))
    assert [f.uuid for f in inside.frames] == ["root", "inner"]
    assert (inside.root.uuid, inside.innermost.uuid) == ("root", "inner")
    assert (inside.children, inside.key, inside.position) == (None, None, 4)
    assert inside.leave().frames == around.frames


def test_nesting_is_bounded():
    itinerary = Itinerary()
    for n in range(MAX_DEPTH):
        itinerary = itinerary.enter(frame(str(n)))
    with pytest.raises(ItineraryError, match="does an operation build itself as its own task") as caught:
        itinerary.enter(frame("one more"))
    assert caught.value.extra == {"uuid": "one more", "entrypoint": "shop.Op"}


# -- where a message goes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("own", "inner", "outer", "wanted"),
    [
        ("own", "inner", "outer", "own"),
        (None, "inner", "outer", "inner"),
        (None, None, "outer", "outer"),
        (None, None, None, None),  # the one that the message being handled came from
    ],
)
def test_the_topic_of_an_entry(own, inner, outer, wanted):
    itinerary = Itinerary((frame("root", topic=outer), frame("inner", topic=inner)))
    assert itinerary.topic_of(Entry("u", "e", {}, topic=own)) == wanted


@pytest.mark.parametrize(
    ("own", "inner", "outer", "wanted"),
    [
        ("own", "inner", "outer", "own"),
        (None, "inner", "outer", "inner"),
        (None, None, "outer", "outer"),
        (None, None, None, "root"),  # the root's uuid: K-99
    ],
)
def test_the_key_of_an_entry_is_the_same_whoever_sends_it(own, inner, outer, wanted):
    itinerary = Itinerary((frame("root", key=outer), frame("inner", key=inner)))
    entry = Entry("u", "e", {}, key=own)
    assert itinerary.key_of(entry) == wanted
    sent = itinerary._replace(key=own).message(entry, Result())
    assert message_key(Message.loads(sent.to_bytes())) == wanted


def test_the_key_of_a_lone_message_is_its_uuid():
    assert message_key(kmsg(uuid="lone")) == "lone"
    assert message_key(kmsg({METADATA_KEY: {"v": 1, "ops": []}}, uuid="lone")) == "lone"
    assert Itinerary().key_of() is None


def test_a_message_has_the_entrys_own_metadata_beside_the_itinerary():
    itinerary = Itinerary((frame("op"),), 2)
    sent = itinerary.message(Entry("u", "e", {"a": 1}, metadata={"m": 1, METADATA_KEY: "old"}), Result(stdout="r"))
    assert (sent.uuid, sent.entrypoint, sent.params, sent.result.stdout) == ("u", "e", {"a": 1}, "r")
    assert sent.metadata == {"m": 1, METADATA_KEY: itinerary.dump()}
    assert Itinerary.of(Message.loads(sent.to_bytes())) == itinerary


def test_any_text_can_be_a_key():
    assert key_bytes("é") == "é".encode()
    assert key_bytes("\udcff") == b"\xed\xb3\xbf"


def test_the_wire_form_is_plain_json():
    itinerary = Itinerary((frame("op", A, B),), end=End(C, "SUCCESS"), children=[A])
    assert Itinerary.load(json.loads(json.dumps(itinerary.dump()))) == itinerary
