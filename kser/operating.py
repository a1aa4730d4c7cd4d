"""OperatingProducer: a producer that also tells workers about what runs: abort this operation, resume that one."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from kser import control, results
from kser.dead_letters import DeadLetters
from kser.errors import Error
from kser.producer import BaseProducer
from kser.results import Result
from kser.transport import Transport

__all__ = ["OperatingProducer"]


class OperatingProducer(BaseProducer):
    """Sends messages, and aborts and resumes operations. May be shared by threads.

    Args:
        transport: the broker.
    """

    def __init__(self, transport: Transport) -> None:
        super().__init__(transport.sink(), partial(transport.sink, failures_only=True))
        self._transport = transport

    def abort(
        self, uuid: str, *, group: str = "kser", run: int | None = None, why: str = "", timeout: float = 60
    ) -> Result:
        """Tell the workers of a group that an operation, or a task of none, is to end.

        They run nothing more of it and tell its end, ABORTED, in the events. Doing it again changes nothing.

        Args:
            uuid: of the root operation, or of a task of none.
            group: the workers' group.
            run: the last run that is meant. None: the newest that the events tell of.
            why: for people.
            timeout: seconds for all of it.

        Returns: a Result with its uuid; ``retval["run"]`` is the last run that is meant. Failed when it has ended, or
            the workers may not hear of it. Never raises because of the broker.
        """
        try:
            answer = control.abort(uuid, group=group, transport=self._transport, run=run, why=why, timeout_s=timeout)
        except Error as exc:
            return results.from_exception(exc, uuid)
        if answer.abort is None:
            return Result(uuid=uuid, retcode=409, stderr=f"{uuid} cannot be aborted: {answer.note}")
        return Result(
            uuid=uuid,
            stdout=f"The workers of group {group} are told that {uuid} is aborted, up to run {answer.abort.run}",
            retval={"run": answer.abort.run},
        )

    def resume(
        self,
        uuid: str,
        *,
        group: str = "kser",
        params: Mapping[str, Any] | None = None,
        step: str | int | None = None,
        timeout: float = 60,
    ) -> Result:
        """Begin a new run of a failed operation at the step that failed it, with the results it had.

        Args:
            uuid: of the root operation, or of a task of none.
            group: the workers' group.
            params: these take the place of that step's parameters of the same names.
            step: begin at another step: its name, or its position from 0.
            timeout: seconds to read what is needed, and to be confirmed; each.

        Returns: a Result with its uuid; ``retval["run"]`` is the new run. Failed when the operation is alive, or there
            is nothing to resume it from. Never raises because of the broker.
        """
        try:
            letters = DeadLetters(self._transport, group, timeout_s=timeout)
            outcome = letters.resume(uuid, params=params, step=step)
        except Error as exc:
            return results.from_exception(exc, uuid)
        return Result(uuid=uuid, stdout=f"{uuid} is resumed as run {outcome.run}", retval={"run": outcome.run})
