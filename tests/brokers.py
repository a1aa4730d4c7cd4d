"""What the embedded broker and Apache Kafka have in common, for tests that run on both."""

import subprocess
import uuid
from pathlib import Path
from typing import Protocol

__all__ = ["Broker", "has_ended", "is_gone", "make_topic", "pids_of", "unique"]


class Broker(Protocol):
    """A broker that a test may use: EmbeddedBroker and ApacheKafka are."""

    @property
    def bootstrap_servers(self) -> str:
        """The addresses for clients."""

    def create_topic(self, name: str, partitions: int) -> None:
        """Make a topic."""


def unique(prefix: str = "t") -> str:
    """A name that no other test has, for topics, groups and transactional ids."""
    return f"{prefix}-{uuid.uuid4().hex[:12]}"


def make_topic(broker: Broker, partitions: int = 4, prefix: str = "t") -> str:
    """The name of a new topic on this broker."""
    name = unique(prefix)
    broker.create_topic(name, partitions)
    return name


def is_gone(pid: int) -> bool:
    """True when there is no such process, not even a zombie that somebody forgot to wait for."""
    return _state(pid) == ""


def has_ended(pid: int) -> bool:
    """True when this process does nothing any more. An orphan may be a zombie: its new parent is not ours to judge."""
    return _state(pid) in ("", "Z", "X")


def pids_of(word: str) -> list[int]:
    """The processes that have this in their command line."""
    if Path("/proc/self/cmdline").exists():
        return [int(folder.name) for folder in Path("/proc").glob("[0-9]*") if word in _command(folder)]
    told = subprocess.run(["ps", "-eo", "pid=", "-o", "args="], capture_output=True, text=True, check=True).stdout
    return [int(row.split()[0]) for row in told.splitlines() if word in row]


def _command(folder: Path) -> str:
    try:
        return (folder / "cmdline").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
        return ""


def _state(pid: int) -> str:
    if Path("/proc/self/stat").exists():
        try:
            # The name before the state is in brackets, and may have blanks and brackets in it.
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return ""
    told = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return told.stdout.strip()[:1]
