"""The event loop that async tasks share."""

import asyncio
import contextvars
import os
import threading

import pytest

from kser import Result, Task
from kser.eventloop import run
from kser.results import is_success

variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="outside")


async def give(value):
    await asyncio.sleep(0)
    return value


async def fail(exc):
    await asyncio.sleep(0)
    raise exc


def test_what_the_coroutine_returns_is_returned():
    assert run(give(5)) == 5


def test_what_it_raises_is_raised_with_its_traceback():
    with pytest.raises(ValueError, match="no") as caught:
        run(fail(ValueError("no")))
    assert any(entry.name == "fail" for entry in caught.traceback)


@pytest.mark.parametrize("exc", [SystemExit(3), KeyboardInterrupt(), asyncio.CancelledError()])
def test_what_ends_a_process_is_raised_too_and_the_loop_lives_on(exc):
    with pytest.raises(type(exc)):
        run(fail(exc))
    assert run(give("still there")) == "still there"


def test_all_coroutines_share_one_loop_whichever_thread_they_come_from():
    loops = []

    async def look():
        loops.append((asyncio.get_running_loop(), threading.current_thread().name))

    threads = [threading.Thread(target=lambda: run(look())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(5)
    run(look())
    assert len(loops) == 5
    assert len(set(loops)) == 1
    assert loops[0][1] != threading.current_thread().name


def test_coroutines_of_several_threads_run_side_by_side():
    """Each waits for the other: one after the other would never end."""
    loop_events = {}

    async def meet(mine, other):
        loop_events.setdefault(mine, asyncio.Event()).set()
        await loop_events.setdefault(other, asyncio.Event()).wait()
        return mine

    met = []
    threads = [threading.Thread(target=lambda p=p: met.append(run(meet(*p)))) for p in (("a", "b"), ("b", "a"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(5)
    assert sorted(met) == ["a", "b"]


def test_the_callers_context_holds_inside():
    async def look():
        return variable.get()

    token = variable.set("mine")
    try:
        assert run(look()) == "mine"
    finally:
        variable.reset(token)
    assert run(look()) == "outside"


def test_executing_a_task_from_inside_an_async_one_is_refused_not_a_deadlock():
    class Inner(Task):
        async def run(self):
            return None

    class Outer(Task):
        async def run(self):
            return Inner().execute()

    result = Outer().execute()
    assert not is_success(result)
    assert "await its coroutine instead of execute()" in result.stderr


def test_an_async_run_is_a_run():
    class Waits(Task):
        async def run(self):
            await asyncio.sleep(0)
            return Result(stdout=f"after {self.params['n']}")

    class Fails(Task):
        async def run(self):
            await asyncio.sleep(0)
            raise ValueError("async no")

    task, bad = Waits(params={"n": 1}), Fails()
    assert (task.execute().stdout, task.status) == ("after 1", "SUCCESS")
    assert (bad.execute().stderr, bad.status) == ("async no", "FAILED")


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # fork beside threads, from 3.12 on
def test_a_forked_child_gets_a_loop_of_its_own():
    assert run(give(1)) == 1
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = 0 if run(give(7)) == 7 else 2
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
