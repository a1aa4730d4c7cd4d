"""What a test run does about a need that is missing here, and the environment that it gives its tests."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

APACHE = "def test_one(apache): pass\ndef test_two(apache3): pass\ndef test_three(): pass\n"
KCAT = """
from tests.needs import need
def test_one(): need("kcat", "no kcat on PATH", cure="install the package kcat")
"""
ANY_OF_TWO = "import pytest\n@pytest.mark.skip(reason='not for this one')\ndef test_none(): pass\n"


@pytest.fixture
def run(tmp_path):
    """Runs pytest on a module with this text, in an environment without Java; gives exit code and output lines."""

    def run(text: str, *arguments: str, **variables: str) -> tuple[int, list[str]]:
        (tmp_path / "test_it.py").write_text(text)
        plugins = ["-p", "tests.conftest", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml")]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", *plugins, *arguments, str(tmp_path / "test_it.py")],
            cwd=ROOT,
            env={"PATH": str(tmp_path), "PYTHONPATH": str(ROOT), "HOME": str(tmp_path), **variables},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        return done.returncode, done.stdout.splitlines() + done.stderr.splitlines()

    return run


def test_the_last_lines_say_what_is_missing_how_many_tests_it_skipped_and_the_cure(run):
    code, lines = run(APACHE + KCAT.replace("test_one", "test_kcat") + ANY_OF_TWO)
    assert code == 0
    assert "1 passed, 4 skipped" in lines[-3]
    assert lines[-2:] == [
        "kser: Apache Kafka not available (no java on PATH): 2 tests skipped; install Java 17 or later and Maven",
        "kser: kcat not available (no kcat on PATH): 1 test skipped; install the package kcat",
    ]


@pytest.mark.parametrize("variable", ["KSER_REQUIRE_KAFKA", "KSER_REQUIRE_ALL"])
def test_a_missing_kafka_fails_where_it_is_required(run, variable):
    code, lines = run(APACHE, **{variable: "1"})
    assert code == 1
    assert f"(required here by {variable})" in "\n".join(lines)
    assert lines[-1].startswith("1 passed, 2 errors")


def test_what_is_required_is_required_by_its_own_name(run):
    assert run(KCAT, KSER_REQUIRE_KCAT="1")[0] == 1
    assert run(KCAT, KSER_REQUIRE_KAFKA="1")[0] == 0
    assert run(KCAT, KSER_REQUIRE_KCAT="0")[0] == 0


def test_a_whole_module_can_be_skipped_for_a_need(run):
    code, lines = run(KCAT.replace("def test_one(): ", "") + "def test_one(): pass\n")
    assert code == 5  # no test was run
    assert lines[-1] == "kser: kcat not available (no kcat on PATH): 1 test skipped; install the package kcat"


def test_tests_that_use_a_broker_can_be_chosen_by_marker(run):
    code, lines = run(APACHE, "-m", "not apache")
    assert code == 0
    assert lines[-1].startswith("1 passed, 2 deselected")


def test_no_setting_of_the_shell_reaches_a_test(run):
    settings = {"KSER_BOOTSTRAP_SERVERS": "x", "LOCK_PATH": "x", "LOCK_FILE": "x", "RUNNING_FILE": "x"}
    kept = {"KSER_REQUIRE_KCAT": "0", "KSER_TEST_KAFKA_CACHE": "/nowhere", "OTHER": "x"}
    text = f"""
import os
def test_it():
    assert not set(os.environ) & {set(settings)}
    assert set(os.environ) >= {set(kept)}
"""
    assert run(text, **settings, **kept)[0] == 0


def test_what_the_fixtures_clear_is_there_again_after_the_test(run):
    text = "import atexit, os\natexit.register(lambda: print(os.environ['KSER_X']))\ndef test_it(): pass\n"
    assert "still here" in run(text, KSER_X="still here")[1]
