"""Isolated tasks in real child processes: what they give, how they end, and that nothing is left of them."""

import contextlib
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kser import ConfigurationError, Message, Worker, headers
from kser.confluent.producer import Producer
from kser.context import Control
from kser.errors import AbortedError, TaskCrashedError, TaskTimeoutError
from kser.events import Event, EventType, OperationView, read
from kser.loading import load
from kser.masking import MASK
from kser.producer import BaseProducer
from kser.telemetry import TaskLog, TaskProgress, WorkerState
from kser.telemetry import read as read_telemetry
from kser.transport import Record, TopicSpec
from kser.transport.memory import MemoryTransport
from kser.worker.pool import IsolatedPool, location_of
from kser.worker.runner import Runner
from tests.apps import isolated
from tests.processes import environment, wait_for, worker

LOCATION = "tests.apps.isolated:registry"
RUNNER = {"group": "g", "worker": "w", "limit": 10_000_000}


def record(entrypoint: str, headers=(), offset: int = 5, **params) -> Record:
    value = json.dumps({"uuid": str(uuid.uuid4()), "entrypoint": entrypoint, "params": params}).encode()
    return Record("work", 0, offset, b"k", value, list(headers), 0)


def pool_of(location: str = LOCATION, size: int = 2, **settings) -> IsolatedPool:
    return IsolatedPool(location, size, settings=RUNNER, **settings)


@pytest.fixture(scope="module")
def pool() -> Iterator[IsolatedPool]:
    with pool_of() as made:
        yield made


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as made:
        yield made


def never() -> None:
    return None


def result(outcome):
    """The Result that the last event of an outcome tells."""
    return Event.loads(outcome.records[-1].value).result


def is_running(pid: int) -> bool:
    """False as well for a zombie: whoever inherited it reaps it when it likes."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gone(*pids: int) -> bool:
    return not any(is_running(pid) for pid in pids)


def told(path: Path) -> list[int]:
    """The process ids that a task has told."""
    wait_for(path.exists, 20, "the task's start")
    return [int(word) for word in path.read_text().split()]


class Switch:
    """An ``aborted`` for run(), which a test flips."""

    reason: str | None = None

    def __call__(self) -> str | None:
        return self.reason


# -- what comes back -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("made", "headers"),
    [
        (("iso.Noop", {"a": 1}), []),
        (("iso.Crash", {}), []),  # KeyError: failed
        (("iso.Sender", {"b": 2}), []),
        (("iso.Chain", {}), []),
        (("iso.Noop", {}), [(headers.GROUP, b"another")]),
    ],
    ids=["done", "failed", "sends", "operation", "foreign"],
)
def test_an_outcome_is_the_one_it_would_have_been_here(pool, made, headers):
    taken = record(made[0], headers, **made[1])
    here, there = Runner(isolated.registry.controller, "g", "w").run(taken), pool.run(taken, 20, never)
    assert (there.kind, there.ahead, there.refused) == (here.kind, here.ahead, None)
    assert [out[:2] + out[3:] for out in there.records] == [out[:2] + tuple(out[3:]) for out in here.records]
    assert list(map(shown, there.records)) == list(map(shown, here.records))


def shown(out):
    """What a record says, without what may differ from one process to another and from one moment to the next."""
    value = json.loads(out.value)
    for name in ("at", "began", "trace"):
        value.pop(name, None)
    for key in ("pid", "error"):
        (value.get("result") or {}).get("retval", {}).pop(key, None)
    return value


def test_data_that_is_no_message_is_rejected_there_as_well(pool):
    outcome = pool.run(Record("work", 0, 1, None, b"{", [], 0), None, never)
    assert outcome.kind == "rejected"


def test_children_are_kept_and_used_again(pool):
    pids = {result(pool.run(record("iso.Noop"), 20, never)).retval["pid"] for _ in range(50)}
    assert len(pids) == 1
    assert pids < {*pool.pids()} | {0}
    assert os.getpid() not in pids


def test_the_task_knows_which_try_it_is(pool):
    outcome = pool.run(record("iso.Noop", [(headers.ATTEMPT, b"3")]), 20, never)
    assert result(outcome).retval["attempt"] == 3


def test_messages_larger_than_a_socket_holds_go_both_ways(pool):
    text = "é" * 700_000
    outcome = pool.run(record("iso.Sender", text=text), 20, never)
    assert Message.loads(outcome.records[0].value).params == {"text": text}


def test_children_compute_side_by_side(pool, threads):
    futures = [threads.submit(pool.run, record("iso.Count", to=n), 60, never) for n in (3_000_000, 3_000_001)]
    assert [result(future.result()).retval["total"] for future in futures] == [4499998500000, 4500001500000]
    assert len(pool.pids()) == 2


def test_heartbeats_of_the_task_come_through(pool):
    beats = []

    class Counting(Control):
        def beat(self):
            beats.append(time.monotonic())

    pool.run(record("iso.Beats", count=30), 20, never, Counting())
    assert 3 <= len(beats) <= 30


def test_a_copy_of_the_process_that_a_task_makes_gives_no_second_outcome(pool):
    """And what it forks can be terminated, although the child itself ignores the signal."""
    outcome = pool.run(record("iso.Fork"), 30, never)
    assert (result(outcome).stdout, result(outcome).retval) == ("the original", {"exitcode": -signal.SIGTERM})
    assert pool.run(record("iso.Noop"), 20, never).kind == "done"


def test_a_child_has_nothing_of_its_parents_but_its_surroundings(pool):
    """And signals that a service manager sends to everybody do not end it, but what it starts has them as usual."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.set_inheritable(True)
        with pool_of() as fresh:
            seen = result(fresh.run(record("iso.Sees"), 20, never)).retval
    kinds = sorted(name.partition(":")[0] for name in seen["files"] if not name.startswith(("/", "anon_inode")))
    assert kinds.count("socket") - sum(is_socket(fd) for fd in (1, 2)) == 3
    assert seen["session"]
    assert seen["signals"] == "default_int_handler 0"
    assert seen["argv"] == sys.argv
    assert seen["directory"] == str(Path.cwd())


def is_socket(fd: int) -> bool:
    return str(Path(f"/proc/self/fd/{fd}").readlink()).startswith("socket:")


def test_what_a_task_prints_and_logs_goes_where_it_went_before(capfd, caplog):
    with caplog.at_level(logging.INFO), pool_of(size=1) as fresh:
        assert fresh.run(record("iso.Loud", what="this"), 20, never).kind == "done"
    out, err = capfd.readouterr()
    assert f"printed {'x' * 100_000}\n" in out
    assert "to stderr\n" in err
    lines = [line for line in caplog.records if line.name == "tests.isolated"]
    assert [line.getMessage() for line in lines] == ["said this", "it failed"]
    assert (lines[0].order, lines[0].path, lines[0].process == os.getpid()) == ({"id": 7}, repr(Path("a/b")), False)
    assert "ZeroDivisionError" in lines[1].exc_text
    assert any("Success: iso.Loud" in line.getMessage() for line in caplog.records)


# -- how it ends -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gil", [False, True], ids=["sleeping", "keeping the GIL"])
def test_a_task_over_its_time_is_killed_with_what_it_started(pool, tmp_path, gil):
    began = time.monotonic()
    taken = record("iso.Sleep", tell=str(tmp_path / "tell"), gil=gil)
    with pytest.raises(TaskTimeoutError, match=r": iso\.Sleep\[.*\] \(record work/0/5\) took longer than .* 1 s") as e:
        pool.run(taken, 1, never)
    assert time.monotonic() - began < 8
    assert e.value.extra["timeout"] == 1
    assert e.value.extra["entrypoint"] == "iso.Sleep"
    pids = told(tmp_path / "tell")
    assert gone(*pids)
    assert pids[0] not in pool.pids()
    assert result(pool.run(record("iso.Noop"), 20, never)).retval["pid"] != pids[0]


def test_a_task_that_ends_when_it_is_told_gives_its_outcome_and_its_process_is_kept(pool, threads, tmp_path):
    switch = Switch()
    future = threads.submit(pool.run, record("iso.Patient", tell=str(tmp_path / "tell")), 30, switch)
    (pid,) = told(tmp_path / "tell")
    switch.reason = "lost"
    assert result(future.result(10)).retval == {"aborted": "lost"}
    assert pid in pool.pids()
    assert is_running(pid)


def test_a_coroutine_is_cancelled(pool, threads, tmp_path):
    switch = Switch()
    future = threads.submit(pool.run, record("iso.Coroutine", tell=str(tmp_path / "tell")), 30, switch)
    (pid,) = told(tmp_path / "tell")
    switch.reason = "lost"
    assert future.result(10).kind == "failed"
    assert is_running(pid)


def test_a_task_that_does_not_listen_is_killed_after_its_grace(threads, tmp_path):
    with pool_of(size=1, grace_s=0.3) as fresh:
        switch = Switch()
        future = threads.submit(fresh.run, record("iso.Sleep", tell=str(tmp_path / "tell")), 30, switch)
        pids = told(tmp_path / "tell")
        switch.reason = "lost"
        with pytest.raises(AbortedError, match=r"told to end \(lost\) and did not end within 0\.3 s") as e:
            future.result(10)
        assert e.value.extra["reason"] == "lost"
        assert gone(*pids)
        assert fresh.pids() == []


def test_what_was_told_to_end_before_it_began_is_not_run(tmp_path):
    with pool_of() as fresh, pytest.raises(AbortedError, match=r"\(stopping\) before it began"):
        fresh.run(record("iso.Sleep", tell=str(tmp_path / "tell")), None, lambda: "stopping")
    assert not (tmp_path / "tell").exists()


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("segfault", "killed by SIGSEGV"),
        ("SIGKILL", r"killed by SIGKILL \(from outside, maybe for want of memory\)"),
        ("exit", "exit code 3"),
        ("closed", "it closed the connection to its parent"),
        ("forked", "exit code 5"),  # its socket stays open in the copy it leaves behind
    ],
)
def test_a_process_that_dies_is_told_and_replaced_and_its_neighbours_go_on(pool, threads, tmp_path, how, said):
    switch = Switch()
    neighbour = threads.submit(pool.run, record("iso.Patient", tell=str(tmp_path / "tell")), 60, switch)
    told(tmp_path / "tell")
    with pytest.raises(
        TaskCrashedError, match=rf": iso\.Crash\[.*\] \(record work/0/5\) ended its process: {said}$"
    ) as e:
        pool.run(record("iso.Crash", how=how), 60, never)
    assert (e.value.code, e.value.extra["offset"]) == (500, 5)
    assert pool.run(record("iso.Noop"), 20, never).kind == "done"
    switch.reason = "lost"
    assert neighbour.result(10).kind == "done"


@pytest.mark.parametrize("seen", [True, False], ids=["before", "as it gets its record"])
def test_an_idle_process_that_died_costs_no_task_anything(pool, seen):
    """Seen before, or only when it dies with the record unread, as a stopped process does."""
    for _ in range(2):
        (pid,) = {result(pool.run(record("iso.Noop"), 20, never)).retval["pid"]}
        if seen:
            os.kill(pid, signal.SIGKILL)
            wait_for(lambda pid=pid: gone(pid), 10, "its end")
            assert pool.run(record("iso.Noop"), 20, never).kind == "done"
        else:
            os.kill(pid, signal.SIGSTOP)
            killer = threading.Timer(0.1, os.kill, [pid, signal.SIGKILL])
            killer.start()
            assert pool.run(record("iso.Noop"), 20, never).kind == "done"
            killer.join()
        assert pid not in pool.pids()


# -- stopping --------------------------------------------------------------------------------------------------------


def test_stop_ends_idle_children_by_themselves_and_kills_what_runs_on(threads, tmp_path):
    (tmp_path / "polite.py").write_text(
        "import atexit\nfrom pathlib import Path\nfrom tests.apps.isolated import registry\n"
        f"atexit.register(lambda: Path({str(tmp_path / 'ended')!r}).open('a').write('x'))\n"
    )
    made = pool_of(f"{tmp_path / 'polite.py'}:registry")
    made.run(record("iso.Noop"), 20, never)
    (idle,) = made.pids()
    busy = threads.submit(made.run, record("iso.Noop"), 20, never)
    busy.result(20)
    running = threads.submit(made.run, record("iso.Sleep", tell=str(tmp_path / "tell")), None, never)
    pids = told(tmp_path / "tell")
    made_idle = threads.submit(made.run, record("iso.Noop"), 20, never).result(20)
    assert made_idle.kind == "done"
    everybody = {idle, *made.pids(), *pids}
    made.stop(0.3)
    assert gone(*everybody)
    with pytest.raises(AbortedError, match=r"\(stopping\) and its process was killed"):
        running.result(5)
    assert made.pids() == []
    assert (tmp_path / "ended").read_text() == "x"
    with pytest.raises(AbortedError, match="the pool of processes was stopped"):
        made.run(record("iso.Noop"), 20, never)


def test_what_ends_within_the_time_of_a_stop_gives_its_outcome(threads, tmp_path):
    made = pool_of(size=1)
    running = threads.submit(made.run, record("iso.Sleep", tell=str(tmp_path / "tell"), seconds=0.5), None, never)
    pids = told(tmp_path / "tell")
    made.stop(10)
    assert running.result(1).kind == "done"
    assert gone(*pids)


# -- in a worker -----------------------------------------------------------------------------------------------------


@pytest.fixture
def transport() -> MemoryTransport:
    made = MemoryTransport()
    made.admin().create([TopicSpec(name="work", partitions=2)])
    return made


def send(transport: MemoryTransport, entrypoint: str, **params) -> str:
    message = Message(uuid=str(uuid.uuid4()), entrypoint=entrypoint, params=params)
    assert BaseProducer(transport.sink()).send("work", message).retcode == 0
    return message.uuid


def view(transport: MemoryTransport, identity: str) -> OperationView:
    found = OperationView(identity)
    for event in read(transport.records("g.events")):
        found.apply(event)
    return found


def test_a_worker_runs_isolated_tasks_and_what_becomes_of_them_is_as_always(transport, tmp_path):
    """An operation goes on; a crash and a timeout fail their task and no other; no process is left."""
    before = set(children_of(os.getpid()))
    chain = send(transport, "iso.Chain")
    crash = send(transport, "iso.Crash", how="exit")
    hurried = send(transport, "iso.Hurried", tell=str(tmp_path / "tell"))
    last = send(transport, "iso.Noop")
    running = Worker(isolated.registry, topics=["work"], group="g", transport=transport, isolated=2)
    runner = threading.Thread(target=running.run, daemon=True)
    runner.start()
    wait_for(lambda: all(view(transport, each).ended for each in (chain, crash, hurried, last)), 30, "the end of all")
    running.stop()
    runner.join(20)
    assert not runner.is_alive()
    statuses = {each: view(transport, each).status for each in (chain, crash, hurried, last)}
    assert statuses == {chain: "SUCCESS", crash: "FAILED", hurried: "FAILED", last: "SUCCESS"}
    assert "exit code 3" in view(transport, crash).result.stderr
    assert "took longer than its timeout of 1 s" in view(transport, hurried).result.stderr
    assert gone(*told(tmp_path / "tell"))
    assert set(children_of(os.getpid())) <= before


def test_what_an_isolated_task_tells_is_told_as_by_any_other(transport):
    task = send(transport, "iso.Tells")
    running = Worker(isolated.registry, topics=["work"], group="g", transport=transport, isolated=1)
    runner = threading.Thread(target=running.run, daemon=True)
    runner.start()
    wait_for(lambda: view(transport, task).ended, 30, "its end")
    running.stop()
    runner.join(20)
    records = [told for told in read_telemetry(transport.records("g.telemetry")) if not isinstance(told, WorkerState)]
    assert {told.task.uuid for told in records} == {task}
    [*_, last] = [told for told in records if isinstance(told, TaskProgress)]
    assert (last.group, last.current, last.total, last.status_line) == (("rows", "read"), 500, 500, "row 499")
    logged, said = [told for told in records if isinstance(told, TaskLog)]
    assert (logged.message, logged.logger, logged.exception) == (
        "it failed",
        "tests.isolated",
        "ZeroDivisionError: kept",
    )
    assert said.message == f"Tells.RUNNING: iso.Tells[{task}]: half of it"
    [failed] = [event for event in read(transport.records("g.events")) if event.type == EventType.STEP_FAILED]
    assert [frame.function for frame in failed.trace.frames] == ["Tells.run", "Tells.deep"]
    assert failed.trace.frames[1].locals["order"] == "'A7'"
    assert failed.trace.frames[1].locals["password"] == MASK


# -- programs --------------------------------------------------------------------------------------------------------

SCRIPT = """
    import json, os, sys, threading, time, uuid
    from kser import OperationRegistry, Task
    from kser.transport import Record
    from kser.worker.pool import IsolatedPool, location_of

    registry = OperationRegistry(topic="work")

    @registry.subscribe(isolate=True)
    class Asks(Task):
        def run(self):
            Other(params={"pid": os.getpid()}).send()

    @registry.subscribe
    class Other(Task):
        pass

    def work():
        value = json.dumps({"uuid": str(uuid.uuid4()), "entrypoint": Asks.path}).encode()
        taken = Record("work", 0, 5, None, value, [], 0)
        with IsolatedPool(location_of(registry), 1, settings={"group": "g"}) as pool:
            print(pool.run(taken, 20, lambda: None).records[0].value.decode())
"""


def program(folder: Path, text: str, name: str = "app.py") -> Path:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(line.removeprefix("    ") for line in text.splitlines()) + "\n")
    return path


def run(*command: str, cwd: Path) -> tuple[list[str], str]:
    """The lines that a program prints, and what it says on stderr."""
    ended = subprocess.run(
        [sys.executable, *command], cwd=cwd, env=environment(), capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.splitlines(), ended.stderr


@pytest.mark.parametrize("kind", ["guarded", "bare", "caught", "thread", "module"])
def test_the_registry_of_a_script_works_and_its_classes_keep_their_names(tmp_path, kind):
    """Without a guard too: the child comes to the same call, stays there, and runs nothing of what stands behind it."""
    end = {
        "guarded": 'if __name__ == "__main__":\n        work()',
        "bare": "work()",
        "caught": "try:\n        work()\n    finally:\n        print('the end')",
        "thread": "t = threading.Thread(target=work)\n    t.start()\n    t.join()",
        "module": "work()",
    }[kind]
    if kind == "module":
        program(tmp_path, "", "shop/__init__.py")
        program(tmp_path, f"{SCRIPT}\n    from . import __name__ as package\n    {end}", "shop/app.py")
        lines, _ = run("-m", "shop.app", cwd=tmp_path)
    else:
        lines, _ = run(str(program(tmp_path, f"{SCRIPT}\n    {end}")), cwd=tmp_path.parent)
    message = Message.loads(lines[0])
    assert message.entrypoint == "__main__.Other"
    assert lines[1:] == (["the end"] if kind == "caught" else [])


def test_what_was_sent_by_a_script_runs_where_its_file_was_loaded(tmp_path, monkeypatch):
    """Its classes are named as those of ``__main__`` then; `kser worker` loads the file so."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    path = program(tmp_path, SCRIPT, f"app_{uuid.uuid4().hex[:8]}.py")
    loaded = load(f"{path}:registry")
    with pool_of(location_of(loaded), size=1) as fresh:
        assert fresh.run(record("__main__.Asks"), 20, never).kind == "done"
    del sys.modules[path.stem]


def test_a_script_without_a_guard_runs_one_worker_and_not_one_in_each_child(tmp_path):
    text = """
    import threading, time, uuid
    from kser import Message, OperationRegistry, Result, Task, Worker
    from kser.events import read
    from kser.producer import BaseProducer
    from kser.transport import TopicSpec
    from kser.transport.memory import MemoryTransport

    registry = OperationRegistry(topic="work")

    @registry.subscribe(isolate=True)
    class Here(Task):
        def run(self):
            return Result(stdout="well")

    transport = MemoryTransport()
    transport.admin().create([TopicSpec(name="work", partitions=1)])
    BaseProducer(transport.sink()).send("work", Message(str(uuid.uuid4()), Here.path))
    worker = Worker(registry, topics=["work"], group="g", transport=transport)

    def told():
        return [event for event in read(transport.records("g.events")) if event.ends]

    def watch():
        end = time.monotonic() + 30
        while not told() and time.monotonic() < end:
            time.sleep(0.02)
        worker.stop()

    threading.Thread(target=watch).start()
    worker.run()
    print([(event.entrypoint, event.result.stdout) for event in told()])
    """
    lines, _ = run(str(program(tmp_path, text)), cwd=tmp_path)
    assert lines == ["[('__main__.Here', 'well')]"]


def test_a_class_that_only_the_parent_has_is_told_as_what_it_is(tmp_path):
    text = f"""{SCRIPT}
    if __name__ == "__main__":
        @registry.subscribe(isolate=True)
        class Asks(Task):
            WIRE_NAME = "late"
        try:
            work()
        except Exception as exc:
            print(type(exc).__name__, exc.message)
    """
    (line,), _ = run(str(program(tmp_path, text)), cwd=tmp_path)
    assert line.startswith("ConfigurationError late is registered in this process, but not in a child that loads ")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("\n1/0", r"app\.py:2: ZeroDivisionError: division by zero$"),
        ("import os\nos._exit(4)", "its process ended while it was being loaded, exit code 4$"),
        ("import time\ntime.sleep(60)", r"it was not loaded within 1 s"),
        ("x = 1", "has no registry; it has no OperationRegistry at all$"),
    ],
    ids=["raises", "dies", "hangs", "empty"],
)
def test_a_registry_that_cannot_be_loaded_is_told_once_in_the_log_and_by_each_run(tmp_path, caplog, text, said):
    path = program(tmp_path, text)
    with pool_of(f"{path}:registry", load_limit_s=1 if "sleep" in text else 60) as fresh:
        for _ in range(1 if "sleep" in text else 2):
            with pytest.raises(ConfigurationError, match=rf"cannot load {path}:registry: .*{said}"):
                fresh.run(record("iso.Noop"), 20, never)
            assert fresh.pids() == []
    assert len([line for line in caplog.records if "cannot load" in line.getMessage()]) == 1


@pytest.mark.parametrize("copy", [False, True], ids=["alone", "with a forked copy of it"])
def test_a_parent_that_is_killed_leaves_nothing_behind(tmp_path, copy):
    """Not what runs, what keeps the GIL, what is idle, nor what any of them has started."""
    text = f"""
    import os, sys, threading, time
    from tests.integration.test_isolated import never, pool_of, record
    pool = pool_of(size=3)
    for name, gil in (("one", False), ("two", True)):
        taken = record("iso.Sleep", tell=os.path.join({str(tmp_path)!r}, name), gil=gil)
        threading.Thread(target=pool.run, args=[taken, None, never], daemon=True).start()
    pool.run(record("iso.Noop"), 20, never)
    while not (os.path.exists("one") and os.path.exists("two")):
        time.sleep(0.01)
    if {copy} and not os.fork():
        time.sleep(300)
        os._exit(0)
    print(*pool.pids(), flush=True)
    time.sleep(300)
    """
    path = program(tmp_path, text)
    parent = subprocess.Popen(
        [sys.executable, str(path)],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    everybody: set[int] = set()
    try:
        children = [int(word) for word in parent.stdout.readline().split()]
        everybody = {*children, *told(tmp_path / "one"), *told(tmp_path / "two")}
        assert (len(children), len(everybody)) == (3, 5)
        assert all(map(is_running, everybody))
        parent.kill()
        parent.wait(10)
        wait_for(lambda: gone(*everybody), 10, "the end of all processes")
    finally:
        for group in (-parent.pid, *everybody):
            with contextlib.suppress(ProcessLookupError):
                os.kill(group, signal.SIGKILL)
        parent.wait(10)
        parent.stdout.close()


def children_of(pid: int) -> list[int]:
    """Process ids of those that serve pools."""
    words = [word for task in Path(f"/proc/{pid}/task").iterdir() for word in (task / "children").read_text().split()]
    return [int(word) for word in words if b"kser.worker.child" in Path(f"/proc/{word}/cmdline").read_bytes()]


def test_kser_worker_logs_what_children_say_and_leaves_none_when_it_is_killed(embedded, tmp_path):
    topic, group, log = f"t{uuid.uuid4().hex[:8]}", f"g{uuid.uuid4().hex[:8]}", tmp_path / "log"
    embedded.create_topic(topic, 1)
    with Producer({"bootstrap.servers": embedded.bootstrap_servers}) as producer:
        for name, params in (("iso.Loud", {"what": "this"}), ("iso.Sleep", {"tell": str(tmp_path / "tell")})):
            sent = producer.send(topic, Message(str(uuid.uuid4()), name, params), timeout=30)
            assert sent.retcode == 0, sent.stderr
    with worker(
        embedded.bootstrap_servers, topic, group, log, "w", app=str(Path(isolated.__file__)) + ":registry"
    ) as running:
        pids = told(tmp_path / "tell")
        said = r"(?m)^\d{4}-\d\d-\d\d [\d:,]+ "
        wait_for(lambda: re.search(said + "WARNING  said this$", log.read_text()), 20, "the child's line")
        assert re.search(said + "INFO     .*Success: iso.Loud", log.read_text())
        assert "not wanted" not in log.read_text()
        running.kill()
        running.wait(10)
        wait_for(lambda: gone(*pids), 10, "the end of its children")


def test_nothing_is_left_of_a_pool_that_was_stopped(tmp_path):
    """Neither process nor thread nor open file, however its children ended."""

    def held() -> list[object]:
        threads = [thread for thread in threading.enumerate() if thread.name == "kser-child-logs"]
        return [len(threads), len(list(Path("/proc/self/fd").iterdir()))]

    before = held()
    with pool_of(size=1) as fresh:
        fresh.run(record("iso.Noop"), 20, never)
        with pytest.raises(TaskCrashedError):
            fresh.run(record("iso.Crash", how="exit"), 20, never)
        with pytest.raises(TaskTimeoutError):
            fresh.run(record("iso.Sleep", tell=str(tmp_path / "tell")), 0.3, never)
        fresh.run(record("iso.Noop"), 20, never)
        assert held() > before
        pids = fresh.pids()
    assert held() == before
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
