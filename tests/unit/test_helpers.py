"""Texts, names, cached properties, dependency graphs, context locals, progress trees: J-60, J-72 to J-78."""

import asyncio
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kser.depgraph import DepLoop, resolve_deps
from kser.errors import ValidationError
from kser.locals import Local, LocalProxy, LocalStack, release_local
from kser.progress import ProgressReport, parse_group
from kser.properties import cached_property
from kser.text import import_object, short_repr, trim_string

# -- texts: J-72, J-73, J-75 -------------------------------------------------------------------------------------------


class Awkward:
    def __repr__(self):
        raise ValueError("no")


@given(st.text(), st.integers(0, 60), st.text(max_size=5))
def test_a_trimmed_text_is_never_longer_than_it_may_be(text, maxlen, ellipsis):
    trimmed = trim_string(text, maxlen, ellipsis)
    assert len(trimmed) <= maxlen
    assert trimmed == text or len(text) > maxlen


@pytest.mark.parametrize(
    ("text", "maxlen", "trimmed"),
    [("hello", 5, "hello"), ("hello!", 5, "he..."), ("hello", 3, "..."), ("hello", 2, ".."), ("hello", 0, "")],
)
def test_what_was_cut_ends_with_an_ellipsis_that_counts(text, maxlen, trimmed):
    assert trim_string(text, maxlen) == trimmed


def test_a_text_is_trimmed_to_1024_characters_unless_said_otherwise():
    assert trim_string("x" * 1024) == "x" * 1024
    assert trim_string("x" * 1025) == "x" * 1021 + "..."
    assert trim_string("abcdef", 4, "~") == "abc~"


def test_a_short_repr_has_50_characters_at_most_and_its_ellipsis_at_the_end():
    assert short_repr("x" * 48) == repr("x" * 48)
    assert short_repr("x" * 49) == "'" + "x" * 46 + "..."
    assert short_repr([1, 2], maxlen=5) == "[1..."
    assert short_repr(Awkward(), maxlen=30) == "<Awkward that cannot be shown>"


def test_an_object_is_imported_by_its_name():
    assert import_object("kser.text:trim_string") is trim_string
    assert import_object("kser.progress:ProgressReport.from_table") == ProgressReport.from_table


@pytest.mark.parametrize("name", ["kser.text", "a:b:c", ":name", "module:", ""])
def test_a_name_without_exactly_one_colon_is_no_name(name):
    with pytest.raises(ValueError, match=r"write package.module:name"):
        import_object(name)


def test_what_is_not_there_cannot_be_imported():
    with pytest.raises(ImportError, match=r"'kser.text:trim_string.missing': .* has no 'missing'"):
        import_object("kser.text:trim_string.missing")
    with pytest.raises(ImportError):
        import_object("kser.no_such:thing")


# -- cached_property: J-76 ---------------------------------------------------------------------------------------------


def test_a_cached_property_is_computed_once_for_each_object():
    calls = []

    class Thing:
        @cached_property
        def answer(self):
            """What it is."""
            calls.append(self)
            return 42

        other = cached_property(lambda self: len(calls), name="whatever", doc="How often.")

    one, two = Thing(), Thing()
    assert (one.answer, one.answer, two.answer) == (42, 42, 42)
    assert calls == [one, two]
    assert (one.other, one.other) == (2, 2)
    assert one.__dict__ == {"answer": 42, "other": 2}
    assert (Thing.answer.__doc__, Thing.other.__doc__) == ("What it is.", "How often.")
    del one.answer
    assert one.answer == 42
    assert len(calls) == 3


def test_a_class_without_a_dict_is_told():
    class Slotted:
        __slots__ = ()

        @cached_property
        def answer(self):
            return 42

    with pytest.raises(TypeError, match=r"Slotted.answer cannot be cached: the class has no __dict__"):
        Slotted().answer  # noqa: B018


# -- dependency graphs: J-77 -------------------------------------------------------------------------------------------


def test_dependencies_come_first_each_once_and_the_start_last():
    graph = {"d": ["b", "c"], "b": ["a"], "c": ["a"], "a": [], "other": ["d"]}
    assert resolve_deps(graph, "d") == ["a", "b", "c", "d"]
    assert resolve_deps(graph, "a") == ["a"]


@pytest.mark.parametrize(
    ("graph", "loop"),
    [
        ({"a": ["a"]}, "a -> a"),
        ({"a": ["b"], "b": ["c"], "c": ["b"]}, "b -> c -> b"),
        ({"a": ["x", "b"], "x": [], "b": ["a"]}, "a -> b -> a"),
    ],
)
def test_a_circle_is_told_from_end_to_end(graph, loop):
    with pytest.raises(DepLoop, match=f"Dependencies in a circle: {loop}$") as caught:
        resolve_deps(graph, "a")
    assert caught.value.extra["loop"] == loop.split(" -> ")


def test_a_missing_vertex_is_told_with_who_needs_it():
    with pytest.raises(ValidationError, match=r"'b' is not in the graph of dependencies, and 'a' depends on it"):
        resolve_deps({"a": ["b"]}, "a")
    with pytest.raises(ValidationError, match=r"'z' is not in the graph of dependencies$"):
        resolve_deps({}, "z")


def test_diamonds_and_long_chains_take_linear_time():
    """T-59: two to the power of 5000 ways, and a chain deeper than Python's stack."""
    graph = {number: [number - 1, number - 1] for number in range(1, 5000)} | {0: []}
    began = time.monotonic()
    assert resolve_deps(graph, 4999) == list(range(5000))
    assert time.monotonic() - began < 2


@given(st.lists(st.lists(st.integers(0, 20), max_size=4), min_size=1, max_size=20))
def test_each_comes_behind_all_that_it_needs(edges):
    graph = {number: [need for need in needs if need < number] for number, needs in enumerate(edges)}
    start = len(edges) - 1
    order = resolve_deps(graph, start)
    assert order[-1] == start
    assert len(set(order)) == len(order)
    for at, vertex in enumerate(order):
        assert set(graph[vertex]) <= set(order[:at])


# -- context locals: J-78 ----------------------------------------------------------------------------------------------


def test_a_released_local_is_empty():
    loc = Local()
    loc.foo = 42
    release_local(loc)
    assert hasattr(loc, "foo") is False


def test_a_stack_gives_its_top_and_none_when_it_is_empty():
    ls = LocalStack()
    ls.push(42)
    assert ls.top == 42
    ls.push(23)
    assert ls.top == 23
    assert ls.pop() == 23
    assert ls.top == 42
    release_local(ls)
    assert ls.top is None
    assert ls.pop() is None


def test_a_proxy_forwards_to_what_is_bound_and_raises_when_nothing_is():
    local, stack = Local(), LocalStack()
    request, user, top = local("request"), LocalProxy(local, "user"), stack()
    session = LocalProxy(lambda: local.request["session"])
    for proxy in (request, user, top):
        with pytest.raises(RuntimeError):
            proxy.upper()
    local.request, local.user = {"session": "s"}, "ann"
    stack.push("top")
    assert (request["session"], user.upper(), top.upper(), session.upper()) == ("s", "ANN", "TOP", "S")


def test_threads_and_asyncio_tasks_see_values_of_their_own():
    local, seen = Local(), []
    local.name = "main"
    thread = threading.Thread(target=lambda: seen.append(hasattr(local, "name")))
    thread.start()
    thread.join()

    async def own(name):
        local.name = name
        await asyncio.sleep(0)
        return local.name

    async def both():
        return await asyncio.gather(own("a"), own("b"))

    assert asyncio.run(both()) == ["a", "b"]
    assert seen == [False]
    assert local.name == "main"


def test_the_module_has_these_four_names_only():
    import kser.locals

    with pytest.raises(AttributeError, match=r"kser.locals.* has no attribute 'LocalManager'"):
        kser.locals.LocalManager  # noqa: B018


# -- progress: J-60, J-74 ----------------------------------------------------------------------------------------------


def test_a_level_without_numbers_of_its_own_sums_its_children():
    tree = ProgressReport("all", children=[ProgressReport("a", 1, 4), ProgressReport("b", 2, 6)])
    assert (tree.current, tree.total) == (3, 10)
    assert (tree.label, tree.percent) == ("3/10 (30%)", 30.0)


def test_numbers_of_its_own_win_over_its_children():
    tree = ProgressReport("all", 5, 10, "half", [ProgressReport("a", 1, 1)])
    assert tree.label == "5/10 (50%)"
    assert tree.status_line == "half"


def test_nothing_to_do_is_0_percent():
    assert ProgressReport("x", 0, 0).percent == 0.0
    assert ProgressReport("x").label == "0/0 (0%)"
    assert ProgressReport.from_table([(None, 999, 1000, "")]).label == "999/1000 (99%)"


def test_rows_make_a_tree_in_any_order():
    rows = [("a::x", 1, 2, "deep"), (("a",), 5, 10, ""), (None, 7, 20, "all"), (["b"], 3, 3, "")]
    tree = ProgressReport.from_table(rows, "build")
    assert (tree.name, tree.label, tree.status_line) == ("build", "7/20 (35%)", "all")
    assert [child.name for child in tree.children] == ["a", "b"]
    assert tree.children[0].label == "5/10 (50%)"
    assert tree.children[0].children == [ProgressReport("x", 1, 2, "deep")]
    data = tree.to_json()
    assert data["children"][0]["children"][0] == {
        "name": "x", "current": 1, "total": 2, "percent": 50.0, "label": "1/2 (50%)", "status_line": "deep",
        "children": [],
    }  # fmt: skip
    assert repr(tree) == "ProgressReport('build', 7/20 (35%), 2 children)"


@pytest.mark.parametrize(
    ("given", "path"),
    [
        (None, ()),
        ("", ()),
        ("a", ("a",)),
        ("a::b", ("a", "b")),
        (("a", "b"), ("a", "b")),
        (["a", "c"], ("a", "c")),
    ],
)
def test_a_group_is_a_path_in_any_form(given, path):
    assert parse_group(given) == path


@pytest.mark.parametrize("given", [5, (1, 2), {"a"}])
def test_what_is_no_path_is_a_type_error(given):
    with pytest.raises(TypeError, match="give a tuple of names, a text like 'a::b', or None"):
        parse_group(given)
