"""Isolated tasks without a process: where a registry is, what a pool refuses, how the two sides talk."""

import importlib
import logging
import socket
import sys
import textwrap
import types
import uuid
from pathlib import Path

import pytest

from kser import ConfigurationError, Controller, OperationRegistry, Task
from kser.context import Control
from kser.loading import (
    absolute,
    answer_to,
    guard,
    load,
    load_controller,
    location_of,
    needs_of,
    stand_in_for_main,
    stop_at_guard,
)
from kser.worker.child import ABORT, BEAT, Channel, _Child, _Control, _Forwarding, pack
from kser.worker.pool import IsolatedPool
from tests.apps import isolated


@pytest.fixture
def module(tmp_path, monkeypatch):
    """``module(text, name)`` is a module of that text, imported; gone again after the test."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)

    def make(text: str, name: str | None = None) -> types.ModuleType:
        name = name or f"mod_{uuid.uuid4().hex[:8]}"
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(text))
        importlib.invalidate_caches()
        return importlib.import_module(name)

    yield make
    for name in set(sys.modules) - before:
        del sys.modules[name]


@pytest.fixture
def script(module, monkeypatch):
    """Like ``module``, but it is ``__main__`` as after ``python FILE``."""

    def make(text: str) -> types.ModuleType:
        made = module("")
        path = Path(made.__file__)
        path.write_text(textwrap.dedent(text))
        del sys.modules[made.__name__]
        main = types.ModuleType("__main__")
        main.__file__ = str(path)
        monkeypatch.setitem(sys.modules, "__main__", main)
        exec(compile(path.read_text(), str(path), "exec"), vars(main))
        return main

    return make


REGISTRY = """
    from kser import OperationRegistry, Task
    registry = OperationRegistry()
    @registry.subscribe
    class One(Task): pass
"""


# -- the place of a registry -----------------------------------------------------------------------------------------


def test_a_registry_is_found_where_a_module_has_it():
    assert location_of(isolated.registry) == "tests.apps.isolated:registry"
    assert load_controller("tests.apps.isolated:registry") is isolated.registry.controller


def test_a_controller_is_found_by_its_registry_and_by_itself(module):
    assert location_of(isolated.registry.controller) == "tests.apps.isolated:registry"
    made = module("from kser import Controller\nclass Shop(Controller): pass\nshop = Shop()")
    assert location_of(made.Shop) == f"{made.__name__}:Shop"
    assert location_of(made.shop) == f"{made.__name__}:shop"
    assert load_controller(f"{made.__name__}:Shop") is made.Shop


def test_of_several_modules_the_one_that_defines_the_classes_is_taken(module):
    base = module("from kser import OperationRegistry\nregistry = OperationRegistry()")
    tasks = module(
        f"from kser import Task\nfrom {base.__name__} import registry\n@registry.subscribe\nclass One(Task): pass",
        f"z{base.__name__}",
    )
    user = module(f"from {base.__name__} import registry as mine", f"a{base.__name__}")
    assert location_of(user.mine) == f"{tasks.__name__}:registry"


def test_a_script_is_named_by_its_file_when_it_defines_classes(script, module):
    base = module("from kser import OperationRegistry\nregistry = OperationRegistry()")
    main = script(f"""
        from kser import Task
        from {base.__name__} import registry
        @registry.subscribe
        class One(Task): pass
    """)
    assert location_of(main.registry) == f"{main.__file__}:registry"
    assert needs_of(location_of(main.registry))[:2] == ([], main.__file__)


def test_a_script_that_only_uses_a_registry_is_not_loaded_again(script, module):
    base = module(REGISTRY)
    main = script(f"from {base.__name__} import registry")
    assert location_of(main.registry) == f"{base.__name__}:registry"
    assert needs_of(location_of(main.registry))[:2] == ([], None)


def test_a_module_of_the_command_line_is_named_as_it_was_said(script):
    main = script(REGISTRY)
    main.__spec__ = importlib.machinery.ModuleSpec("shop.worker", None)
    assert location_of(main.registry) == "shop.worker:registry"
    assert needs_of("shop.worker:registry")[:2] == ([], "shop.worker")


def test_the_other_modules_that_define_classes_are_named_the_script_among_them(script, module):
    base = module("from kser import OperationRegistry\nregistry = OperationRegistry()")
    more = module(f"from kser import Task\nimport {base.__name__} as b\n@b.registry.subscribe\nclass One(Task): pass")
    main = script(f"from kser import Task\nimport {base.__name__} as b\n@b.registry.subscribe\nclass Two(Task): pass")
    location = location_of(base.registry)
    assert location == f"{base.__name__}:registry"
    assert needs_of(location)[:2] == ([more.__name__, main.__file__], main.__file__)


def test_what_is_not_loaded_here_needs_nothing_more():
    assert needs_of("no.such.module:registry") == ([], None, {})
    assert needs_of("no/such/file.py:registry") == ([], None, {})
    assert needs_of("tests.apps.isolated:nothing") == ([], None, {})


def test_all_names_of_the_classes_are_named_and_can_be_given_to_those_of_another_process(module):
    made = module(REGISTRY)
    stem = made.__name__
    load(f"{made.__file__}:registry").controller.register("uno", made.One)
    names = needs_of(location_of(made.registry)).names
    assert names == {f"{stem}.One": f"{stem}.One", "__main__.One": f"{stem}.One", "uno": f"{stem}.One"}
    other = OperationRegistry()
    other.subscribe(made.One)
    answer_to(other.controller, {**names, "nobody": "no.such.Class"})
    assert set(other.tasks()) == set(names)


def test_a_registry_that_no_module_has_is_refused_with_what_to_do():
    with pytest.raises(ConfigurationError, match=r"registry = OperationRegistry\(\)$"):
        location_of(OperationRegistry())
    with pytest.raises(ConfigurationError, match=r"No module has this controller .* controller = Shop\(\)$"):
        location_of(type("Shop", (Controller,), {}))


def test_a_registry_of_a_module_made_by_hand_or_of_a_session_is_refused(monkeypatch, script):
    registry = OperationRegistry()
    made = types.ModuleType("made_by_hand")
    made.registry = registry
    monkeypatch.setitem(sys.modules, "made_by_hand", made)
    with pytest.raises(ConfigurationError, match="No module has this registry"):
        location_of(registry)
    main = script(REGISTRY)
    del main.__file__
    with pytest.raises(ConfigurationError, match=r"of an interactive session.* put it into a file$"):
        location_of(main.registry)


def test_a_file_gets_its_full_path_and_a_module_stays(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert absolute("app.py:registry") == f"{tmp_path.resolve()}/app.py:registry"
    assert absolute("app.py") == f"{tmp_path.resolve()}/app.py"
    assert absolute("shop.tasks:registry") == "shop.tasks:registry"


def test_the_classes_of_a_stand_in_are_called_as_those_of_the_script(module, monkeypatch):
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
    made = module(f"{REGISTRY}\n    @registry.subscribe(name='two')\n    class Two(Task): pass\n")
    assert made.One.path == f"{made.__name__}.One"
    stand_in_for_main(made.__file__, made.registry.controller)
    assert made.One.path == "__main__.One"
    assert made.Two.path == "two"
    assert sys.modules["__main__"] is made
    assert made.registry.controller.find("__main__.One") is made.One


def test_what_is_neither_registry_nor_controller_is_refused(module):
    made = module("x = 1")
    with pytest.raises(ConfigurationError, match="is a int: name an OperationRegistry or a Controller"):
        load_controller(f"{made.__name__}:x")


def test_a_guard_does_nothing_but_in_a_child_that_loads():
    guard()

    def instead():
        raise KeyError("served")

    stop_at_guard(instead)
    try:
        with pytest.raises(KeyError, match="served"):
            guard()
    finally:
        stop_at_guard(None)
    guard()


# -- the pool --------------------------------------------------------------------------------------------------------


def pool(**settings):
    arguments = {"location": "shop:registry", "size": 1, "settings": {"group": "g", "worker": "w", "limit": 1000}}
    return IsolatedPool(**arguments | settings)


def test_a_pool_refuses_what_cannot_be(monkeypatch):
    with pytest.raises(ConfigurationError, match="size=0"):
        pool(size=0)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", "")
        with pytest.raises(ConfigurationError, match=r"sys\.executable"):
            pool()


def test_a_pool_starts_no_process_before_it_has_something_to_do():
    with pool() as made:
        assert made.pids() == []


# -- the two sides ---------------------------------------------------------------------------------------------------


@pytest.fixture
def channels():
    one, other = socket.socketpair()
    with one, other:
        yield Channel(one), Channel(other)


def test_values_arrive_whole_and_in_order_however_they_are_cut(channels):
    one, other = channels
    values = [("a", 1, None), ("b", b"\x00" * 50_000, [("h", b"")]), {"c": "\ud800é"}]
    data = b"".join(map(pack, values))
    found = []
    for start in range(0, len(data), 1013):
        one._sock.sendall(data[start : start + 1013])
        while (value := other.arrived()) is not None:
            found.append(value)
    assert found == values
    assert other.arrived() is None


def test_the_end_of_a_channel_is_told_after_what_came_before(channels):
    one, other = channels
    one.send((1,))
    one.close()
    assert other.arrived() == (1,)
    for receive in (other.arrived, other.receive):
        with pytest.raises(EOFError):
            receive()


def test_what_does_not_fit_at_once_is_given_back(channels):
    one, other = channels
    frame = memoryview(pack("x" * 3_000_000))
    rest = frame
    received = None
    while rest or received is None:
        before = len(rest)
        rest = one.offer(rest)
        assert before == len(frame) or len(rest) < before or not rest
        received = other.arrived()
    assert received == "x" * 3_000_000


def child(channels):
    return _Child(channels[0], channels[1], {})


@pytest.mark.parametrize("first", ["the abort", "the record"])
def test_an_abort_reaches_its_record_whichever_comes_first(channels, first):
    made, control = child(channels), _Control(1, 7, channels[0])
    if first == "the abort":
        made._aborted = 7, "lost"
        made._running = 7, control
    else:
        made._running = 7, control
        made._aborted = 7, "lost"
    made._tell(made._running)
    assert control.aborted == "lost"


def test_an_abort_that_comes_too_late_does_not_reach_the_next_record(channels):
    made, control = child(channels), _Control(1, 8, channels[0])
    made._aborted = 7, "lost"
    made._running = 8, control
    made._tell(made._running)
    made._tell(None)
    assert control.aborted is None


def test_an_abort_ends_the_coroutine_that_runs(channels):
    made, control, cancelled = child(channels), _Control(1, 7, channels[0]), []
    control.cancel = lambda: cancelled.append(True)
    made._aborted = 7, "stopping"
    made._tell((7, control))
    assert cancelled == [True]


def test_heartbeats_in_a_tight_loop_are_told_once(channels):
    control = _Control(3, 7, channels[0])
    for _ in range(1000):
        control.beat()
    assert channels[1].arrived() == (BEAT, 7)
    assert isinstance(control, Control)
    assert (control.attempt, control.alive > 0) == (3, True)
    assert ABORT != BEAT


def forwarded(channel):
    log = logging.Logger("somewhere")  # noqa: LOG001 - one that no other test meets
    log.addHandler(_Forwarding(channel))
    return log


def test_a_log_line_travels_with_its_fields_and_what_is_no_plain_value_as_text(channels):
    one, other = channels
    log = forwarded(one)
    log.warning("%s of %d", "one", 2, extra={"order": {"id": 7}, "where": Path("a/b")})
    fields = other.arrived()
    assert (fields["msg"], fields["args"], fields["name"], fields["levelname"]) == (
        "one of 2",
        None,
        "somewhere",
        "WARNING",
    )
    assert (fields["order"], fields["where"]) == ({"id": 7}, repr(Path("a/b")))


def test_a_log_line_of_a_child_whose_parent_is_gone_breaks_nothing(channels):
    one, other = channels
    other.close()
    log = forwarded(one)
    log.warning("nobody hears this")


def test_every_task_of_the_test_application_is_isolated():
    assert all(cls.isolate for cls in isolated.registry.tasks().values() if issubclass(cls, Task))
