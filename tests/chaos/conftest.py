"""Scenarios of the fault suite run side by side: each one mostly waits, for sessions and transactions to time out."""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from tests.apache_kafka import ApacheKafka

#: At most so many at a time: each has a worker, which is busy when it starts.
SIDE_BY_SIDE = 6

#: Runs one scenario on a broker, with a folder for logs; raises AssertionError when something is wrong.
Scenario = Callable[[ApacheKafka, Path], None]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "chaos: faults under load on a real broker; takes a while")


def names(scenarios: dict[str, Scenario], long: Iterable[str] = ()) -> list[Any]:
    """For parametrize: the names of all, those of ``long`` marked so."""
    return [pytest.param(name, marks=pytest.mark.long) if name in long else name for name in scenarios]


class Ensemble:
    """The scenarios of a module. The first test that asks for a result starts all that were selected."""

    def __init__(self, scenarios: list[tuple[str, Scenario]], kafka: ApacheKafka, folder: Path) -> None:
        self._results: dict[str, Future[None]] = {name: Future() for name, _ in scenarios}
        self._waiting: queue.SimpleQueue[tuple[str, Scenario]] = queue.SimpleQueue()
        for scenario in scenarios:
            self._waiting.put(scenario)
        self._kafka = kafka
        self._folder = folder
        self._threads = [
            threading.Thread(target=self._work, name="scenario", daemon=True)
            for _ in range(min(SIDE_BY_SIDE, len(scenarios)))
        ]
        for thread in self._threads:
            thread.start()

    def result(self, name: str, within_s: float = 110) -> None:
        """Return when this scenario has passed; raises what it raised."""
        self._results[name].result(within_s)

    def close(self) -> None:
        """Wait for those under way, start no more."""
        while not self._waiting.empty():
            self._waiting.get()
        for thread in self._threads:
            thread.join(120)

    def _work(self) -> None:
        while True:
            try:
                name, scenario = self._waiting.get_nowait()
            except queue.Empty:
                return
            try:
                scenario(self._kafka, self._folder)
            except BaseException as exc:  # it is raised where the result is asked for
                self._results[name].set_exception(exc)
            else:
                self._results[name].set_result(None)


@pytest.fixture(scope="module")
def ensemble(
    request: pytest.FixtureRequest, apache: ApacheKafka, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Ensemble]:
    """The scenarios of this module (its SCENARIOS, name to Scenario) that were selected, under way."""
    wanted = [
        item.callspec.params["scenario"]
        for item in request.session.items
        if getattr(item, "module", None) is request.module
        and hasattr(item, "callspec")
        and "scenario" in item.callspec.params
    ]
    scenarios = request.module.SCENARIOS
    running = Ensemble([(name, scenarios[name]) for name in wanted], apache, tmp_path_factory.mktemp("chaos"))
    yield running
    running.close()
