"""Every test, as `make test` runs them: in two parts of two test runs side by side, because they wait most of the time.

The fault suite goes beside the unit tests, which need no broker; then those on brokers go in two halves, each with
brokers of its own. What the second run of a part says is printed as one piece when both have ended. Exit code: the
first that is not 0. Arguments are for all of them.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTEST = (sys.executable, "-m", "pytest")
#: Longest time of one part, in seconds: something hangs then.
LIMIT_S = 1500
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
    with tempfile.TemporaryFile("w+") as out:
        other = subprocess.Popen(
            [*PYTEST, *arguments, *told], cwd=ROOT, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT
        )
        try:
            code = subprocess.run([*PYTEST, *arguments, *shown], cwd=ROOT, timeout=LIMIT_S, check=False).returncode
            other.wait(LIMIT_S)
        finally:
            if other.poll() is None:
                other.terminate()  # pytest ends what its tests have started
                other.wait(60)
            out.seek(0)
            print(f"\n{out.read()}", flush=True)
    return code, other.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
