"""Every test, as `make test` runs them: in two parts of two test runs side by side, because they wait most of the time.

The fault suite goes beside the unit tests, which need no broker; then those on brokers go in two halves, each with
brokers of its own. What the second run of a part says is printed as one piece when both have ended, and then the end
of the first again if it failed. Exit code: the first that is not 0. Arguments are for all of them.

Nothing hangs unseen: a test that its own time limit cannot end, because the interpreter does not run any more, ends its
run with the tracebacks of all threads (pytest's faulthandler_timeout); so does a run that takes too long as a whole.
"""

import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
#: Seconds after which a test ends its run: more than the time limit of any of them.
TEST_S = 330
PYTEST = (
    *(sys.executable, "-X", "faulthandler", "-m", "pytest"),
    *("-o", f"faulthandler_timeout={TEST_S}", "-o", "faulthandler_exit_on_timeout=true"),
)
#: Longest time of one part, in seconds: something hangs then.
LIMIT_S = 1200
#: How much of the end of a run that failed is shown again, in bytes.
TAIL = 6000
#: Half of the time that the tests on brokers take; all others are the other half.
FIRST_HALF = (
    "contract/test_projection.py",
    "contract/test_storage.py",
    "contract/test_transport.py",
    "integration/test_cli.py",
    "integration/test_confluent_transport.py",
    "integration/test_consumer_protocol.py",
    "integration/test_control.py",
    "integration/test_documents.py",
    "integration/test_embedded_broker.py",
    "integration/test_operations.py",
    "integration/test_topics.py",
    "integration/test_worker.py",
    "integration/test_worker_command.py",
)


def main(arguments: list[str]) -> int:
    """Run all; the exit code."""
    first = [str(ROOT / "tests" / name) for name in FIRST_HALF]
    every = [str(p) for folder in ("contract", "integration") for p in (ROOT / "tests" / folder).glob("test_*.py")]
    second = sorted(set(every) - set(first))
    codes = [
        *_side_by_side(arguments, ["tests/chaos"], ["tests/unit"]),
        *_side_by_side(arguments, first, second),
    ]
    return next((code for code in codes if code), 0)


def _side_by_side(arguments: list[str], shown: list[str], told: list[str]) -> tuple[int, int]:
    """Run both; the exit codes. The first is shown as it goes."""
    with tempfile.TemporaryFile() as out:
        colour = ["--color=yes"] if sys.stdout.isatty() else []
        first = _start([*colour, *arguments], shown, subprocess.PIPE)
        second = _start(arguments, told, out)
        hangs = threading.Timer(LIMIT_S, _abort, (first, second))
        hangs.start()
        try:
            tail = bytearray()
            reader = threading.Thread(target=_show, args=(first, tail), daemon=True)
            reader.start()
            codes = first.wait(), second.wait()
            reader.join(5)  # not longer: whatever a test left behind could hold the pipe open
        finally:
            hangs.cancel()
            for run in (first, second):
                if run.poll() is None:
                    run.terminate()  # pytest ends what its tests have started
                    run.wait(60)
        out.seek(0)
        _write(b"\n" + out.read())
        if codes[0]:
            _write(b"\n... the end of the run before it, which failed too:\n" if codes[1] else b"\n... failed:\n")
            _write(tail)
    return codes


def _start(arguments: list[str], paths: list[str], out: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [*PYTEST, *arguments, *paths], cwd=ROOT, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT
    )


def _show(run: subprocess.Popen[bytes], tail: bytearray) -> None:
    """Pass on what a run says, as it comes, and keep the end of it."""
    assert run.stdout is not None
    while piece := os.read(run.stdout.fileno(), 65536):
        _write(piece)
        tail += piece
        del tail[:-TAIL]


def _write(piece: bytes | bytearray) -> None:
    sys.stdout.buffer.write(piece)
    sys.stdout.buffer.flush()


def _abort(*runs: subprocess.Popen[bytes]) -> None:
    """Python's faulthandler says where each of them is, and ends it."""
    for run in runs:
        if run.poll() is None:
            run.send_signal(signal.SIGABRT)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
