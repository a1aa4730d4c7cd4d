"""The program of source document 003, unchanged but for what it elides, against Apache Kafka."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import ROOT, environment, new_topic, process, wait_for

pytestmark = pytest.mark.apache

DATA = ROOT / "tests" / "data"
CONSUMER = (DATA / "seed_dice_consumer.py.txt").read_text()
PRODUCER = (DATA / "seed_dice_producer.py.txt").read_text()
UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"


def fill_in(bootstrap: str, topic: str, directory: Path) -> tuple[Path, Path]:
    """The two programs with configuration values and a topic where the document has dots."""
    consumer, producer = directory / "consumer.py", directory / "producer.py"
    options = {"bootstrap_servers": bootstrap, "group_id": f"{topic}-group"}
    consumer.write_text(CONSUMER.replace("Consumer(...)", f"Consumer({options!r}, [{topic!r}])"))
    text = PRODUCER.replace("Producer(...)", f"Producer({{'bootstrap_servers': {bootstrap!r}}})")
    producer.write_text(text.replace("'...'", repr(topic)))
    return consumer, producer


def matching(log: str, *patterns: str) -> list[int]:
    """The line number of each pattern."""
    lines = log.splitlines()
    return [next((n for n, line in enumerate(lines) if re.search(p, line)), -1) for p in patterns]


def test_the_documents_programs_print_the_documents_lines_in_order(apache, tmp_path):
    """K-30, K-71, K-76, K-82, K-94, K-101."""
    topic = new_topic(apache.bootstrap_servers, partitions=3)
    consumer, producer = fill_in(apache.bootstrap_servers, topic, tmp_path)
    log = tmp_path / "consumer.log"
    with process(str(consumer), log=log) as running:
        wait_for(lambda: "Consumer.Starting..." in log.read_text(), 30, "the consumer's start")
        sent = subprocess.run(
            [sys.executable, str(producer)], env=environment(), capture_output=True, text=True, timeout=60
        )
        assert sent.returncode == 0, sent.stderr
        wait_for(lambda: "Controller.Success" in log.read_text(), 40, f"the roll: {log.read_text()}")
        running.terminate()
        assert running.wait(15) == 0, log.read_text()
    said = re.search(
        rf" INFO     Producer\.Success: __main__\.DiceRoll\[({UUID})\]: "
        rf"Message __main__\.DiceRoll\[\1\] sent in {topic}$",
        sent.stderr,
        re.MULTILINE,
    )
    assert said, sent.stderr
    rolled = re.escape(f"__main__.DiceRoll[{said[1]}]") + r": You made a [1-6]$"
    order = matching(
        log.read_text(),
        r" INFO     Operation registry: loaded __main__\.DiceRoll$",
        r" INFO     Operation registry: loaded __main__\.DiceLaunch$",
        r" INFO     Consumer\.Starting\.\.\.$",
        rf" INFO     DiceRoll\.Success: {rolled}",
        rf" INFO     Controller\.Success: {rolled}",
    )
    assert -1 not in order, log.read_text()
    assert order == sorted(order)


def test_the_documents_operation_runs_by_messages_to_its_end(apache, tmp_path):
    """A message that names DiceLaunch makes three rolls, one after the other."""
    topic = new_topic(apache.bootstrap_servers, partitions=3)
    consumer, producer = fill_in(apache.bootstrap_servers, topic, tmp_path)
    producer.write_text(producer.read_text().replace("__main__.DiceRoll", "__main__.DiceLaunch"))
    log = tmp_path / "consumer.log"
    with process(str(consumer), log=log):
        done = subprocess.run([sys.executable, str(producer)], env=environment(), capture_output=True, timeout=60)
        assert done.returncode == 0
        wait_for(lambda: "DiceLaunch.Success" in log.read_text(), 40, f"the end: {log.read_text()}")
    text = log.read_text()
    assert text.count("DiceRoll.Success") == 3
    assert re.search(r"DiceLaunch\.SetStatus: .* status update 'RUNNING' -> 'SUCCESS'", text)


@pytest.mark.parametrize("name", ["consumer.py", "producer.py"])
def test_the_example_is_the_documents_program(name):
    """examples/dice differs from the document only where the document has dots."""
    seed = {"consumer.py": CONSUMER, "producer.py": PRODUCER}[name]
    ours = [line.strip() for line in (ROOT / "examples" / "dice" / name).read_text().splitlines()]
    for line in seed.splitlines():
        if line.strip() and "..." not in line:
            assert line.strip() in ours, line
