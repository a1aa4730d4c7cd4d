"""Status of a task or an operation, and the moves between statuses."""

from enum import StrEnum

from kser.errors import StatusError, ValidationError

__all__ = ["Status"]


class Status(StrEnum):
    """Where a task or an operation stands. Each member equals its name: ``Status.PENDING == "PENDING"``."""

    #: Not started.
    PENDING = "PENDING"
    #: A worker runs it, or its tasks.
    RUNNING = "RUNNING"
    #: It waits for a person.
    WAITING_FOR_INPUT = "WAITING_FOR_INPUT"
    #: Ended with retcode 0.
    SUCCESS = "SUCCESS"
    #: Ended with any other retcode.
    FAILED = "FAILED"
    #: Ended without having been run, on purpose.
    SKIPPED = "SKIPPED"
    #: Ended because somebody asked for it.
    ABORTED = "ABORTED"

    # Equal to its name, so hashed as it; Enum's own hash is Python code, and slow.
    __hash__ = str.__hash__

    @classmethod
    def parse(cls, value: str) -> "Status":
        """The Status of this name. Raises ValidationError naming the ones there are."""
        found = _BY_NAME.get(value)
        if found is None:
            raise ValidationError(
                f"Unknown status {value!r}: use one of {', '.join(cls)}", extra={"status": str(value)}
            )
        return found

    @property
    def final(self) -> bool:
        """True when nothing more happens by itself (a FAILED or ABORTED one may be retried on purpose)."""
        return self in _FINAL

    def allows(self, new: "Status") -> bool:
        """True when the direct move from this status to ``new`` is legal. Staying where one is always is."""
        return new is self or new in _MOVES[self]

    def move(self, new: "str | Status") -> "Status":
        """``new`` as a Status, when it can be reached from here.

        From PENDING whatever RUNNING leads to is legal too: a run that nobody announced was still a run.

        Raises:
            ValidationError: no status has this name.
            StatusError: the move is not legal, for example SUCCESS -> RUNNING.
        """
        target = Status.parse(new)
        if self.allows(target) or (self is Status.PENDING and target in _MOVES[Status.RUNNING]):
            return target
        raise StatusError(
            f"Status cannot move from {self} to {target}: from {self} only "
            f"{', '.join(sorted(_MOVES[self])) or 'nothing'} follows",
            extra={"old": str(self), "new": str(target)},
        )


_BY_NAME: dict[str, Status] = {str(status): status for status in Status}
_FINAL = frozenset({Status.SUCCESS, Status.FAILED, Status.SKIPPED, Status.ABORTED})
_MOVES: dict[Status, frozenset[Status]] = {
    Status.PENDING: frozenset({Status.RUNNING, Status.ABORTED, Status.SKIPPED, Status.FAILED}),
    Status.RUNNING: frozenset(
        {Status.SUCCESS, Status.FAILED, Status.SKIPPED, Status.ABORTED, Status.WAITING_FOR_INPUT}
    ),
    Status.WAITING_FOR_INPUT: frozenset({Status.PENDING, Status.ABORTED, Status.FAILED}),
    Status.FAILED: frozenset({Status.PENDING}),
    Status.ABORTED: frozenset({Status.PENDING}),
    Status.SUCCESS: frozenset(),
    Status.SKIPPED: frozenset(),
}
