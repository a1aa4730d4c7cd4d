"""kser: a Kafka message-driven operation sequencer.

Services publish messages that name a task; workers run it; each result emits the next message of its operation.
Importing this package loads no Kafka client, no Flask, no SQL and no YAML.
"""

from typing import TYPE_CHECKING, Any

from kser.controller import Controller
from kser.entry import Entrypoint
from kser.errors import (
    ConfigurationError,
    DeliveryError,
    EntrypointNotFoundError,
    Error,
    ItineraryError,
    MessageTooLargeError,
    NotFound,
    StatusError,
    TransportError,
    ValidationError,
)
from kser.results import Result
from kser.retry import Retry
from kser.schemas import Message
from kser.sequencing.operation import Operation
from kser.sequencing.registry import OperationRegistry
from kser.sequencing.task import Task
from kser.status import Status

if TYPE_CHECKING:
    from kser.worker import Worker

__all__ = [
    "ConfigurationError",
    "Controller",
    "DeliveryError",
    "Entrypoint",
    "EntrypointNotFoundError",
    "Error",
    "ItineraryError",
    "Message",
    "MessageTooLargeError",
    "NotFound",
    "Operation",
    "OperationRegistry",
    "Result",
    "Retry",
    "Status",
    "StatusError",
    "Task",
    "TransportError",
    "ValidationError",
    "Worker",
]


def __getattr__(name: str) -> Any:
    # Services only produce: the worker's modules are loaded by those who use one.
    if name == "Worker":
        from kser.worker import Worker

        return Worker
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
