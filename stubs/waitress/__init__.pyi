from collections.abc import Callable
from typing import Any

class ThreadedTaskDispatcher:
    def shutdown(self, cancel_pending: bool = True, timeout: float = 5) -> bool: ...

class BaseWSGIServer:
    task_dispatcher: ThreadedTaskDispatcher
    active_channels: dict[int, Any]
    def pull_trigger(self) -> None: ...

def create_server(application: Callable[..., Any], map: dict[int, Any] | None = None, **kw: Any) -> BaseWSGIServer: ...
