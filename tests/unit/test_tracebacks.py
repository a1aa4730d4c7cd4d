# ruff: noqa: F841, B904 - variables that nobody uses are what this is about
"""TracebackInfo: frames with code and variables, secrets masked, in JSON and back, whatever went wrong."""

import json
import sys
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kser import ValidationError
from kser.masking import MASK
from kser.tracebacks import FrameInfo, TracebackInfo


class Unshowable:
    def __repr__(self):
        raise RuntimeError("no")


class Account:
    def __repr__(self):
        return "Account(user='ann', password='open sesame', limit=3)"


def caught(function, *args):
    try:
        function(*args)
    except BaseException as exc:
        return TracebackInfo.from_exception(exc)
    raise AssertionError("it did not raise")


def outer(order):
    total = order["amount"] * 2
    return middle(total)


def middle(total):
    password = "hunter2hunter2"
    settings = {"host": "db", "api_token": "tttttttt", "deep": [{"secret": "ssssssss"}]}
    return inner(total, password)


def inner(total, credentials):
    odd, account, text = Unshowable(), Account(), f"bob:{credentials}@db"
    raise ValueError(f"{total} is too much for {credentials}")


@pytest.fixture
def info():
    return caught(outer, {"amount": 6})


def test_frames_have_the_line_the_code_around_it_and_the_variables(info):
    assert [frame.function for frame in info.frames] == ["caught", "outer", "middle", "inner"]
    frame = info.frames[1]
    assert frame.filename == __file__
    assert frame.line == "    return middle(total)"
    assert frame.before[-1] == '    total = order["amount"] * 2'
    assert (len(frame.before), len(frame.after)) == (5, 5)
    assert frame.locals == {"order": "{'amount': 6}", "total": "12"}
    assert info.type == "ValueError"


def test_secrets_are_masked_by_their_names_and_wherever_else_they_are(info):
    middle_, inner_ = info.frames[2].locals, info.frames[3].locals
    assert middle_["password"] == inner_["credentials"] == MASK
    assert middle_["settings"] == (f"{{'host': 'db', 'api_token': '{MASK}', 'deep': [{{'secret': '{MASK}'}}]}}")
    assert inner_["account"] == f"Account(user='ann', password={MASK}, limit=3)"
    assert inner_["text"] == f"'bob:{MASK}@db'"
    assert info.exception == f"ValueError: 12 is too much for {MASK}"
    for text in (json.dumps(info.dump()), str(info), repr(info)):
        assert not any(secret in text for secret in ("hunter2", "tttttttt", "ssssssss", "open sesame"))


def test_a_repr_that_raises_breaks_nothing(info):
    assert info.frames[3].locals["odd"] == "<Unshowable that cannot be shown>"


def test_the_text_is_pythons_with_code_and_variables(info):
    text = str(info)
    assert text.startswith("Traceback (most recent call last):\n")
    assert text.endswith(f"\nValueError: 12 is too much for {MASK}")
    assert f'  File "{__file__}", line {info.frames[1].lineno}, in outer\n' in text
    assert f"    > {info.frames[1].lineno}      return middle(total)\n" in text
    assert "      total = 12\n" in text
    plain = info.format(context=False, variables=False)
    assert plain.startswith("Traceback (most recent call last):\n")
    assert "    return middle(total)\n" in plain
    assert "total = 12" not in plain


def test_it_goes_into_json_and_back(info):
    assert TracebackInfo.load(json.loads(json.dumps(info.dump()))) == info


@pytest.mark.parametrize("data", [None, 5, [], {}, {"frames": 5, "exception": ""}, {"exception": "", "frames": [{}]}])
def test_what_is_none_is_refused(data):
    with pytest.raises(ValidationError, match="Not a traceback of kser"):
        TracebackInfo.load(data)


def test_what_it_came_from_is_told_before_it():
    def chained():
        try:
            inner(1, "")
        except ValueError as exc:
            raise KeyError("k") from exc

    def within():
        try:
            inner(1, "")
        except ValueError:
            raise KeyError("k")

    def hidden():
        try:
            inner(1, "")
        except ValueError:
            raise KeyError("k") from None

    cause, context = caught(chained), caught(within)
    assert (cause.type, cause.how, cause.cause.type) == ("KeyError", "cause", "ValueError")
    assert (context.how, context.cause.type) == ("context", "ValueError")
    assert caught(hidden).cause is None
    assert str(cause).index("ValueError:") < str(cause).index("direct cause") < str(cause).index("KeyError: 'k'")
    assert TracebackInfo.load(cause.dump()) == cause


def test_a_circle_of_causes_ends():
    def circle():
        one, two = ValueError(1), ValueError(2)
        one.__cause__, two.__cause__ = two, one
        raise one

    assert caught(circle).cause.cause is None


def test_a_recursion_without_end_is_cut_in_the_middle():
    def forever(n):
        return forever(n + 1)

    info = caught(forever, 0)
    assert len(info.frames) == 50
    assert info.cut > 500
    assert f"  ... {info.cut} more ...\n" in str(info)
    assert TracebackInfo.load(info.dump()) == info


def test_from_current_exc_and_from_tb():
    with pytest.raises(ValidationError, match="No exception"):
        TracebackInfo.from_current_exc()
    try:
        inner(1, "")
    except ValueError:
        current, bare = TracebackInfo.from_current_exc(), TracebackInfo.from_tb(sys.exc_info()[2])
    assert current.exception == "ValueError: 1 is too much for "
    assert bare.frames == current.frames
    assert bare.exception == ""
    assert str(TracebackInfo.from_tb(None)) == "Traceback (most recent call last):"


def test_frames_of_kser_around_a_task_are_left_out():
    from kser import Task

    class Bad(Task):
        def run(self):
            inner(1, "")

    found = []
    Bad.onerror = lambda self, result: found.append(TracebackInfo.from_exception(self.seen))

    def finish(self, result, cause=None):
        self.seen = cause
        return super(Bad, self)._finish(result, cause)

    Bad._finish = finish
    Bad().execute()
    assert found[0].frames[0].function.endswith("Bad.run")


def test_large_values_are_trimmed_and_not_made_first():
    def large():
        text, numbers, deep = "x" * 10_000_000, list(range(1_000_000)), []
        many = {n: n for n in range(1000)}
        for _ in range(50):
            deep = [deep]
        number = 10**9000
        one, none, empty = (1,), (), set()
        raise ValueError("y" * 100_000)

    info = caught(large)
    shown = info.frames[1].locals
    assert all(len(value) <= 1024 for value in shown.values())
    assert shown["text"].startswith("'xxx")
    assert shown["numbers"].startswith("[0, 1, 2,")
    assert shown["many"].endswith(", ...}")
    assert shown["deep"] == "[[[[[[...]]]]]]"
    assert (shown["one"], shown["none"], shown["empty"]) == ("(1,)", "()", "set()")
    assert len(info.exception) == 4096


def test_an_exception_that_cannot_say_what_it_is():
    class Odd(Exception):
        def __str__(self):
            raise RuntimeError("no")

    def odd():
        raise Odd

    assert "Odd" in caught(odd).exception


def test_lone_surrogates_can_be_written():
    def odd():
        name = "\udcff"
        raise ValueError("\udcff")

    info = caught(odd)
    assert json.dumps(info.dump()).encode()
    assert info.fitted(100_000) == info  # which writes it


def test_secrets_written_in_the_code_are_masked():
    def written():
        api_key = "in the code"
        print(password="also in the code")

    text = str(caught(written))
    assert "in the code" not in text
    assert f"api_key = {MASK}" in text


def test_a_traceback_of_another_thread():
    found = []

    def run():
        try:
            inner(1, "")
        except ValueError:
            found.append(TracebackInfo.from_current_exc())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(10)
    assert found[0].frames[-1].function == "inner"


@pytest.mark.parametrize("limit", [16_384, 40_000, 80_000])
def test_it_fits_when_it_must_and_says_least_about_the_outermost(limit):
    def dig(n):
        filler = [f"{n} {m} " * 100 for m in range(8)]
        if n:
            dig(n - 1)
        raise ValueError("bottom")

    info = caught(dig, 60)
    small = info.fitted(limit)
    assert len(json.dumps(small.dump(), separators=(",", ":"))) <= limit
    assert small.exception == "ValueError: bottom"
    assert small.frames[-1].lineno == info.frames[-1].lineno
    assert TracebackInfo.load(small.dump()) == small
    assert info.fitted(10_000_000) is info


texts = st.text(max_size=20)
frames = st.builds(
    FrameInfo,
    texts, st.integers(0, 10**6), texts, texts,
    st.lists(texts, max_size=5).map(tuple), st.lists(texts, max_size=5).map(tuple),
    st.dictionaries(texts, texts, max_size=4),
)  # fmt: skip


def infos(cause):
    return st.builds(
        TracebackInfo,
        frames=st.lists(frames, max_size=4).map(tuple),
        exception=texts,
        type=texts,
        cut=st.integers(0, 9),
        cause=cause,
    )


@given(infos(st.none()) | infos(infos(st.none())))
def test_what_is_dumped_is_loaded(info):
    assert TracebackInfo.load(json.loads(json.dumps(info.dump()))) == info
    assert "Traceback (most recent call last):" in str(info)


def test_a_module_s_code_shows_no_imports(tmp_path):
    source = tmp_path / "top.py"
    source.write_text("import json\ndef f(): pass\norder = 5\n1 / 0\n")

    def load():
        exec(compile(source.read_text(), str(source), "exec"), {"__name__": "top"})

    assert caught(load).frames[-1].locals == {"order": "5"}
