"""A task where only run() is the user's is executed by a short way: it must give and say what the long one does."""

import logging

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kser import Result, Task
from kser.context import current_task
from kser.sequencing.task import is_plain

results = st.builds(
    Result,
    retcode=st.sampled_from([0, 0, 0, 1, 202, 500]),
    stdout=st.sampled_from(["", "out"]),
    stderr=st.sampled_from(["", "err"]),
    retval=st.dictionaries(st.sampled_from("abc"), st.integers(), max_size=2),
    uuid=st.sampled_from(["other", "u"]),
)
outcomes = st.none() | results | st.sampled_from([ValueError("no"), KeyError("k"), 42, "text"])


class Short(Task):
    REQUIRED_FIELDS = ("what",)

    def run(self):
        assert current_task() is self
        what = self.params["what"]
        if isinstance(what, Exception):
            raise what
        return what


class Async(Short):
    async def run(self):
        return Short.run(self)


def long_way(cls):
    """The same class with a hook of its own that does nothing."""
    return type(cls.__name__, (cls,), {"prerun": lambda self: None, "__module__": cls.__module__})


def told(result):
    error = {k: v for k, v in (result.retval.get("error") or {}).items() if k != "stack"}
    return (
        result.uuid,
        result.retcode,
        result.stdout,
        result.stderr,
        {**result.retval, "error": error} if error else result.retval,
    )


@pytest.mark.parametrize("level", [logging.INFO, logging.WARNING, logging.ERROR])
@pytest.mark.parametrize("cls", [Short, Async])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(
    outcome=outcomes,
    forwarded=st.none() | results,
    missing=st.booleans(),
    status=st.sampled_from(["PENDING", "PENDING", "FAILED", "SUCCESS"]),
)
def test_both_ways_give_and_say_the_same(caplog, cls, level, outcome, forwarded, missing, status):
    other = long_way(cls)
    assert is_plain(cls)
    assert not is_plain(other)
    said, gave = [], []
    for made in (cls, other):
        caplog.clear()
        with caplog.at_level(level, "kser.entry"):
            params = {} if missing else {"what": outcome}
            task = made(uuid="u", params=params, status=status, result=forwarded)
            result = task.execute()
        gave.append((told(result), told(task.result), task.status))
        said.append([(r.levelname, r.getMessage()) for r in caplog.records])
    assert gave[0] == gave[1]
    assert said[0] == said[1]


@pytest.mark.parametrize("hook", ["prerun", "postrun", "onsuccess", "onerror", "check_required_params"])
def test_a_hook_that_comes_later_is_called(hook):
    """On the class, on one object, or on Task itself."""
    calls = []

    class Plain(Task):
        def run(self):
            if hook == "onerror":
                raise ValueError("no")

    def note(self, *args):
        calls.append(hook)
        return args[0] if args else None

    Plain().execute()
    assert calls == []
    one = Plain()
    setattr(one, hook, lambda *args: note(one, *args))
    one.execute()
    assert calls == [hook]
    setattr(Plain, hook, note)
    Plain().execute()
    assert calls == [hook] * 2
    delattr(Plain, hook)
    Plain().execute()
    assert calls == [hook] * 2
    original = Task.__dict__.get(hook)
    setattr(Task, hook, note)
    try:
        Plain().execute()
    finally:
        if original is None:
            delattr(Task, hook)
        else:
            setattr(Task, hook, original)
    assert calls == [hook] * 3
