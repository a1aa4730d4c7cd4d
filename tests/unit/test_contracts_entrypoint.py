"""Contracts K-01, K-07, K-10 and K-13 to K-32: Entrypoint and Task. Traps T-08, T-09, T-10."""

import inspect
import logging
import uuid

import pytest

from kser import Entrypoint, Message, Operation, OperationRegistry, Result, Task, ValidationError
from kser.errors import InternalError
from kser.results import is_success

U = "872c3be0-51ac-457f-a4d9-12c2f7667b80"


@pytest.fixture(autouse=True)
def _all_levels(caplog):
    caplog.set_level(logging.DEBUG, logger="kser")


class Roll(Task):
    """Succeeds."""

    def run(self):
        return Result(uuid=self.uuid, stdout="You made a 1", retval={"made": 1})


class Bad(Task):
    """Fails."""

    def run(self):
        raise ValueError("no luck")


def lines(caplog, *levels):
    return [r.getMessage() for r in caplog.records if not levels or r.levelno in levels]


# -- names and arguments ---------------------------------------------------------------------------------------------


def test_k01_task_takes_the_documented_arguments():
    from kser.sequencing.task import Task as Documented

    parameters = list(inspect.signature(Documented.__init__).parameters.values())[1:]
    assert [(p.name, p.default) for p in parameters] == [
        ("uuid", None),
        ("params", None),
        ("status", "PENDING"),
        ("result", None),
        ("metadata", None),
    ]
    result = Result(uuid="r")
    task = Documented("u", {"a": 1}, "RUNNING", result, {"m": 2})
    assert (task.uuid, task.params, task.status, task.result, task.metadata) == (
        "u", {"a": 1}, "RUNNING", result, {"m": 2},
    )  # fmt: skip
    assert Documented().status == "PENDING"


def test_k07_the_classes_derive_from_each_other():
    from kser.entry import Entrypoint as Documented

    assert issubclass(Task, Documented)
    assert issubclass(Operation, Task)


def test_k10_run_takes_no_argument_and_gives_a_result():
    assert list(inspect.signature(Task.run).parameters) == ["self"]
    assert Roll().execute().stdout == "You made a 1"


def test_k13_missing_arguments_get_defaults_that_no_two_instances_share():
    one, two = Entrypoint(), Entrypoint()
    assert uuid.UUID(one.uuid).version == 4
    assert one.uuid != two.uuid
    assert (one.params, one.metadata) == ({}, {})
    assert (one.result.retcode, one.result.uuid) == (0, one.uuid)
    for name in ("params", "metadata", "result"):
        assert getattr(one, name) is not getattr(two, name)
    one.params["a"] = one.metadata["b"] = 1
    assert (Entrypoint().params, Entrypoint().metadata) == ({}, {})


def test_k13_a_uuid_object_becomes_text():
    value = uuid.uuid4()
    assert Entrypoint(uuid=value).uuid == str(value)


def test_k14_path_is_module_and_class_on_the_class_and_on_the_instance():
    assert Roll.path == f"{__name__}.Roll"
    assert Roll().path == Roll.path

    class DiceRoll(Task):
        __module__ = "__main__"

    assert DiceRoll.path == DiceRoll().path == "__main__.DiceRoll"
    assert DiceRoll(uuid=U).to_Message().entrypoint == "__main__.DiceRoll"


def test_k14_a_name_given_at_subscribe_belongs_to_that_class_only():
    @OperationRegistry().subscribe(name="shop.Charge")
    class Charge(Task):
        pass

    class Special(Charge):
        pass

    assert Charge.path == "shop.Charge"
    assert Special.path == f"{__name__}.Special"


# -- execution -------------------------------------------------------------------------------------------------------


def test_k15_execute_turns_every_exception_into_a_failed_result_through_onerror():
    seen = []

    class Told(Bad):
        def onerror(self, result):
            seen.append(result)
            return result

    task = Told()
    result = task.execute()
    assert (result.retcode, result.stderr, result.uuid) == (500, "no luck", task.uuid)
    assert seen == [result]
    assert task.status == "FAILED"


def test_k15_unsafe_execute_lets_it_propagate():
    task = Bad()
    with pytest.raises(ValueError, match="no luck"):
        task.unsafe_execute()
    assert task.status == "FAILED"


@pytest.mark.parametrize("signal", [KeyboardInterrupt, SystemExit, GeneratorExit])
@pytest.mark.parametrize("method", ["execute", "unsafe_execute"])
def test_k15_what_ends_the_process_propagates_from_both(signal, method):
    class Ends(Task):
        def run(self):
            raise signal

    with pytest.raises(signal):
        getattr(Ends(), method)()


@pytest.mark.parametrize("hook", ["prerun", "run", "postrun", "onsuccess"])
def test_k15_an_exception_in_any_hook_fails_the_task(hook):
    def broken(self, *args):
        raise ValueError(f"in {hook}")

    made = type("Made", (Roll,), {hook: broken})
    task = made()
    result = task.execute()
    assert (result.retcode, result.stderr, task.status) == (500, f"in {hook}", "FAILED")
    with pytest.raises(ValueError, match=f"in {hook}"):
        made().unsafe_execute()


def test_k15_an_onerror_that_raises_is_logged_and_the_first_failure_stays(caplog):
    class Twice(Bad):
        def onerror(self, result):
            raise RuntimeError("and again")

    task = Twice()
    assert task.execute().stderr == "no luck"
    assert task.status == "FAILED"
    (logged,) = [r for r in caplog.records if r.exc_info]
    assert "and again" in str(logged.exc_info[1])


def test_k15_what_an_exception_carries_can_not_make_execute_raise():
    """Odd keys, large numbers, lone surrogates, circles, and exceptions that cannot say what they are."""
    import marshmallow

    circle = {}
    circle["self"] = circle

    class Mute(Exception):
        def __str__(self):
            raise RuntimeError("no text")

    for exc in (
        ValidationError("x", extra={(1, 2): "odd", "n": 2**80, "s": "\udcff", "o": object()}),
        ValidationError("x", extra=circle),
        ValidationError(ValueError("an exception as message")),
        marshmallow.ValidationError("bad"),
        marshmallow.ValidationError({"field": ["bad"]}),
        Mute(),
        ValueError("lone \udcff"),
        OSError(),
    ):

        class Raises(Task):
            def run(self, exc=exc):
                raise exc

        task = Raises(uuid="u")
        result = task.execute()
        assert not is_success(result)
        assert isinstance(result.stderr, str)
        assert Message.loads(task.to_Message(result).to_bytes()).result.retcode == result.retcode


def test_k16_the_hooks_run_in_order_and_their_results_are_carried_on():
    order = []

    class Noted(Task):
        REQUIRED_FIELDS = ("a",)

        def check_required_params(self):
            order.append("check")
            super().check_required_params()

        def prerun(self):
            order.append("prerun")
            return Result(retcode=9, stdout="ignored")

        def run(self):
            order.append("run")
            return Result(stdout="run")

        def postrun(self, result):
            order.append(("postrun", result.stdout))
            return Result(stdout="postrun", retval={"post": True})

        def onsuccess(self, result):
            order.append(("onsuccess", result.stdout))
            return Result(stdout="onsuccess")

        def onerror(self, result):
            order.append("onerror")
            return result

    result = Noted(params={"a": 1}).execute()
    assert order == ["check", "prerun", "run", ("postrun", "run"), ("onsuccess", "postrun")]
    assert result.stdout == "onsuccess"


def test_k16_a_failed_result_goes_through_onerror_not_onsuccess():
    order = []

    class Fails(Task):
        def run(self):
            return Result(retcode=3, stderr="three")

        def postrun(self, result):
            order.append(("postrun", result.retcode))
            return result

        def onsuccess(self, result):
            order.append("onsuccess")

        def onerror(self, result):
            order.append(("onerror", result.stderr))
            return Result(retcode=4, stderr="four")

    task = Fails()
    result = task.execute()
    assert order == [("postrun", 3), ("onerror", "three")]
    assert (result.retcode, result.stderr, task.status) == (4, "four", "FAILED")


def test_k16_hooks_that_return_none_keep_the_result():
    class Silent(Roll):
        def postrun(self, result):
            pass

        def onsuccess(self, result):
            pass

    assert Silent().execute().stdout == "You made a 1"


def test_k16_a_hook_may_turn_the_outcome_round_and_the_status_follows():
    class Rescued(Bad):
        def onerror(self, result):
            return Result(stdout="compensated")

    class Spoiled(Roll):
        def onsuccess(self, result):
            return Result(retcode=2, stderr="on second thoughts")

    rescued, spoiled = Rescued(), Spoiled()
    assert (rescued.execute().stdout, rescued.status) == ("compensated", "SUCCESS")
    assert (spoiled.execute().retcode, spoiled.status) == (2, "FAILED")


def test_k17_postrun_is_called_with_the_failed_result_when_run_raised():
    seen = []

    class Post(Bad):
        def postrun(self, result):
            seen.append((result.retcode, result.stderr))
            return Result(stdout="cannot turn it round")

    assert Post().execute().stderr == "no luck"
    assert seen == [(500, "no luck")]


def test_k17_a_postrun_that_raises_does_not_hide_the_first_exception(caplog):
    class Post(Bad):
        def postrun(self, result):
            raise RuntimeError("second")

    assert Post().execute().stderr == "no luck"
    with pytest.raises(ValueError, match="no luck"):
        Post().unsafe_execute()
    assert any(r.exc_info and "second" in str(r.exc_info[1]) for r in caplog.records)


def test_k18_a_missing_parameter_is_refused_before_run():
    ran = []

    class Needs(Task):
        REQUIRED_FIELDS = ("first", "second")

        def run(self):
            ran.append(True)

    result = Needs(params={"first": None}).execute()
    error = result.retval["error"]
    assert ran == []
    assert (result.retcode, result.stderr) == (400, "Missing parameter: second")
    assert (error["code"], error["msgid"], error["name"]) == (400, "ERR-04413", "ValidationError")
    with pytest.raises(ValidationError, match="Missing parameter: first"):
        Needs().unsafe_execute()
    assert is_success(Needs(params={"first": None, "second": None}).execute())
    assert ran == [True]


def test_k19_t10_a_run_that_nobody_wrote_is_said_to_be_so():
    class Todo(Task):
        pass

    result = Todo().execute()
    assert result.retcode == 501
    assert f"Task '{Todo.path}' not implemented" in result.stderr
    assert result.retval["error"]["name"] == "NotImplemented"
    assert result.retval["error"]["msgid"] == "ERR-04766"


# -- messages --------------------------------------------------------------------------------------------------------


def test_k20_a_task_becomes_a_message_and_back_and_loses_nothing_but_its_status():
    task = Roll(U, {"a": [1, {"b": None}]}, "RUNNING", Result(uuid="r", stdout="so far", retval={"x": 1}), {"m": 1})
    kmsg = task.to_Message()
    assert (kmsg.uuid, kmsg.entrypoint, kmsg.params, kmsg.metadata) == (U, Roll.path, task.params, {"m": 1})
    assert kmsg.result is task.result
    back = Roll.from_Message(Message.loads(kmsg.dumps()))
    assert type(back) is Roll
    assert (back.uuid, back.params, back.metadata) == (U, task.params, {"m": 1})
    assert (back.result.uuid, back.result.stdout, back.result.retval) == ("r", "so far", {"x": 1})
    assert back.status == "PENDING"


def test_k20_a_result_given_to_to_message_wins():
    given = Result(stdout="given")
    assert Roll().to_Message(given).result is given


def test_k21_the_forwarded_result_is_readable_in_run():
    class Reads(Task):
        def run(self):
            return Result(retval={"seen": self.result.retval["made"], "out": self.result.stdout})

    by_argument = Reads().execute(Result(stdout="s", retval={"made": 6}))
    by_message = Reads.from_Message(Message("u", Reads.path, result=Result(stdout="s", retval={"made": 6}))).execute()
    assert by_argument.retval == by_message.retval == {"made": 6, "seen": 6, "out": "s"}


def test_k22_t13_what_run_gives_is_merged_over_what_came_in_a_new_result():
    forwarded = Result(uuid="f", stdout="old", stderr="warned", retval={"a": 1, "b": 1})

    class Adds(Task):
        def run(self):
            return Result(retval={"b": 2, "c": 3})

    task = Adds()
    result = task.execute(forwarded)
    assert result is not forwarded
    assert (result.stdout, result.stderr, result.retval) == ("old", "warned", {"a": 1, "b": 2, "c": 3})
    assert result.uuid == task.uuid
    assert (forwarded.uuid, forwarded.stdout, forwarded.retval) == ("f", "old", {"a": 1, "b": 1})


def test_k22_t13_a_step_that_succeeds_after_a_failed_one_is_a_success():
    """DESIGN.md 9: the merged retcode is the new result's own."""
    task = Roll()
    result = task.execute(Result(retcode=500, stderr="the one before"))
    assert (result.retcode, result.stdout, task.status) == (0, "You made a 1", "SUCCESS")


def test_k23_none_is_a_success_with_the_forwarded_result():
    class Quiet(Task):
        def run(self):
            return None

    result = Quiet().execute(Result(stdout="so far", retval={"x": 1}))
    assert (result.retcode, result.stdout, result.retval) == (0, "so far", {"x": 1})
    assert is_success(Quiet().execute())


@pytest.mark.parametrize(("value", "type_name"), [(5, "int"), ("text", "str"), ({"a": 1}, "dict"), (True, "bool")])
def test_k23_anything_else_fails_with_the_type_named(value, type_name):
    class Wrong(Task):
        def run(self):
            return value

    result = Wrong().execute()
    assert result.retcode == 500
    assert f"returned a {type_name}" in result.stderr
    assert "Result" in result.stderr
    assert "attribute" not in result.stderr


@pytest.mark.parametrize("hook", ["postrun", "onsuccess"])
def test_k23_a_hook_that_returns_no_result_is_named(hook):
    result = type("Wrong", (Roll,), {hook: lambda self, result: "text"})().execute()
    assert (result.retcode, f"{hook}() of" in result.stderr, "a str" in result.stderr) == (500, True, True)


def test_k24_t09_a_postinit_that_raises_fails_the_task_without_running_it(caplog):
    ran = []

    class Broken(Roll):
        def postinit(self):
            raise ValueError("no database")

        def run(self):
            ran.append(True)

    task = Broken(uuid=U)
    assert task.status == "FAILED"
    for _ in range(2):
        result = task.execute()
        assert (result.retcode, result.stderr, result.stdout, result.uuid) == (500, "no database", "", U)
    assert ran == []
    assert [line.split(":")[0] for line in lines(caplog, logging.ERROR)] == ["Broken.Failed"]
    assert not any(".Success" in line for line in lines(caplog))


def test_k24_postinit_is_called_once():
    calls = []

    class Once(Roll):
        def postinit(self):
            calls.append(self.params)

    task = Once(params={"a": 1})
    task.execute()
    assert calls == [{"a": 1}]


# -- log lines -------------------------------------------------------------------------------------------------------


def test_k25_log_writes_one_record_with_the_documented_prefix(caplog):
    class DiceRoll(Task):
        __module__ = "__main__"

    DiceRoll(uuid="U").log("hello")
    (logged,) = caplog.records
    assert logged.getMessage() == "DiceRoll.PENDING: __main__.DiceRoll[U]: hello"
    assert (logged.levelno, logged.name) == (logging.INFO, "kser.sequencing.task")


def test_k25_the_prefix_tells_the_status_of_the_moment(caplog):
    class Talks(Task):
        def run(self):
            self.log("now", logging.WARNING)

    task = Talks(uuid="U")
    task.execute()
    task.log("after")
    assert f"Talks.RUNNING: {Talks.path}[U]: now" in lines(caplog, logging.WARNING)
    assert lines(caplog)[-1] == f"Talks.SUCCESS: {Talks.path}[U]: after"


def test_k26_t08_args_are_log_record_arguments(caplog):
    Roll(uuid="U").log("x %s %d%%", logging.INFO, "a", 5)
    assert lines(caplog) == [f"Roll.PENDING: {Roll.path}[U]: x a 5%"]


@pytest.mark.parametrize(("message", "args", "said"), [("100% %s", (), "100% %s"), ("%s", ("100%",), "100%")])
def test_k26_a_percent_sign_breaks_nothing(caplog, message, args, said):
    odd = type("Odd%s", (Roll,), {})
    odd(uuid="%d").log(message, logging.INFO, *args)
    assert lines(caplog) == [f"Odd%s.PENDING: {odd.path}[%d]: {said}"]


def test_k26_what_is_logged_need_not_be_text(caplog):
    Roll(uuid="U").log(ValueError("as it is"))
    assert lines(caplog) == [f"Roll.PENDING: {Roll.path}[U]: as it is"]


def test_k27_t08_kwargs_are_log_record_arguments_and_the_callers_extra_is_not_changed(caplog):
    extra = {"order": "A7"}
    try:
        raise ValueError("seen")
    except ValueError:
        Roll().log("with", logging.ERROR, extra=extra, exc_info=True, stack_info=True)
    (logged,) = caplog.records
    assert extra == {"order": "A7"}
    assert logged.order == "A7"
    assert "seen" in str(logged.exc_info[1])
    assert logged.stack_info
    assert logged.funcName == "test_k27_t08_kwargs_are_log_record_arguments_and_the_callers_extra_is_not_changed"


def test_k27_nothing_is_written_below_the_level_in_force(caplog):
    caplog.set_level(logging.WARNING, logger="kser")
    Roll().log("quiet")
    assert caplog.records == []


def test_k28_records_carry_the_message_and_the_result_with_secrets_masked(caplog):
    given = "p4" + "ss"

    class Leaks(Task):
        def run(self):
            raise ValidationError("no", extra={"password": given})

    Leaks(uuid="U", params={"api_key": "s3cret", "order": 7}).execute()
    (failed,) = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert failed.kmsg["uuid"] == "U"
    assert failed.kmsg["entrypoint"] == Leaks.path
    assert failed.kmsg["params"] == {"api_key": "********", "order": 7}
    assert (failed.kresult["retcode"], failed.kresult["stderr"]) == (400, "no")
    assert failed.error["msgid"] == "ERR-04413"
    shown = f"{failed.kmsg} {failed.kresult} {failed.error}"
    assert "s3cret" not in shown
    assert given not in shown


def test_k28_logger_names(caplog):
    registry = OperationRegistry()

    @registry.subscribe
    class Noted(Roll):
        pass

    class Op(Operation):
        def build_tasks(self, **params):
            return [Noted()]

    registry.subscribe(Op)
    Noted().log("x")
    registry.controller.run(Noted().to_Message().dumps())
    Op().execute()
    names = {r.getMessage().split(":")[0]: r.name for r in caplog.records}
    assert names["Noted.Success"] == "kser.entry"
    assert names["Noted.PENDING"] == "kser.sequencing.task"
    assert names["Controller.Success"] == "kser.controller"
    assert names["Op.SetStatus"] == "kser.sequencing.operation"
    assert names["Operation registry"] == "kser.sequencing.registry"


def test_k29_the_lines_of_a_success(caplog):
    Roll(uuid="U").execute()
    at = f"{Roll.path}[U]"
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [
        ("DEBUG", f"Roll.PreRun: {at}"),
        ("DEBUG", f"Roll.Run: {at}"),
        ("DEBUG", f"Roll.PostRun: {at}"),
        ("INFO", f"Roll.Success: {at}: You made a 1"),
    ]


def test_k29_the_lines_of_a_failure(caplog):
    Bad(uuid="U").execute()
    at = f"{Bad.path}[U]"
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [
        ("DEBUG", f"Bad.PreRun: {at}"),
        ("DEBUG", f"Bad.Run: {at}"),
        ("DEBUG", f"Bad.PostRun: {at}"),
        ("ERROR", f"Bad.Failed: {at}: no luck"),
    ]


def test_k30_the_success_line_of_the_example(caplog):
    class DiceRoll(Task):
        __module__ = "__main__"

        def run(self):
            return Result(uuid=self.uuid, stdout="You made a 1")

    DiceRoll(uuid=U).execute()
    assert "DiceRoll.Success: __main__.DiceRoll[872c3be0-51ac-457f-a4d9-12c2f7667b80]: You made a 1" in lines(
        caplog, logging.INFO
    )


# -- status ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("made", "end"), [(Roll, "SUCCESS"), (Bad, "FAILED")])
def test_k31_the_status_moves_as_the_task_runs(made, end):
    seen = []

    class Watched(made):
        def prerun(self):
            seen.append(self.status)

        def run(self):
            seen.append(self.status)
            return super().run()

    task = Watched()
    assert task.status == "PENDING"
    task.execute()
    assert seen == ["RUNNING", "RUNNING"]
    assert task.status == end


def test_k31_a_task_that_is_success_is_not_run_again_and_gives_its_result():
    stored = Result(stdout="stored")
    task = Bad(status="SUCCESS", result=stored)
    assert task.execute(Result(stdout="other")) is stored


def test_k31_a_failed_task_runs_again_when_it_is_executed_again():
    task = Roll(status="FAILED")
    assert (task.execute().stdout, task.status) == ("You made a 1", "SUCCESS")


def test_k32_repr():
    assert repr(Roll(uuid="U", params={"a": 1})) == f"Task [{Roll.path}](uuid=U,status=PENDING, params={{'a': 1}})"
    assert repr(Operation(uuid="O", status="RUNNING")) == "Operation [Operation](id=O,status=RUNNING)"


def test_a_result_whose_retval_is_no_dict_fails_the_task():
    """The wire has an object there (K-41)."""

    class Lists(Task):
        def run(self):
            return Result(retval=[1, 2])

    task = Lists()
    assert not is_success(task.execute())
    assert task.status == "FAILED"


def test_an_internal_error_of_a_wrong_return_value_tells_the_task():
    class Wrong(Task):
        def run(self):
            return 5

    with pytest.raises(InternalError) as caught:
        Wrong(uuid="U").unsafe_execute()
    assert caught.value.extra == {"uuid": "U", "type": "int"}
