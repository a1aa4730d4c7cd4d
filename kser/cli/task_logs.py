"""``kser logs``: what the code of an operation or task has logged."""

import logging
import time
from typing import TYPE_CHECKING, Final

import click

from kser.cli.operations.view import traceback_lines
from kser.cli.options import example, format_option, log_level_option, option
from kser.cli.output import write_json
from kser.cli.storage import open_history, storage_option
from kser.cli.terminal import one_line, printable
from kser.errors import NotFound
from kser.masking import mask
from kser.status import Status

if TYPE_CHECKING:
    from kser.storage.history import History
    from kser.storage.views import LogLine

__all__ = ["logs"]

#: Records asked for at a time.
_PAGE: Final = 500
#: Seconds between two looks with --follow, and what is waited for the last lines once it has ended: they come beside
#: the events, and a little later.
_POLL_S: Final = 0.5
_AFTER_S: Final = 2.0
_LEVELS: Final = ("debug", "info", "warning", "error", "critical")
_COLOURS: Final = {"WARNING": "yellow", "ERROR": "red", "CRITICAL": "red", "DEBUG": "bright_black"}


@click.command(
    "logs",
    short_help="What the code of an operation or task has logged.",
    epilog=example(
        "kser logs 5f0c6d4e --storage sqlite:///kser.db",
        "kser logs 5f0c6d4e-9a3b-4f0e-8a53-0d6f3f1f2b11 --storage sqlite:///kser.db --follow --level warning",
    ),
)
@click.argument("uuid")
@option("--follow", "-f", is_flag=True, help="Go on with what comes, until it has ended.")
@option(
    "--level",
    variable="KSER_LOGS_LEVEL",
    type=click.Choice(_LEVELS, case_sensitive=False),
    help="Only this level and those above.  [default: all that was told]",
)
@storage_option
@format_option
@log_level_option("warning")
def logs(uuid: str, follow: bool, level: str | None, storage: str, output: str) -> None:
    """Show what the tasks of the operation UUID, or the task UUID, have logged, as the recorder has stored it.

    The first 8 characters will do, when no other begins so. With --format json an object a line. A task may log faster
    than is told: a line then says how many are missing.
    """
    least = None if level is None else logging.getLevelNamesMapping()[level.upper()]
    with open_history(storage) as history:
        uuid = history.complete_uuid(uuid)
        try:
            history.get_operation(uuid)
        except NotFound as exc:
            if not follow:
                raise
            click.echo(f"kser: {exc.message} yet: it is waited for", err=True)
        _show(history, uuid, least, output, follow=follow)


def _show(history: "History", uuid: str, least: int | None, output: str, *, follow: bool) -> None:
    after, ended_at = 0, float("inf")
    while True:
        ended = _has_ended(history, uuid)  # asked before the lines: what comes first was told first
        lines = history.list_logs(uuid, after=after, min_level=least, limit=_PAGE)
        for line in lines:
            _write(line, output)
            after = line.id
        if len(lines) == _PAGE:
            continue
        now = time.monotonic()
        if not follow or now >= ended_at + _AFTER_S:
            return
        ended_at = min(ended_at, now) if ended else float("inf")
        time.sleep(_POLL_S)


def _has_ended(history: "History", uuid: str) -> bool:
    try:
        return Status.parse(history.get_operation(uuid).status).final
    except NotFound:
        return False  # it has not begun


def _write(line: "LogLine", output: str) -> None:
    if output == "json":
        write_json(mask(line.to_json()))
        return
    when, level = f"{line.created.astimezone():%Y-%m-%d %H:%M:%S}", line.level_name
    styled = click.style(f"{level:8}", fg=_COLOURS[level]) if level in _COLOURS else f"{level:8}"
    first, *more = line.message.splitlines() or [""]
    click.echo(f"{when}  {styled}  {one_line(line.entrypoint) or '?'} [{line.uuid[:8]}]  {printable(first)}")
    for text in [*more, *(traceback_lines(line.traceback, full=False) if line.traceback else [])]:
        click.echo(f"  {printable(text)}")
