"""Contracts K-04, K-05 and K-70 to K-80, and @registry.task. Traps T-02, T-04, T-06, T-11, T-20."""

import asyncio
import inspect
import json
import logging

import pytest

from kser import (
    ConfigurationError,
    Controller,
    Entrypoint,
    EntrypointNotFoundError,
    Message,
    Operation,
    OperationRegistry,
    Result,
    Task,
    ValidationError,
)
from kser.results import is_success
from tests.unit.fakes import raw
from tests.unit.test_contracts_messages import Reversed

U = "872c3be0-51ac-457f-a4d9-12c2f7667b80"


@pytest.fixture(autouse=True)
def _info(caplog):
    caplog.set_level(logging.INFO, logger="kser")


@pytest.fixture
def registry():
    return OperationRegistry()


def lines(caplog, level=None):
    return [r.getMessage() for r in caplog.records if level is None or r.levelno == level]


class Roll(Task):
    """Succeeds."""

    def run(self):
        return Result(uuid=self.uuid, stdout="You made a 1")


# -- registry --------------------------------------------------------------------------------------------------------


def test_k04_the_registrys_arguments():
    from kser.controller import Controller as DocumentedController
    from kser.sequencing.registry import OperationRegistry as Documented

    parameters = list(inspect.signature(Documented.__init__).parameters.values())[1:]
    assert [(p.name, p.default) for p in parameters][:2] == [("app", None), ("controller_class", DocumentedController)]


def test_k05_controller_has_the_documented_names():
    for name in ("register", "ENTRYPOINTS", "run"):
        assert hasattr(Controller, name)


def test_k70_t02_subscribe_gives_the_class_itself(registry):
    @registry.subscribe
    class DiceRoll(Task):
        def run(self):
            return Result(stdout="rolled")

    @registry.subscribe
    class DiceLaunch(Operation):
        def build_tasks(self, **kwargs):
            return [DiceRoll(), DiceRoll(), DiceRoll()]

    assert isinstance(DiceRoll, type)
    assert len(DiceLaunch().build().tasks) == 3
    assert registry.subscribe(Roll) is Roll
    assert registry.controller.ENTRYPOINTS[DiceRoll.path] is DiceRoll
    assert is_success(DiceLaunch().execute())


def test_k71_subscribing_logs_one_line(registry, caplog):
    class DiceRoll(Task):
        __module__ = "__main__"

    registry.subscribe(DiceRoll)
    registry.subscribe(DiceRoll)
    assert lines(caplog, logging.INFO) == ["Operation registry: loaded __main__.DiceRoll"]


def test_k71_two_classes_cannot_have_one_name(registry):
    registry.subscribe(name="shop.Roll")(type("One", (Roll,), {}))
    other = type("Other", (Roll,), {})
    with pytest.raises(ValidationError, match=r"shop\.Roll is subscribed already"):
        registry.subscribe(name="shop.Roll")(other)
    with pytest.raises(ValidationError, match=r"shop\.Roll is subscribed already"):
        registry.subscribe(aliases=["shop.Roll"])(other)
    assert other.path == f"{__name__}.Other"  # as it was
    assert set(registry.tasks()) == {"shop.Roll"}


def test_k71_a_name_and_aliases_all_lead_to_the_class(registry):
    made = type("Made", (Roll,), {})
    assert registry.subscribe(name="new", aliases=["old", "older"], topic="dice")(made) is made
    assert registry.tasks() == {"new": made, "old": made, "older": made}
    assert (made.path, made.topic, made().home is registry) == ("new", "dice", True)
    for name in ("new", "old", "older"):
        assert registry.controller.run(raw("u", name)).stdout == "You made a 1"


def test_k71_aliases_given_as_one_text_are_refused(registry):
    with pytest.raises(ConfigurationError, match="give a list of names"):
        registry.subscribe(aliases="old")(type("Made", (Roll,), {}))


def test_k72_init_app_keeps_the_app_and_loads_the_tasks():
    from flask import Flask

    app, loaded = Flask("shop"), []

    class Loads(OperationRegistry):
        def load_tasks(self):
            loaded.append(self.app)

    registry = Loads()
    assert (registry.app, loaded) == (None, [])
    registry.init_app(app)
    assert (registry.app, loaded) == (app, [app])
    assert Loads(app=app).app is app
    assert loaded == [app, app]
    assert OperationRegistry().load_tasks() is None


def test_k73_the_controller_is_what_a_consumer_takes(registry):
    registry.subscribe(Roll)
    assert isinstance(registry.controller, Controller)
    assert registry.controller.run(Roll().to_Message().dumps()).stdout == "You made a 1"


@pytest.mark.parametrize("wrong", [5, "Roll", None, Roll(), int, Message, lambda: None])
def test_k74_only_entrypoint_classes_are_registered(registry, wrong):
    with pytest.raises(ValidationError) as caught:
        registry.controller.register("dice", wrong)
    assert caught.value.message == "Invalid type for entry 'dice', MUST implement kser.entry.Entrypoint"
    with pytest.raises(ValidationError, match=r"MUST implement kser\.entry\.Entrypoint"):
        registry.subscribe(wrong) if wrong is not None else registry.subscribe()(wrong)
    assert registry.tasks() == {}


def test_k74_a_bare_entrypoint_may_be_subscribed(registry):
    @registry.subscribe
    class Bare(Entrypoint):
        def run(self):
            return Result(stdout="bare")

    assert registry.controller.run(raw("u", Bare.path)).stdout == "bare"


def test_k78_t11_two_registries_share_nothing():
    one, two = OperationRegistry(), OperationRegistry()
    assert one.controller.ENTRYPOINTS is not two.controller.ENTRYPOINTS
    one.subscribe(Roll)
    assert two.tasks() == {}
    assert Roll.path not in Controller.ENTRYPOINTS


def test_k78_a_controller_class_is_used_with_what_it_has():
    class Mine(Controller):
        pass

    Mine.register("dice", Roll)
    assert "dice" not in Controller.ENTRYPOINTS
    registry = OperationRegistry(controller_class=Mine)
    assert isinstance(registry.controller, Mine)
    assert registry.controller.run(raw("u", "dice")).stdout == "You made a 1"
    registry.subscribe(name="more")(type("More", (Roll,), {}))
    assert "more" not in Mine.ENTRYPOINTS


def test_k78_the_class_attribute_works_for_code_that_uses_the_class(monkeypatch):
    monkeypatch.setattr(Controller, "ENTRYPOINTS", {})
    Controller.register("dice", Roll)
    Controller.ENTRYPOINTS["dice2"] = Roll
    for name in ("dice", "dice2"):
        assert Controller.run(raw("u", name)).stdout == "You made a 1"


# -- controller ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", ["{", "[]", b"\xff", '{"uuid": "u"}', '{"uuid": "u", "entrypoint": 5}', ""])
def test_k75_t20_a_message_that_cannot_be_read(registry, caplog, bad):
    result = registry.controller.run(bad)
    assert (result.retcode, result.stderr) == (400, "Failed to load message")
    assert isinstance(result.uuid, str)
    (logged,) = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert logged.getMessage().startswith("Controller.ImportError: Failed to load data from kafka: ")
    assert logged.name == "kser.controller"


@pytest.mark.parametrize(
    ("bad", "uuid"),
    [
        ('{"uuid": "U"}', "U"),
        ('{"uuid": "U", "entrypoint": ""}', "U"),
        (b'{"uuid": "U", "entrypoint": "e", "params": [1]}', "U"),
        ('{"uuid": "U", "entrypoint": "e", "result": {"retcode": "x"}}', "U"),
        # NaN and long numbers are read by another library.
        ('{"uuid": "U", "entrypoint": 12345678901234567890, "params": NaN}', "U"),
        ('{"uuid": "", "entrypoint": "e"}', None),
        ('{"uuid": ["U"], "entrypoint": "e"}', None),
        ('{"uuid": 5, "entrypoint": "e"}', None),
        ('["U"]', None),
        ("", None),
    ],
)
def test_k37_k80_a_message_that_is_refused_keeps_the_uuid_that_it_names(registry, bad, uuid):
    """Else one of its Results could not be told to belong to it; what names none gets a random one."""
    first, second = registry.controller.run(bad), registry.controller.run(bad)
    assert (first.retcode, second.retcode) == (400, 400)
    assert isinstance(first.uuid, str)
    assert first.uuid
    if uuid is not None:
        assert first.uuid == second.uuid == uuid
    else:
        assert first.uuid != second.uuid


def test_k37_the_uuid_of_a_message_whose_transport_raised_is_kept(registry):
    class Sealed(Message):
        @classmethod
        def loads(cls, data):
            raise OSError("no key")

    registry.controller.TRANSPORT = Sealed
    assert registry.controller.run('{"uuid": "U", "entrypoint": "e"}').uuid == "U"
    assert registry.controller.run(b"\x00sealed").uuid


def test_k75_an_entrypoint_nobody_registered(registry, caplog):
    registry.subscribe(name="known")(type("Known", (Roll,), {}))
    result = registry.controller.run(raw("u", "unknown"))
    assert (result.retcode, result.stderr, result.uuid) == (400, "Entrypoint 'unknown' not registred", "u")
    assert result.retval["error"]["extra"] == {"uuid": "u", "entrypoint": "unknown", "allowed": ["known"]}
    assert "Controller.Failed: unknown[u]: Entrypoint 'unknown' not registred" in lines(caplog, logging.ERROR)
    with pytest.raises(EntrypointNotFoundError):
        registry.controller.lookup(Message("u", "unknown"))


def test_k76_the_lines_after_the_run(registry, caplog):
    class DiceRoll(Roll):
        __module__ = "__main__"

    class DiceBad(Task):
        __module__ = "__main__"

        def run(self):
            raise ValueError("no luck")

    registry.subscribe(DiceRoll)
    registry.subscribe(DiceBad)
    registry.controller.run(raw(U, "__main__.DiceRoll"))
    registry.controller.run(raw(U, "__main__.DiceBad"))
    assert lines(caplog)[2:] == [
        f"DiceRoll.Success: __main__.DiceRoll[{U}]: You made a 1",
        f"Controller.Success: __main__.DiceRoll[{U}]: You made a 1",
        f"DiceBad.Failed: __main__.DiceBad[{U}]: no luck",
        f"Controller.Failed: __main__.DiceBad[{U}]: no luck",
    ]
    failed = caplog.records[-1]
    assert (failed.levelno, failed.kmsg["uuid"], failed.kresult["retcode"]) == (logging.ERROR, U, 500)
    assert failed.error["name"] == "InternalError"


def test_k76_the_name_is_that_of_the_class_in_use(caplog):
    class ShopController(Controller):
        pass

    registry = OperationRegistry(controller_class=ShopController)
    registry.controller.run(raw("u", "none"))
    assert lines(caplog, logging.ERROR) == ["ShopController.Failed: none[u]: Entrypoint 'none' not registred"]


def test_k77_the_hooks_and_what_they_give():
    seen = []

    class Hooked(Controller):
        @classmethod
        def onmessage(cls, kmsg):
            seen.append(("onmessage", kmsg.uuid))
            kmsg.params["added"] = True
            return super().onmessage(kmsg)

        @classmethod
        def onsuccess(cls, kmsg, result):
            seen.append(("onsuccess", kmsg.uuid, result.stdout))
            return Result(uuid=kmsg.uuid, stdout="changed")

        @classmethod
        def onerror(cls, kmsg, result):
            seen.append(("onerror", kmsg.uuid, result.retcode))
            return super().onerror(kmsg, result)

    registry = OperationRegistry(controller_class=Hooked)

    @registry.subscribe
    class Echo(Task):
        def run(self):
            return Result(stdout=str(self.params))

    assert registry.controller.run(raw("u", Echo.path)).stdout == "changed"
    assert registry.controller.run(raw("v", "none")).retcode == 400
    assert seen == [
        ("onmessage", "u"), ("onsuccess", "u", "{'added': True}"),
        ("onmessage", "v"), ("onerror", "v", 400),
    ]  # fmt: skip
    kmsg, result = Message("u", "e"), Result()
    assert Controller.onmessage(kmsg) is kmsg
    assert Controller.onsuccess(kmsg, result) is result
    assert Controller.onerror(kmsg, result) is result


@pytest.mark.parametrize("hook", ["onmessage", "onsuccess", "onerror"])
@pytest.mark.parametrize("what", ["raises", "gives nonsense"])
def test_k79_a_hook_that_fails_changes_nothing_and_is_logged(hook, what, caplog):
    def broken(cls, *args):
        if what == "raises":
            raise ValueError("hook broke")
        return "nonsense"

    made = type("Controller", (Controller,), {hook: classmethod(broken)})
    registry = OperationRegistry(controller_class=made)
    registry.subscribe(Roll)

    @registry.subscribe
    class Bad(Task):
        def run(self):
            raise KeyError("first")

    assert registry.controller.run(raw("u", Roll.path)).stdout == "You made a 1"
    assert registry.controller.run(raw("u", Bad.path)).stderr == "'first'"
    logged = [r for r in caplog.records if r.exc_info]
    assert bool(logged) is (what == "raises")
    for one in logged:
        assert "hook broke" in str(one.exc_info[1])
        assert f"Controller.{hook}() raised for" in one.getMessage()


@pytest.mark.parametrize("signal", [SystemExit, KeyboardInterrupt])
def test_k79_t04_what_ends_the_process_propagates_as_itself(registry, signal):
    @registry.subscribe
    class Ends(Task):
        def run(self):
            raise signal(3)

    with pytest.raises(signal):
        registry.controller.run(raw("u", Ends.path))


def deep(depth, value=1):
    for _ in range(depth):
        value = {"a": value}
    return value


@pytest.mark.parametrize(
    "poison",
    [
        "", "{", "null", "[]", "5", b"\xff\xfe", b"\x00", None, 5, 10**12, object(), [], {},
        b"[" * 1000 + b"]" * 1000, b"[" * 200_000, '{"a":' * 1000 + "1" + "}" * 1000,
        raw("u", "unknown", params=deep(450)), raw("u", "roll", params=deep(450)), raw("\ud800", "\ud800"),
        raw("u", "roll", metadata={"kser": 5}), raw("u", "operation", metadata={"kser": {"v": 1, "tasks": [5]}}),
        raw("u", "roll", result={"retcode": 10**30, "retval": {"n": 2**90}}),
        raw("u", "operation", metadata={"kser": {"v": 99}}), raw("u", "raises"),
    ],
)  # fmt: skip
def test_k80_run_gives_a_result_for_every_input(registry, poison, caplog):
    caplog.set_level(logging.DEBUG, logger="kser")
    registry.subscribe(name="roll")(type("Dice", (Roll,), {}))
    registry.subscribe(name="operation")(type("Op", (Operation,), {}))

    @registry.subscribe(name="raises")
    class Raises(Task):
        def __init__(self, **kwargs):
            raise ValueError("in the constructor")

    result = registry.controller.run(poison)
    assert isinstance(result, Result)
    assert isinstance(result.uuid, str)


def test_k80_a_transport_that_raises_anything_gives_a_failed_result():
    class Odd(Exception):
        extra = None

    class Locked(Message):
        @classmethod
        def loads(cls, json_data):
            raise Odd("no key")

    made = type("Locks", (Controller,), {"TRANSPORT": Locked})
    result = OperationRegistry(controller_class=made).controller.run(b"x")
    assert (result.retcode, result.stderr) == (500, "no key")


def test_k80_a_poison_message_can_be_told_from_a_failed_one(registry):
    """The error of what is no message has no uuid of a message, and is a ValidationError of loading."""
    registry.subscribe(name="bad")(type("Bad", (Task,), {"run": lambda self: 1 / 0}))
    poison, failed = registry.controller.run("{"), registry.controller.run(raw("u", "bad"))
    assert poison.retval["error"]["message"] == "Failed to load message"
    assert (failed.uuid, failed.retval["error"]["extra"]["type"]) == ("u", "ZeroDivisionError")


def test_what_looks_secret_is_masked_in_the_line_of_a_message_that_cannot_be_read(registry, caplog):
    registry.controller.run(json.dumps({"uuid": "u", "params": {"password": "hunter2"}}))
    (logged,) = caplog.records
    assert "hunter2" not in logged.getMessage() + logged.kafka_raw_data
    assert "********" in logged.kafka_raw_data


def test_the_line_of_a_large_message_that_cannot_be_read_is_short(registry, caplog):
    registry.controller.run("x" * 1_000_000)
    (logged,) = caplog.records
    assert len(logged.kafka_raw_data) < 3000
    assert "(1000000 characters)" in logged.kafka_raw_data


# -- TRANSPORT (K-102) -----------------------------------------------------------------------------------------------


def test_k102_transport_decides_how_messages_are_read():
    made = type("Secret", (Controller,), {"TRANSPORT": Reversed})
    registry = OperationRegistry(controller_class=made)
    registry.subscribe(Roll)
    assert registry.controller.run(Roll().to_Message().dumps()[::-1]).stdout == "You made a 1"
    assert registry.controller.run(Roll().to_Message().dumps()).retcode == 400


# -- @registry.task --------------------------------------------------------------------------------------------------


def execute(registry, task_class, **params):
    return registry.controller.run(raw("u", task_class.path, params=params))


def test_a_function_becomes_a_task_class_that_keeps_its_name_and_text(registry, caplog):
    @registry.task
    def charge(order, amount=1):
        """Charge an order."""
        return {"order": order, "amount": amount}

    assert issubclass(charge, Task)
    assert (charge.__name__, charge.__doc__, charge.path) == ("charge", "Charge an order.", f"{__name__}.charge")
    assert charge.REQUIRED_FIELDS == ("order",)
    assert charge.function("A", 2) == {"order": "A", "amount": 2}
    assert lines(caplog) == [f"Operation registry: loaded {__name__}.charge"]
    assert execute(registry, charge, order="A7").retval == {"order": "A7", "amount": 1}
    assert execute(registry, charge, order="A7", amount=5, other="ignored").retval == {"order": "A7", "amount": 5}
    assert execute(registry, charge).stderr == "Missing parameter: order"
    assert charge(params={"order": "x"}).execute().retval["order"] == "x"


def test_what_a_function_returns(registry):
    result = Result(stdout="own", retval={"x": 1})
    for value, wanted in (
        (None, {}),
        ({"a": 1}, {"a": 1}),
        (5, {"value": 5}),
        ([1], {"value": [1]}),
        (result, {"x": 1}),
    ):

        @registry.task(name=f"returns {value!r}")
        def give(value=value):
            return value

        given = execute(registry, give)
        assert (given.retcode, given.retval) == (0, wanted)
        if value is result:
            assert given.stdout == "own"


def test_a_function_that_returns_none_forwards_what_came(registry):
    @registry.task
    def quiet():
        pass

    kmsg = raw("u", quiet.path, result={"stdout": "so far", "retval": {"x": 1}})
    assert registry.controller.run(kmsg).retval == {"x": 1}


def test_a_function_that_raises_fails_its_task(registry):
    @registry.task
    def fails():
        raise ValueError("no")

    assert execute(registry, fails).stderr == "no"


def test_an_async_function_is_awaited(registry):
    @registry.task(name="waits", aliases=["old"], topic="slow")
    async def waits(n, *, factor=2):
        await asyncio.sleep(0)
        return n * factor

    assert execute(registry, waits, n=3).retval == {"value": 6}
    assert execute(registry, waits, n=3, factor=3).retval == {"value": 9}
    assert (waits.path, waits.topic) == ("waits", "slow")
    assert set(registry.tasks()) == {"waits", "old"}


def test_a_function_with_keywords_takes_all_params(registry):
    @registry.task
    def takes(first, **others):
        return {"first": first, "others": others}

    assert takes.REQUIRED_FIELDS == ("first",)
    assert execute(registry, takes, first=1, self=2, task=3).retval == {"first": 1, "others": {"self": 2, "task": 3}}


def test_a_function_that_cannot_be_called_by_names_is_refused(registry):
    def positional(a, /, b):
        return None

    with pytest.raises(ConfigurationError, match=r"positional\(\) cannot be a task: a can only be given by position"):
        registry.task(positional)
    assert registry.tasks() == {}


@pytest.mark.parametrize("wrong", [5, None, Roll])
def test_what_is_no_function_is_refused(registry, wrong):
    with pytest.raises((ConfigurationError, ValidationError)):
        registry.task()(wrong)
    assert registry.tasks() == {}


def test_a_function_may_be_a_step_of_an_operation(registry):
    @registry.task
    def one():
        return {"one": 1}

    @registry.task
    def two():
        return {"two": 2}

    assert Operation(tasks=[one(), two()]).execute().retval == {"one": 1, "two": 2}


@pytest.mark.parametrize("with_app", [True, False])
def test_k81_k82_k92_t23_the_documented_consumer_with_and_without_a_flask_app(with_app, caplog):
    """The program of the document on the in-memory driver: REGISTRY is set on the instance, run() blocks."""
    from flask import Flask

    from kser.dummy.consumer import Consumer
    from kser.dummy.producer import Producer

    oregistry = OperationRegistry()

    @oregistry.subscribe(name=f"dice with app {with_app}")
    class DiceRoll(Task):
        def run(self):
            return Result(uuid=self.uuid, stdout="You made a 1")

    if with_app:
        oregistry.init_app(Flask("dice"))
    config = {"bootstrap_servers": f"documented {with_app}", "group_id": "dice"}
    assert Consumer.REGISTRY is Controller
    consumer = Consumer(config, ["dice"])
    consumer.REGISTRY = oregistry.controller
    caplog.clear()
    assert Producer(config).send("dice", Message(uuid=U, entrypoint=DiceRoll.path)).retcode == 0
    consumer.run(until_idle=True)
    at = f"{DiceRoll.path}[{U}]"
    wanted = [
        f"Producer.Success: {at}: Message {at} sent in dice",
        "Consumer.Starting...",
        f"DiceRoll.Success: {at}: You made a 1",
        f"Controller.Success: {at}: You made a 1",
    ]
    assert [line for line in lines(caplog, logging.INFO) if line in wanted] == wanted
