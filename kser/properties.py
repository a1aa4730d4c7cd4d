"""cached_property: computed at the first use, then a plain attribute."""

from collections.abc import Callable
from typing import Any, Generic, Self, TypeVar, overload

__all__ = ["cached_property"]

T = TypeVar("T")


class cached_property(Generic[T]):  # noqa: N801 - used as a decorator, and named by the source document
    """A property that calls ``func`` at its first use and is its result from then on. The class needs a ``__dict__``.

    Assigning to it replaces the result, deleting it has it computed anew. Two threads that use it for the first time
    at once may both compute it; one result is kept.

    Args:
        func: gets the object.
        name: of the attribute; None: the function's.
        doc: docstring; None: the function's.
    """

    def __init__(self, func: Callable[[Any], T], name: str | None = None, doc: str | None = None) -> None:
        self.func = func
        self.__name__ = name or func.__name__
        self.__doc__ = doc or func.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self.__name__ = name

    @overload
    def __get__(self, instance: None, owner: type | None = None) -> Self: ...
    @overload
    def __get__(self, instance: object, owner: type | None = None) -> T: ...
    def __get__(self, instance: object, owner: type | None = None) -> Any:
        if instance is None:
            return self
        try:
            stored = instance.__dict__
        except AttributeError:
            raise TypeError(
                f"{type(instance).__name__}.{self.__name__} cannot be cached: the class has no __dict__ (__slots__?)"
            ) from None
        return stored.setdefault(self.__name__, self.func(instance))
