"""Contracts K-06 and K-40 to K-46: Message and its wire format. Traps T-12, T-20."""

import datetime as dt
import enum
import json
import subprocess
import sys
import uuid

import pytest

from kser import Controller, Message, MessageTooLargeError, Result, ValidationError
from kser.schemas import MessageSchema
from kser.sequencing.sequencer import encode

EXAMPLE = (
    '{"uuid": "a", "entrypoint": "e", "params": {}, "result": {"uuid": "a", "retcode": 0, "stdout": "", '
    '"stderr": "", "retval": {}}, "metadata": {}}'
)
#: What kser 0.8.27 wrote for DiceRoll (see tests/integration/test_interop_original.py), the order of keys included.
ORIGINAL = (
    '{"uuid": "872c3be0-51ac-457f-a4d9-12c2f7667b80", "entrypoint": "__main__.DiceRoll", "params": {"a": 1}, '
    '"result": {"retcode": 0, "uuid": "872c3be0-51ac-457f-a4d9-12c2f7667b80", "retval": {}, "stderr": "", '
    '"stdout": ""}, "metadata": {}}'
)


def test_k06_the_message_of_the_documented_producer():
    from kser.schemas import Message as Documented

    kmsg = Documented(uuid="u", entrypoint="__main__.DiceRoll")
    assert (kmsg.uuid, kmsg.entrypoint) == ("u", "__main__.DiceRoll")
    assert Documented is Message


@pytest.mark.parametrize("given", [None, {}])
def test_k40_without_a_result_there_is_an_empty_one_of_the_messages_uuid(given):
    kmsg = Message("u", "e", None, given, None)
    assert (kmsg.params, kmsg.metadata) == ({}, {})
    assert (kmsg.result.uuid, kmsg.result.retcode, kmsg.result.retval) == ("u", 0, {})


def test_k40_result_may_be_a_result_or_a_dict():
    result = Result(stdout="x")
    assert Message("u", "e", result=result).result is result
    made = Message("u", "e", result={"retcode": 3, "stderr": "no"}).result
    assert (made.uuid, made.retcode, made.stderr, made.stdout, made.retval) == ("u", 3, "no", "", {})


def test_k40_two_messages_share_no_default():
    one, two = Message("u", "e"), Message("u", "e")
    for name in ("params", "metadata", "result"):
        assert getattr(one, name) is not getattr(two, name)


def test_k40_a_uuid_object_becomes_text():
    value = uuid.uuid4()
    assert Message(value, "e").uuid == str(value)


def test_k41_dumps_gives_exactly_the_contracted_text():
    kmsg = Message("a", "e")
    assert kmsg.dumps() == EXAMPLE
    assert isinstance(kmsg.dumps(), str)
    assert kmsg.to_bytes() == json.dumps(json.loads(EXAMPLE), separators=(",", ":")).encode()
    assert kmsg.dump() == json.loads(EXAMPLE)


def test_k41_what_the_original_wrote_is_read():
    kmsg = Message.loads(ORIGINAL)
    assert (kmsg.uuid, kmsg.entrypoint) == ("872c3be0-51ac-457f-a4d9-12c2f7667b80", "__main__.DiceRoll")
    assert kmsg.params == {"a": 1}
    assert kmsg.result.uuid == kmsg.uuid


@pytest.mark.parametrize(
    "convert", [str, str.encode, lambda t: bytearray(t.encode()), lambda t: memoryview(t.encode())]
)
def test_k42_loads_takes_text_and_bytes(convert):
    assert Message.loads(convert(ORIGINAL)).dump() == json.loads(ORIGINAL)


def test_k42_missing_fields_get_defaults_and_unknown_ones_are_ignored():
    kmsg = Message.loads('{"uuid": "u", "entrypoint": "e", "newer": 1, "result": {"retcode": 1, "newer": 2}}')
    assert (kmsg.params, kmsg.metadata) == ({}, {})
    assert (kmsg.result.uuid, kmsg.result.retcode, kmsg.result.stdout, kmsg.result.retval) == ("u", 1, "", {})


@pytest.mark.parametrize(
    ("data", "fields"),
    [
        ({}, {"uuid", "entrypoint"}),
        ({"uuid": "u"}, {"entrypoint"}),
        ({"uuid": None, "entrypoint": "e"}, {"uuid"}),
        ({"uuid": "", "entrypoint": "e"}, {"uuid"}),
        ({"uuid": 5, "entrypoint": "e"}, {"uuid"}),
        ({"uuid": "u", "entrypoint": ["e"]}, {"entrypoint"}),
        ({"uuid": "u", "entrypoint": "e", "params": []}, {"params"}),
        ({"uuid": "u", "entrypoint": "e", "params": "{}"}, {"params"}),
        ({"uuid": "u", "entrypoint": "e", "metadata": 1}, {"metadata"}),
        ({"uuid": "u", "entrypoint": "e", "result": "ok"}, {"result"}),
        ({"uuid": "u", "entrypoint": "e", "result": {"retcode": "many"}}, {"result"}),
        ({"uuid": "u", "entrypoint": "e", "result": {"retcode": None}}, {"result"}),
        ({"uuid": "u", "entrypoint": "e", "result": {"retval": []}}, {"result"}),
        ({"uuid": 1, "entrypoint": 2, "params": 3, "metadata": 4}, {"uuid", "entrypoint", "params", "metadata"}),
    ],
)
def test_k42_wrong_types_are_named(data, fields):
    with pytest.raises(ValidationError) as caught:
        Message.loads(json.dumps(data))
    error = caught.value
    assert (error.code, error.message, error.msgid) == (400, "Failed to load message", "ERR-04413")
    assert set(error.extra) == fields
    assert all(isinstance(why, (list, dict)) for why in error.extra.values())


@pytest.mark.parametrize("name", ["params", "metadata", "result"])
def test_k43_null_is_absent(name):
    kmsg = Message.loads(json.dumps({"uuid": "u", "entrypoint": "e", name: None}))
    assert kmsg.dump() == Message("u", "e").dump()


@pytest.mark.parametrize(
    "raw",
    [
        "", "{", "nonsense", "[]", "[1]", "5", "null", "true", '"text"', b"\xff\xfe{}", b"\x80", b"", b"\x00" * 8,
        '{"uuid": "u", "entrypoint": "e"', "[" * 100_000, '{"a":' * 100_000, "1" * 5000,
    ],
)  # fmt: skip
def test_k44_t20_what_is_no_json_object_is_a_validation_error_400(raw):
    with pytest.raises(ValidationError) as caught:
        Message.loads(raw)
    assert (caught.value.code, caught.value.message) == (400, "Failed to load message")
    assert set(caught.value.extra) == {"_schema"}


@pytest.mark.parametrize("raw", [None, 5, 10**12, object(), ["x"]])
def test_k44_what_is_not_even_text_is_a_validation_error(raw):
    with pytest.raises(ValidationError, match="Failed to load message"):
        Message.loads(raw)


class Color(enum.Enum):
    RED = "red"


CIRCLE = {}
CIRCLE["self"] = CIRCLE


@pytest.mark.parametrize("method", ["dumps", "to_bytes"])
@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({"params": {"when": dt.datetime(2026, 1, 1)}}, "params['when']"),
        ({"params": {"a": [{"b": object()}]}}, "params['a'][0]['b']"),
        ({"params": {"a": {1, 2}}}, "params['a']"),
        ({"params": {"a": b"bytes"}}, "params['a']"),
        ({"params": {"a": float("nan")}}, "params['a']"),
        ({"params": {"a": [float("inf")]}}, "params['a'][0]"),
        ({"params": {"a": 10**6000}}, "params['a']"),
        ({"params": {(1, 2): "x"}}, "params key (1, 2)"),
        ({"result": Result(retval={"a": object()})}, "result.retval['a']"),
        ({"result": Result(stdout=b"bytes")}, "result['stdout']"),
        ({"metadata": {"m": object()}}, "metadata['m']"),
    ],
)
def test_k45_what_json_has_no_form_for_is_named(method, fields, where):
    with pytest.raises(ValidationError) as caught:
        getattr(Message("u", "e", **fields), method)()
    assert (caught.value.code, caught.value.extra["field"]) == (400, where)
    assert f"Message e[u] cannot be written as JSON: {where} is " in caught.value.message


@pytest.mark.parametrize("method", ["dumps", "to_bytes"])
def test_k45_a_circle_and_too_deep_nesting_are_refused(method):
    deep = {}
    for _ in range(3000):
        deep = {"a": deep}
    for params in (CIRCLE, deep):
        with pytest.raises(ValidationError, match="nested too deep"):
            getattr(Message("u", "e", params), method)()


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (2**70, 2**70),  # beyond 64 bits
        (-(2**63), -(2**63)),
        (1.5, 1.5),
        ((1, 2), [1, 2]),
        ({1: "a", None: "b", 2.5: "c"}, {"1": "a", "null": "b", "2.5": "c"}),
        (uuid.UUID(int=5), str(uuid.UUID(int=5))),
        (Color.RED, "red"),
        ("\udcff", "\udcff"),  # a file name that is no UTF-8
        ("\u2028 é 💥 \x00", "\u2028 é 💥 \x00"),
    ],
)
def test_k45_both_ways_of_writing_agree(value, written):
    kmsg = Message("u", "e", {"v": value}, Result(uuid="u", retval={"v": value}))
    for text in (kmsg.dumps(), kmsg.to_bytes()):
        assert json.loads(text)["params"] == json.loads(text)["result"]["retval"] == {"v": written}
        assert Message.loads(text).params == {"v": written}


def test_k45_deep_nesting_is_carried_as_far_as_json_can():
    for depth in (100, 300, 700):
        deep = 1
        for _ in range(depth):
            deep = {"a": [deep]} if depth < 400 else {"a": deep}
        kmsg = Message("u", "e", {"deep": deep})
        assert Message.loads(kmsg.to_bytes()).params == Message.loads(kmsg.dumps()).params == {"deep": deep}


def test_k46_t12_the_schema_uses_nothing_that_marshmallow_deprecates():
    """Own schemas load with every warning of marshmallow an error; cdumay_result's own is the one exception."""
    code = (
        "import warnings\n"
        "with warnings.catch_warnings():\n"
        "    warnings.simplefilter('ignore')\n"
        "    import cdumay_result, cdumay_error\n"
        "warnings.simplefilter('error')\n"
        "import kser.schemas\n"
        'print(kser.schemas.Message.loads(\'{"uuid": "u", "entrypoint": "e"}\').dumps())\n'
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["uuid"] == "u"


def test_the_schema_is_the_contract():
    assert set(MessageSchema().fields) == {"uuid", "entrypoint", "params", "result", "metadata"}
    assert {name for name, field in MessageSchema().fields.items() if field.required} == {"uuid", "entrypoint"}


# -- TRANSPORT -------------------------------------------------------------------------------------------------------


class Reversed(Message):
    """Stands for encryption: the text is written backwards."""

    @classmethod
    def loads(cls, json_data):
        text = json_data if isinstance(json_data, str) else bytes(json_data).decode()
        return super().loads(text[::-1])

    def dumps(self):
        return super().dumps()[::-1]


def test_k102_an_overridden_dumps_decides_what_is_sent():
    kmsg = Reversed("u", "e", {"a": 1})
    assert kmsg.to_bytes() == kmsg.dumps().encode()
    assert kmsg.to_bytes().startswith(b"}")
    assert Reversed.loads(kmsg.to_bytes()).dump() == kmsg.dump()
    with pytest.raises(ValidationError):
        Message.loads(kmsg.to_bytes())


def test_k102_a_plain_message_is_sent_as_the_transport_of_the_controller():
    plain, own = Message("u", "e", {"a": 1}, Result(uuid="r"), {"m": 1}), Reversed("u", "e")
    made = plain.sent_as(Reversed)
    assert type(made) is Reversed
    assert made.dump() == plain.dump()
    assert plain.sent_as(Message) is plain
    assert own.sent_as(Message) is own
    assert Controller.TRANSPORT is Message


# -- size ------------------------------------------------------------------------------------------------------------


def test_encode_refuses_what_is_over_the_limit_with_size_limit_and_cure():
    kmsg = Message("u", "e", {"a": "x" * 2000})
    size = len(kmsg.to_bytes())
    assert encode(kmsg, size) == kmsg.to_bytes()
    with pytest.raises(MessageTooLargeError) as caught:
        encode(kmsg, size - 1)
    error = caught.value
    assert (error.code, error.extra["size"], error.extra["limit"]) == (413, size, size - 1)
    assert (error.extra["uuid"], error.extra["entrypoint"]) == ("u", "e")
    for part in ("Message e[u]", str(size), str(size - 1), "reference", "nest"):
        assert part in error.message


def test_encode_tells_a_dumps_that_raises():
    class Locked(Message):
        def dumps(self):
            raise RuntimeError("no key")

    with pytest.raises(ValidationError, match=r"Locked\.dumps\(\) raised RuntimeError\('no key'\)"):
        encode(Locked("u", "e"))


def test_repr_and_str_show_the_message():
    kmsg = Message("u", "e", {"a": 1})
    assert repr(kmsg) == "Message<uuid='u', entrypoint='e', result=>"
    assert str(kmsg) == str(kmsg.dump())
