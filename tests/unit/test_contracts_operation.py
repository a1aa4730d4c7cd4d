"""Contracts K-02, K-03 and K-47 to K-69: Operation, as a service and one process see it. Traps T-03, T-07, T-15, T-16.

How it goes on by messages (K-47, K-48 on the workers' side) is in test_sequencer.py and test_runner.py.
"""

import inspect
import logging
import warnings

import pytest

from kser import (
    ConfigurationError,
    Message,
    Operation,
    OperationRegistry,
    Result,
    StatusError,
    Task,
    ValidationError,
)
from kser.results import is_success
from kser.sequencing.itinerary import Itinerary
from tests.unit.fakes import FakeProducer, FakeSink, Producer

EMPTY = "Nothing to do, empty operation !"


class Step(Task):
    """Notes its name in the Result."""

    def run(self):
        name = self.params.get("n", 0)
        if name == self.params.get("fails"):
            raise ValueError(f"step {name}")
        return Result(uuid=self.uuid, stdout=f"step {name}", retval={f"s{name}": True, "last": name})


class Three(Operation):
    """Three steps, the second of which may fail."""

    def build_tasks(self, **kwargs):
        return [Step(params={"n": n, "fails": kwargs.get("fails")}) for n in range(3)]


@pytest.fixture
def producer():
    return FakeProducer()


@pytest.fixture
def registry(producer):
    return OperationRegistry(producer=producer, topic="work")


@pytest.fixture
def classes(registry):
    """Step and an operation of three of them, subscribed to a registry with a producer."""

    @registry.subscribe
    class Sent(Step):
        pass

    @registry.subscribe
    class Op(Operation):
        def build_tasks(self, **kwargs):
            return [Sent(params={"n": n}) for n in range(3)]

    return Sent, Op


# -- arguments -------------------------------------------------------------------------------------------------------


def test_k02_k03_t15_the_arguments_are_the_documented_ones_in_the_documented_order():
    from kser.sequencing.operation import Operation as Documented

    parameters = list(inspect.signature(Documented.__init__).parameters.values())[1:]
    assert [(p.name, p.default) for p in parameters][:6] == [
        ("uuid", None),
        ("params", None),
        ("status", "PENDING"),
        ("result", None),
        ("metadata", None),
        ("tasks", None),
    ]
    result = Result(uuid="r")
    operation = Documented("U", {"a": 1}, "RUNNING", result, {"m": 1})
    assert (operation.uuid, operation.params, operation.status) == ("U", {"a": 1}, "RUNNING")
    assert (operation.result, operation.metadata, operation.tasks) == (result, {"m": 1}, [])


def test_k03_tasks_may_be_given():
    tasks = [Step(), Step()]
    operation = Operation(tasks=tasks)
    assert operation.tasks == tasks
    tasks.append(Step())
    assert len(operation.tasks) == 2


def test_k49_new_is_the_class_called_with_the_parsed_inputs_and_deprecated():
    class Parsed(Operation):
        @classmethod
        def parse_inputs(cls, **kwargs):
            return {"params": kwargs}

    with pytest.warns(DeprecationWarning, match=r"Operation\.new\(\) is deprecated"):
        operation = Parsed.new(a=1)
    assert type(operation) is Parsed
    assert operation.params == {"a": 1}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Operation.new(uuid="u")
    assert [str(w.message).split()[0] for w in caught] == ["Operation.new()"]
    assert caught[0].filename == __file__


def test_k50_parse_inputs_gives_its_arguments_and_is_deprecated():
    with pytest.warns(DeprecationWarning, match=r"Operation\.parse_inputs\(\) is deprecated"):
        assert Operation.parse_inputs(a=1, b=2) == {"a": 1, "b": 2}


# -- status ----------------------------------------------------------------------------------------------------------


def test_k51_set_status_updates_the_status():
    operation = Operation()
    operation.set_status("RUNNING", Result())
    assert operation.status == "RUNNING"
    operation.set_status("FAILED")
    assert operation.status == "FAILED"
    with pytest.raises(StatusError):
        Operation(status="SUCCESS").set_status("RUNNING")
    with pytest.raises(ValidationError, match="Unknown status"):
        operation.set_status("DONE")


def test_k51_the_wrapper_logs_each_move_before_it_is_made(caplog):
    caplog.set_level(logging.INFO, logger="kser")
    operation = Three(uuid="U")
    operation.execute()
    lines = [r.getMessage() for r in caplog.records if "SetStatus" in r.getMessage()]
    assert lines == [
        f"Three.SetStatus: {Three.path}[U] status update 'PENDING' -> 'RUNNING'",
        f"Three.SetStatus: {Three.path}[U] status update 'RUNNING' -> 'SUCCESS'",
    ]


def test_k51_an_overridden_set_status_is_told_every_move_with_its_result():
    noted = []

    class Noted(Three):
        def set_status(self, status, result=None):
            noted.append((str(status), None if result is None else result.retcode))
            super().set_status(status, result)

    Noted().execute()
    Noted(params={"fails": 1}).execute()
    assert noted == [("RUNNING", None), ("SUCCESS", 0), ("RUNNING", None), ("FAILED", 500)]


@pytest.mark.parametrize("when", ["RUNNING", "SUCCESS", "FAILED"])
def test_k51_a_set_status_that_raises_fails_the_operation_and_never_escapes(when, caplog):
    """K-15: execute() raises no Exception; the operation is not left open; a failure that was there is the one told."""

    class Unnoted(Three):
        def set_status(self, status, result=None):
            if status == when:
                raise OSError("database is down")
            super().set_status(status, result)

    operation = Unnoted(params={"fails": 1} if when == "FAILED" else None)
    result = operation.execute()
    assert operation.status == "FAILED"
    assert result.stderr == ("step 1" if when == "FAILED" else "database is down")
    assert not is_success(result)


# -- building --------------------------------------------------------------------------------------------------------


def test_k52_add_task_appends():
    operation, first, second = Operation(), Step(), Step()
    operation.add_task(first)
    operation.add_task(second)
    assert operation.tasks == [first, second]


@pytest.mark.parametrize("wrong", [5, None, "task", Step, object()])
def test_k52_what_is_no_task_is_refused(wrong):
    with pytest.raises(ValidationError, match="cannot take a"):
        Operation().add_task(wrong)


def test_k52_one_task_cannot_be_two_steps():
    task = Step()
    operation = Operation(tasks=[task])
    with pytest.raises(ValidationError, match=f"has a task with uuid {task.uuid} already"):
        operation.add_task(task)
    with pytest.raises(ValidationError, match="already"):
        operation.add_task(operation)
    assert operation.tasks == [task]


def test_k53_prebuild_checks_and_its_dict_goes_to_build_tasks():
    seen = []

    class Checked(Operation):
        def prebuild(self, **kwargs):
            seen.append(("prebuild", kwargs))
            return {"changed": True} if kwargs.get("change") else None

        def build_tasks(self, **kwargs):
            seen.append(("build_tasks", kwargs))
            return [Step()]

    operation = Checked(params={"a": 1}).build(change=True)
    assert seen == [("prebuild", {"a": 1, "change": True}), ("build_tasks", {"changed": True})]
    assert operation.params == {"a": 1, "change": True}
    seen.clear()
    Checked(params={"a": 1}).build(b=2)
    assert seen == [("prebuild", {"a": 1, "b": 2}), ("build_tasks", {"a": 1, "b": 2})]


def test_k53_a_prebuild_that_raises_ends_the_build():
    class Refuses(Three):
        def prebuild(self, **kwargs):
            raise ValueError("not on Sundays")

    operation = Refuses()
    with pytest.raises(ValueError, match="not on Sundays"):
        operation.build()
    assert operation.tasks == []
    result = Refuses().execute()
    assert (result.retcode, result.stderr) == (500, "not on Sundays")


def test_k54_next_gives_the_task_after_that_is_not_success_yet():
    a, b, c, d = Step(uuid="a"), Step(uuid="b"), Step(uuid="c", status="SUCCESS"), Step(uuid="d")
    operation = Operation(tasks=[a, b, c, d])
    assert operation.next(a) is b
    assert operation.next(b) is d
    assert operation.next(c) is d
    assert operation.next(d) is None
    assert operation.next(Step()) is None
    assert Operation().next(a) is None


def test_k54_uuids_are_compared_as_text():
    import uuid

    value = uuid.uuid4()
    a, b = Step(uuid=value), Step()
    operation = Operation(tasks=[a, b])
    same = Step()
    same.uuid = value  # not text, as somebody may have set it
    assert operation.next(same) is b


def test_k59_finalize_is_called_after_the_build_and_what_it_gives_is_given():
    seen = []

    class Mapped(Three):
        def finalize(self):
            seen.append(len(self.tasks))
            return super().finalize()

    operation = Mapped()
    assert operation.build() is operation
    assert seen == [3]
    assert Operation().finalize().tasks == []


def test_k60_build_tasks_gives_nothing_by_default():
    assert Operation().build_tasks(a=1) == []


@pytest.mark.parametrize("convert", [tuple, iter])
def test_k60_any_iterable_of_tasks_will_do(convert, caplog):
    caplog.set_level(logging.DEBUG, logger="kser")

    class Other(Operation):
        def build_tasks(self, **kwargs):
            return convert([Step(), Step()])

    assert len(Other().build().tasks) == 2


def test_k60_a_build_tasks_that_gives_none_is_told_so():
    class Forgets(Operation):
        def build_tasks(self, **kwargs):
            Step()

    with pytest.raises(ValidationError, match=r"build_tasks\(\) of .*Forgets returned a NoneType"):
        Forgets().build()


def test_k61_compute_tasks_checks_and_builds_and_leaves_the_operation_as_it_is():
    operation = Three(params={"x": 1})
    tasks = operation.compute_tasks(y=2)
    assert [type(task) for task in tasks] == [Step, Step, Step]
    assert operation.tasks == []
    assert operation.params == {"x": 1}


def test_k61_tasks_of_another_operation_may_be_included():
    class Both(Operation):
        def build_tasks(self, **kwargs):
            tasks = [Step(params={"n": "first"})]
            tasks += Three().compute_tasks()
            return tasks

    result = Both().execute()
    assert is_success(result)
    assert result.retval == {"sfirst": True, "s0": True, "s1": True, "s2": True, "last": 2}


def test_k62_build_appends_and_gives_the_operation():
    first = Step()
    operation = Three(tasks=[first])
    assert operation.build() is operation
    assert len(operation.tasks) == 4
    assert operation.tasks[0] is first


def test_k64_the_required_fields_of_the_tasks_are_required_of_the_operation():
    class Needs(Step):
        REQUIRED_FIELDS = ("order",)

    class Op(Three):
        REQUIRED_FIELDS = ("customer",)
        TASKS = (Needs, Step)

    for given, said in (
        ({}, f"Missing parameter: customer for {Op.path}"),
        ({"customer": 1}, f"Missing parameter: order for {Needs.path}"),
    ):
        with pytest.raises(ValidationError) as caught:
            Op(params=given).build()
        assert (caught.value.message, caught.value.code, caught.value.msgid) == (said, 400, "ERR-04413")
        assert Op(params=given).execute().stderr == said
    assert len(Op(params={"customer": 1}).build(order=None).tasks) == 3


# -- in this process -------------------------------------------------------------------------------------------------


def test_k65_t07_the_tasks_run_in_order_and_get_what_the_one_before_gave():
    operation = Three()
    result = operation.execute()
    assert (result.retcode, result.stdout) == (0, "step 2")
    assert result.retval == {"s0": True, "s1": True, "s2": True, "last": 2}
    assert [str(task.status) for task in operation.tasks] == ["SUCCESS"] * 3
    assert operation.status == "SUCCESS"
    assert operation.result is result


def test_k47_k65_the_first_task_that_fails_stops_it():
    operation = Three(params={"fails": 1})
    result = operation.execute()
    assert operation.status == "FAILED"
    assert [str(task.status) for task in operation.tasks] == ["SUCCESS", "FAILED", "PENDING"]
    assert (result.retcode, result.stderr) == (500, "step 1")


def test_k68_a_failed_operation_names_the_task_and_has_its_own_uuid():
    operation = Three(uuid="op", params={"fails": 1})
    result = operation.execute()
    assert result.uuid == "op"
    assert result.retval["failed_task"] == {"uuid": operation.tasks[1].uuid, "path": Step.path}
    assert result.retval["error"]["message"] == "step 1"


def test_k68_of_nested_operations_the_innermost_task_is_named():
    inner = Three(params={"fails": 2})
    outer = Operation(tasks=[Step(), inner])
    result = outer.execute()
    assert result.uuid == outer.uuid
    assert result.retval["failed_task"] == {"uuid": inner.tasks[2].uuid, "path": Step.path}
    assert (inner.status, outer.status) == ("FAILED", "FAILED")


@pytest.mark.parametrize("forwarded", [{"uuid": "old", "path": "some.Other"}, "mine"])
def test_k68_a_failed_task_that_was_forwarded_is_not_named_for_the_one_that_failed(forwarded):
    """A Result of another operation's failure comes in when one operation cleans up after another."""

    class Refuses(Task):
        def run(self):
            return Result(retcode=4, stderr="refused")

    before = Result(retcode=3, stderr="before", retval={"failed_task": forwarded})
    inner = Operation(tasks=[Refuses()])
    result = Operation(tasks=[inner], result=before).execute()
    assert result.retval["failed_task"] == {"uuid": inner.tasks[0].uuid, "path": Refuses.path}


def test_k65_tasks_that_are_success_already_are_not_run_again_and_forward_what_they_gave():
    done = Step(status="SUCCESS", result=Result(stdout="stored", retval={"s0": "stored"}), params={"fails": 0})
    operation = Operation(tasks=[done, Step(params={"n": 1})])
    result = operation.execute()
    assert result.retval == {"s0": "stored", "s1": True, "last": 1}
    all_done = Operation(tasks=[done])
    assert all_done.execute().stdout == "stored"
    assert all_done.status == "SUCCESS"


def test_k65_a_failed_operation_resumes_where_it_failed():
    ran = []

    class Once(Task):
        def run(self):
            ran.append(self.params["n"])
            if self.params["n"] == 1 and ran.count(1) == 1:
                raise ValueError("the first time")
            return Result(retval={f"s{self.params['n']}": True})

    operation = Operation(tasks=[Once(params={"n": n}) for n in range(3)])
    assert not is_success(operation.execute())
    result = operation.execute()
    assert ran == [0, 1, 1, 2]
    assert (operation.status, result.retval["s0"], result.retval["s2"]) == ("SUCCESS", True, True)


def test_k66_t03_controller_run_of_an_operations_message_runs_all_of_it(registry, classes, producer, caplog):
    caplog.set_level(logging.INFO, logger="kser")
    _, op = classes
    result = registry.controller.run(Message("U", op.path).dumps())
    assert (result.retcode, result.stdout) == (0, "step 2")
    lines = [r.getMessage() for r in caplog.records]
    assert f"Op.Success: {op.path}[U]: step 2" in lines
    assert f"Controller.Success: {op.path}[U]: step 2" in lines
    assert producer.sent == []


def test_k66_it_runs_the_tasks_that_came_with_the_message(registry, classes, producer):
    sent, _ = classes
    Operation(uuid="U", tasks=[sent(params={"n": "only"})]).send()
    ((_, _, kmsg),) = producer.sent
    assert registry.controller.run(kmsg.dumps()).retval == {"sonly": True, "last": "only"}


def test_k67_an_operation_without_tasks_fails():
    operation = Operation(uuid="op")
    result = operation.execute()
    assert (result.retcode, result.stderr, result.uuid, operation.status) == (1, EMPTY, "op", "FAILED")


def test_an_operation_that_adds_a_task_as_it_goes_runs_it_here_too():
    """next() decides at the end, in this process as on the workers (test_runner.py)."""

    class Grows(Three):
        def next(self, task):
            if task.params.get("n") == 2:
                self.add_task(Step(params={"n": "extra"}))
            return super().next(task)

    assert Grows().execute().retval["last"] == "extra"


def test_an_operation_that_builds_itself_as_its_own_task_fails_and_ends():
    class Selfish(Operation):
        def build_tasks(self, **kwargs):
            return [Selfish()]

    assert not is_success(Selfish().execute())


def test_an_operation_has_the_hooks_of_a_task_around_its_tasks():
    order = []

    class Hooked(Three):
        def prerun(self):
            order.append(("prerun", str(self.status), [str(t.status) for t in self.tasks]))

        def onsuccess(self, result):
            order.append(("onsuccess", str(self.status)))
            return result

        def onerror(self, result):
            order.append(("onerror", result.retval["failed_task"]["path"]))
            return result

    Hooked().execute()
    Hooked(params={"fails": 0}).execute()
    pending = ["PENDING"] * 3
    assert order == [
        ("prerun", "RUNNING", pending), ("onsuccess", "SUCCESS"),
        ("prerun", "RUNNING", pending), ("onerror", Step.path),
    ]  # fmt: skip


# -- by messages, seen from the service ------------------------------------------------------------------------------


def test_k58_t16_launch_sends_the_first_task(classes, producer):
    sent, op = classes
    operation = op().build()
    result = operation.launch()
    ((topic, key, kmsg),) = producer.sent
    assert is_success(result)
    assert (topic, kmsg.entrypoint, kmsg.uuid) == ("work", sent.path, operation.tasks[0].uuid)
    assert key == operation.uuid
    assert operation.status == "RUNNING"
    itinerary = Itinerary.of(kmsg)
    assert (itinerary.root.uuid, itinerary.root.entrypoint, itinerary.new) == (operation.uuid, op.path, True)
    assert [entry["uuid"] for entry in itinerary.root.tasks] == [task.uuid for task in operation.tasks[1:]]


def test_k57_launch_of_an_empty_operation(producer):
    for result in (Operation().launch_next(), Operation().launch()):
        assert (result.retcode, result.stderr) == (1, EMPTY)
    assert producer.sent == []


def test_k58_an_operation_is_launched_once(classes, producer):
    operation = classes[1]().build()
    operation.launch()
    again = operation.launch()
    assert again.retcode == 409
    assert "was launched already" in again.stderr
    assert len(producer.sent) == 1


def test_k58_a_launch_that_did_not_arrive_may_be_repeated():
    sink = FakeSink(answer=lambda record: ConfigurationError("no"))
    registry = OperationRegistry(producer=Producer(sink), topic="work")

    @registry.subscribe
    class Sent(Step):
        pass

    operation = Operation(tasks=[Sent()])
    assert not is_success(operation.launch())
    assert operation.status == "PENDING"
    sink.answer = lambda record: None
    assert is_success(operation.launch())
    assert operation.status == "RUNNING"
    assert len(sink.records) == 2


def test_k58_without_a_producer_or_a_topic_it_says_what_to_configure():
    with pytest.raises(ConfigurationError, match=r"no producer is configured.*OperationRegistry\(producer="):
        Three().build().launch()
    registry = OperationRegistry(producer=FakeProducer())
    lone = registry.subscribe(type("Lone", (Step,), {}))
    with pytest.raises(ConfigurationError, match="no topic is configured"):
        lone().send()
    assert is_success(lone().send(topic="other"))


@pytest.mark.parametrize(
    ("registry_topic", "op_topic", "task_topic", "wanted"),
    [
        ("reg", "op", "task", "task"),  # the task's own wins
        ("reg", "op", None, "reg"),  # else its registry's
        (None, "op", None, "op"),  # else that of its operation, as on a worker
    ],
)
def test_k58_which_topic_the_first_task_is_sent_to(registry_topic, op_topic, task_topic, wanted):
    producer = FakeProducer()
    registry = OperationRegistry(producer=producer, topic=registry_topic)

    @registry.subscribe(topic=task_topic)
    class Sent(Step):
        pass

    @registry.subscribe(topic=op_topic)
    class Op(Operation):
        def build_tasks(self, **kwargs):
            return [Sent()]

    Op().build().launch()
    assert [topic for topic, _, _ in producer.sent] == [wanted]


def test_k58_a_task_whose_class_is_subscribed_nowhere_goes_by_its_operations_registry(registry, producer):
    @registry.subscribe
    class Op(Operation):
        def build_tasks(self, **kwargs):
            return [Step(), Step()]

    assert is_success(Op().build().launch())
    assert [(topic, kmsg.entrypoint) for topic, _, kmsg in producer.sent] == [("work", Step.path)]


def test_k55_launch_next_sends_the_next_task_with_the_result(classes, producer):
    operation = classes[1]().build()
    first = operation.tasks[0]
    first.execute()
    result = operation.launch_next(first, Result(stdout="given", retval={"x": 1}))
    ((_, key, kmsg),) = producer.sent
    assert is_success(result)
    assert (kmsg.uuid, key) == (operation.tasks[1].uuid, operation.uuid)
    assert (kmsg.result.stdout, kmsg.result.retval) == ("given", {"x": 1})
    itinerary = Itinerary.of(kmsg)
    assert (itinerary.position, itinerary.new) == (1, False)
    assert [entry["uuid"] for entry in itinerary.root.tasks] == [operation.tasks[2].uuid]


def test_k55_without_a_result_the_tasks_own_is_sent(classes, producer):
    operation = classes[1]().build()
    first = operation.tasks[0]
    first.execute()
    operation.launch_next(first)
    assert producer.sent[0][2].result.stdout == "step 0"


def test_k55_k56_t16_after_the_last_task_the_operation_is_finished_with_a_result(classes, producer):
    operation = classes[1]().build()
    last = operation.tasks[-1]
    last.execute()
    result = operation.launch_next(last)
    assert isinstance(result, Result)
    assert (result.stdout, operation.status) == ("step 2", "SUCCESS")
    assert producer.sent == []


@pytest.mark.parametrize("how", ["status", "result", "both"])
def test_k56_t16_after_a_failed_task_the_operation_fails_and_nothing_is_sent(classes, producer, how):
    operation = classes[1]().build()
    first = operation.tasks[0]
    if how != "result":
        first.status = "FAILED"
    given = Result(retcode=5, stderr="five") if how != "status" else None
    result = operation.launch_next(first, given)
    assert operation.status == "FAILED"
    assert result.retcode == (1 if how == "status" else 5)
    assert result.retval["failed_task"]["uuid"] == first.uuid
    assert result.uuid == operation.uuid
    assert producer.sent == []


def test_k56_set_status_is_called_with_the_result(classes):
    noted = []

    class Noted(classes[1]):
        def set_status(self, status, result=None):
            noted.append((str(status), result.stdout if result else None))
            super().set_status(status, result)

    operation = Noted(tasks=[Step(params={"n": 9})])
    operation.tasks[0].execute()
    operation.launch_next(operation.tasks[0])
    assert noted == [("SUCCESS", "step 9")]


def test_k63_send_sends_the_operation_itself_and_gives_it(classes, producer):
    _, op = classes
    operation = op(uuid="U", params={"a": 1})
    assert operation.send() is operation
    ((topic, key, kmsg),) = producer.sent
    assert (topic, key, kmsg.uuid, kmsg.entrypoint, kmsg.params) == ("work", "U", "U", op.path, {"a": 1})
    assert kmsg.metadata == {}
    assert operation.result.stdout == f"Message {op.path}[U] sent in work"


def test_k63_without_a_producer_it_raises():
    with pytest.raises(ConfigurationError, match="no producer is configured"):
        Operation().send()


def test_k58_task_send_exists_and_sends_the_task(classes, producer):
    sent, _ = classes
    result = sent(uuid="U", params={"n": 1}).send(Result(stdout="forwarded"))
    ((topic, key, kmsg),) = producer.sent
    assert (result.retcode, result.stdout) == (0, f"Message {sent.path}[U] sent in work")
    assert (topic, key, kmsg.uuid, kmsg.params, kmsg.result.stdout) == ("work", "U", "U", {"n": 1}, "forwarded")


def test_k58_launches_go_through_an_overridden_send_of_the_task(registry, producer):
    """Who had to write send() for kser 0.8 has it without further arguments."""
    calls = []

    @registry.subscribe
    class Own(Task):
        def send(self, result=None):
            calls.append(result)
            return Result(stdout="sent by myself")

    operation = Operation(tasks=[Own()])
    assert operation.launch().stdout == "sent by myself"
    assert calls == [None]


def test_k99_all_of_an_operation_has_its_uuid_as_key_unless_it_is_given_one(classes, producer):
    sent, op = classes
    op(key="customer 7").build().launch()
    op(uuid="U", key="customer 8").send()
    sent().send(key="own")
    assert [key for _, key, _ in producer.sent] == ["customer 7", "customer 8", "own"]


def test_k102_a_launch_is_written_the_way_the_registrys_controller_reads(producer):
    from kser import Controller
    from tests.unit.test_contracts_messages import Reversed

    class Secret(Controller):
        TRANSPORT = Reversed

    registry = OperationRegistry(controller_class=Secret, producer=producer, topic="work")
    sent = registry.subscribe(type("Sent", (Step,), {}))
    sent(params={"n": 4}).send()
    Operation(tasks=[sent(params={"n": 5})]).launch()
    for _, _, kmsg in producer.sent:
        assert type(kmsg) is Reversed
        assert registry.controller.run(kmsg.to_bytes()).stdout.startswith("step ")


def test_k69_display_prints_the_operation_and_its_tasks(capsys):
    operation = Operation(uuid="O", tasks=[Step(uuid="a"), Step(uuid="b", status="SUCCESS")])
    operation.display()
    assert capsys.readouterr().out.splitlines() == [
        "Operation [Operation](id=O,status=PENDING)",
        f"  - Task [{Step.path}](uuid=a,status=PENDING, params={{}})",
        f"  - Task [{Step.path}](uuid=b,status=SUCCESS, params={{}})",
    ]


def test_a_postinit_that_raises_fails_the_operation_even_when_its_status_cannot_be_noted():
    class Broken(Three):
        def postinit(self):
            raise ValueError("no settings")

        def set_status(self, status, result=None):
            raise OSError("no database")

    operation = Broken()
    assert (operation.execute().stderr, operation.status) == ("no settings", "FAILED")
