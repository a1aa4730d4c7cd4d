"""Events a second that a recorder stores, on sqlite and on PostgreSQL, beside what one worker tells at full speed.

``recorder.py [OPERATIONS]`` (default 4000): histories of operations of three tasks, without a broker.
PostgreSQL is one of the tests' own and commits to disk here, as a real one does. A worker tells one event for each
task (benchmarks/produce_to_done.py says how many those are a second), and telemetry only of those over 0.1 s.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

from common import ROOT, show

from kser.storage import get_storage_from_url
from kser.storage.projection import Projection

sys.path.insert(0, str(ROOT))
from tests import postgresql
from tests.recording import Tape

BATCH = 2000


def history(operations):
    """Events alone, as short tasks tell them: started, three steps, ended."""
    tape = Tape()
    for number in range(operations):
        tape.operation(f"operation-{number:08d}", 3)
    tape.records = [record for record in tape.records if record.topic.endswith(".events")]
    return tape


def measure(url, tape):
    storage = get_storage_from_url(url)
    storage.install()
    projection = Projection(storage.database, "c", "shop")
    projection.positions(tape.partitions)
    began = time.perf_counter()
    for at in range(0, len(tape.records), BATCH):
        projection.apply(tape.records[at : at + BATCH])
    seconds = time.perf_counter() - began
    assert storage.history.count_operations(states=["SUCCESS"]) == len(tape.records) // 5
    storage.uninstall()
    storage.close()
    return len(tape.records) / seconds


def main(operations):
    tape = history(operations)
    measure("memory:", history(200))  # imports and caches
    with tempfile.TemporaryDirectory() as folder:
        sqlite = measure(f"sqlite:///{Path(folder) / 'kser.db'}", tape)
    show("recorder, sqlite", sqlite, "events/s")
    if reason := postgresql.unavailable():
        print(f"recorder, PostgreSQL: left out, {reason}")
        return
    postgresql.SETTINGS.update({"fsync": "on", "synchronous_commit": "on", "full_page_writes": "on"})
    with postgresql.PostgreSQL() as server:
        other = measure(server.url("bench_"), tape)
    show("recorder, PostgreSQL", other, "events/s", f"{other / sqlite:.2f} of sqlite")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("operations", type=int, nargs="?", default=4000)
    main(parser.parse_args().operations)
