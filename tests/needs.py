"""What tests need that this project cannot bring: who lacks it, skips, and says so at the end of the run.

``need("kcat", "no kcat on PATH", cure="install kcat")`` skips the test, or fails it where the need is a must: under
KSER_REQUIRE_ALL=1 (the CI), or under KSER_REQUIRE_KCAT=1 for this one alone (for Apache Kafka: KSER_REQUIRE_KAFKA).
The last lines of a test run name each need that was missing and how many tests were skipped for it.
"""

import os
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any, NoReturn

import pytest

__all__ = ["APACHE_KAFKA", "POSTGRESQL", "need", "required", "summary"]

APACHE_KAFKA = "Apache Kafka"
POSTGRESQL = "PostgreSQL"
_VARIABLES = {APACHE_KAFKA: "KSER_REQUIRE_KAFKA"}


#: The text of a skip, which is all that pytest's reports tell of it.
_TEXT = re.compile(r"needs (?P<name>[^:]+): (?P<reason>.*?)(?: -- (?P<cure>.*))?", re.DOTALL)


def need(name: str, reason: str, *, cure: str = "") -> NoReturn:
    """Skip this test because ``name`` is missing, or fail it where that is required.

    Args:
        name: what is needed, e.g. "kcat".
        reason: why it cannot be used, e.g. "no kcat on PATH".
        cure: what to do about it, in the imperative, e.g. "install the package kcat".
    """
    text = f"needs {name}: {reason}" + (f" -- {cure}" if cure else "")
    if required(name):
        pytest.fail(f"{text} (required here by {required(name)})", pytrace=False)
    pytest.skip(text, allow_module_level=True)


def required(name: str) -> str:
    """The environment variable that makes ``name`` a must here, "" when it is none."""
    own = _VARIABLES.get(name) or "KSER_REQUIRE_" + re.sub(r"[^A-Z0-9]+", "_", name.upper())
    return next((variable for variable in (own, "KSER_REQUIRE_ALL") if os.environ.get(variable) in _TRUE), "")


def summary(skipped: Iterable[Any]) -> list[str]:
    """One line for each need that was missing, of the reports of what was skipped."""
    counts: Counter[str] = Counter()
    for report in skipped:
        # The text of a skip is (file, line, "Skipped: text").
        if isinstance(report.longrepr, tuple):
            counts[report.longrepr[2].removeprefix("Skipped: ")] += 1
    lines = []
    for text, number in counts.items():
        if found := _TEXT.fullmatch(text):
            tests = "1 test" if number == 1 else f"{number} tests"
            cure = f"; {found['cure']}" if found["cure"] else ""
            lines.append(f"kser: {found['name']} not available ({found['reason']}): {tests} skipped{cure}")
    return lines


_TRUE = frozenset({"1", "true", "yes", "on"})
