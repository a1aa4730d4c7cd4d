"""Status: the names, and the moves of CONTRACTS.md section 6 (status map)."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kser import Status, StatusError, Task, ValidationError

# The text of the status map, from -> to. FAILED and ABORTED go back only when somebody asks for it.
LEGAL = {
    "PENDING": {"RUNNING", "ABORTED", "SKIPPED", "FAILED"},
    "RUNNING": {"SUCCESS", "FAILED", "SKIPPED", "ABORTED", "WAITING_FOR_INPUT"},
    "WAITING_FOR_INPUT": {"PENDING", "ABORTED", "FAILED"},
    "FAILED": {"PENDING"},
    "ABORTED": {"PENDING"},
    "SUCCESS": set(),
    "SKIPPED": set(),
}


def test_the_names_are_those_of_the_status_map():
    assert {str(s) for s in Status} == set(LEGAL)


@pytest.mark.parametrize(("old", "new"), list(itertools.product(LEGAL, LEGAL)))
def test_exactly_the_moves_of_the_status_map_are_legal(old, new):
    assert Status(old).allows(Status(new)) is (new in LEGAL[old] or new == old)


@pytest.mark.parametrize(("old", "new"), list(itertools.product(LEGAL, LEGAL)))
def test_move_refuses_what_is_not_legal_and_takes_a_run_nobody_announced(old, new):
    skips_running = old == "PENDING" and new in LEGAL["RUNNING"]
    if new == old or new in LEGAL[old] or skips_running:
        assert Status(old).move(new) is Status(new)
        return
    with pytest.raises(StatusError) as caught:
        Status(old).move(new)
    assert caught.value.code == 409
    assert caught.value.extra == {"old": old, "new": new}
    assert f"from {old} to {new}" in caught.value.message


@given(st.lists(st.sampled_from(sorted(LEGAL)), max_size=20))
@settings(deadline=None)
def test_no_walk_of_moves_leaves_success_or_skipped(walk):
    at = Status.PENDING
    for new in walk:
        before = at
        try:
            at = at.move(new)
        except StatusError:
            assert not before.allows(Status(new))
        if before in (Status.SUCCESS, Status.SKIPPED):
            assert at is before


def test_final_is_what_nothing_follows_by_itself():
    assert {str(s) for s in Status if s.final} == {"SUCCESS", "FAILED", "SKIPPED", "ABORTED"}


def test_a_status_equals_its_name_and_prints_as_it():
    assert Status.PENDING == "PENDING"
    assert f"{Status.WAITING_FOR_INPUT}" == "WAITING_FOR_INPUT"


@given(st.text())
@settings(deadline=None)
def test_parse_gives_the_status_or_names_those_there_are(name):
    if name in LEGAL:
        assert Status.parse(name) == name
        return
    with pytest.raises(ValidationError, match="use one of PENDING, RUNNING") as caught:
        Status.parse(name)
    assert caught.value.code == 400


def test_a_task_refuses_a_status_that_is_none():
    with pytest.raises(ValidationError, match="Unknown status 'DONE'"):
        Task(status="DONE")
