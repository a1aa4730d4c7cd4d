"""Apache Kafka's jar files, fetched once through Maven into a cache folder."""

import fcntl
import functools
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

KAFKA_VERSION = "4.3.1"
LOG4J_VERSION = "2.25.4"
JAVA_AT_LEAST = 17
CURE = f"install Java {JAVA_AT_LEAST} or later and Maven"

#: Kafka needs the rest by itself, except for its logging. It logs through SLF4J 1.7, hence log4j-slf4j-impl.
ARTIFACTS = (
    ("org.apache.kafka", "kafka_2.13", KAFKA_VERSION),
    ("org.apache.logging.log4j", "log4j-api", LOG4J_VERSION),
    ("org.apache.logging.log4j", "log4j-core", LOG4J_VERSION),
    ("org.apache.logging.log4j", "log4j-slf4j-impl", LOG4J_VERSION),
    ("org.apache.logging.log4j", "log4j-1.2-api", LOG4J_VERSION),
)
PLUGIN = "org.apache.maven.plugins:maven-dependency-plugin:3.6.1:copy-dependencies"
FETCH_TIMEOUT_S = 600


class KafkaUnavailableError(Exception):
    """Apache Kafka cannot run here: something that is not part of this project is missing. The text is the reason."""


def folder() -> Path:
    """Where the jars are, or will be: in $KSER_TEST_KAFKA_CACHE, else in ~/.cache/kser."""
    base = os.environ.get("KSER_TEST_KAFKA_CACHE")
    return (Path(base) if base else Path.home() / ".cache" / "kser").absolute() / f"kafka-{KAFKA_VERSION}"


def cached() -> bool:
    return (folder() / f"kafka_2.13-{KAFKA_VERSION}.jar").exists()


def java() -> str | None:
    """The path of the java to use: that of $JAVA_HOME, else the first on PATH."""
    home = os.environ.get("JAVA_HOME")
    return (shutil.which(str(Path(home) / "bin" / "java")) if home else None) or shutil.which("java")


def unavailable() -> str | None:
    """Why Apache Kafka cannot run here; None when it can, as far as can be seen without fetching it."""
    if os.name != "posix":
        return "not on Linux or macOS"
    path = java()
    if path is None:
        return "no java on PATH"
    version = _java_version(path)
    if version is None:
        return f"{path} -version does not tell a version"
    if version < JAVA_AT_LEAST:
        return f"java is version {version}, Apache Kafka {KAFKA_VERSION} needs {JAVA_AT_LEAST}"
    if not cached() and shutil.which("mvn") is None:
        return f"no mvn on PATH, and no jars in {folder()}"
    return None


def fetch() -> Path:
    """The folder with the jars, fetched now if they are not there yet.

    Safe for several processes at once: one fetches, the others wait for it.

    Raises KafkaUnavailableError with the reason, Maven's first error among them.
    """
    if reason := unavailable():
        raise KafkaUnavailableError(reason)
    if cached():
        return folder()
    deadline = time.monotonic() + FETCH_TIMEOUT_S
    folder().parent.mkdir(parents=True, exist_ok=True)
    with _lock(_beside(".lock"), deadline) as descriptor:
        if not cached():
            _fetch(descriptor, deadline)
    return folder()


def _beside(ending: str) -> Path:
    return folder().with_name(folder().name + ending)


@functools.cache
def _java_version(path: str) -> int | None:
    try:
        told = subprocess.run([path, "-version"], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r'version "(?:1\.)?(\d+)', told.stderr + told.stdout)
    return int(found[1]) if found else None


@contextmanager
def _lock(path: Path, deadline: float) -> Iterator[int]:
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise KafkaUnavailableError(f"another process fetches Apache Kafka and holds {path}") from None
                time.sleep(0.2)
        yield descriptor
    finally:
        os.close(descriptor)


def _fetch(lock: int, deadline: float) -> None:
    work = _beside(".part")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        (work / "pom.xml").write_text(_pom())
        command = ["mvn", "-q", "-B", "-Dstyle.color=never", "-f", str(work / "pom.xml"), PLUGIN]
        command += ["-DincludeScope=runtime", f"-DoutputDirectory={work / 'lib'}"]
        # Maven's own limits for an answer are half an hour; a registry that is not reachable is to be told soon.
        command += ["-Dmaven.wagon.rto=60000", "-Daether.connector.requestTimeout=60000"]
        _run(command, lock, deadline)
        # The folder appears with all its files or not at all, so that nobody starts a Kafka with half of them.
        (work / "lib").rename(folder())
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _run(command: list[str], lock: int, deadline: float) -> None:
    # Maven holds the lock too: should this process be killed, nobody fetches into the same folder beside it.
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        pass_fds=(lock,),
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=max(1.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        raise KafkaUnavailableError(f"mvn did not get Apache Kafka within {FETCH_TIMEOUT_S} s") from None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    if process.returncode:
        errors = [line for line in output.splitlines() if line.startswith("[ERROR]")] or [output.strip()[-300:]]
        raise KafkaUnavailableError(f"mvn could not get Apache Kafka: {errors[0].removeprefix('[ERROR]').strip()}")


def _pom() -> str:
    dependencies = "".join(
        f"<dependency><groupId>{group}</groupId><artifactId>{name}</artifactId><version>{version}</version></dependency>"
        for group, name, version in ARTIFACTS
    )
    return (
        '<project xmlns="http://maven.apache.org/POM/4.0.0"><modelVersion>4.0.0</modelVersion>'
        "<groupId>kser.test</groupId><artifactId>kafka-jars</artifactId><version>1</version>"
        f"<packaging>pom</packaging><dependencies>{dependencies}</dependencies></project>\n"
    )
