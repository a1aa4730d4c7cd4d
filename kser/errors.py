"""The one error tree.

Error                         code 1       everything kser raises on purpose (cdumay_error.Error)
├─ ConfigurationError         400          a setting is missing, unknown or wrong
├─ ValidationError            400          data that cannot be what it should be
│  ├─ EntrypointNotFoundError 400          no class is registered under the name a message gives
│  ├─ ItineraryError          400          what travels with the message of an operation cannot be read
│  ├─ StatusError             409          a move between statuses that does not exist
│  ├─ MessageTooLargeError    413          a message over the limit, refused before it was sent
│  └─ SerializationError      400          a value that JSON has no form for
├─ NotFound                   404          nothing with this identifier
├─ NotImplemented             501          a hook the user has to write was called
├─ IOError                    500
│  ├─ StorageError            503          the database, or the way to it
│  └─ TransportError          503          the broker, or the way to it
│     ├─ DeliveryError        504          not confirmed by the broker in time
│     ├─ GroupError           409          this member does not own the partition (any more)
│     ├─ FencedError          409          another producer took over the transactional id
│     └─ OffsetLostError      410          the committed offset does not exist any more
├─ TaskTimeoutError           408          an execution took longer than the ``timeout`` of its task
├─ AbortedError               409          an execution was ended from outside
├─ TaskCrashedError           500          the child process that an execution was in died
└─ InternalError              500          anything else, user code's own exceptions among them

Every error has code, message, extra, stack, msgid and name (source: cdumay-error 0.2.1).
"""

from typing import Any, ClassVar

from cdumay_error import Error
from cdumay_error.types import (
    ConfigurationError,
    InternalError,
    IOError,  # noqa: A004 - the published name of kser 0.8's error family
    NotFound,
    NotImplemented,  # noqa: A004 - the published name
    ValidationError,
)

__all__ = [
    "AbortedError",
    "ConfigurationError",
    "DeliveryError",
    "EntrypointNotFoundError",
    "Error",
    "FencedError",
    "GroupError",
    "IOError",
    "InternalError",
    "ItineraryError",
    "MessageTooLargeError",
    "NotFound",
    "NotImplemented",
    "OffsetLostError",
    "SerializationError",
    "StatusError",
    "StorageError",
    "TaskCrashedError",
    "TaskTimeoutError",
    "TransportError",
    "ValidationError",
]


class EntrypointNotFoundError(ValidationError):
    """Entrypoint not registered."""


class ItineraryError(ValidationError):
    """The itinerary of the message cannot be read."""


class StatusError(ValidationError):
    """Illegal status move."""

    MSGID = "ERR-40901"
    CODE = 409


class MessageTooLargeError(ValidationError):
    """The message is too large.

    ``extra`` has ``size`` and ``limit``, both in bytes.
    """

    MSGID = "ERR-41301"
    CODE = 413

    def __init__(self, what: str, size: int, limit: int, **extra: Any) -> None:
        super().__init__(
            f"{what} has {size} bytes, the limit is {limit}: put what is large somewhere else and pass a reference to "
            "it, or nest operations, so that each message carries only the tasks of its own level",
            extra={"size": size, "limit": limit, **extra},
        )


class SerializationError(ValidationError):
    """A value cannot be stored; the message says where it is and which type it has."""


class TaskTimeoutError(Error):
    """The task took longer than its ``timeout``."""

    MSGID = "ERR-40801"
    CODE = 408


class AbortedError(Error):
    """The execution was ended from outside; ``extra["reason"]`` says why."""

    MSGID = "ERR-40904"
    CODE = 409


class TaskCrashedError(Error):
    """The child process of an isolated task died while it ran the task; the message names the signal or exit code."""

    MSGID = "ERR-50001"
    CODE = 500


class StorageError(IOError):
    """The database cannot be reached, or refused."""

    MSGID = "ERR-50302"
    CODE = 503


class TransportError(IOError):
    """The broker cannot be reached or refused.

    ``retriable`` tells whether the same call may succeed when it is made again.
    """

    MSGID = "ERR-50301"
    CODE = 503
    retriable: bool = False
    RETRIABLE: ClassVar[bool] = False

    def __init__(self, message: str | None = None, *, retriable: bool | None = None, **kwargs: Any) -> None:
        super().__init__(message, **kwargs)
        self.retriable = self.RETRIABLE if retriable is None else retriable


class DeliveryError(TransportError):
    """Messages were not confirmed by the broker.

    ``extra["uuids"]`` has the uuids of the messages that may not have arrived.
    """

    MSGID = "ERR-50401"
    CODE = 504


class GroupError(TransportError):
    """This member does not own the partition any more."""

    MSGID = "ERR-40902"
    CODE = 409


class FencedError(TransportError):
    """Another producer uses the same transactional id."""

    MSGID = "ERR-40903"
    CODE = 409


class OffsetLostError(TransportError):
    """The committed offset does not exist any more."""

    MSGID = "ERR-41001"
    CODE = 410
