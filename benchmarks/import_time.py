"""Milliseconds of `import kser`, beside cdumay_result alone. Aim: 150 ms."""

import statistics
import subprocess
import sys

from common import show

CODE = "import time; t = time.perf_counter(); import {}; print(time.perf_counter() - t)"


def milliseconds(module: str) -> float:
    def once() -> float:
        done = subprocess.run([sys.executable, "-c", CODE.format(module)], check=True, capture_output=True, timeout=60)
        return float(done.stdout)

    return statistics.median(once() for _ in range(9)) * 1000


if __name__ == "__main__":
    show("import cdumay_result", milliseconds("cdumay_result"), "ms")
    show("import kser", milliseconds("kser"), "ms", "aim: 150")
