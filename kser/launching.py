"""From a class and its parameters to what is sent: for those who launch by name, the command line and the REST API."""

from collections.abc import Mapping
from typing import Any

from kser import context, results
from kser.entry import Entrypoint, wire_name
from kser.errors import ConfigurationError, Error, InternalError, ValidationError
from kser.headers import Headers
from kser.loading import where
from kser.producer import BaseProducer
from kser.results import Result
from kser.schemas import Message
from kser.sequencing.operation import Operation
from kser.sequencing.task import Task

__all__ = ["build", "launch"]


def build(
    cls: type[Entrypoint], params: Mapping[str, Any], key: str | None = None, idempotency_key: str | None = None
) -> Entrypoint:
    """The task or operation, ready to be sent.

    Args:
        cls: its class.
        params: its parameters.
        key: message key of a task or operation.
        idempotency_key: what an operation is for: of all with the same one, one is started.

    Raises:
        ValidationError: a parameter is missing, or it is no operation and has an idempotency key.
        InternalError: the user's code raised, or gave nothing to do; the text has file and line.
    """
    if idempotency_key is not None and not issubclass(cls, Operation):
        raise ValidationError(
            f"{wire_name(cls)} is a task, and only operations are started once: leave the key {idempotency_key} out"
        )
    try:
        if idempotency_key is not None and issubclass(cls, Operation):
            made: Entrypoint = cls(params=dict(params), idempotency_key=idempotency_key)
        else:
            made = cls(params=dict(params))
        if isinstance(made, Task) and key:
            made.key = key
        if isinstance(made, Operation):
            made.build()
        else:
            made.check_required_params()
    except Error:
        raise
    except Exception as exc:  # user code
        raise InternalError(f"{wire_name(cls)} cannot be built: {where(exc)}: {type(exc).__name__}: {exc}") from exc
    if isinstance(made, Operation) and not made.tasks:
        raise InternalError(f"{made.path} has nothing to do: its build_tasks() gave no task")
    if not results.is_success(made.result):  # its postinit() raised
        raise InternalError(f"{made.path} cannot be built: {made.result.stderr}")
    return made


def launch(
    made: Entrypoint, producer: BaseProducer, topic: str | None, timeout_s: float, default: str | None = None
) -> tuple[str, Result]:
    """Send what build() gave through this producer, whatever its registry has: the topic it went to, and the Result.

    Args:
        made: the task or operation.
        producer: sends it.
        topic: where to. An operation whose class or registry names a topic has to go there.
        timeout_s: longest wait for the confirmation.
        default: where to, when nobody names a topic.

    Raises ConfigurationError when there is no topic at all, ValidationError when it is not the operation's.
    """
    outbox = _Outbox()
    with context.within(context.Scope(outbox)):
        if isinstance(made, Operation):
            made.launch()
        elif isinstance(made, Task):
            made.send()
        else:
            outbox.send(made.to_Message(), None, None)
    (kmsg, named, key, headers) = outbox.messages[-1]
    if isinstance(made, Operation) and topic and named not in (None, topic):
        raise ValidationError(f"{made.path} goes to topic {named}, not {topic}: leave the topic out")
    target = topic or named or default
    if target is None:
        raise ConfigurationError(f"No topic is named for {made.path}: name one, in its class or its registry")
    home = made.home if isinstance(made, Task) else None
    sent = kmsg.sent_as(home.transport) if home is not None else kmsg
    return target, producer.send(target, sent, timeout_s, key=key, headers=headers)


class _Outbox:
    """Keeps what a launch sends. Implements context.Delivery."""

    traced = True

    def __init__(self) -> None:
        self.messages: list[tuple[Message, str | None, str | None, Headers]] = []

    def send(self, kmsg: Message, topic: str | None, key: str | None, headers: Headers = ()) -> Result:
        """Keep one message."""
        self.messages.append((kmsg, topic, key, headers))
        return Result(uuid=kmsg.uuid, retcode=results.ACCEPTED)

    def drop(self) -> None:
        """Forget them."""
        self.messages.clear()
