"""Every test, as `make test` runs them: the fault suite alone, then the others in two processes side by side.

Those on brokers wait most of the time, so the unit tests cost nothing beside them. What the unit tests say is printed
as one piece when they end. Exit code: the first that is not 0. Arguments are for both.
"""

import subprocess
import sys
import tempfile
import threading
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTEST = (sys.executable, "-m", "pytest")
#: Longest time of one of the three runs, in seconds: something hangs then.
LIMIT_S = 1800


def main(arguments: list[str]) -> int:
    """Run all; the exit code."""
    code = subprocess.run([*PYTEST, *arguments, "tests/chaos"], cwd=ROOT, timeout=LIMIT_S, check=False).returncode
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
            brokers = subprocess.run(
                [*PYTEST, *arguments, "tests/contract", "tests/integration"], cwd=ROOT, timeout=LIMIT_S, check=False
            )
            unit.wait(LIMIT_S)
        finally:
            if unit.poll() is None:
                unit.kill()
            teller.join()
    return code or brokers.returncode or unit.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
