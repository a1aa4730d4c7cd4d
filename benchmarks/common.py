"""What the benchmarks share: the original kser's environment, a broker, and how a line is shown."""

import contextlib
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

ORIGINAL = HERE / ".original"


def original_python() -> str:
    """The interpreter of an environment with kser 0.8.27 from the package index; made when it is missing."""
    python = ORIGINAL / "bin" / "python"
    if not (ORIGINAL / ".done").exists():
        print("making the environment of the original kser 0.8.27 ...", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", str(ORIGINAL)], check=True, timeout=120)
        wanted = ["kser==0.8.27", "confluent-kafka==2.16.1", "kafka-python", "marshmallow<4"]
        subprocess.run([str(python), "-m", "pip", "install", "-q", *wanted], check=True, timeout=600)
        (ORIGINAL / ".done").touch()
    return str(python)


@contextlib.contextmanager
def broker(kind: str) -> Iterator[str]:
    """The address of a broker: "apache", "embedded", or a host:port that runs already."""
    if kind == "apache":
        from tests.apache_kafka import ApacheKafka

        with ApacheKafka() as kafka:
            yield kafka.bootstrap_servers
    elif kind == "embedded":
        from kser.confluent.embedded import EmbeddedBroker

        with EmbeddedBroker() as embedded:
            yield embedded.bootstrap_servers
    else:
        yield kind


def make_topic(bootstrap: str, partitions: int = 1) -> str:
    """A new topic of one partition; on the embedded broker the first use makes it, with four."""
    from kser.confluent.transport import ConfluentTransport
    from kser.transport import TopicSpec

    name = f"bench-{uuid.uuid4().hex[:8]}"
    admin = ConfluentTransport({"bootstrap.servers": bootstrap}).admin()
    if admin.can_create():
        admin.create([TopicSpec(name=name, partitions=partitions)])
        time.sleep(0.5)
    return name


def show(name: str, value: float, unit: str, note: str = "") -> None:
    """One line of a result."""
    print(f"{name:58s} {value:12,.1f} {unit:8s} {note}", flush=True)
