"""The judge is judged: a clean run of the app passes, and each fault put into its records is found and named."""

import contextlib
import json
import random
import uuid

import pytest

from kser.producer import BaseProducer
from kser.transport import Record
from kser.worker.offsets import encode
from kser.worker.runner import Runner
from tests.chaos import __main__ as command
from tests.chaos.app import registry
from tests.chaos.harness import Outcome, make_operation
from tests.chaos.judge import EVENT, MESSAGE, STEPS, Committed, Facts, Observed, Verdict, judge
from tests.chaos.plan import ROUND, SLOTS, plan
from tests.chaos.topics import Seen


class Run:
    """The records of three operations of one key, run one after the other as a worker does; a test spoils them."""

    def __init__(self) -> None:
        draw = random.Random(1)
        self.messages: list[Seen] = []
        self.events: list[Seen] = []
        registry.configure(producer=BaseProducer(self), topic="t")
        try:
            operations = [make_operation(draw, 1, 0) for _ in range(3)]
            for operation in operations:
                assert operation.launch().retcode == 0
            runner = Runner(registry.controller, "g", "w")
            for record in self.messages:  # it grows meanwhile
                outcome = runner.run(Record("t", *record, headers=(), timestamp_ms=0))
                for following in outcome.records:
                    self.produce(following)
        finally:
            registry.producer, registry.topic = None, None
        self.launched = [operation.uuid for operation in operations]
        self.committed = [Committed(0, self.end)]
        self.observed = []

    def produce(self, record, on_delivery=None):
        """Of a Sink: write a record. All of a topic is in one partition."""
        records = self.messages if record.topic == "t" else self.events
        records.append(Seen(0, len(records), record.key, record.value))
        if on_delivery is not None:
            on_delivery(None)

    @property
    def end(self):
        return self.messages[-1].offset + 1

    def verdict(self):
        facts = Facts()
        for record in self.messages:
            facts.message(record)
        for record in self.events:
            facts.event(record)
        return judge(facts, self.launched, self.committed, self.observed)

    def lone(self, operation):
        """The index of the message that a task of one of the operations sent by itself."""
        sends = json.loads(self.messages[self.message(operation, (2, 1))].value)["uuid"]
        return next(n for n, r in enumerate(self.messages) if json.loads(r.value)["params"].get("of") == sends)

    def message(self, operation, step):
        """The index of the message of a step of one of the operations."""
        for index, record in enumerate(self.messages):
            route = json.loads(record.value)["metadata"].get("kser")
            at = (route["ops"][0]["uuid"], (route["position"], len(route["ops"]))) if route else None
            if at == (self.launched[operation], step):
                return index
        raise AssertionError(f"no message of step {step}")

    def event(self, **wanted):
        """The index of the first event with these fields."""
        for index, record in enumerate(self.events):
            if wanted.items() <= json.loads(record.value).items():
                return index
        raise AssertionError(f"no event {wanted}")

    def again(self, records, index, **changed):
        """Write a record a second time, at the end, with other fields in its value."""
        record = records[index]
        value = json.dumps(json.loads(record.value) | changed).encode()
        records.append(record._replace(offset=records[-1].offset + 1, value=value))
        self.committed = [Committed(0, self.end)]

    def edited(self, records, index, **changed):
        record = records[index]
        records[index] = record._replace(value=json.dumps(json.loads(record.value) | changed).encode())


@pytest.fixture
def run():
    return Run()


def test_a_clean_run_has_no_fault(run):
    verdict = run.verdict()
    assert verdict.faults("exactly_once") == {}
    assert verdict.operations == 3
    assert len(run.messages) == 3 * (len(STEPS) + 1)
    assert "3 operations: 0 lost, 0 doubled" in verdict.told("exactly_once")


@pytest.mark.parametrize("step", STEPS)
def test_a_missing_message_of_any_step_is_lost(run, step):
    del run.messages[run.message(1, step)]
    assert any(run.launched[1] in text for text in run.verdict().faults("at_least_once")["lost"])


@pytest.mark.parametrize("step", STEPS)
def test_a_doubled_message_of_any_step_is_found_and_is_no_fault_at_least_once(run, step):
    run.again(run.messages, run.message(1, step))
    verdict = run.verdict()
    assert "2 times" in verdict.faults("exactly_once")["doubled"][0]
    assert "doubled" not in verdict.faults("at_least_once")


def test_a_hand_off_that_came_again_under_another_uuid_is_doubled(run):
    run.again(run.messages, run.message(0, (1, 1)), uuid=str(uuid.uuid4()))
    faults = run.verdict().faults("exactly_once")
    assert len(faults["doubled"]) == 1
    assert "step (1, 1)" in faults["strays"][0]


def test_what_a_task_sent_is_looked_at_as_well(run):
    lone = next(n for n, r in enumerate(run.messages) if json.loads(r.value)["entrypoint"] == "chaos.Lone")
    run.again(run.messages, lone)
    assert "lone message" in run.verdict().faults("exactly_once")["doubled"][0]
    del run.messages[-1], run.messages[lone]
    assert "lone message" in run.verdict().faults("at_least_once")["lost"][0]


def test_what_a_task_sent_twice_under_two_uuids_is_doubled(run):
    lone = next(n for n, r in enumerate(run.messages) if json.loads(r.value)["entrypoint"] == "chaos.Lone")
    run.again(run.messages, lone, uuid=str(uuid.uuid4()))
    assert "lone message" in run.verdict().faults("exactly_once")["doubled"][0]


@pytest.mark.parametrize("kind", ["operation.started", "step.done", "operation.ended"])
def test_events_are_counted_too(run, kind):
    """Each event once: a second one is doubled, none is lost."""
    index = run.event(type=kind)
    run.again(run.events, index)
    assert kind in run.verdict().faults("exactly_once")["doubled"][0]
    run.events.pop()
    del run.events[index]
    assert kind in run.verdict().faults("at_least_once")["lost"][0]


@pytest.mark.parametrize("inside", [True, False])
def test_the_end_of_an_operation_that_failed_is_a_fault(run, inside):
    index = run.event(type="operation.ended", **({} if inside else {"parent": None}))
    run.edited(run.events, index, status="FAILED")
    assert "says FAILED" in run.verdict().faults("at_least_once")["failed"][0]


def test_a_failed_step_is_a_fault(run):
    run.edited(run.events, run.event(type="step.done"), type="step.failed", status="FAILED")
    assert set(run.verdict().faults("at_least_once")) == {"failed", "lost", "strays"}


def test_a_message_of_an_operation_that_nobody_launched_is_a_stray(run):
    run.launched.pop()
    assert len(run.verdict().faults("at_least_once")["strays"]) == len(STEPS) + 1 + 9 + 1


def test_an_operation_that_is_not_in_the_topic_is_lost(run):
    run.launched.append("nobody")
    assert run.verdict().faults("at_least_once")["lost"] == ["operation nobody: its first message is not in the topic"]


@pytest.mark.parametrize("value", [b"", b"{}", b"null", b'{"metadata": 1}', None])
def test_what_is_no_record_of_the_app_is_a_stray(run, value):
    run.messages.append(Seen(0, run.end, b"k", value))
    run.events.append(Seen(0, run.events[-1].offset + 1, b"k", value))
    run.committed = [Committed(0, run.end)]
    assert len(run.verdict().faults("at_least_once")["strays"]) == 2


def test_a_task_begun_before_the_end_of_the_one_before_it_in_its_lane_is_out_of_order(run):
    second = json.loads(run.messages[run.message(1, (0, 1))].value)["uuid"]
    index = run.event(uuid=second)
    result = json.loads(run.events[index].value)["result"]
    began, ended = result["retval"][second]
    run.edited(run.events, index, result=result | {"retval": {second: [began - 1, ended]}})
    (text,) = run.verdict().faults("exactly_once")["disordered"]
    assert "was begun 1.0" in text or "was begun 0.9" in text


def test_the_same_times_under_two_keys_are_in_order(run):
    """Of different keys nothing is promised."""
    index = run.message(1, (0, 1))
    second = json.loads(run.messages[index].value)["uuid"]
    run.messages[index] = run.messages[index]._replace(key=b"another")
    index = run.event(uuid=second)
    result = json.loads(run.events[index].value)["result"]
    began, ended = result["retval"][second]
    run.edited(run.events, index, result=result | {"retval": {second: [began - 1, ended]}})
    assert "disordered" not in run.verdict().faults("exactly_once")


def test_hand_offs_that_changed_places_are_out_of_order(run):
    first, second = run.message(0, (1, 1)), run.message(1, (1, 1))
    one, other = run.messages[first], run.messages[second]
    run.messages[first], run.messages[second] = one._replace(offset=other.offset), other._replace(offset=one.offset)
    assert any("what followed from" in text for text in run.verdict().faults("exactly_once")["disordered"])


def test_a_lone_message_behind_what_followed_from_the_next_record_is_out_of_order(run):
    """What a task sent is settled with its hand-off, so it is held to the same order."""
    lone = next(n for n, r in enumerate(run.messages) if json.loads(r.value)["entrypoint"] == "chaos.Lone")
    run.messages[lone] = run.messages[lone]._replace(offset=run.end)
    run.committed = [Committed(0, run.end + 1)]
    assert "disordered" in run.verdict().faults("exactly_once")


# What is committed of partition 0, whose last offset is end - 1; None: nothing is wrong with it.
@pytest.mark.parametrize(
    ("committed", "fault"),
    [
        (lambda end: Committed(0, end), None),
        (lambda end: Committed(0, end + 1), None),  # a transaction's marker counts as well
        (lambda end: Committed(0, 2, encode("x.1.1", 2, end, [])), None),  # the metadata says that all is finished
        (lambda end: Committed(0, end - 1), "1 records are not settled"),
        (lambda end: Committed(0, -1), "records are not settled, the first at 0"),
        (lambda end: Committed(0, 2, encode("x.1.1", 2, end, [2, 5])), "2 records are not settled, the first at 2"),
        (lambda end: Committed(0, 2, encode("x.1.1", 2, end - 1, [])), "1 records are not settled"),
    ],
)
def test_committed_offsets_cover_every_record(run, committed, fault):
    run.committed = [committed(run.end)]
    found = run.verdict().faults("at_least_once").get("unfinished", [])
    assert len(found) == (0 if fault is None else 1)
    assert fault is None or fault in found[0]


def all_of(run):
    """The ends of the topics when all was over."""
    return {(MESSAGE, 0): run.end, (EVENT, 0): len(run.events)}


def test_what_was_committed_after_it_was_settled_is_well(run):
    run.observed = [
        Observed([Committed(0, n, encode("x.1.1", n, n, []))], all_of(run)) for n in (0, 1, 5, run.end, run.end)
    ]
    assert run.verdict().faults("exactly_once") == {}


@pytest.mark.parametrize("delivery", ["exactly_once", "at_least_once"])
@pytest.mark.parametrize("step", [*STEPS, "lone"])
def test_what_was_committed_before_it_was_settled_is_found(run, delivery, step):
    """By the time its offset was read, its event, or what followed from it, was not written."""
    at = run.message(1, step) if step != "lone" else run.lone(1)
    follows = run.event(uuid=json.loads(run.messages[at].value)["uuid"])
    ends = all_of(run) | {(EVENT, 0): follows}
    run.observed = [Observed([Committed(0, at, encode("x.1.1", at, at, []))], all_of(run))]
    assert run.verdict().faults(delivery) == {}
    run.observed.append(Observed([Committed(0, at + 1, encode("x.1.2", at + 1, at + 1, []))], ends))
    (text,) = run.verdict().faults(delivery)["early"]
    assert text.startswith(f"0/{at} was committed before it was settled: ")


def test_a_hand_off_without_the_next_message_is_found_too(run):
    following = run.message(1, (1, 1))
    at = run.message(1, (0, 1))
    ends = all_of(run) | {(MESSAGE, 0): following}
    run.observed = [Observed([Committed(0, 0, encode("x.1.1", 0, at + 1, list(range(at))))], ends)]
    (text,) = run.verdict().faults("at_least_once")["early"]
    assert f"message {run.launched[1]} 1 1 did not exist" in text


def test_what_the_metadata_calls_unfinished_was_not_committed(run):
    at = run.message(1, (0, 1))
    ends = all_of(run) | {(EVENT, 0): 0, (MESSAGE, 0): 0}
    run.observed = [Observed([Committed(0, 0, encode("x.1.1", 0, at + 1, list(range(at + 1))))], ends)]
    assert run.verdict().faults("exactly_once") == {}


@pytest.mark.parametrize("later", [(3, 3, []), (2, 6, [2, 4]), (0, 0, [])])
def test_offsets_that_were_set_back_are_a_fault_exactly_once(run, later):
    base, end, unfinished = later
    run.observed = [Observed([Committed(0, 5, encode("x.1.1", 5, 5, []))], all_of(run))]
    assert run.verdict().faults("exactly_once") == {}
    run.observed.append(Observed([Committed(0, base, encode("x.1.2", base, end, unfinished))], all_of(run)))
    assert "was finished, is not by" in run.verdict().faults("exactly_once")["set_back"][0]
    assert "set_back" not in run.verdict().faults("at_least_once")


def test_a_long_list_of_faults_is_cut_and_counted(run):
    run.messages.clear()
    told = run.verdict().told("at_least_once")
    assert told.count("\n  lost: ") == 3
    run.launched += [str(n) for n in range(20)]
    assert "lost: ... and 15 more" in run.verdict().told("at_least_once")


def test_the_same_seed_gives_the_same_plan():
    one, other = (plan(7, 600, pace_s=5, session_s=3, nodes=3) for _ in range(2))
    assert one == other
    assert one != plan(8, 600, pace_s=5, session_s=3, nodes=3)


@pytest.mark.parametrize("nodes", [0, 3])
def test_a_round_of_the_plan_has_every_kind_of_fault(nodes):
    """Whatever the seed, and pauses are longer than the session timeout; nodes are left alone where they must be."""
    for seed in range(50):
        steps = plan(seed, 60, pace_s=2, session_s=3, nodes=nodes)
        kinds = [kind for kind in ROUND if nodes or kind != "broker"]
        assert sorted(step.what for step in steps[: len(kinds)]) == sorted(kinds)
        assert all(step.for_s > 3 for step in steps if step.what == "pause")
        assert {step.target for step in steps} <= {*SLOTS, "extra", "1", "2", "3"}
        assert all(0 < step.at_s <= 60 for step in steps)


@pytest.mark.parametrize(
    ("operations", "done", "code"),
    [
        (20_000, {"kill": 20, "broker": 10, "pause": 4}, 0),
        (20_000, {"kill": 20, "broker": 9, "pause": 40}, 1),
        (500, {"kill": 1}, 0),
    ],
)
def test_the_long_form_fails_when_it_killed_too_little(monkeypatch, tmp_path, capsys, operations, done, code):
    monkeypatch.setattr(command, "run", lambda chaos, *_, **__: Outcome(Verdict(), done, 1.0, 0.0))
    monkeypatch.setattr(command, "broker", lambda kind: contextlib.nullcontext())
    monkeypatch.setattr(command.signal, "signal", lambda *_: None)
    assert command.main(["--operations", str(operations), "--logs", str(tmp_path)]) == code
    said = capsys.readouterr().out
    kills = done["kill"] + done.get("broker", 0)
    assert f"{kills} kills of workers and nodes" in said
    assert ("at least 30 are wanted" in said) is bool(code)
