"""Graphs of dependencies: ``{vertex: [what it depends on]}``."""

from collections.abc import Iterable, Mapping
from typing import Any

from kser.errors import ValidationError

__all__ = ["DepLoop", "resolve_deps"]


class DepLoop(ValidationError):  # noqa: N818 - named by the source document
    """Things depend on each other in a circle; ``extra["loop"]`` has it, the first one again at its end."""


def resolve_deps(graph: Mapping[Any, Iterable[Any]], start: Any) -> list[Any]:
    """All that ``start`` needs, each once and behind what it needs itself, ``start`` last.

    Dependencies come in the order in which they are written. Takes time in proportion to vertices and edges.

    Raises:
        DepLoop: there is a circle; the text has it, ``a -> b -> a``.
        ValidationError: a vertex is missing; the text says which, and who needs it.
    """
    order: list[Any] = []
    done: set[Any] = set()
    #: The way from start to here, and what is still to look at of each vertex on it.
    path: dict[Any, Any] = {start: iter(_needs(graph, start, None))}
    while path:
        vertex, needs = next(reversed(path.items()))
        for need in needs:
            if need in path:
                raise _loop([*path, need])
            if need not in done:
                path[need] = iter(_needs(graph, need, vertex))
                break
        else:
            del path[vertex]
            done.add(vertex)
            order.append(vertex)
    return order


def _needs(graph: Mapping[Any, Iterable[Any]], vertex: Any, needed_by: Any) -> Iterable[Any]:
    if vertex not in graph:
        who = f", and {needed_by!r} depends on it" if needed_by is not None else ""
        raise ValidationError(f"{vertex!r} is not in the graph of dependencies{who}", extra={"vertex": str(vertex)})
    return graph[vertex]


def _loop(path: list[Any]) -> DepLoop:
    loop = [str(vertex) for vertex in path[path.index(path[-1]) :]]
    return DepLoop(f"Dependencies in a circle: {' -> '.join(loop)}", extra={"loop": loop})
