"""What a failed Result says does not show what a variable with a secret name holds, however it came into the text."""

import functools
import json
import logging
import time
from types import SimpleNamespace
from typing import NamedTuple

import pytest

from kser import Message, Operation, OperationRegistry, Result, Task, results
from kser.errors import Error
from kser.masking import MASK
from kser.tracebacks import TracebackInfo, hide, secret_values
from kser.transport import Record
from kser.worker.runner import Runner

VALUE = "9xZ"[::-1] + '-qqTop"Secret'  # the code around a frame is shown, and this is it


def failed(function):
    try:
        function()
    except BaseException as exc:
        return exc
    raise AssertionError("it raised nothing")


def local():
    password = VALUE
    raise RuntimeError(f"cannot log in as joe with {password}")


def caused():
    try:
        local()
    except RuntimeError as exc:
        raise Error(f"gave up: {exc}", extra={"tried": [str(exc)]}) from exc


def in_a_dict():
    config = {"user": "joe", "api_token": VALUE}
    raise RuntimeError(f"config {list(config.values())[1]} was refused")


def nested():
    secrets = {"db": {"deep": [VALUE]}}
    raise RuntimeError(f"{secrets['db']['deep'][0]} was refused")


def two_levels_down():
    conf = {"db": [{"password": VALUE}], "port": 1}
    raise RuntimeError(f"{conf['db'][0]['password']} was refused")


def in_a_group():
    raise ExceptionGroup("both were refused", [failed(local), failed(in_a_dict)])


def as_repr():
    password = f"{VALUE}'\n"
    raise RuntimeError(f"{password!r} was refused")


class Client:
    def __init__(self):
        self.password = VALUE

    def call(self):
        raise RuntimeError(f"{self.password} was refused")


class OfTask(Client):
    def __init__(self):
        self.params = {"password": VALUE}

    def call(self):
        raise RuntimeError(f"{self.params['password']} was refused")


def in_bytes():
    token = VALUE.encode()
    raise RuntimeError(f"{token!r} and {token.decode()} were refused")


def in_an_object():
    client = Client()
    raise RuntimeError(f"{client.password} was refused")


class Slotted:
    __slots__ = ("password", "unset")

    def __init__(self):
        self.password = VALUE


class Settings(NamedTuple):
    user: str
    password: str


class Parameters(dict):
    """With a name of its own, as a library's may be."""


def in_slots_of_an_attribute():
    owner = SimpleNamespace(pool=SimpleNamespace(client=Slotted()))
    raise RuntimeError(f"{owner.pool.client.password} was refused")


def in_fields():
    settings = [Settings("joe", VALUE)]
    raise RuntimeError(f"{settings[0].password} was refused")


def in_a_kind_of_dict():
    kmsg = Message("u", "leak", Parameters(password=VALUE))
    raise RuntimeError(f"{kmsg.params['password']} was refused")


def in_arguments():
    call = functools.partial(print, password=VALUE)
    raise RuntimeError(f"{call.keywords['password']} was refused")


def in_an_object_that_is_secret():
    password = SimpleNamespace(_secret_value=VALUE)
    raise RuntimeError(f"{password._secret_value} was refused")


def at_the_end_of_a_deep_recursion(depth=200):
    client = Client() if not depth else None
    if client is not None:
        client.call()
    at_the_end_of_a_deep_recursion(depth - 1)


FUNCTIONS = [
    local, caused, in_a_dict, nested, two_levels_down, in_a_group, as_repr, Client().call, OfTask().call, in_bytes,
    in_an_object, in_slots_of_an_attribute, in_fields, in_a_kind_of_dict, in_arguments, in_an_object_that_is_secret,
    at_the_end_of_a_deep_recursion,
]  # fmt: skip


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__qualname__)
def test_it_is_in_no_part_of_the_result(function):
    exc = failed(function)
    result = results.from_exception(exc, "u")
    text = json.dumps(results.dump(result), ensure_ascii=False).replace("\\", "")
    assert "Zx9" not in text
    assert "********" in text
    assert "refused" in result.stderr or "joe" in result.stderr
    assert "Zx9" not in TracebackInfo.from_exception(exc).format()


def test_short_values_and_what_is_only_called_key_stay():
    def short():
        password, key = "joe", "customers"
        raise RuntimeError(f"{password} of {key}")

    assert results.from_exception(failed(short), "u").stderr == "joe of customers"


def test_objects_that_cannot_be_looked_into_do_no_harm():
    class Closed:
        __slots__ = ()

        def call(self):
            password = VALUE  # noqa: F841 - it is looked for
            raise RuntimeError("no")

    class Breaks:
        @property
        def __dict__(self):
            raise ValueError("no")

        def call(self):
            raise RuntimeError("no")

    assert results.from_exception(failed(Closed().call), "u").stderr == "no"
    assert secret_values(failed(Breaks().call)) == []


def test_nothing_of_an_object_is_called():
    called = []

    class Meta(type):
        @property
        def __mro__(cls):
            called.append("mro")

        def __instancecheck__(cls, instance):
            called.append("instancecheck")

    class Watched(metaclass=Meta):
        def __getattribute__(self, name):
            called.append(name)
            return super().__getattribute__(name)

        def __getattr__(self, name):
            called.append(name)

        @property
        def secret(self):
            called.append("secret")

        def __iter__(self):
            called.append("iter")

        def __eq__(self, other):
            called.append("eq")

        __hash__ = None

    class Listed(list):
        def __iter__(self):
            called.append("iter")

        def __len__(self):
            called.append("len")

    class Mapped(dict):
        def items(self):
            called.append("items")

        def __getattribute__(self, name):
            called.append(name)

    def look():
        found = [Watched(), Listed([{"password": VALUE}]), Mapped(token="in-a-mapping")]
        vars(found[0])["password"] = "in-an-object"
        called.clear()
        raise RuntimeError("no")

    assert set(secret_values(failed(look))) >= {"in-an-object", "in-a-mapping", VALUE}
    assert called == []


def test_numbers_with_secret_names_are_hidden_from_six_digits_on():
    def look():
        token, pin, count = 12345678, 1234, 87654321
        raise RuntimeError(f"no {token} {pin} {count}")

    assert secret_values(failed(look)) == ["12345678"]
    assert results.from_exception(failed(look), "u").stderr == f"no {MASK} 1234 87654321"


def test_what_has_no_end_is_not_looked_at_for_ever():
    def endless():
        rows = [{f"n{n}": SimpleNamespace(b=[SimpleNamespace(c=n)] * 99) for n in range(99)} for _ in range(99)]
        rows.append(rows)
        near = SimpleNamespace(password=VALUE)
        raise RuntimeError(f"no {near}")

    exc = failed(endless)
    began = time.perf_counter()
    assert VALUE in secret_values(exc)
    assert time.perf_counter() - began < 1


def test_longest_first_so_that_none_is_left_in_parts():
    assert hide({"a": ["secret-value and secret"]}, ["secret-value", "secret"]) == {"a": ["******** and ********"]}


@pytest.mark.parametrize("events", [True, False])
def test_nothing_that_a_worker_sends_for_a_failure_has_it(events):
    registry = OperationRegistry(topic="tasks")

    @registry.subscribe(name="leak")
    class Leak(Task):
        def run(self):
            local()

    outcome = Runner(registry.controller, "g", "w", events=events, dead_letters=True).run(
        Record("tasks", 0, 0, None, Message("u", "leak", {}, Result(uuid="u")).to_bytes(), (), 1)
    )
    assert outcome.kind == "failed"
    assert any(record.topic == "g.dlq" for record in outcome.records)
    sent = b"".join(part or b"" for r in outcome.records for part in (r.value, *(value for _, value in r.headers)))
    assert b"Zx9" not in sent


class Hooked(Task):
    """Fails, and then each of its hooks does."""

    def run(self):
        raise ValueError("it fails")

    def postrun(self, result):
        local()

    def onerror(self, result):
        raise RuntimeError(f"cannot tell joe with {self.params['password']}")


class Leaks(Message):
    """Cannot be read."""

    @classmethod
    def loads(cls, raw):
        local()


def rejected(registry, raw):
    registry.controller.TRANSPORT = Leaks
    return registry.controller.run(raw)


def of_controller(registry, raw):
    @classmethod
    def onmessage(cls, kmsg):
        raise RuntimeError(f"cannot take joe's {kmsg.params['password']}")

    registry.controller.onmessage = onmessage
    return registry.controller.run(raw)


def of_operation(registry, raw):
    class Order(Operation):
        def build_tasks(self, **params):
            return [Hooked(params=params)]

        def set_status(self, status, result=None):
            local()

    registry.controller.ENTRYPOINTS["leak"] = Order
    return registry.controller.run(raw)


def on_a_worker(registry, raw):
    class Exits(Hooked):
        def onerror(self, result):
            password = self.params["password"]
            raise SystemExit(f"joe with {password}")

    registry.controller.ENTRYPOINTS["leak"] = Exits
    return Runner(registry.controller, "g", "w").run(Record("tasks", 0, 0, None, raw, (), 1))


def of_task(registry, raw):
    return registry.controller.run(raw)


@pytest.mark.parametrize("run", [of_task, on_a_worker, rejected, of_controller, of_operation], ids=lambda f: f.__name__)
def test_no_log_line_of_a_hook_that_raises_has_it(run, caplog):
    registry = OperationRegistry(topic="tasks")
    registry.subscribe(name="leak")(Hooked)
    run(registry, Message("u", "leak", {"password": VALUE}, Result(uuid="u")).to_bytes())
    formatter = logging.Formatter()
    text = "\n".join(formatter.format(record) for record in caplog.records)
    assert "Zx9" not in text
    assert "joe with ********" in text or "joe's ********" in text


def test_a_hook_that_raises_without_secrets_is_logged_with_the_exception(caplog):
    class Fails(Task):
        def run(self):
            raise ValueError("it fails")

        def onerror(self, result):
            raise RuntimeError("and it cannot be told")

    Fails().execute()
    (raised,) = [record for record in caplog.records if record.exc_info]
    assert (str(raised.exc_info[1]), raised.funcName) == ("and it cannot be told", "_finish")
