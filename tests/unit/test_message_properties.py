"""Properties of the envelope: what is written is read, and the short cuts give what the schema gives."""

import contextlib
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from marshmallow import ValidationError as SchemaError

from kser import Controller, Message, Result, ValidationError
from kser.schemas import MessageSchema, parse

# Text with lone surrogates, integers beyond 64 bits and finite floats: all that Python's json can write and read.
text = st.text(st.characters(), max_size=8)
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(2**80), 2**80)
    | st.floats(allow_nan=False, allow_infinity=False)
    | text
)
values = st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(text, inner), max_leaves=12)
objects = st.dictionaries(text, values, max_size=4)
messages = st.builds(
    Message,
    uuid=text.filter(bool),
    entrypoint=text.filter(bool),
    params=objects,
    metadata=objects,
    result=st.none()
    | st.builds(Result, retcode=st.integers(), stdout=text, stderr=text, retval=objects, uuid=text.filter(bool)),
)


@given(messages)
@settings(deadline=None, max_examples=100)
def test_what_is_written_is_read_whichever_way_it_was_written(kmsg):
    data = kmsg.dump()
    assert json.loads(kmsg.dumps()) == json.loads(kmsg.to_bytes()) == data
    assert Message.loads(kmsg.dumps()).dump() == data
    assert Message.loads(kmsg.to_bytes()).dump() == data
    assert Message.loads(kmsg.dumps().encode()).dump() == data


@given(st.lists(st.integers(0, 1), max_size=700), scalars)
@settings(deadline=None, max_examples=50)
def test_deep_nesting_comes_through(shape, leaf):
    value = leaf
    for kind in shape:
        value = {"k": value} if kind else [value]
    kmsg = Message("u", "e", {"v": value})
    assert Message.loads(kmsg.to_bytes()).params == Message.loads(kmsg.dumps()).params == {"v": value}


@given(st.integers(-(10**40), 10**40) | st.integers(2**63 - 3, 2**64 + 3) | st.integers(-(2**63) - 3, -(2**63) + 3))
@settings(deadline=None)
def test_whole_numbers_of_any_size_stay_whole(number):
    for raw in (Message("u", "e", {"n": number}).to_bytes(), Message("u", "e", {"n": number}).dumps()):
        read = Message.loads(raw).params["n"]
        assert read == number
        assert type(read) is int


# JSON objects that look like a message, with everything wrong that a producer can get wrong.
almost_results = st.dictionaries(
    st.sampled_from(["uuid", "retcode", "stdout", "stderr", "retval", "more"]),
    st.text(max_size=3) | st.integers(-3, 600) | st.booleans() | st.none() | st.floats(allow_nan=False) | values,
    max_size=6,
) | st.fixed_dictionaries(
    {},
    optional={
        "uuid": st.text(max_size=3), "retcode": st.integers(), "stdout": st.text(max_size=3),
        "stderr": st.text(max_size=3), "retval": objects, "more": values,
    },
)  # fmt: skip
almost_messages = st.fixed_dictionaries(
    {},
    optional={
        "uuid": st.sampled_from(["u", "", None, 5, []]) | text,
        "entrypoint": st.sampled_from(["e", "", None, 5, {}]) | text,
        "params": st.none() | objects | values,
        "metadata": st.none() | objects | values,
        "result": st.none() | almost_results | values,
        "more": values,
    },
) | st.fixed_dictionaries(
    {"uuid": text.filter(bool), "entrypoint": text.filter(bool)},
    optional={"params": objects, "metadata": objects, "result": almost_results},
)


def _by_the_schema(data):
    return Message(**MessageSchema().load(data))


@given(almost_messages | values)
@settings(deadline=None, max_examples=250, suppress_health_check=[HealthCheck.too_slow])
def test_the_short_cut_accepts_refuses_and_reads_what_the_schema_does(data):
    raw = json.dumps(data)
    try:
        expected = _by_the_schema(json.loads(raw))
    except SchemaError as refused:
        wrong = refused.messages_dict
        for given_ in (raw, raw.encode()):
            with pytest.raises(ValidationError, match="Failed to load message") as caught:
                Message.loads(given_)
            assert caught.value.extra == wrong
            assert caught.value.code == 400
        return
    for given_ in (raw, raw.encode()):
        found = Message.loads(given_).dump()
        wanted = expected.dump()
        result = data.get("result")
        if isinstance(result, dict) and result.get("uuid") == "":
            found["result"].pop("uuid"), wanted["result"].pop("uuid")  # an empty one becomes a random one
        assert found == wanted
        assert [type(v) for v in found["result"].values()] == [type(v) for v in wanted["result"].values()]


@given(
    st.binary(max_size=60)
    | st.text(max_size=60)
    | st.text(st.sampled_from('{}[]",:0123456789.eE-+ ntfu\\'), max_size=40)
)
@settings(deadline=None, max_examples=300)
def test_reading_raises_nothing_but_a_validation_error_and_a_controller_nothing_at_all(raw):
    with contextlib.suppress(ValidationError):
        Message.loads(raw)
    result = Controller.run(raw)
    assert isinstance(result, Result)
    assert result.retcode == 400
    assert isinstance(result.uuid, str)


@given(values)
@settings(deadline=None)
def test_parse_reads_what_the_standard_library_reads(value):
    raw = json.dumps(value)
    assert parse(raw) == parse(raw.encode()) == value
    assert json.dumps(parse(raw)) == raw
