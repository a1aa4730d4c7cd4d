"""``kser operations list``: which operations there were, and what became of them."""

from datetime import datetime
from typing import Any, Final

import click

from kser.cli.moments import Moment
from kser.cli.operations.view import table
from kser.cli.options import example, format_option, log_level_option, option
from kser.cli.output import write_json
from kser.cli.storage import open_history, storage_option
from kser.masking import mask
from kser.status import Status

__all__ = ["list_"]

#: Fields of an operation that --format json gives; `kser operations show` has them all.
_FIELDS: Final = ("uuid", "kind", "entrypoint", "status", "started", "ended", "duration_s", "error", "run")


@click.command(
    "list",
    short_help="Which there were, and what became of them.",
    epilog=example(
        "kser operations list --storage sqlite:///kser.db",
        "kser operations list --storage sqlite:///kser.db --state failed --state aborted --since 2h",
        "kser operations list --storage sqlite:///kser.db --entrypoint Order --text 'card refused' --format json",
    ),
)
@option(
    "--state",
    "states",
    multiple=True,
    type=click.Choice([str(status) for status in Status], case_sensitive=False),
    help="Only those with this status; several may be given.",
)
@option("--entrypoint", metavar="NAME", help="Only of this class: its name in messages, or the last part of it.")
@option("--group", metavar="NAME", help="Only what workers of this consumer group told of.  [default: all groups]")
@option("--since", type=Moment(), metavar="TIME", help="Began since then: 15m, 2h, 7d ago, or 2026-07-29T18:00.")
@option("--until", type=Moment(), metavar="TIME", help="Began before then.")
@option("--text", metavar="TEXT", help="With this in the uuid, the name, the parameters or the error.")
@option(
    "--limit",
    type=click.IntRange(min=1),
    default=50,
    show_default=True,
    metavar="N",
    help="No more than so many, the newest.",
)
@option(
    "--offset", type=click.IntRange(min=0), default=0, show_default=True, metavar="N", help="Leave out so many first."
)
@storage_option
@format_option
@log_level_option("warning")
def list_(
    states: tuple[str, ...],
    entrypoint: str | None,
    group: str | None,
    since: datetime | None,
    until: datetime | None,
    text: str | None,
    limit: int,
    offset: int,
    storage: str,
    output: str,
) -> None:
    """Show operations, and tasks that belong to none, the newest first, as the recorder has put them into the storage.

    Of a uuid the first 8 characters will do for the other commands, when no other begins so.
    """
    filters: dict[str, Any] = {
        "states": [str(state).upper() for state in states],
        "entrypoint": entrypoint,
        "group": group,
        "since": since,
        "until": until,
        "text": text,
    }
    with open_history(storage) as history:
        found = history.list_operations(**filters, limit=limit, offset=offset)
        if output == "json":
            shown = [execution.to_json() for execution in found]
            write_json(mask([{name: each[name] for name in _FIELDS} for each in shown]))
            return
        total = history.count_operations(**filters)
    for line in table(found):
        click.echo(line)
    click.echo(_sum(len(found), total, offset))


def _sum(shown: int, total: int, offset: int) -> str:
    if not total:
        return "None is known that matches; a recorder has to run: `kser recorder`"
    if shown == total:
        return f"{total} in all"
    more = f"; --offset {offset + shown} goes on" if offset + shown < total else ""
    return f"{shown} of {total}{more}"
