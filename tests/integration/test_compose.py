"""docker-compose.yml is what a compose client takes, and says what the rest of the repository says."""

import json
import shlex
import shutil
import subprocess

import pytest
import yaml
from click.testing import CliRunner

from kser.cli.main import cli
from tests.needs import need
from tests.processes import ROOT

FILE = ROOT / "docker-compose.yml"


def compose_client() -> list[str] | None:
    """The command of a compose client on this machine; none of them needs an engine to read a file."""
    for command in (["docker", "compose"], ["docker-compose"]):
        found = shutil.which(command[0])
        if found and subprocess.run([*command, "version"], capture_output=True, timeout=30).returncode == 0:
            return command
    return None


@pytest.fixture(scope="module")
def services():
    return yaml.safe_load(FILE.read_text())["services"]


def test_a_compose_client_takes_the_file():
    client = compose_client()
    if client is None:
        need("a compose client", "neither docker compose nor docker-compose is installed (Debian: docker-compose)")
    done = subprocess.run(
        [*client, "-f", str(FILE), "config", "--services"], capture_output=True, text=True, timeout=60, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert {"kafka", "postgres", "worker"} <= set(done.stdout.split())


def test_a_compose_client_refuses_a_broken_file(tmp_path):
    """The check above can fail."""
    client = compose_client()
    if client is None:
        need("a compose client", "neither docker compose nor docker-compose is installed (Debian: docker-compose)")
    broken = tmp_path / "docker-compose.yml"
    broken.write_text(FILE.read_text().replace("    image:", "    imaje:"))
    done = subprocess.run([*client, "-f", str(broken), "config", "-q"], capture_output=True, timeout=60)
    assert done.returncode != 0


def test_the_worker_of_the_file_can_be_started(services):
    """Its commands are commands of kser, on a file that is there."""
    for name in ("worker", "topics"):
        words = services[name]["command"]
        assert CliRunner().invoke(cli, [words[0], "--help"]).exit_code == 0
    app = services["worker"]["command"][1]
    path = app.removeprefix("/app/").split(":")[0]
    assert (ROOT / path).exists(), shlex.join(services["worker"]["command"])
    listed = CliRunner().invoke(cli, ["tasks", f"{ROOT / path}:{app.split(':')[1]}", "--format", "json"])
    assert listed.exit_code == 0, listed.output
    assert "consumer.DiceRoll" in json.dumps(json.loads(listed.stdout))


def test_ports_are_published_on_this_machine_only(services):
    ports = [port for service in services.values() for port in service.get("ports", [])]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)
