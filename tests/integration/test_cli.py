"""The command line as people run it: processes, terminals and signals, on the embedded broker."""

import contextlib
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from kser.cli import demo as demo_module
from kser.cli.main import cli
from kser.confluent.transport import ConfluentTransport
from kser.transport import Partition
from tests.processes import DICE, ROOT, environment, process, wait_for

KSER = [sys.executable, "-m", "kser"]
SCRIPT = """
    import sys
    from kser import Operation, OperationRegistry, Result, Task

    registry = OperationRegistry()

    @registry.subscribe
    class Greet(Task):
        def run(self):
            return Result(stdout=f"hello {self.params['name']}")

    @registry.subscribe
    class Round(Operation):
        def build_tasks(self, **params):
            return [Greet(params=params), Greet(params=params)]

    if __name__ == "__main__":
        from kser.confluent.producer import Producer

        with Producer({"bootstrap.servers": sys.argv[1]}) as producer:
            registry.configure(producer=producer, topic=sys.argv[2])
            operation = Round(params={"name": "world"}).build()
            assert operation.launch().retcode == 0
            print(operation.uuid)
"""


@pytest.fixture
def place(embedded, make_topic, topic_name):
    """Options that name the embedded broker, a new topic and a new group."""
    topic, group = make_topic(embedded, partitions=2), topic_name("g")
    embedded.create_topic(f"{group}.events", 2)
    return {"servers": ("--bootstrap-servers", embedded.bootstrap_servers), "topic": topic, "group": group}


def kser(*args, timeout=60, **options):
    return subprocess.run(
        [*KSER, *map(str, args)],
        cwd=options.pop("cwd", ROOT),
        env=environment(**options.pop("env", {})),
        capture_output=True,
        text=True,
        timeout=timeout,
        stdin=options.pop("stdin", subprocess.DEVNULL),
        **options,
    )


def start_worker(place, app, log):
    return process(
        *("-m", "kser", "worker", app, "--topics", place["topic"], "--group", place["group"], "--name", "w1"),
        *("--drain", "20", *place["servers"]),
        log=log,
    )


def launch(place, app, name, params, *more):
    return kser(
        *("launch", app, name, "--topic", place["topic"], "--group", place["group"], "--params", json.dumps(params)),
        *("--watch", "--timeout", "40", *place["servers"], *more),
    )


def processes_with(marker):
    """Id and command line of the processes that have ``marker`` in theirs, this one excepted."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if marker in line and int(path.parent.name) != os.getpid():
                found.append((int(path.parent.name), line))
    return found


# -- worker, send, launch --------------------------------------------------------------------------------------------


def test_a_worker_runs_what_is_launched_and_watched_from_other_processes(place, tmp_path):
    log = tmp_path / "log"
    with start_worker(place, DICE, log) as worker:
        good = launch(place, DICE, "Launch", {})
        bad = launch(place, DICE, "Launch", {"fail": True})
        sent = kser("send", "dice.Roll", "--topic", place["topic"], "--uuid", "lone-1", *place["servers"])
        wait_for(lambda: "Roll.Success: dice.Roll[lone-1]" in log.read_text(), 30, "the lone roll")
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(30) == 0, log.read_text()
    assert good.returncode == 0, good.stderr + log.read_text()
    assert good.stdout.count("dice.Roll  You made a 4  (w1)") == 3
    assert re.search(r"SUCCESS  dice\.Launch  ended  \(w1\)$", good.stdout, re.MULTILINE)
    assert good.stderr == ""
    assert bad.returncode == 1
    [line] = bad.stderr.splitlines()
    assert re.fullmatch(
        r"kser: error: dice\.Launch\[.+\] FAILED in dice\.Roll\[.+\]: the die rolled off the table", line
    )
    assert (sent.returncode, sent.stdout) == (0, f"dice.Roll[lone-1] sent to {place['topic']}\n")
    assert "Worker.Stopped: 4 done, 1 failed" in log.read_text()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_worker_asked_to_stop_lets_the_running_task_end_and_exits_with_0(place, tmp_path, signum):
    log, tell = tmp_path / "log", tmp_path / "tell"
    with start_worker(place, DICE, log) as worker:
        params = json.dumps({"sleep": 2, "tell": str(tell)})
        assert (
            kser("send", "dice.Roll", "--topic", place["topic"], "--params", params, *place["servers"]).returncode == 0
        )
        wait_for(tell.exists, 30, "the beginning of the roll")
        worker.send_signal(signum)
        assert worker.wait(30) == 0, log.read_text()
    assert "Worker.Stopped: 1 done" in log.read_text()
    [position] = [p for p in committed(place) if p.offset > 0]
    assert position.offset == 1


def committed(place):
    transport = ConfluentTransport({"bootstrap.servers": place["servers"][1]})
    source = transport.source(place["group"])
    try:
        return source.committed([Partition(place["topic"], n) for n in range(2)])
    finally:
        source.close()


def test_a_script_that_launches_and_a_worker_of_the_same_file_agree_on_names(place, tmp_path):
    """The producer calls its classes __main__.Name, the worker imported them as app.Name."""
    (tmp_path / "greetings.py").write_text(textwrap.dedent(SCRIPT))
    log = tmp_path / "log"
    with start_worker(place, f"{tmp_path}/greetings.py", log):
        script = subprocess.run(
            [sys.executable, "greetings.py", place["servers"][1], place["topic"]],
            cwd=tmp_path,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert script.returncode == 0, script.stderr
        done = f"Round.Success: greetings.Round[{script.stdout.strip()}]"
        wait_for(lambda: done in log.read_text(), 30, f"the end of the round: {log.read_text()}")
    assert log.read_text().count("hello world") >= 2
    assert "not registred" not in log.read_text()


def test_a_broker_that_is_down_fails_a_send_in_time_with_one_line():
    began = time.monotonic()
    result = kser("send", "x", "--topic", "t", "--timeout", "1", "--bootstrap-servers", "127.0.0.1:1")
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("kser: error: x[")
    assert time.monotonic() - began < 20


def test_output_to_a_reader_that_is_gone_ends_without_a_traceback():
    command = f"{sys.executable} -m kser tasks {DICE}"
    code = f"{command} | true; echo ${{PIPESTATUS[0]}}"
    child = subprocess.run(
        ["bash", "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=60
    )
    assert child.stdout.strip() in ("0", "1")
    assert child.stderr == ""


# -- broker ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def running_broker(*args):
    child = subprocess.Popen(
        [*KSER, "broker", *args],
        cwd=ROOT,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield child
    finally:
        if child.poll() is None:
            child.kill()
        child.communicate(timeout=10)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_broker_gives_its_address_has_the_topics_and_ends_with_0(signum):
    with running_broker("--topic", "shop:3", "--topic", "mails", "--group", "g", "--format", "json") as child:
        said = json.loads(child.stdout.readline())
        assert {"shop": 3, "mails": 6, "g.events": 6, "g.state.shop": 3}.items() <= said["topics"].items()
        admin = ConfluentTransport({"bootstrap.servers": said["bootstrap_servers"]}).admin()
        found = admin.describe([*said["topics"], "else"])
        assert {name: info.partitions for name, info in found.items()} == said["topics"]
        child.send_signal(signum)
        assert child.wait(20) == 0


def test_broker_tells_people_its_address_and_its_limits():
    with running_broker("--topic", "shop:3") as child:
        lines = [child.stdout.readline() for _ in range(4)]
    assert re.search(r"on 127\.0\.0\.1:\d+, in memory: at most 5 MB or 100,000 records a partition", lines[0])
    assert "shop (3 partitions)" in lines[1]
    assert re.fullmatch(r"  export KSER_BOOTSTRAP_SERVERS=127\.0\.0\.1:\d+\n", lines[3])


def test_a_broker_whose_process_dies_says_so_with_exit_code_1():
    with running_broker("--format", "json") as child:
        child.stdout.readline()
        [(pid, _)] = processes_with(f"mock_cluster.py {child.pid} ")
        os.kill(pid, signal.SIGKILL)
        assert child.wait(20) == 1
        assert "has ended; its topics are lost" in child.stderr.read()


# -- demo ------------------------------------------------------------------------------------------------------------


def test_demo_without_a_terminal_plays_to_the_end_and_leaves_nothing_behind():
    began = time.monotonic()
    result = kser("demo", "--operations", "3")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert time.monotonic() - began < 45  # 5 s on an idle machine
    lines = result.stdout.splitlines()
    address = re.search(r"127\.0\.0\.1:\d+", lines[0])[0]
    assert (
        len([line for line in lines if re.fullmatch(r"game \d: roll \d: You made a [1-6] \(worker-[12]\)", line)]) == 9
    )
    assert len([line for line in lines if re.fullmatch(r"game \d: SUCCESS, \d+ points", line)]) == 3
    assert any(line.startswith("All 3 operations SUCCESS: 9 rolls in ") for line in lines)
    shares = re.search(r"Rolled by worker-1: (\d), worker-2: (\d)", result.stdout)
    assert int(shares[1]) > 0 < int(shares[2])
    assert int(shares[1]) + int(shares[2]) == 9
    assert "\x1b" not in result.stdout
    assert processes_with(address) == []


def test_demo_as_json_with_stdin_closed():
    command = ["bash", "-c", f"exec {sys.executable} -m kser demo --operations 1 --workers 1 --format json <&-"]
    result = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    events = [json.loads(line) for line in result.stdout.splitlines()]
    assert [event["type"] for event in events[:-1]] == ["operation.started", *["step.done"] * 3, "operation.ended"]
    assert events[-1] | {"seconds": 0} == {
        "type": "demo.summary",
        "operations": 1,
        "rolls": 3,
        "seconds": 0,
        "workers": {"worker-1": 3},
    }


def in_terminal(*args):
    """Exit code and all output of a command in a pseudo-terminal of 90 columns and 30 lines."""
    terminal, inside = pty.openpty()
    child = subprocess.Popen(
        [*KSER, *args],
        cwd=ROOT,
        env=environment(TERM="xterm-256color", COLUMNS="90", LINES="30", LANG="C.UTF-8"),
        stdin=inside,
        stdout=inside,
        stderr=inside,
        start_new_session=True,
    )
    os.close(inside)
    output, end = b"", time.monotonic() + 60
    try:
        while time.monotonic() < end:
            if select.select([terminal], [], [], 0.5)[0]:
                chunk = _read(terminal)
                if not chunk:
                    break
                output += chunk
        return child.wait(10), output.decode()
    finally:
        os.close(terminal)
        if child.poll() is None:
            child.kill()
            child.wait(10)


def _read(terminal):
    try:
        return os.read(terminal, 65536)
    except OSError:  # how Linux tells that the other end is closed
        return b""


def test_demo_on_a_terminal_is_a_table_that_changes_in_place():
    code, output = in_terminal("demo", "--operations", "2")
    assert code == 0, output
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", output)
    assert "roll 1" in plain
    assert "\x1b[1A" in output  # the cursor goes up: the rows are written over
    assert output.rstrip().endswith("to its end") or "\x1b[?25h" in output  # and the cursor is shown again
    last = plain[plain.rindex("roll 3") :]
    assert len(re.findall(r"[⚀-⚅] [1-6] worker-[12]", last)) == 6
    assert last.count("SUCCESS") == 3
    assert "RUNNING" in plain


def test_launch_watch_on_a_terminal_shows_the_steps(place, tmp_path):
    with start_worker(place, DICE, tmp_path / "log"):
        code, output = in_terminal(
            *("launch", DICE, "Launch", "--topic", place["topic"], "--group", place["group"], "--watch"),
            *("--timeout", "40", *place["servers"]),
        )
    assert code == 0, output
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", output)
    assert plain.count("dice.Roll  You made a 4") == 3
    assert "waiting for a worker" in plain
    assert "\x1b[32m" in output


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("moment", ["workers,", "roll 2"])
def test_an_interrupted_demo_leaves_nothing_behind(signum, code, moment):
    child = subprocess.Popen(
        [*KSER, "demo", "--operations", "9"],
        cwd=ROOT,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        title = line = child.stdout.readline()
        while line and moment not in line:
            line = child.stdout.readline()
        child.send_signal(signum)
        _, errors = child.communicate(timeout=30)
    finally:
        child.kill()
    assert child.returncode == code, errors
    assert errors.strip() == ""
    assert processes_with(re.search(r"127\.0\.0\.1:\d+", title)[0]) == []


def test_a_demo_whose_worker_ends_fails_with_the_workers_last_words(monkeypatch):
    def start(name, bootstrap_servers, log):
        code = "import sys; print('out of dice', file=sys.stderr); sys.exit(3)"
        return subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=log, stderr=log)

    monkeypatch.setattr(demo_module, "_start_worker", start)
    result = CliRunner().invoke(cli, ["demo", "--operations", "1"])
    assert result.exit_code == 1
    assert result.stderr.strip() in {f"kser: error: worker-{n} has ended with exit code 3: out of dice" for n in (1, 2)}


def test_a_demo_that_takes_too_long_fails_with_how_far_it_came(monkeypatch):
    monkeypatch.setattr(demo_module, "TIMEOUT_S", 0.01)
    result = CliRunner().invoke(cli, ["demo", "--operations", "1"])
    assert result.exit_code == 1
    assert "did not start within 0.01 s" in result.stderr
