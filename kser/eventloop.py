"""The one event loop that ``async def run`` of every task of this process shares, in a thread of its own."""

import asyncio
import os
import threading
from collections.abc import Coroutine
from typing import Any

from kser import context

__all__ = ["run"]

_THREAD = "kser-event-loop"
_lock = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None
_pid: int | None = None


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """What ``coroutine`` returns; what it raises is raised here.

    May be called from any thread but the loop's own. The caller's context variables hold inside. Connections a task
    keeps (HTTP sessions, database pools) may be shared by later tasks, because the loop stays the same. On a worker the
    coroutine is cancelled when the task is over its timeout; concurrent.futures.CancelledError is raised then.
    """
    if threading.current_thread().name == _THREAD:
        coroutine.close()
        raise RuntimeError(
            "A task was executed from inside the code of an async task: await its coroutine instead of execute()"
        )
    future = asyncio.run_coroutine_threadsafe(_guarded(coroutine), _running_loop())
    control = context.current_control()
    if control is not None:
        control.cancel = future.cancel  # a coroutine, unlike a thread, can be ended at its next await
        if control.aborted is not None:
            future.cancel()
    try:
        outcome, error = future.result()
    finally:
        if control is not None:
            control.cancel = None
    if error is not None:
        raise error
    return outcome


async def _guarded(coroutine: Coroutine[Any, Any, Any]) -> tuple[Any, BaseException | None]:
    # SystemExit or KeyboardInterrupt would end the loop's thread, and with it every other task.
    try:
        return await coroutine, None
    except BaseException as exc:  # noqa: BLE001 - raised again by run(), in the thread it belongs to
        return None, exc


def _running_loop() -> asyncio.AbstractEventLoop:
    global _loop, _pid
    with _lock:
        if _loop is None or _pid != os.getpid():  # a forked child has the object but not the thread
            _loop, _pid = asyncio.new_event_loop(), os.getpid()
            threading.Thread(target=_loop.run_forever, name=_THREAD, daemon=True).start()
        return _loop
