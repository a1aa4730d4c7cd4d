"""Controller: which class runs which message. Decodes, dispatches and executes; does no I/O."""

import contextlib
import json
import logging
from typing import Any, ClassVar

import orjson

from kser import results
from kser.entry import Entrypoint, result_extra
from kser.errors import EntrypointNotFoundError, Error, ValidationError
from kser.masking import mask
from kser.results import Result
from kser.schemas import Message, parse
from kser.tracebacks import log_raised, secret_values

__all__ = ["BaseController", "Controller", "is_silent"]

logger = logging.getLogger(__name__)


class BaseController:
    """The hooks around a message, and the log lines: shared by controllers and producers.

    A hook that raises is logged with its traceback and changes nothing else.
    """

    _logger: ClassVar[logging.Logger] = logger

    @classmethod
    def onmessage(cls, kmsg: Message) -> Message | None:
        """Called with each message before anything is done with it. Gives the message to go on with."""
        return kmsg

    @classmethod
    def onsuccess(cls, kmsg: Message, result: Result) -> Result | None:  # noqa: ARG003 - a hook to override
        """Called when it went well. Gives the Result to carry on."""
        return result

    @classmethod
    def onerror(cls, kmsg: Message, result: Result) -> Result | None:  # noqa: ARG003 - a hook to override
        """Called when it failed. Gives the Result to carry on."""
        return result

    @classmethod
    def _onmessage(cls, kmsg: Message) -> Message:
        if cls._logger.isEnabledFor(logging.DEBUG):
            cls._logger.debug(
                "%s.ReceivedMessage %s[%s]",
                cls.__name__,
                kmsg.entrypoint,
                kmsg.uuid,
                extra={"kmsg": mask(kmsg.dump())},
            )
        given = cls._hooked("onmessage", kmsg)
        return given if isinstance(given, Message) else kmsg

    @classmethod
    def _onsuccess(cls, kmsg: Message, result: Result) -> Result:
        if cls._logger.isEnabledFor(logging.INFO):
            cls._log_end(logging.INFO, "Success", kmsg, result)
        given = cls._hooked("onsuccess", kmsg, result)
        return given if isinstance(given, Result) else result

    @classmethod
    def _onerror(cls, kmsg: Message, result: Result) -> Result:
        if cls._logger.isEnabledFor(logging.ERROR):
            cls._log_end(logging.ERROR, "Failed", kmsg, result)
        given = cls._hooked("onerror", kmsg, result)
        return given if isinstance(given, Result) else result

    @classmethod
    def _onresult(cls, kmsg: Message, result: Result) -> Result:
        return cls._onsuccess(kmsg, result) if results.is_success(result) else cls._onerror(kmsg, result)

    @classmethod
    def _log_end(cls, level: int, word: str, kmsg: Message, result: Result) -> None:
        cls._logger.log(
            level,
            "%s.%s: %s[%s]: %s",
            cls.__name__,
            word,
            kmsg.entrypoint,
            kmsg.uuid,
            result,
            extra={"kmsg": mask(kmsg.dump())} | result_extra(result),
        )

    @classmethod
    def _hooked(cls, hook: str, kmsg: Message, *args: Result) -> Message | Result | None:
        """What the hook gives; None, and a log line, when it raises: a hook never changes an outcome by failing."""
        try:
            given: Message | Result | None = getattr(cls, hook)(kmsg, *args)
        except Exception:  # noqa: BLE001 - user code; it is logged
            log_raised(
                cls._logger,
                "%s.%s() raised for %s[%s]; the outcome stays as it was",
                cls.__name__,
                hook,
                kmsg.entrypoint,
                kmsg.uuid,
            )
            return None
        return given


class Controller(BaseController):
    """Entrypoint name -> class.

    Each subclass has entries of its own. An OperationRegistry makes a subclass for itself, so two registries share
    nothing.
    """

    #: Name in messages -> class.
    ENTRYPOINTS: ClassVar[dict[str, type[Entrypoint]]] = {}
    #: How a message is read and written; the hook for encryption.
    TRANSPORT: ClassVar[type[Message]] = Message

    #: Classes every controller knows without their being registered.
    BUILT_IN: ClassVar[dict[str, type[Entrypoint]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "ENTRYPOINTS" not in cls.__dict__:
            cls.ENTRYPOINTS = dict(cls.ENTRYPOINTS)

    @classmethod
    def register(cls, name: str, entrypoint: type[Entrypoint]) -> None:
        """Route messages that name ``name`` to this class. Raises ValidationError when it is no Entrypoint."""
        cls.check(name, entrypoint)
        cls.ENTRYPOINTS[name] = entrypoint
        cls._logger.debug("%s.Registered: %s", cls.__name__, name)

    @staticmethod
    def check(name: str, entrypoint: Any) -> None:
        """Raise ValidationError unless this is a class derived from Entrypoint."""
        if not isinstance(entrypoint, type) or not issubclass(entrypoint, Entrypoint):
            raise ValidationError(
                f"Invalid type for entry '{name}', MUST implement kser.entry.Entrypoint", extra={"entrypoint": name}
            )

    @classmethod
    def decode(cls, raw: str | bytes) -> Message:
        """The message in ``raw``, after onmessage(). Raises ValidationError when it cannot be read."""
        return cls._onmessage(cls.TRANSPORT.loads(raw))

    @classmethod
    def lookup(cls, kmsg: Message) -> type[Entrypoint]:
        """The class ``kmsg`` names. Raises EntrypointNotFoundError listing those there are."""
        found = cls.find(kmsg.entrypoint)
        if found is None:
            raise EntrypointNotFoundError(
                f"Entrypoint '{kmsg.entrypoint}' not registred",
                extra={"uuid": kmsg.uuid, "entrypoint": kmsg.entrypoint, "allowed": list(cls.ENTRYPOINTS)},
            )
        return found

    @classmethod
    def find(cls, name: str) -> type[Entrypoint] | None:
        """The class registered under ``name``, or None."""
        return cls.ENTRYPOINTS.get(name) or cls.BUILT_IN.get(name)

    @classmethod
    def dispatch(cls, kmsg: Message) -> Entrypoint:
        """The task object ``kmsg`` asks for, ready to be executed."""
        task = cls.lookup(kmsg).from_Message(kmsg)
        task.restore(kmsg, cls.find)
        return task

    @classmethod
    def reject(cls, raw: str | bytes | None, exc: Exception) -> Result:
        """The failed Result of something that is no message, after logging it.

        It has the uuid of ``raw`` when that much of it can be read, else a random one.
        """
        result = results.from_exception(exc, "")
        extra = getattr(exc, "extra", None)
        uuid = extra.get("uuid") if isinstance(extra, dict) else None
        result.uuid = uuid if isinstance(uuid, str) and uuid else _uuid_in(raw) or Result().uuid
        why: object = f"{exc} {exc.extra}" if isinstance(exc, Error) and exc.extra else exc
        if secret_values(exc):
            why = result.stderr  # without them
        cls._logger.error(
            "%s.ImportError: Failed to load data from kafka: %s",
            cls.__name__,
            why,
            extra={"kafka_raw_data": _excerpt(raw), "error": result.retval["error"]},
        )
        return result

    @classmethod
    def run(cls, raw_data: str | bytes) -> Result:
        """Decode and execute one message in this process; its Result, whatever the input is. Emits no message.

        A message that names an Operation runs all of it.
        """
        if cls._logger.isEnabledFor(logging.DEBUG):
            cls._logger.debug("%s.ReceivedFromKafka: %s", cls.__name__, _excerpt(raw_data))
        try:
            kmsg = cls.decode(raw_data)
        except Exception as exc:  # noqa: BLE001 - a user's TRANSPORT may raise anything; it is told by the Result
            return cls.reject(raw_data, exc)
        try:
            result = cls.dispatch(kmsg).execute()
        except Exception as exc:  # noqa: BLE001 - not registered, or a constructor that raised
            result = results.from_exception(exc, kmsg.uuid)
        return cls._onresult(kmsg, result)


def is_silent(controller: Controller | type[Controller]) -> bool:
    """Whether nobody changed how messages are read and routed, nor a hook, and what goes well is not logged."""
    cls = controller if isinstance(controller, type) else type(controller)
    if cls._logger.isEnabledFor(logging.INFO):
        return False
    if not isinstance(controller, type) and not vars(controller).keys().isdisjoint(_ORIGINALS):
        return False
    return all(
        next(base.__dict__[name] for base in cls.__mro__ if name in base.__dict__) is original
        for name, original in _ORIGINALS.items()
    )


#: How that is which is_silent() asks for.
_ORIGINALS = {
    name: kind.__dict__[name]
    for kind, names in (
        (BaseController, ("onmessage", "onsuccess", "_onmessage", "_onsuccess", "_onresult", "_hooked", "_logger")),
        (Controller, ("TRANSPORT", "decode", "lookup", "find", "dispatch")),
    )
    for name in names
}
_SHOWN = 2048


def _uuid_in(raw: Any) -> str:
    """The uuid that data names which is no whole message; "" when it names none."""
    with contextlib.suppress(ValidationError):
        data = parse(raw)
        if isinstance(data, dict) and isinstance(data.get("uuid"), str):
            return str(data["uuid"])
    return ""


def _excerpt(raw: Any) -> str:
    """The beginning of what came, as text, with what looks secret masked when it can be read at all."""
    if raw is None:
        return "None"
    if not isinstance(raw, (str, bytes, bytearray, memoryview)):
        text = results.shown(raw)
    else:
        text = raw if isinstance(raw, str) else bytes(raw).decode("utf-8", "backslashreplace")
        with contextlib.suppress(ValidationError):
            data = results.json_safe(mask(parse(text)))
            try:
                text = orjson.dumps(data).decode()
            except TypeError:
                text = json.dumps(data)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}... ({len(text)} characters)"
