"""The short way of the hand-off that most are gives what the long way gives, byte for byte, or leaves it to that."""

import copy
import logging

from hypothesis import given
from hypothesis import strategies as st

from kser import Message, Operation, OperationRegistry, Result, Task
from kser.sequencing.itinerary import METADATA_KEY, Entry, Frame, Itinerary
from kser.sequencing.plain_step import is_plain, next_step
from kser.sequencing.sequencer import Sequencer

registry = OperationRegistry()


@registry.subscribe(name="step")
class Step(Task):
    """Not run here."""


@registry.subscribe(name="plain")
class Plain(Operation):
    """Has no say in its end."""


@registry.subscribe(name="hooked")
class Hooked(Operation):
    def onsuccess(self, result):
        return Result(uuid=self.uuid, stdout="from its hook")


@registry.subscribe(name="made")
class Made(Operation):
    @classmethod
    def from_Message(cls, kmsg):
        return cls(uuid=f"{kmsg.uuid}!", params=kmsg.params)


texts = st.text(min_size=1, max_size=6)
params = st.dictionaries(texts, st.integers() | st.text(max_size=4) | st.lists(st.booleans(), max_size=2), max_size=3)
entries = st.fixed_dictionaries(
    {"uuid": texts, "entrypoint": texts, "params": params},
    optional={"topic": texts, "key": texts, "metadata": params, "tasks": st.just([])},
)
frames = st.builds(
    Frame,
    uuid=texts,
    entrypoint=texts | st.sampled_from(["plain", "hooked", "made", "step", "plain"]),
    params=params,
    topic=st.none() | texts,
    key=st.none() | texts,
    metadata=params,
    tasks=st.lists(entries, max_size=3),
    hooks=st.booleans(),
)
itineraries = st.builds(
    Itinerary,
    frames=st.lists(frames, min_size=1, max_size=3).map(tuple),
    position=st.integers(0, 50),
    run=st.integers(1, 3),
    new=st.booleans(),
    key=st.none() | texts,
    children=st.none(),
    end=st.none(),
)
outcomes = st.builds(Result, uuid=st.just("t"), stdout=st.text(max_size=5), retval=params)


def timeless(events):
    return [event._replace(at=0) for event in events]


@given(itinerary=itineraries, result=outcomes, topic=texts, events=st.booleans())
def test_both_ways_give_the_same(itinerary, result, topic, events):
    data = Message.loads(Message("t", "step", metadata={METADATA_KEY: itinerary.dump()}).to_bytes()).metadata[
        METADATA_KEY
    ]
    before = copy.deepcopy(data)
    assert is_plain(data)
    sequencer, task = Sequencer(registry.controller), Step(uuid="t")
    short = sequencer.plain_step(task, result, data, topic, events=events)
    assert data == before
    inner = itinerary.innermost
    plain_entry = bool(inner.tasks) and len(inner.tasks[0]) == 3
    unchanged = inner.entrypoint not in ("hooked", "made", "step") and not inner.hooks
    plain_end = len(itinerary.frames) == 1 and not inner.tasks and unchanged
    assert (short is not None) == (plain_entry or plain_end)
    if short is None:
        return
    long = sequencer.task_ended(task, result, Itinerary.load(data), topic)
    assert short.messages == long.messages
    assert timeless(short.events) == (timeless(long.events) if events else [])


def test_an_operation_that_logs_its_end_takes_the_long_way(caplog):
    caplog.set_level(logging.INFO)
    sequencer, task = Sequencer(registry.controller), Step(uuid="t")
    data = Itinerary((Frame("o", "plain", {}, tasks=[]),)).dump()
    assert sequencer.plain_step(task, Result(uuid="t"), data, "t", events=True) is None
    sequencer.task_ended(task, Result(uuid="t"), Itinerary.load(data), "t")
    assert "Plain.Success: plain[o]" in caplog.text


junk = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2) | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["v", "run", "position", "ops", "new", "key", "tasks", "uuid", "params"]), inner
        )
    ),
    max_leaves=8,
)


@given(itinerary=itineraries, data=st.data())
def test_what_is_no_itinerary_is_never_plain(itinerary, data):
    """Where is_plain() says yes, Itinerary reads it too, and an entry that next_step() takes is one for Entry."""
    dumped = itinerary.dump()
    field = data.draw(st.sampled_from([*dumped, "end", "tasks", "extra"]))
    dumped[field] = data.draw(junk)
    if data.draw(st.booleans()) and isinstance(dumped.get("ops"), list) and dumped["ops"]:
        frame = dict(dumped["ops"][0]) if isinstance(dumped["ops"][0], dict) else {}
        frame[data.draw(st.sampled_from(["uuid", "entrypoint", "params", "tasks", "topic", "key", "metadata"]))] = (
            data.draw(junk)
        )
        dumped["ops"] = [frame, *dumped["ops"][1:]]
    if not is_plain(dumped):
        return
    read = Itinerary.load(dumped)
    assert read.end is None
    if next_step(dumped, "t") is not None:
        assert Entry.load(dumped["ops"][-1]["tasks"][0]).tasks is None
