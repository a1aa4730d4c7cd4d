# ruff: noqa: B018, B904, F821 - how exceptions come from others is what this is about
"""The text of an exception is the one that the traceback module writes, the first time and when it is remembered."""

import sys
import traceback
import types

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kser import stacks
from kser.stacks import format_exception, format_exception_only


class Named(Exception):
    pass


class Mute(Exception):
    def __str__(self):
        raise RuntimeError("no")


class Empty(Exception):
    def __str__(self):
        return ""


class Text(str):
    def __format__(self, spec):
        return "something else"


class Fancy(Exception):
    def __str__(self):
        return Text("fancy")


class Nosy(Exception):
    def __getattr__(self, name):
        raise LookupError(name)


def fail(exc):
    raise exc


def from_cause():
    try:
        fail(ValueError("first"))
    except ValueError as exc:
        raise Named("second") from exc


def meanwhile():
    try:
        from_cause()
    except Named:
        [1, 2][5] + len("a")


def from_none():
    try:
        fail(ValueError("first"))
    except ValueError:
        raise Named("second") from None


def cause_and_context():
    cause = KeyError("cause")
    try:
        fail(ValueError("context"))
    except ValueError:
        raise Named("both") from cause


def shared():
    """The cause of the one is in what is around the other."""
    inner = ValueError("inner")
    around = KeyError("around")
    around.__context__ = inner
    cause = TypeError("cause")
    cause.__cause__ = inner
    exc = Named("outer")
    exc.__cause__, exc.__context__ = cause, around
    raise exc


def circle():
    one, two = ValueError(1), ValueError(2)
    one.__cause__, two.__cause__ = two, one
    raise one


def noted(*notes):
    exc = ValueError("noted")
    for note in notes:
        exc.add_note(note)
    raise exc


def odd_notes():
    exc = ValueError("noted")
    exc.__notes__ = 5
    raise exc


def of_a_group():
    found = []
    for function in (from_cause, noted):
        try:
            function()
        except Exception as exc:
            found.append(exc)
    raise ExceptionGroup("several", [*found, ExceptionGroup("inner", [ValueError(1)])])


def caused_by_a_group():
    try:
        of_a_group()
    except ExceptionGroup as exc:
        raise Named("all failed") from exc


def syntax():
    compile("a = (1,\nb = 2", "some.py", "exec")


def without_source():
    exec(compile("def f(n):\n    return 1 / n\nf(0)", "<made>", "exec"), {})


def forever(n=0):
    return forever(n + 1)


def dig(n):
    return dig(n - 1) if n else 1 / 0


def two_ways(n):
    return two_ways(n - 1) + 1 if n % 2 else two_ways(n - 1) - 1 if n else int("x")


def moved():
    """A place that the code itself does not tell."""
    try:
        1 / 0
    except ZeroDivisionError as exc:
        tb = exc.__traceback__
        moved_to = types.TracebackType(None, tb.tb_frame, tb.tb_lasti, 1)
        raise Named("moved").with_traceback(moved_to)


def of_no_module():
    raise type("Odd", (Exception,), {"__module__": None})("odd")


def several_lines():
    raise Named(
        "line one\nline two",
    )


CASES = {
    "plain": lambda: fail(Named("x")), "builtin": lambda: fail(KeyError("k")), "empty": lambda: fail(Empty()),
    "no arguments": lambda: fail(Named()), "mute": lambda: fail(Mute()), "fancy": lambda: fail(Fancy()),
    "cause": from_cause, "context": meanwhile, "from none": from_none,
    "cause and context": cause_and_context, "shared": shared, "circle": circle, "noted": lambda: noted("a", "b\nc"),
    "no notes": noted, "odd notes": odd_notes, "group": of_a_group, "caused by a group": caused_by_a_group,
    "syntax": syntax, "without source": without_source, "recursion": forever, "repeated": lambda: dig(7),
    "repeated once": lambda: dig(4), "two ways": lambda: two_ways(9), "moved": moved, "no module": of_no_module,
    "several lines": several_lines, "name": lambda: ordre, "attribute": lambda: "".lowr,
    "import": lambda: __import__("jsonn"), "exit": lambda: sys.exit(3), "interrupt": lambda: fail(KeyboardInterrupt()),
    "large": lambda: fail(Named("é\udcff" * 5000)), "operators": lambda: {"a": 1}["a"] + {"b": None}["b"],
}  # fmt: skip


def caught(function):
    try:
        function()
    except BaseException as exc:
        return exc
    raise AssertionError("it did not raise")


def python_s(exc):
    return "".join(traceback.format_exception(exc))


@pytest.mark.filterwarnings("ignore::SyntaxWarning")
@pytest.mark.parametrize("name", CASES)
def test_it_is_what_python_writes(name):
    stacks._stacks.clear()
    for _ in range(3):
        exc = caught(CASES[name])
        assert format_exception(exc) == python_s(exc)
        assert format_exception_only(exc) == "".join(traceback.format_exception_only(exc))


def test_an_exception_that_breaks_the_traceback_module_is_named():
    assert format_exception(caught(lambda: fail(Nosy()))) == "Nosy whose traceback cannot be told\n"


def test_an_exception_that_was_not_raised_has_no_stack():
    assert format_exception(ValueError("x")) == python_s(ValueError("x")) == "ValueError: x\n"


def test_one_raised_elsewhere_is_another_stack():
    def here():
        fail(Named("x"))

    def there():
        fail(Named("x"))

    for function in (here, there, here):
        exc = caught(function)
        assert format_exception(exc) == python_s(exc)


def test_code_that_is_equal_but_in_another_file_is_not_mixed_up():
    for name in ("<a>", "<b>", "<a>"):
        exc = caught(lambda name=name: exec(compile("1 / 0", name, "exec"), {}))
        assert f'File "{name}", line 1' in format_exception(exc)


def test_a_limit_is_obeyed(monkeypatch):
    for limit in (0, 1, 3):
        monkeypatch.setattr(sys, "tracebacklimit", limit, raising=False)
        exc = caught(from_cause)
        assert format_exception(exc) == python_s(exc)


def test_what_is_remembered_is_bounded():
    for n in range(stacks._KEPT + 20):
        format_exception(caught(lambda n=n: exec(compile("1 / 0", f"<{n}>", "exec"), {})))
    assert 0 < len(stacks._stacks) <= stacks._KEPT
    before = len(stacks._stacks)
    format_exception(caught(forever))  # nothing as deep as this
    assert len(stacks._stacks) == before


kinds = st.sampled_from([ValueError, KeyError, Named, Empty, OSError, ExceptionGroup, SyntaxError])
links = st.sampled_from(["from", "context", "none"])
steps = st.lists(
    st.tuples(kinds, st.text(max_size=12), links, st.booleans(), st.integers(0, 5)), min_size=1, max_size=5
)


def chained(chain):
    (kind, text, how, noted_, depth), *before = chain
    exc = kind(text, [ValueError(text)]) if kind is ExceptionGroup else kind(text)
    if noted_:
        exc.add_note(text)
    if not before:
        _raise(exc, depth)
    try:
        chained(before)
    except Exception as cause:
        if how == "from":
            exc.__cause__ = cause
        elif how == "none":
            exc.__suppress_context__ = True
        _raise(exc, depth)


def _raise(exc, depth):
    if depth:
        _raise(exc, depth - 1)
    raise exc


@given(steps)
def test_chains_are_what_python_writes(chain):
    exc = caught(lambda: chained(chain))
    assert format_exception(exc) == python_s(exc)
    assert format_exception(exc) == python_s(exc)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.booleans()), min_size=4, max_size=12))
def test_causes_that_are_shared_are_told_as_python_tells_them(leads):
    found = [caught(lambda n=n: fail(Named(n))) for n in range(4)]
    for at, (one, other, cause) in enumerate(leads):
        if one != other:
            if cause:
                found[one].__cause__ = found[other]
            else:
                found[one].__context__ = found[other]
        if at % 3 == 0:
            found[one].__suppress_context__ = not cause
    for exc in found:
        assert format_exception(exc) == python_s(exc)
