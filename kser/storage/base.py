"""StorageBase: what a storage of builds is (source document 002, ``jobcontrol.interfaces``)."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal, Self

from kser.errors import ConfigurationError

if TYPE_CHECKING:
    from kser.storage.history import History

__all__ = ["StorageBase"]


class StorageBase(ABC):
    """Builds with their progress and logs.

    A build is one execution of a job, an operation or a task. It has a number, ``build_id``, and a uuid. As a dict it
    has the keys id, uuid, job_id, start_time, end_time, started, finished, success, skipped, job_config, build_config,
    retval, exception, exception_tb. Dicts are copies. Times are datetimes in UTC, values are JSON: tuples come back as
    lists, and what JSON has no form for raises SerializationError.

    Every method raises NotFound for a build that does not exist, unless it says otherwise, StorageError when the
    database does not answer, and ConfigurationError when its tables are missing.

    Thread rule: may be shared by threads.
    """

    @classmethod
    @abstractmethod
    def from_url(cls, url: str) -> Self:
        """The storage at this URL. Raises ConfigurationError for one that cannot be."""

    # -- tables --------------------------------------------------------------------------------------------------------

    @abstractmethod
    def install(self) -> None:
        """Create what it needs, or bring it to the newest version. Doing it again changes nothing."""

    @abstractmethod
    def uninstall(self) -> None:
        """Drop all that install() made, with everything in it, and nothing else."""

    @abstractmethod
    def close(self) -> None:
        """Let go of all connections. A second call does nothing."""

    # -- builds --------------------------------------------------------------------------------------------------------

    @abstractmethod
    def get_job_builds(
        self,
        job_id: str,
        started: bool | None = None,
        finished: bool | None = None,
        success: bool | None = None,
        skipped: bool | None = None,
        order: Literal["asc", "desc"] = "asc",
        limit: int | None = 100,
    ) -> Iterator[dict[str, Any]]:
        """The builds of a job by date: of their start, or of their creation where they have not started.

        Args:
            job_id: the job.
            started: only those that have (True) or have not (False) been started; None: all.
            finished: the same for the end.
            success: the same for success; one that has not ended is no success.
            skipped: the same for being skipped.
            order: "asc", oldest first, or "desc".
            limit: at most so many; None: all.

        Raises ValueError for another order.
        """

    @abstractmethod
    def create_build(self, job_id: str, job_config: dict[str, Any], build_config: dict[str, Any]) -> int:
        """Create a build; its number.

        Args:
            job_id: the job.
            job_config: its configuration (function, args, kwargs, ...), copied: the build uses it from now on.
            build_config: for this build, e.g. ``dependency_builds``: job id -> build id, or None for "make a new one".
        """

    @abstractmethod
    def get_build(self, build_id: int) -> dict[str, Any]:
        """All about a build."""

    @abstractmethod
    def find_build(self, uuid: str) -> int:
        """The number of the build with this uuid."""

    @abstractmethod
    def start_build(self, build_id: int) -> None:
        """Note that it runs from now on. Raises StatusError when it has ended."""

    @abstractmethod
    def finish_build(
        self,
        build_id: int,
        success: bool | None = None,
        skipped: bool | None = None,
        retval: Any = None,
        exception: Any = None,
        exception_tb: Any = None,
    ) -> None:
        """Note that it has ended. Raises StatusError when it had ended before.

        Args:
            build_id: the build.
            success: whether it ended well; what is not True is no success.
            skipped: True when it was skipped, whatever ``success`` says.
            retval: what it gave, as JSON.
            exception: the error, as JSON.
            exception_tb: its traceback, as JSON.
        """

    @abstractmethod
    def delete_build(self, build_id: int) -> None:
        """Delete it, its progress, its logs and its events; of an operation what is in it, too."""

    def get_latest_successful_build(self, job_id: str) -> dict[str, Any] | None:
        """The newest successful build of a job; None when there is none."""
        found = self.get_job_builds(
            job_id, started=True, finished=True, success=True, skipped=False, order="desc", limit=1
        )
        return next(iter(found), None)

    # -- progress ------------------------------------------------------------------------------------------------------

    @abstractmethod
    def report_build_progress(
        self,
        build_id: int,
        current: int,
        total: int,
        group_name: Sequence[str] | str | None = "",
        status_line: str = "",
    ) -> None:
        """Note how far a build, or a group inside it, has come; what was said of that group before is replaced.

        Args:
            build_id: the build.
            current: steps done.
            total: steps there are.
            group_name: path of the group: a tuple, or a text with ``::`` between the levels; empty: the whole build.
            status_line: what happens now, in words.

        Raises TypeError when ``current`` or ``total`` is no int, or ``group_name`` no path.
        """

    @abstractmethod
    def get_build_progress_info(self, build_id: int) -> list[tuple[tuple[str, ...], int, int, str]]:
        """(group path, current, total, status line) of each group that was reported, by path."""

    # -- logs ----------------------------------------------------------------------------------------------------------

    @abstractmethod
    def log_message(
        self,
        build_id: int,
        level: int,
        message: str,
        *,
        logger: str = "",
        created: datetime | None = None,
        exception: Any = None,
        exception_tb: Any = None,
    ) -> None:
        """Store one log record of a build.

        Args:
            build_id: the build.
            level: as in logging: 20 is INFO.
            message: the text.
            logger: name of who logged it.
            created: when; None: now. With a time zone.
            exception: the error, as JSON.
            exception_tb: its traceback, as JSON.
        """

    @abstractmethod
    def iter_log_messages(
        self,
        build_id: int | None = None,
        max_date: datetime | None = None,
        min_date: datetime | None = None,
        min_level: int | None = None,
    ) -> Iterator[dict[str, Any]]:
        """Log records, oldest first: dicts of id, build_id, job_id, created, level, logger, message, exception,
        exception_tb.

        Args:
            build_id: only of this build; None: of all. One that does not exist has none.
            max_date: only from before this time.
            min_date: only from this time on.
            min_level: only of this level and above.

        The source document has "newer than" for max_date and "older than" for min_date, against the names: here it is
        ``min_date <= created < max_date``. Raises ValidationError for a time without a time zone.
        """  # noqa: D205 - the keys of the dict do not fit into one line

    @abstractmethod
    def prune_log_messages(
        self,
        job_id: str | None = None,
        build_id: int | None = None,
        max_age: float | None = None,
        level: int | None = None,
    ) -> int:
        """Delete the log records that all of the given filters meet; without one, all. The number deleted.

        Args:
            job_id: only of builds of this job.
            build_id: only of this build.
            max_age: only those older than so many seconds.
            level: only of this level and below.
        """

    # -- history -------------------------------------------------------------------------------------------------------

    @property
    def history(self) -> "History":
        """The read API over operations, events, logs and workers.

        Raises ConfigurationError for a storage that keeps builds only.
        """
        raise ConfigurationError(
            f"{type(self).__name__} keeps builds only: for the history of operations use sqlite:///FILE or "
            "postgresql://USER@HOST/DB"
        )
