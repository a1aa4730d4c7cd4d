"""The launch that most are: of an operation that nobody tuned, inside ``with producer.batch()``, with INFO logging off.

Operation.launch_next(), Itinerary and Message make the same of it, byte for byte (a property test holds them to that),
at three times the cost: this writes the message from the objects as they are. Whatever is not as kser made it, hooks,
attributes of an object, a topic, is left to them.
"""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from kser import context
from kser.entry import EntrypointMeta
from kser.results import ACCEPTED, Result
from kser.schemas import Message, plain_bytes
from kser.sequencing.itinerary import METADATA_KEY, VERSION, key_bytes
from kser.sequencing.task import Facts, Task, facts_of
from kser.status import Status

if TYPE_CHECKING:
    from kser.sequencing.operation import Operation

__all__ = ["PlainBatch", "send_first", "within_batch"]


class PlainBatch(Protocol):
    """The batch of a producer, open in this thread, where the bytes of a message are all that matters."""

    @property
    def producer(self) -> object:
        """Whose batch this is."""

    def send_plain(self, topic: str, key: bytes, raw: bytes, uuid: str, entrypoint: str) -> Result | None:
        """Hand over one message, written already; None when the producer's send() has to be called instead."""


class _Open(threading.local):
    batch: PlainBatch | None = None


_open = _Open()


@contextmanager
def within_batch(batch: PlainBatch) -> Iterator[None]:
    """Within the block launches of this thread by the batch's producer may go to ``batch``."""
    around, _open.batch = _open.batch, batch
    try:
        yield
    finally:
        _open.batch = around


def send_first(operation: "Operation") -> Result | None:
    """What operation.launch() does and gives, up to noting it; None, and nothing done, where not all is plain."""
    batch, home, tasks = _open.batch, operation._home, operation.tasks
    if (
        batch is None
        or home is None
        or not tasks
        or home.producer is not batch.producer
        or context._scope.get() is not None
        or operation._logger.isEnabledFor(logging.INFO)
    ):
        return None
    known = EntrypointMeta.facts
    own = operation.__dict__
    facts: Facts = known.get(type(operation)) or facts_of(type(operation))
    if not facts.launches or (len(own) != _OF_OPERATION and not facts.launches.isdisjoint(own)):
        return None
    first = tasks[0]
    step = known.get(type(first)) or _facts(first)
    if step is None:
        return None
    own = first.__dict__
    if not step.sends or (len(own) != _OF_TASK and not step.sends.isdisjoint(own)) or first._home is not home:
        return None
    near = home.topic
    topic, target = operation.topic or near, first.topic or near
    uuid, params, result = first.uuid, first.params, first._result
    own_key = first.key
    key = own_key or operation.key or operation.uuid
    if (
        not topic
        or not target
        or type(key) is not str
        or type(uuid) is not str
        or not uuid
        or type(params) is not dict
        or (result is not None and type(result) is not Result)
        or type(first.metadata) is not dict
        or home.transport is not Message
        or first.status == _SUCCESS
    ):
        return None
    frame = _frame(operation, facts, topic, near)
    if frame is None:
        return None
    itinerary: dict[str, Any] = {"v": VERSION, "run": 1, "position": 0, "ops": [frame], "new": True}
    if own_key:
        itinerary["key"] = own_key
    metadata = {**first.metadata, METADATA_KEY: itinerary}
    raw = plain_bytes(uuid, step.path, params, result, metadata)
    if raw is None:
        return None
    sent = batch.send_plain(target, key_bytes(key), raw, uuid, step.path)
    if sent is not None:
        first.metadata = metadata
        if sent.retcode in _ON_ITS_WAY and operation.status == _PENDING:
            operation.status = _RUNNING
    return sent


def _facts(task: Any) -> Facts | None:
    """What is known of its class; None when it is no task: anybody may put something into ``tasks``."""
    return facts_of(type(task)) if isinstance(task, Task) else None


def _frame(operation: "Operation", facts: Facts, topic: str, near: str | None) -> dict[str, Any] | None:
    """operation.frame(topic, tasks).dump(), for the tasks after the first one; None where there is something else.

    ``near``: topic of its registry.
    """
    frame: dict[str, Any] = {
        "uuid": operation.uuid,
        "entrypoint": facts.path,
        "params": operation.params,
        "topic": topic,
    }
    if operation.key:
        frame["key"] = operation.key
    if operation.metadata:
        metadata = {k: v for k, v in operation.metadata.items() if k != METADATA_KEY}
        if metadata:
            frame["metadata"] = metadata
    if not facts.ends:
        frame["hooks"] = True
    known, home, entries = EntrypointMeta.facts, operation._home if topic == near else None, []
    for task in operation.tasks[1:]:
        step = known.get(type(task)) or _facts(task)
        if step is None:
            return None
        own = task.__dict__
        if (
            step.home is home is not None
            and step.enters
            and len(own) == _OF_TASK
            and not own.get("metadata", True)
            and "params" in own
        ):
            entries.append({"uuid": own["uuid"], "entrypoint": step.path, "params": own["params"]})
        elif task.status != _SUCCESS:
            entries.append(task.to_entry(topic))
    frame["tasks"] = entries
    return frame


#: How many attributes an object has of its own when nobody gave it more: uuid, params, metadata, and tasks.
_OF_TASK = len(Task(uuid="u").__dict__)
_OF_OPERATION = _OF_TASK + 1
_PENDING, _RUNNING, _SUCCESS = Status.PENDING, Status.RUNNING, Status.SUCCESS
_ON_ITS_WAY = (0, ACCEPTED)
