"""Fixtures for all tests: the brokers, names, a clean environment; and the last lines of a run, which say what lacked.

Brokers are started by the first test that asks for them and are shared by the whole run, so each test takes topics,
groups and transactional ids of its own. A test that breaks a broker on purpose starts one of its own, or takes
``apache3``, whose dead nodes are started again after each test.
"""

import logging
import os
import uuid
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest

from kser.confluent.embedded import EmbeddedBroker
from kser.storage import get_storage_from_url
from kser.storage.sql import SqlStorage
from tests import brokers, kafka_jars
from tests.apache_kafka import ApacheKafka, KafkaUnavailableError
from tests.needs import APACHE_KAFKA, POSTGRESQL, need, summary
from tests.postgresql import CURE, PostgreSQL
from tests.postgresql import unavailable as no_postgresql

#: Fixtures, and the marker that a test gets by using one of them, directly or through another fixture.
MARKERS = {"apache": "apache", "apache3": "apache", "embedded": "embedded"}
#: What the settings of a developer's shell would change in the code under test.
OLD_VARIABLES = ("LOCK_PATH", "LOCK_FILE", "RUNNING_FILE", "TERMINATE_FILE")
KEPT_VARIABLES = ("KSER_REQUIRE_", "KSER_TEST_KAFKA_CACHE")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for fixture in getattr(item, "fixturenames", ()):
            if fixture in MARKERS:
                item.add_marker(MARKERS[fixture])


def pytest_collection_finish(session: pytest.Session) -> None:
    """Fetch Apache Kafka before the first test: a download is not on the clock of the test that needs it first."""
    wanted = any(item.get_closest_marker("apache") for item in session.items)
    if not wanted or session.testsfailed or session.config.option.collectonly:
        return
    if kafka_jars.cached() or kafka_jars.unavailable():
        return
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter:
        reporter.write_line(f"fetching Apache Kafka through Maven into {kafka_jars.folder()}, once")
    try:
        kafka_jars.fetch()
    except KafkaUnavailableError as error:
        _unfetched.append(str(error))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> Generator[None, None, None]:
    """Write the last lines of the run, below pytest's own."""
    yield
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter:
        for line in summary(reporter.stats.get("skipped", [])):
            reporter.write_line(line, yellow=True)


@pytest.fixture(autouse=True)
def clean_environment() -> Iterator[None]:
    """No KSER_* setting of the shell reaches a test, nor the variables of kser 0.8."""
    removed = {
        name: value
        for name, value in os.environ.items()
        if name in OLD_VARIABLES or (name.startswith("KSER_") and not name.startswith(KEPT_VARIABLES))
    }
    for name in removed:
        del os.environ[name]
    yield
    os.environ.update(removed)


@pytest.fixture(autouse=True)
def clean_logging() -> Iterator[None]:
    """What a command did to the loggers of this process is undone: the next test may look at its log lines."""
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    yield
    root.setLevel(level)
    for handler in [h for h in root.handlers if h not in handlers]:
        root.removeHandler(handler)
    for name in list(root.manager.loggerDict):
        if name == "kser" or name.startswith("kser."):
            logging.getLogger(name).setLevel(logging.NOTSET)


@pytest.fixture(scope="session")
def apache() -> Iterator[ApacheKafka]:
    """A real Apache Kafka of one node."""
    yield from _apache(1)


@pytest.fixture(scope="session")
def apache3() -> Iterator[ApacheKafka]:
    """A real Apache Kafka of three nodes. A test may kill() nodes."""
    yield from _apache(3)


@pytest.fixture(autouse=True)
def _restored_apache3(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "apache3" in request.fixturenames:
        request.getfixturevalue("apache3").restore()


@pytest.fixture(scope="session")
def embedded() -> Iterator[EmbeddedBroker]:
    """The embedded broker, one node."""
    with EmbeddedBroker() as broker:
        yield broker


@pytest.fixture(scope="session")
def postgresql() -> Iterator[PostgreSQL]:
    """A real PostgreSQL."""
    if reason := no_postgresql():
        need(POSTGRESQL, reason, cure=CURE)
    with PostgreSQL() as server:
        yield server


@pytest.fixture(params=["memory", "sqlite", "postgresql"])
def storage_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a storage that no other test has, on each database; without its tables, but for that in memory."""
    if request.param == "memory":
        return "memory:"
    return _new_database(request, tmp_path)


@pytest.fixture(params=["sqlite", "postgresql"])
def shared_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """As storage_url, of databases that several storages and processes may open."""
    return _new_database(request, tmp_path)


@pytest.fixture
def storage(storage_url: str) -> Iterator[SqlStorage]:
    """A storage with its tables, on each database."""
    opened = get_storage_from_url(storage_url)
    assert isinstance(opened, SqlStorage)
    opened.install()
    yield opened
    opened.uninstall()
    opened.close()


@pytest.fixture(scope="session")
def topic_name() -> Callable[..., str]:
    """``topic_name("orders")`` is a name that no other test has: for topics, groups, transactional ids."""
    return brokers.unique


@pytest.fixture(scope="session")
def make_topic() -> Callable[..., str]:
    """``make_topic(apache, partitions=6, prefix="orders")`` is the name of a new topic on that broker."""
    return brokers.make_topic


def _new_database(request: pytest.FixtureRequest, folder: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{folder}/kser.db"
    url: str = request.getfixturevalue("postgresql").url(f"t{uuid.uuid4().hex[:12]}_")
    return url


#: Why fetching failed before the first test; it is not tried again.
_unfetched: list[str] = []


def _apache(nodes: int) -> Iterator[ApacheKafka]:
    reason = _unfetched[0] if _unfetched else kafka_jars.unavailable()
    if reason:
        need(APACHE_KAFKA, reason, cure=kafka_jars.CURE)
    try:
        kafka = ApacheKafka(nodes)
    except KafkaUnavailableError as error:
        need(APACHE_KAFKA, str(error), cure=kafka_jars.CURE)
    with kafka:
        yield kafka
