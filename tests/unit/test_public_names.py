"""What kser shows, and what importing it costs: K-08, K-11, K-12, T-24; DESIGN.md 9."""

import importlib
import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import kser

#: Not loaded by ``import kser``: clients, servers, SQL, YAML, templates, command lines.
HEAVY = ["confluent_kafka", "kafka", "flask", "werkzeug", "sqlalchemy", "alembic", "yaml", "jinja2", "click", "rich"]

#: Tells what importing does: the modules loaded, the files opened for writing, the variables changed.
IMPORTS = """
import json, os, sys
written, before = [], dict(os.environ)
def look(event, args):
    if event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+"):
        written.append(str(args[0]))
    if event in ("os.mkdir", "os.rename", "os.remove", "socket.connect", "subprocess.Popen"):
        written.append(f"{event} {args[0]}")
sys.addaudithook(look)
sys.dont_write_bytecode = True
for name in sys.argv[1:]:
    __import__(name)
print(json.dumps({"modules": sorted(sys.modules), "written": written, "same": dict(os.environ) == before}))
"""


def imported(*names, cwd=None):
    env = {**os.environ, "PYTHONPATH": str(Path(kser.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS, *names],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env=env,
        cwd=cwd,
    )
    assert done.stderr == ""
    return json.loads(done.stdout)


def test_the_public_names_are_these():
    """Pinned: a name that is added or taken away is a decision."""
    assert kser.__all__ == [
        "ConfigurationError", "Controller", "DeliveryError", "Entrypoint", "EntrypointNotFoundError", "Error",
        "ItineraryError", "Message", "MessageTooLargeError", "NotFound", "Operation", "OperationRegistry", "Result",
        "Retry", "Status", "StatusError", "Task", "TransportError", "ValidationError", "Worker",
    ]  # fmt: skip
    for name in kser.__all__:
        assert getattr(kser, name).__name__ == name


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'kser' has no attribute 'Nothing'"):
        kser.Nothing  # noqa: B018


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("kser.sequencing.task", "Task"),
        ("kser.sequencing.operation", "Operation"),
        ("kser.sequencing.registry", "OperationRegistry"),
        ("kser.controller", "Controller"),
        ("kser.schemas", "Message"),
        ("kser.entry", "Entrypoint"),
        ("kser.python_kafka.consumer", "Consumer"),
        ("kser.python_kafka.producer", "Producer"),
        ("kser.confluent.consumer", "Consumer"),
        ("kser.confluent.producer", "Producer"),
        ("kser.http.consumer", "Consumer"),
        ("kser.http.producer", "Producer"),
        ("kser.dummy.consumer", "Consumer"),
        ("kser.dummy.producer", "Producer"),
    ],
)
def test_k01_to_k08_the_documented_imports(module, name):
    assert getattr(importlib.import_module(module), name).__name__ == name


def test_k11_k12_importing_kser_is_light(tmp_path):
    found = imported("kser", cwd=tmp_path)
    assert [m for m in found["modules"] if m.split(".")[0] in HEAVY] == []
    assert "kser.worker" not in found["modules"]
    assert found["written"] == []
    assert found["same"]
    assert list(tmp_path.iterdir()) == []


def test_k11_the_core_needs_no_driver():
    core = ["entry", "controller", "schemas", "producer", "worker", "events", "testing"]
    core += ["sequencing.task", "sequencing.operation", "sequencing.registry", "dummy.producer", "dummy.consumer"]
    core += ["http.producer"]
    found = imported(*(f"kser.{name}" for name in core))
    assert [m for m in found["modules"] if m.split(".")[0] in HEAVY] == []


def test_k12_importing_any_module_writes_nothing_and_changes_no_variable(tmp_path):
    names = [m.name for m in pkgutil.walk_packages(kser.__path__, "kser.") if not m.name.endswith("__main__")]
    assert len(names) > 30
    found = imported(*names, cwd=tmp_path)
    assert found["written"] == []
    assert found["same"]
    assert list(tmp_path.iterdir()) == []


def test_the_package_is_typed():
    assert (Path(kser.__file__).parent / "py.typed").exists()
