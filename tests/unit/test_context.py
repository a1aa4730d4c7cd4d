"""What code runs within: the task, the delivery, and the ids that a redelivery makes again."""

import asyncio
import contextvars
import os
import threading
import uuid

import pytest

from kser import Operation, Result, Task
from kser.context import (
    Scope,
    current_delivery,
    current_task,
    derive_uuid,
    id_scope,
    new_uuid,
    random_uuid,
    within,
)

PARENT = "872c3be0-51ac-457f-a4d9-12c2f7667b80"


def test_there_is_no_task_outside_of_one():
    assert current_task() is None
    assert current_delivery() is None


def test_a_task_sees_itself_while_its_code_runs_and_an_inner_one_does_not_hide_it_for_good():
    seen = []

    class Inner(Task):
        def run(self):
            seen.append(("inner", current_task() is self))

    class Outer(Task):
        def prerun(self):
            seen.append(("prerun", current_task() is self))

        def run(self):
            Inner().execute()
            seen.append(("outer", current_task() is self))

        def onsuccess(self, result):
            seen.append(("onsuccess", current_task() is self))
            return result

    Outer().execute()
    assert seen == [("prerun", True), ("inner", True), ("outer", True), ("onsuccess", True)]
    assert current_task() is None


def test_a_task_that_raises_leaves_nothing_behind():
    class Exits(Task):
        def run(self):
            raise SystemExit

    with pytest.raises(SystemExit):
        Exits().execute()
    assert current_task() is None


def test_two_threads_do_not_see_each_others_task_but_a_copied_context_does():
    seen = {}

    class Spawns(Task):
        def run(self):
            fresh = threading.Thread(target=lambda: seen.update(fresh=current_task()))
            copied = contextvars.copy_context()
            with_context = threading.Thread(target=lambda: copied.run(lambda: seen.update(copied=current_task())))
            for thread in (fresh, with_context):
                thread.start()
                thread.join(5)

    task = Spawns()
    task.execute()
    assert seen == {"fresh": None, "copied": task}


def test_an_async_run_sees_its_task():
    class Waits(Task):
        async def run(self):
            await asyncio.sleep(0)
            inner = await asyncio.gather(asyncio.create_task(self.look()), self.look())
            return Result(retval={"same": [current_task() is self, *inner]})

        async def look(self):
            return current_task() is self

    assert Waits().execute().retval == {"same": [True, True, True]}


def test_a_scope_ends_with_its_block():
    class Delivery:
        def send(self, kmsg, topic, key):
            return Result()

    outer, inner = Delivery(), Delivery()
    with within(Scope(outer)):
        with pytest.raises(ValueError, match="x"), within(Scope(inner)):
            assert current_delivery() is inner
            raise ValueError("x")
        assert current_delivery() is outer
    assert current_delivery() is None


# -- ids -------------------------------------------------------------------------------------------------------------


def test_a_derived_uuid_is_uuid5_of_parent_and_position():
    """DESIGN.md 3."""
    assert derive_uuid(PARENT, 0) == str(uuid.uuid5(uuid.UUID(PARENT), "0"))
    assert derive_uuid(PARENT, 7) == str(uuid.uuid5(uuid.UUID(PARENT), "7"))


def test_a_parent_that_is_no_uuid_is_hashed_into_one_first():
    hashed = uuid.uuid5(uuid.NAMESPACE_OID, "order A7")
    assert derive_uuid("order A7", 1) == str(uuid.uuid5(hashed, "1"))


@pytest.mark.parametrize("parent", ["", "\udcff", "é", "x" * 5000, PARENT.upper(), "{" + PARENT + "}"])
def test_any_text_can_be_a_parent(parent):
    assert derive_uuid(parent, 0) == derive_uuid(parent, 0)
    assert uuid.UUID(derive_uuid(parent, 0)).version == 5


def test_within_a_scope_new_ids_follow_from_their_order():
    def made():
        with id_scope(PARENT):
            return [new_uuid(), Task().uuid, Operation().uuid, Task(uuid="own").uuid, new_uuid()]

    assert made() == made() == [*(derive_uuid(PARENT, n) for n in range(3)), "own", derive_uuid(PARENT, 3)]


def test_an_inner_scope_does_not_disturb_the_count_of_the_outer_one():
    with id_scope(PARENT):
        first = new_uuid()
        with id_scope("other"):
            assert new_uuid() == derive_uuid("other", 0)
        assert (first, new_uuid()) == (derive_uuid(PARENT, 0), derive_uuid(PARENT, 1))
    assert uuid.UUID(new_uuid()).version == 4


def test_random_uuids_are_version_4_and_never_the_same():
    made = [random_uuid() for _ in range(2000)]
    assert len(set(made)) == 2000
    for text in made:
        parsed = uuid.UUID(text)
        assert str(parsed) == text
        assert (parsed.version, parsed.variant) == (4, uuid.RFC_4122)
    assert {text[19] for text in made} == set("89ab")


def test_threads_never_get_the_same_uuid():
    made, start = [], threading.Barrier(4)

    def draw():
        start.wait(5)
        made.extend([random_uuid() for _ in range(1000)])

    threads = [threading.Thread(target=draw) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(set(made)) == len(made) == 4000


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # fork beside threads, from 3.12 on
def test_a_forked_child_draws_other_uuids_than_its_parent():
    random_uuid()  # some are drawn and not used
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writes, "\n".join(random_uuid() for _ in range(200)).encode())
        os._exit(0)
    os.close(writes)
    with os.fdopen(reads) as pipe:
        theirs = pipe.read().split()
    os.waitpid(child, 0)
    assert len(theirs) == 200
    assert not set(theirs) & {random_uuid() for _ in range(200)}
