"""Contracts K-09, K-22 and K-34 to K-39: results and errors. Traps T-06, T-13, T-14."""

import subprocess
import sys

import cdumay_error.types
import cdumay_result
import marshmallow
import pytest

import kser
from kser import Controller, Message, Operation, Result, Task, ValidationError, errors, results
from kser.results import from_exception, is_success, json_safe, merge
from tests.unit.fakes import FakeSink, Producer


def test_k09_results_are_those_of_cdumay_result_which_is_left_as_it_is():
    """Nothing of cdumay_result is replaced by importing kser: its own merge still works in place (DESIGN.md 9)."""
    assert kser.Result is cdumay_result.Result
    before = (
        "import cdumay_result, cdumay_error\n"
        "def look():\n"
        "    return [(m.__name__, n, id(v)) for m in (cdumay_result, cdumay_error) for n, v in sorted(vars(m).items())]"
        " + [(n, id(v)) for n, v in sorted(vars(cdumay_result.Result).items())]\n"
        "seen = look()\n"
        "import kser, kser.worker, kser.producer\n"
        "assert [x for x in look() if 'types' not in x] == [x for x in seen if 'types' not in x]\n"
    )
    subprocess.run([sys.executable, "-c", before], check=True, timeout=60)
    a = cdumay_result.Result(retval={"a": 1})
    assert a + cdumay_result.Result(retval={"b": 2}) is a


# -- the success rule ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("retcode", [-1, 0, 1, 200, 202, 299, 300, 500])
def test_k38_t06_retcode_0_is_the_one_success_everywhere(retcode, caplog):
    caplog.set_level("INFO", logger="kser")
    good = retcode == 0
    word = "Success" if good else "Failed"

    class Coded(Task):
        def run(self):
            return Result(retcode=retcode)

    class Known(Controller):
        ENTRYPOINTS = {Coded.path: Coded}  # noqa: RUF012 - the published interface

    class Answers(Producer):
        """A producer one of whose hooks turns the outcome round."""

        outcomes: list = []  # noqa: RUF012

        @classmethod
        def onsuccess(cls, kmsg, result):
            return Result(uuid=kmsg.uuid, retcode=retcode)

    task = Coded()
    operation = Operation(tasks=[Coded()])
    assert is_success(Result(retcode=retcode)) is good
    task.execute()
    operation.execute()
    assert (task.status, operation.status) == (("SUCCESS", "SUCCESS") if good else ("FAILED", "FAILED"))
    Known.run(Coded(uuid="c").to_Message().dumps())
    lines = [r.getMessage() for r in caplog.records]
    assert f"Coded.{word}: {Coded.path}[{task.uuid}]: " in lines
    assert f"Known.{word}: {Coded.path}[c]: " in lines
    assert any(line.startswith(f"Operation.{word}: ") for line in lines)
    assert Answers(FakeSink()).send("t", Message("u", "e")).retcode == retcode


# -- Result ----------------------------------------------------------------------------------------------------------


def test_k34_the_result_and_its_defaults():
    result = Result()
    assert (result.retcode, result.stdout, result.stderr, result.retval) == (0, "", "", {})
    assert Result().uuid != result.uuid
    assert Result().retval is not result.retval
    given = Result(1, "out", "err", {"a": 1}, "u")
    assert (given.retcode, given.stdout, given.stderr, given.retval, given.uuid) == (1, "out", "err", {"a": 1}, "u")
    assert str(given) == "err"
    assert str(Result(stdout="out", stderr="err")) == "out"
    assert repr(Result()) == "Result<retcode='0'>"


def test_k35_print_and_search_value():
    result = Result(retval={"a": {"b": 1}, "c": [1, 2]})
    result.print("x")
    result.print(5)
    result.print_err("y")
    assert (result.stdout, result.stderr) == ("x\n5\n", "y\n")
    assert result.search_value("a.b") == 1
    assert result.search_value("c[*]") == [1, 2]
    assert result.search_value("z", default="none") == "none"
    with pytest.raises(ValidationError):
        result.search_value("z", fail_if_no_match=True)


def test_k22_merge_gives_a_new_result_and_changes_neither():
    old = Result(retcode=7, stdout="old out", stderr="old err", retval={"a": 1, "b": 1}, uuid="old")
    new = Result(stdout="new out", retval={"b": 2}, uuid="new")
    merged = merge(old, new, "u")
    assert merged not in (old, new)
    assert (merged.retcode, merged.stdout, merged.stderr, merged.uuid) == (0, "new out", "old err", "u")
    assert merged.retval == {"a": 1, "b": 2}
    assert merged.retval is not old.retval
    assert (old.retval, old.retcode, old.uuid) == ({"a": 1, "b": 1}, 7, "old")
    assert (new.retval, new.stderr, new.uuid) == ({"b": 2}, "", "new")


# -- exceptions ------------------------------------------------------------------------------------------------------


def _raised(exc):
    try:
        raise exc
    except BaseException as caught:
        return caught


def test_k36_an_ordinary_exception():
    result = from_exception(_raised(KeyError("missing")), "U")
    error = result.retval["error"]
    assert (result.retcode, result.stderr, result.uuid) == (500, "'missing'", "U")
    assert set(error) == {"code", "name", "message", "msgid", "extra", "stack"}
    assert (error["code"], error["name"], error["msgid"]) == (500, "InternalError", "ERR-29885")
    assert error["message"] == "'missing'"
    assert error["extra"]["type"] == "KeyError"
    assert error["stack"].startswith("Traceback (most recent call last)")
    assert "raise exc" in error["stack"]


def test_k36_an_exception_without_a_text_is_named():
    assert from_exception(_raised(OSError()), "U").stderr == "OSError"


def test_k36_what_ends_the_process_is_told_with_its_name():
    assert from_exception(_raised(SystemExit(3)), "U").stderr == "SystemExit: 3"
    assert from_exception(_raised(KeyboardInterrupt()), "U").stderr == "KeyboardInterrupt"


@pytest.mark.parametrize(
    "exc",
    [
        ValueError("x"),
        ValidationError("x", extra={"uuid": "another"}),
        ValidationError("x", extra={"uuid": ["Missing data for required field."]}),
        marshmallow.ValidationError({"uuid": ["Missing data for required field."]}),
    ],
)
def test_k37_t14_the_uuid_is_the_one_given_and_always_text(exc):
    assert from_exception(exc, "U").uuid == "U"
    uuid_object = __import__("uuid").uuid4()
    assert from_exception(exc, uuid_object).uuid == str(uuid_object)


def test_k37_a_failed_operation_has_its_own_uuid():
    operation = Operation(uuid="op")
    assert operation.execute().uuid == "op"


@pytest.mark.parametrize(
    ("exc", "extra"),
    [
        (marshmallow.ValidationError({"a": ["bad"]}), {"a": ["bad"]}),
        (marshmallow.ValidationError("bad"), {"_schema": ["bad"]}),
    ],
)
def test_k36_an_error_of_a_schema_is_a_validation_error_with_its_fields(exc, extra):
    result = from_exception(exc, "U")
    assert (result.retcode, result.retval["error"]["name"], result.retval["error"]["extra"]) == (
        400, "ValidationError", extra,
    )  # fmt: skip
    assert ", ".join(extra) in result.stderr


def test_k36_an_error_keeps_its_own_code_and_never_looks_like_a_success():
    class Odd(errors.Error):
        CODE = 0

    class Text(errors.Error):
        CODE = "E42"

    assert from_exception(errors.NotFound("x"), "U").retcode == 404
    for odd in (Odd("x"), Text("x")):
        assert not is_success(from_exception(odd, "U"))


# -- JSON of anything ------------------------------------------------------------------------------------------------


def test_json_safe_gives_plain_data_for_anything():
    import json

    class Mute:
        def __repr__(self):
            raise RuntimeError("no")

    circle = [1]
    circle.append(circle)
    shared = {"a": 1}
    deep = []
    for _ in range(3000):
        deep = [deep]
    given = {
        "object": object(), "mute": Mute(), 5: "key", (1, 2): "tuple key", "big": 2**80, "huge": 10**6000,
        "lone": "\udcff", "nan": float("nan"), "set": {1}, "circle": circle, "twice": [shared, shared], "deep": deep,
    }  # fmt: skip
    safe = json_safe(given)
    assert json.loads(json.dumps(safe)) == safe
    assert safe["object"].startswith("<object object")
    assert safe["mute"] == "<Mute that cannot be shown>"
    assert (safe["big"], safe["lone"], safe["nan"], safe["set"]) == (2**80, "\udcff", None, [1])
    assert safe["circle"] == [1, "..."]
    assert safe["twice"] == [{"a": 1}, {"a": 1}]
    assert safe["(1, 2)"] == "tuple key"


def test_json_safe_leaves_plain_data_as_it_is():
    plain = {"a": [1, 2.5, None, True, "é", {"b": {}}]}
    assert json_safe(plain) == plain


# -- the error tree --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "code", "msgid"),
    [
        ("ConfigurationError", 400, "ERR-19036"),
        ("IOError", 500, "ERR-27582"),
        ("NotImplemented", 501, "ERR-04766"),
        ("ValidationError", 400, "ERR-04413"),
        ("NotFound", 404, "ERR-08414"),
        ("InternalError", 500, "ERR-29885"),
    ],
)
def test_k39_the_published_errors(name, code, msgid):
    made = getattr(errors, name)("what happened", extra={"a": 1})
    assert getattr(errors, name) is getattr(cdumay_error.types, name)
    assert (made.code, made.msgid, made.message, made.extra, made.name) == (
        code, msgid, "what happened", {"a": 1}, name,
    )  # fmt: skip
    assert made.stack is None
    assert _raised(made) is made


def test_k39_every_error_of_kser_has_the_published_attributes_and_a_code_of_its_own():
    for name in errors.__all__:
        kind = getattr(errors, name)
        if name == "MessageTooLargeError":
            made = kind("Message e[u]", 10, 5)
            assert made.extra == {"size": 10, "limit": 5}
            assert "Message e[u] has 10 bytes, the limit is 5" in made.message
            assert "reference" in made.message
            assert "nest" in made.message
        else:
            made = kind("text")
        assert issubclass(kind, errors.Error)
        assert made.name == name
        assert isinstance(made.code, int)
        assert made.code != 0
        assert made.msgid
        assert from_exception(made, "u").retcode == made.code


def test_transport_errors_tell_whether_trying_again_may_help():
    assert errors.TransportError("x").retriable is False
    assert errors.TransportError("x", retriable=True).retriable is True
    assert errors.DeliveryError("x", extra={"uuids": ["u"]}).extra == {"uuids": ["u"]}


def test_dump_is_the_form_on_the_wire():
    assert results.dump(Result(1, "o", "e", {"a": 1}, "u")) == {
        "uuid": "u", "retcode": 1, "stdout": "o", "stderr": "e", "retval": {"a": 1},
    }  # fmt: skip
