"""JobControlLogHandler: what a running task logs reaches its history, and the task never notices (J-44, J-45)."""

import logging

import pytest

from kser import Entrypoint, Task
from kser.context import Control, controlling
from kser.loghandler import JobControlLogHandler, fields_of, installed
from kser.masking import MASK

logger = logging.getLogger("shop.stock")


class Reports:
    """Takes log records as a worker's telemetry does."""

    def __init__(self):
        self.found = []

    def log(self, record):
        self.found.append(fields_of(record))

    def end(self):
        pass


@pytest.fixture
def reports():
    return Reports()


@pytest.fixture
def running(reports):
    """Within the test a task runs, and the handler is there."""
    with installed(), controlling(Control(1, lambda _: reports)):
        yield


def test_level_message_place_and_traceback_are_told(reports, running):
    password = "hunter2hunter2"
    try:
        raise ValueError(f"not {password}")
    except ValueError:
        logger.exception("order %s of %s", "A7", "ann")
    [found] = reports.found
    assert (found["level"], found["logger"], found["message"]) == (logging.ERROR, "shop.stock", "order A7 of ann")
    assert found["where"].startswith("test_loghandler.py:")
    assert found["where"].endswith(" in test_level_message_place_and_traceback_are_told")
    assert found["trace"]["exception"] == f"ValueError: not {MASK}"
    assert found["trace"]["frames"][0]["locals"]["password"] == MASK


def test_task_log_is_told_with_its_prefix_and_no_other_line_of_kser(reports, running, caplog):
    class Step(Task):
        def run(self):
            self.log("half of %s", logging.WARNING, 7)

    class Bare(Entrypoint):
        def run(self):
            self.log("bare", logging.WARNING)

    with caplog.at_level(logging.DEBUG):
        step = Step()
        step.execute()
        Bare().execute()
    assert [found["message"] for found in reports.found] == [
        f"Step.RUNNING: {step.path}[{step.uuid}]: half of 7",
        reports.found[1]["message"],
    ]
    assert reports.found[1]["message"].endswith("]: bare")
    assert len(caplog.records) > 4  # kser said more, to others


def test_outside_of_an_execution_nothing_is_taken(reports):
    with installed():
        logger.warning("nobody runs")
    with controlling(Control()), installed():
        logger.warning("nobody wants to know")
    assert reports.found == []


def test_levels_are_those_of_the_loggers(reports, running):
    before = logging.getLogger().level
    logger.debug("not wanted")
    assert logging.getLogger().level == before
    assert reports.found == []


def test_it_never_comes_back_to_itself(reports, running):
    class Loud:
        def __str__(self):
            logger.warning("while it is being formatted")
            return "loud"

    record = logging.makeLogRecord({"name": "shop", "msg": "%s", "args": (Loud(),), "levelno": logging.WARNING})
    JobControlLogHandler().emit(record)
    assert [found["message"] for found in reports.found] == ["loud"]


def test_what_goes_wrong_in_it_does_not_reach_the_task(reports, running, monkeypatch):
    told = []
    monkeypatch.setattr(JobControlLogHandler, "handleError", lambda self, record: told.append(record))
    monkeypatch.setattr(reports, "log", lambda record: 1 / 0)
    logger.warning("goes on")
    assert [record.getMessage() for record in told] == ["goes on"]
    monkeypatch.undo()
    logger.warning("and works again")
    assert [found["message"] for found in reports.found] == ["and works again"]


def test_there_is_one_however_many_workers_run_and_none_after_them():
    root = logging.getLogger()

    def there():
        return [handler for handler in root.handlers if isinstance(handler, JobControlLogHandler)]

    with installed():
        with installed():
            assert len(there()) == 1
        assert len(there()) == 1
    assert there() == []


def test_one_that_the_program_has_put_there_is_enough(reports):
    mine = JobControlLogHandler()
    logging.getLogger().addHandler(mine)
    try:
        with installed(), controlling(Control(1, lambda _: reports)):
            logger.warning("once")
        assert len(reports.found) == 1
        assert mine in logging.getLogger().handlers
    finally:
        logging.getLogger().removeHandler(mine)


def test_what_a_frame_of_the_exception_keeps_secret_is_not_in_the_message_either(reports, running):
    try:
        password = "hunter2hunter2"
        raise ValueError("refused")
    except ValueError:
        logger.exception("cannot log in with %s as ann", password)
    (found,) = reports.found
    assert found["message"] == f"cannot log in with {MASK} as ann"
    assert password not in str(found)


def test_long_lines_are_cut_and_secrets_masked(reports, running):
    logger.warning("password=hunter2 %s", "x" * 100_000)
    [found] = reports.found
    assert len(found["message"]) <= 8192
    assert found["message"].startswith(f"password={MASK} xxx")
