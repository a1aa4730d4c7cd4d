"""Objects of the current context: werkzeug's, loaded when the first of them is asked for.

``Local``, ``LocalStack``, ``LocalProxy`` and ``release_local`` are those of werkzeug.local: threads and asyncio tasks
see values of their own. ``LocalProxy(callable)`` forwards to what the callable gives; a proxy of nothing raises
RuntimeError.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from werkzeug.local import Local, LocalProxy, LocalStack, release_local

__all__ = ["Local", "LocalProxy", "LocalStack", "release_local"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        import werkzeug.local

        return getattr(werkzeug.local, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
