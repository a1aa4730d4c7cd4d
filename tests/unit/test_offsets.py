"""What a worker remembers of a partition, and what the next owner makes of it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kser.errors import ConfigurationError, ValidationError
from kser.transport import Partition, Position
from kser.worker.offsets import METADATA_BYTES, Committed, PartitionState, decode, encode

OF = Partition("work", 0)


@given(
    base=st.integers(0, 2**40),
    gaps=st.lists(st.integers(1, 5000), max_size=300),
    beyond=st.integers(0, 1000),
)
def test_metadata_is_read_as_it_was_written(base, gaps, beyond):
    unfinished, offset = [base], base
    for gap in gaps:
        offset += gap
        unfinished.append(offset)
    end = offset + 1 + beyond
    text = encode("w.1.2", base, end, unfinished)
    assert len(text.encode()) <= METADATA_BYTES
    assert decode(base, text) == Committed("w.1.2", end, unfinished, {}, [])


@pytest.mark.parametrize(
    "text", ["", "some other program's", "k1;", "k1;id", "k1;id;x,y", "k1;id;z!!", "k1;id;", "kx;a;1"]
)
def test_what_another_program_stored_means_nothing(text):
    _, end, unfinished, *_ = decode(7, text)
    assert (end, list(unfinished)) == (7, [])


def test_metadata_of_a_newer_release_is_refused():
    with pytest.raises(ConfigurationError, match="newer kser"):
        decode(7, "k2;id;0")


def test_what_does_not_fit_is_refused():
    spread = [n * n * 7919 for n in range(4000)]
    with pytest.raises(ValidationError, match="fit beside an offset"):
        encode("id", 0, spread[-1] + 1, spread)


class Log:
    """A partition with gaps (markers), and what was run of it."""

    def __init__(self, offsets):
        self.offsets = offsets
        self.runs = dict.fromkeys(offsets, 0)


@given(data=st.data())
def test_every_record_is_finished_once_however_often_the_partition_changes_hands(data):
    """Records finish in any order, batches are settled or not, owners come and go: no record is lost, none twice."""
    gaps = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=40))
    offsets = [sum(gaps[: n + 1]) for n in range(len(gaps))]
    log, stored = Log(offsets), None
    for life in range(data.draw(st.integers(1, 5))):
        state = PartitionState(OF, stored)
        start = state.base
        taken, settled = [], []
        for offset in [o for o in offsets if o >= start]:
            wanted = state.take(offset)
            assert wanted is not False
            if wanted:
                taken.append(offset)
            if data.draw(st.booleans()) and life < 4:
                break
        order = data.draw(st.permutations(taken))
        for offset in order[: data.draw(st.integers(0, len(order)))]:
            state.finished(offset)
            settled.append(offset)
            if data.draw(st.booleans()):  # settled: what is stored and what was run are one
                stored = state.commit_point(f"w.{life}.{offset}")
                for done in settled:
                    log.runs[done] += 1
                settled.clear()
    last = PartitionState(OF, stored)
    for offset in [o for o in offsets if o >= last.base]:
        if last.take(offset):
            last.finished(offset)
            log.runs[offset] += 1
    assert log.runs == dict.fromkeys(offsets, 1)


def test_held_records_stay_unfinished_for_the_next_owner():
    """A batch that is settled in parts: what waits for its turn is not finished by the first part."""
    state = PartitionState(OF)
    for offset in range(6):
        state.take(offset)
    for offset in (1, 3, 4):
        state.finished(offset)
    position = state.commit_point("id", held=[3])
    following = PartitionState(OF, position)
    assert [o for o in range(6) if o >= following.base and following.take(o)] == [0, 2, 3, 5]


def test_a_record_that_comes_again_is_not_taken_twice():
    """KAFKA.md finding 12."""
    state = PartitionState(OF)
    assert state.take(5) is True
    assert state.take(5) is False
    assert state.take(6) is True


def test_all_that_runs_above_what_is_finished_is_not_listed():
    """A thousand records under way cost nothing beside the offset."""
    state = PartitionState(OF, Position("work", 0, 100))
    for offset in range(100, 1100):
        state.take(offset)
    assert state.commit_point("id") == Position("work", 0, 100, "k1;id;0")
    state.finished(100)
    assert state.commit_point("id") == Position("work", 0, 101, "k1;id;0")
    state.finished(103)
    assert state.commit_point("id") == Position("work", 0, 101, "k1;id;3,0,1")
