"""The commands of README.md, docs/quickstart.md and examples/dice/README.md, read from there and run in their order.

Whoever follows a document starts with an empty broker: `kser broker`, as the document starts it, or Apache Kafka.
"""

import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.processes import ROOT, environment, wait_for

UUID = "[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"
#: What stands for the address of the broker in the documents.
ADDRESS = re.compile(r"127\.0\.0\.1:(9092|\.\.\.)")
BROKER = ("kser", "broker")
#: Commands that go on until they are stopped, and what shows that they are up.
SERVICES = {("kser", "worker"): "Worker.Starting...", ("python", "examples/dice/consumer.py"): "Consumer.Starting..."}
#: To get a checkout, an installation and a broker is not what is tried here.
SET_UP = ("make", "git", "pip")


class Document:
    """What a document tells its reader to do. Commands are lists of words, without the path of the environment."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.text = (ROOT / path).read_text("utf-8")
        without_fences = re.sub(r"^```.*?^```$", "", self.text, flags=re.MULTILINE | re.DOTALL)
        self._indented: list[str] = re.findall(r"(?:^    .*\n+)+", without_fences, re.MULTILINE)

    def python(self, mark: str) -> str:
        """The only Python block that has ``mark`` in it."""
        found = re.findall(r"^```python\n(.*?)^```$", self.text, re.MULTILINE | re.DOTALL)
        [block] = [block for block in found if mark in block]
        return block

    def blocks(self) -> list[list[list[str]]]:
        """The commands of each indented block that has some."""
        found = []
        for block in self._indented:
            lines = [shlex.split(line, comments=True) for line in block.splitlines()]
            words = [[line[0].removeprefix(".venv/bin/"), *line[1:]] for line in lines if line]
            words = [line for line in words if line[0] in ("kser", "python", "export")]
            if words:
                found.append(words)
        return found

    def within_a_sentence(self, beginning: str) -> list[str]:
        """The command that begins so and stands in a sentence, however often it does."""
        [found] = set(re.findall(rf"`({re.escape(beginning)}[^`]*)`", self.text))
        return shlex.split(found)

    def lines_shown(self) -> list[str]:
        """Patterns of the log lines that the document shows."""
        shown = [line.strip() for block in self._indented for line in block.splitlines() if "    INFO " in line]
        patterns = [re.escape(line).replace(re.escape("872c..."), UUID) for line in shown]
        return [re.sub(r"(made\\ a\\ )\d$", r"\g<1>[1-6]$", pattern) for pattern in patterns]


class Reader:
    """Somebody who types what a document says, service by service into terminals of their own.

    Args:
        folder: where the commands are typed.
        log: where everything that they print goes.
    """

    def __init__(self, folder: Path, log: Path) -> None:
        self.address = ""
        self.folder = folder
        self.log = log
        self.ran: list[tuple[str, ...]] = []
        self._exported: dict[str, str] = {}
        self._services: list[subprocess.Popen[bytes]] = []
        self._opened = ExitStack()

    def type(self, words: list[str]) -> subprocess.CompletedProcess[str] | None:
        """Type one command. What it printed and its exit code, when it ends by itself."""
        words = [ADDRESS.sub(self.address, word) if self.address else word for word in words]
        self.ran.append(tuple(words[:2]))
        if words[0] == "export":
            self._exported |= dict(word.split("=", 1) for word in words[1:])
            return None
        command = ["-m", "kser", *words[1:]] if words[0] == "kser" else words[1:]
        if tuple(words[:2]) == BROKER:
            self._start_broker(command)
            return None
        if tuple(words[:2]) in SERVICES:
            self._start(command, SERVICES[tuple(words[:2])])
            return None
        done = subprocess.run(
            [sys.executable, *command],
            cwd=self.folder,
            env=environment(**self._exported),
            capture_output=True,
            text=True,
            timeout=90,
            stdin=subprocess.DEVNULL,
        )
        with self.log.open("a") as log:
            log.write(done.stdout + done.stderr)
        return done

    def stop(self) -> None:
        """Press Ctrl-C in the terminals of all services; each ends well."""
        for child in self._services:
            child.send_signal(signal.SIGINT)
        codes = [child.wait(45) for child in self._services]
        self._services.clear()
        assert not any(codes), self.log.read_text()

    def close(self) -> None:
        """Close all terminals, that of the broker last."""
        self._opened.close()

    def _start(self, command: list[str], up: str) -> None:
        before = self._said(up)
        child = self._process(command, self.log)
        self._services.append(child)
        wait_for(lambda: self._said(up) > before or child.poll() is not None, 40, f"{up} of {command}")
        assert child.poll() is None, self.log.read_text()

    def _start_broker(self, command: list[str]) -> None:
        told = self.log.with_name("broker.log")
        child = self._process(command, told)
        line = re.compile(r"^  export KSER_BOOTSTRAP_SERVERS=(\S+)$", re.MULTILINE)
        wait_for(lambda: line.search(told.read_text()) or child.poll() is not None, 40, "the address of the broker")
        found = line.search(told.read_text())
        assert found is not None, told.read_text()
        self.address = found[1]

    def _process(self, command: list[str], log: Path) -> subprocess.Popen[bytes]:
        with log.open("ab") as out:
            child = subprocess.Popen(
                [sys.executable, *command],
                cwd=self.folder,
                env=environment(**self._exported),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        self._opened.callback(_end, child)
        return child

    def _said(self, text: str) -> int:
        return self.log.read_text().count(text) if self.log.exists() else 0


def _end(child: subprocess.Popen[bytes]) -> None:
    child.terminate()
    try:
        child.wait(15)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait(15)


@pytest.fixture
def reader(tmp_path) -> Iterator[Reader]:
    """One at work in an empty directory."""
    found = Reader(tmp_path, tmp_path / "log")
    yield found
    found.close()


@pytest.fixture(params=["embedded", pytest.param("apache", marks=pytest.mark.apache)])
def kind(request, reader) -> str:
    """The kind of broker that the reader has."""
    if request.param == "apache":
        reader.address = request.getfixturevalue("apache").bootstrap_servers
    return request.param


def follow(reader: Reader, commands: list[list[str]], kind: str) -> list[subprocess.CompletedProcess[str]]:
    """Type the commands of a block; what those printed that ended. Each did what the document says of it."""
    ended = []
    for words in commands:
        if tuple(words[:2]) == BROKER and kind == "apache":
            continue
        done = reader.type(words)
        if done is None:
            continue
        if words[:3] == ["kser", "topics", "create"] and kind == "embedded":
            assert done.returncode == 1, done.stderr  # the documents: not needed there
            assert "This is the embedded broker: it makes topics by itself" in done.stderr
            continue
        assert done.returncode == 0, done.stdout + done.stderr + reader.log.read_text()
        ended.append(done)
    return ended


def test_the_readme_leads_from_an_empty_broker_to_an_operation_that_ends(reader, kind):
    document = Document("README.md")
    (reader.folder / "shop.py").write_text(document.python("class Order(Operation)"))
    if kind == "embedded":
        reader.type(document.within_a_sentence("kser broker"))
    [commands] = document.blocks()
    [*_, launched] = follow(reader, commands, kind)
    assert re.search(r"SUCCESS  shop\.Order  ended", launched.stdout)
    assert [line for line in reader.ran if line[0] == "kser" and line != BROKER] == [
        ("kser", "topics"), ("kser", "worker"), ("kser", "launch"),
    ]  # fmt: skip
    # And in a service:
    (reader.folder / "service.py").write_text(ADDRESS.sub(reader.address, document.python("import Producer")))
    said = reader.type(["python", "service.py"])
    assert re.match(rf"0 Message shop\.Charge\[{UUID}\] sent in shop$", said.stdout), said.stderr
    wait_for(lambda: reader.log.read_text().count("Order.Success: ") == 2, 40, "the end of the service's operation")
    reader.stop()


def test_the_quickstart_leads_from_an_empty_broker_to_an_operation_that_ends_and_one_that_fails(reader, kind):
    document = Document("docs/quickstart.md")
    (reader.folder / "shop.py").write_text(document.python("class Order(Operation)"))
    [commands] = document.blocks()
    if kind == "apache":
        reader.type(["export", "KSER_BOOTSTRAP_SERVERS=127.0.0.1:..."])
        follow(reader, [document.within_a_sentence("kser topics create")], kind)
    [launched] = follow(reader, commands, kind)
    assert re.search(r"SUCCESS  shop\.Order  ended", launched.stdout)
    assert len(re.findall(r"SUCCESS    shop\.(Reserve|Charge|notify)  ", launched.stdout)) == 3
    # "Leave out `amount` and see what it says."
    without = [re.sub(r', "amount": \d+', "", word) for word in commands[-1]]
    assert without != commands[-1]
    failed = reader.type(without)
    assert failed.returncode == 1
    assert "Missing parameter: amount" in failed.stderr
    reader.stop()


def test_the_readme_of_the_dice_leads_from_an_empty_broker_to_a_game(reader, kind):
    document = Document("examples/dice/README.md")
    reader.folder = ROOT  # its commands name the files from there
    if kind == "embedded":
        reader.type([*BROKER])  # the README has `make kafka`, which is on the port that its programs expect
    reader.type(["export", "KSER_BOOTSTRAP_SERVERS=127.0.0.1:9092"])
    roll, game = document.blocks()
    follow(reader, roll, kind)
    shown = document.lines_shown()
    assert len(shown) == 3
    for pattern in shown:
        wait_for(lambda pattern=pattern: re.search(pattern, reader.log.read_text(), re.MULTILINE), 40, pattern)
    reader.stop()  # "Stop `consumer.py` first"
    [*_, launched] = follow(reader, game, kind)
    assert len(re.findall(r"SUCCESS    consumer\.DiceRoll  You made a [1-6]  ", launched.stdout)) == 3
    assert re.search(r"SUCCESS  consumer\.DiceLaunch  ended", launched.stdout)
    assert ("kser", "topics") in reader.ran
    assert ("python", "examples/dice/producer.py") in reader.ran
    reader.stop()


@pytest.mark.parametrize("path", ["README.md", "docs/quickstart.md", "examples/dice/README.md"])
def test_every_command_of_a_document_is_one_of_a_block_that_is_tried(path):
    """So that a document cannot grow a command that the tests above do not see."""
    document = Document(path)
    lines = [line.strip() for block in document._indented for line in block.splitlines()]
    others = [line for line in lines if line and not re.match(r"(\.venv/bin/)?(kser|python|export) ", line)]
    assert all(line.split()[0] in (*SET_UP, "INFO") for line in others), others
