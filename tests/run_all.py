"""Every test, as `make test` runs them, in two parts that use both cores of a small machine.

The fault suite goes beside the unit tests, which need no broker; then those on brokers, which wait most of the time, go
side by side in two processes, each with brokers of its own. What the unit tests say is printed as one piece when they
end. Exit code: the first that is not 0. Arguments are for all of them.
"""

import subprocess
import sys
import tempfile
import threading
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTEST = (sys.executable, "-m", "pytest")
#: Longest time of one part, in seconds: something hangs then.
LIMIT_S = 1500


def main(arguments: list[str]) -> int:
    """Run all; the exit code."""
    with tempfile.TemporaryFile("w+") as out:
        unit = subprocess.Popen(
            [*PYTEST, *arguments, "tests/unit"],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
        )

        def tell() -> None:
            unit.wait()
            out.seek(0)
            print(f"\n{out.read()}", flush=True)

        teller = threading.Thread(target=tell)
        teller.start()
        try:
            chaos = _run(*arguments, "tests/chaos")
            unit.wait(LIMIT_S)
        finally:
            if unit.poll() is None:
                unit.kill()
            teller.join()
    brokers = _run("-n", "2", "--dist", "loadfile", *arguments, "tests/contract", "tests/integration")
    return chaos or unit.returncode or brokers


def _run(*arguments: str) -> int:
    return subprocess.run([*PYTEST, *arguments], cwd=ROOT, timeout=LIMIT_S, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
