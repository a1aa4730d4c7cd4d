"""Properties of the sequence: random nested operations driven by the Sequencer alone, message by message.

Each message is decoded from its bytes and handled by the controller of the topic it went to, as a worker does; nothing
else is shared. Two topics: on "ops" all classes are known, on "far" only one kind of leaf, so that operations end there
whose class the worker does not know.
"""

import json
from collections import deque

from hypothesis import given, settings
from hypothesis import strategies as st

from kser import Message, Operation, OperationRegistry, Result, Task
from kser.events import EventType
from kser.results import is_success, merge
from kser.sequencing.itinerary import Itinerary, message_key
from kser.sequencing.sequencer import Sequencer
from tests.unit.fakes import FakeProducer

near, far = OperationRegistry(producer=FakeProducer(), topic="ops"), OperationRegistry()


@near.subscribe
class Leaf(Task):
    """Run by the test, not by itself."""


@near.subscribe(topic="far")
class FarLeaf(Task):
    """A leaf that runs where nobody knows an operation."""


far.controller.register(FarLeaf.path, FarLeaf)


@near.subscribe
class Tree(Operation):
    """A tree of operations: params["tree"] is the list of its nodes."""

    def build_tasks(self, **kwargs):
        return [_made(node) for node in kwargs["tree"]]

    def onsuccess(self, result):
        """So that its end has to be where its class is known."""
        return result


def _made(node):
    if "leaf" in node:
        return (FarLeaf if node["far"] else Leaf)(params={"leaf": node["leaf"]})
    nested = Tree(params={"tree": node["tree"]})
    return nested.build() if node["carried"] else nested


leaves = st.fixed_dictionaries({"leaf": st.none(), "far": st.booleans()})
nodes = st.recursive(
    leaves,
    lambda inner: st.fixed_dictionaries({"tree": st.lists(inner, min_size=1, max_size=4), "carried": st.booleans()}),
    max_leaves=14,
)
trees = st.lists(nodes, min_size=1, max_size=5)


def numbered(tree, count=0):
    """The tree with its leaves numbered in the order they have to run, and how many there are."""
    named = []
    for node in tree:
        if "leaf" in node:
            named.append({**node, "leaf": count})
            count += 1
        else:
            inside, count = numbered(node["tree"], count)
            named.append({**node, "tree": inside})
    return named, count


class Drive:
    """Runs an operation to its end, each message twice."""

    def __init__(self, first, failing):
        self.failing = failing
        self.sequencers = {"ops": Sequencer(near.controller), "far": Sequencer(far.controller)}
        self.leaves, self.events, self.keys, self.ends = [], [], set(), 0
        queue = deque([first])
        while queue:
            topic, key, value = queue.popleft()
            self.keys.add(key)
            out, again = self.handle(topic, value), self.handle(topic, value, note=False)
            assert out.messages == again.messages
            assert [plain(e) for e in out.events] == [plain(e) for e in again.events]
            assert len(out.messages) <= 1
            self.events += out.events
            queue.extend((m.topic, m.key, m.value) for m in out.messages)

    def handle(self, topic, value, *, note=True):
        sequencer = self.sequencers[topic]
        kmsg = Message.loads(value)
        itinerary = Itinerary.of(kmsg)
        if itinerary is not None:
            assert Itinerary.load(json.loads(json.dumps(itinerary.dump()))) == itinerary
        if itinerary is not None and itinerary.end is not None:
            self.ends += note
            return sequencer.operation_ended(kmsg.result, itinerary, topic)
        task = sequencer.controller.dispatch(kmsg)
        if isinstance(task, Operation):
            return sequencer.operation_reached(task, itinerary, topic)
        leaf = task.params["leaf"]
        result = Result(retcode=1, stderr=f"leaf {leaf}") if leaf == self.failing else Result(retval={str(leaf): topic})
        if note:
            self.leaves.append((leaf, task.uuid, type(task)))
        return sequencer.task_ended(task, merge(kmsg.result, result, task.uuid), itinerary, topic)


def plain(event):
    return {k: v for k, v in json.loads(event.to_bytes()).items() if k != "at"}


def launched(tree, by_message):
    """The first message of the operation, as a service sends it, and the operation."""
    operation = Tree(params={"tree": tree})
    near.producer.sent.clear()
    if by_message:
        operation.send()
    else:
        operation.build().launch()
    ((topic, _, kmsg),) = near.producer.sent
    return operation, (topic, message_key(kmsg), kmsg.to_bytes())


@given(trees, st.booleans(), st.data())
@settings(max_examples=120, deadline=None)
def test_every_task_runs_once_in_order_and_every_operation_ends_once_innermost_first(tree, by_message, data):
    tree, count = numbered(tree)
    failing = data.draw(st.none() | st.integers(0, count - 1), label="failing leaf")
    operation, first = launched(tree, by_message)
    drive = Drive(first, failing)

    wanted = range(count if failing is None else failing + 1)
    assert [leaf for leaf, _, _ in drive.leaves] == list(wanted)
    assert len({uuid for _, uuid, _ in drive.leaves}) == len(wanted)
    assert drive.keys == {operation.uuid}

    steps = [e for e in drive.events if e.type in (EventType.STEP_DONE, EventType.STEP_FAILED)]
    assert [e.uuid for e in steps] == [uuid for _, uuid, _ in drive.leaves]
    assert [e.position for e in steps] == list(wanted)
    assert len({e.identity for e in drive.events}) == len(drive.events)
    assert {e.key for e in drive.events} == {operation.uuid}

    started = [e.uuid for e in drive.events if e.type == EventType.OPERATION_STARTED]
    ended = [e for e in drive.events if e.type == EventType.OPERATION_ENDED]
    assert started[0] == operation.uuid
    assert sorted(started) == sorted(e.uuid for e in ended)
    assert len(set(started)) == len(started)
    assert ended[-1] is drive.events[-1]
    assert (ended[-1].uuid, ended[-1].parent) == (operation.uuid, None)
    order = {e.uuid: index for index, e in enumerate(ended)}
    assert all(order[e.uuid] < order[e.parent] for e in ended[:-1])
    assert not any(e.note for e in ended)

    root = ended[-1].result
    if failing is None:
        assert {e.status for e in ended} == {"SUCCESS"}
        assert set(root.retval) == {str(n) for n in range(count)}
        return
    _, uuid, kind = drive.leaves[-1]
    open_ones = ended[len(ended) - sum(not is_success(e.result) for e in ended) :]
    assert {e.status for e in open_ones} == {"FAILED"}
    for event in open_ones:  # those around the failing leaf, and no other
        assert event.result.retval["failed_task"] == {"uuid": uuid, "path": kind.path}
        assert event.result.uuid == event.uuid
        assert (event.result.retcode, event.result.stderr) == (1, f"leaf {failing}")
    assert steps[-1].parent == open_ones[0].uuid
    assert [e.parent for e in open_ones[:-1]] == [e.uuid for e in open_ones[1:]]


@given(trees, st.booleans())
@settings(max_examples=25, deadline=None)
def test_the_same_first_message_always_makes_the_same_ids(tree, by_message):
    """A redelivery of any message makes the children again that were made before."""
    tree, _ = numbered(tree)
    _, first = launched(tree, by_message)
    one, two = Drive(first, None), Drive(first, None)
    assert [uuid for _, uuid, _ in one.leaves] == [uuid for _, uuid, _ in two.leaves]
    assert [plain(e) for e in one.events] == [plain(e) for e in two.events]


def test_operations_end_where_their_class_is_not_known():
    """That the properties above reach the end messages."""
    tree = [{"tree": [{"leaf": 0, "far": True}], "carried": False}, {"leaf": 1, "far": True}]
    _, first = launched(tree, by_message=False)
    assert Drive(first, None).ends == 2
    assert Drive(first, 0).ends == 1
