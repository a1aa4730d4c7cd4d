"""``kser dlq``: look at the dead letters of a group, send them back, delete them."""

import functools
import sys
from collections.abc import Sequence
from typing import Any

import click

from kser.cli.connection import Connection
from kser.cli.errors import FAILED, MISUSE, CommandFailed
from kser.cli.letters_view import details, hints, outcome_lines, table
from kser.cli.moments import Moment
from kser.cli.options import (
    Decorator,
    Function,
    JsonObject,
    example,
    format_option,
    group_option,
    kafka_options,
    log_level_option,
    need_command,
    option,
)
from kser.cli.output import write_json
from kser.dead_letters import DeadLetter, DeadLetters, Found, Replay
from kser.errors import ValidationError
from kser.letters_json import content_as_json, letter_as_json, outcome_as_json
from kser.worker.topic_findings import count

__all__ = ["dlq"]

#: Letters that `kser dlq list` shows when nobody says how many.
_SHOWN = 50


def _letter_filters(function: Function) -> Function:
    """The options that choose letters; the command gets them as ``filters``, as DeadLetters.search() takes them."""
    names = ("task", "error", "since", "until", "operation", "limit")

    @functools.wraps(function)
    def wrapper(**kwargs: Any) -> Any:
        filters = {name: kwargs.pop(name) for name in names}
        return function(filters={name: value for name, value in filters.items() if value is not None}, **kwargs)

    chosen: list[Decorator] = [
        option("--task", metavar="NAME", help="Of this task: its name, its class alone, or a pattern as in 'shop.*'."),
        option("--error", metavar="TEXT", help="With this in the type or text of the error."),
        option(
            "--since", type=Moment(), metavar="TIME", help="Failed since then: 15m, 2h, 7d ago, or 2026-07-29T18:00."
        ),
        option("--until", type=Moment(), metavar="TIME", help="Failed before then."),
        option("--operation", metavar="UUID", help="Of this operation, or with this uuid; its beginning will do."),
        option("--limit", type=click.IntRange(min=1), metavar="N", help="No more than so many, the newest."),
    ]
    decorated: Function = wrapper
    for decorator in reversed(chosen):
        decorated = decorator(decorated)
    return decorated


def _place_options(function: Function) -> Function:
    for decorator in (log_level_option("warning"), format_option, kafka_options, group_option):
        function = decorator(function)
    return function


@click.group(
    "dlq",
    invoke_without_command=True,
    subcommand_metavar="COMMAND [ARGS]...",
    short_help="Look at dead letters, send them back.",
    epilog=example(
        "kser dlq list --group shop --since 2h",
        "kser dlq show 0:12 --group shop",
        "kser dlq replay --group shop --task Charge --dry-run",
        "kser dlq purge --group shop --until 30d",
    ),
)
@click.pass_context
def dlq(ctx: click.Context) -> None:
    """The dead letters of a group: messages that failed for good, or cannot be read, in {group}.dlq."""
    need_command(ctx)


@dlq.command(
    "list",
    epilog=example(
        "kser dlq list --group shop --bootstrap-servers 127.0.0.1:9092",
        "kser dlq list --group shop --task 'shop.*' --error timeout --since 2h --format json",
    ),
)
@_letter_filters
@option("--replayed/--not-replayed", default=None, help="Only those that were replayed, or were not.")
@_place_options
def list_(
    filters: dict[str, Any], replayed: bool | None, group: str | None, connection: Connection, output: str
) -> None:
    """Show the dead letters of a group, the newest first.

    The id in the first column is what `kser dlq show` and `kser dlq replay` take.
    """
    letters = _letters(connection, group)
    shown = filters.pop("limit", None) or (_SHOWN if output == "human" else None)
    with connection.patience():
        found = letters.search(**filters, limit=shown, replayed=replayed)
    if output == "json":
        write_json([letter_as_json(letter) for letter in found.letters])
        return
    for line in table(found.letters):
        click.echo(line)
    click.echo(_sum(found, letters, filters))


def _sum(found: Found, letters: DeadLetters, filters: dict[str, Any]) -> str:
    if not found.total:
        return f"No dead letter of group {letters.group}{' matches' if filters else ''}"
    more = f", the {len(found.letters)} newest shown: --limit shows more" if found.total > len(found.letters) else ""
    return f"{count(found.total, 'dead letter')}{more}"


@dlq.command(
    "show",
    epilog=example(
        "kser dlq show 0:12 --group shop --bootstrap-servers 127.0.0.1:9092",
        "kser dlq show 0:12 --group shop --format json",
    ),
)
@click.argument("id")
@_place_options
def show(id: str, group: str | None, connection: Connection, output: str) -> None:  # noqa: A002 - click takes the name
    """Show one dead letter: what failed, where, why, and the message.

    ID is that of `kser dlq list`; or a uuid, or its first 8 characters: then it is the last one of that operation.

    Values under names that look secret are masked.
    """
    letters = _letters(connection, group)
    with connection.patience():
        letter = letters.show(id)
    if output == "json":
        write_json(letter_as_json(letter) | content_as_json(letter))
        return
    for line in details(letter, letters.group):
        click.echo(line)
    for line in hints(letter, letters.group, letters.max_redrives):
        click.echo(line)


@dlq.command(
    "replay",
    epilog=example(
        "kser dlq replay 0:12 1:3 --group shop --bootstrap-servers 127.0.0.1:9092",
        "kser dlq replay --group shop --task Charge --since 2h --dry-run",
        "kser dlq replay 0:12 --group shop --params '{\"amount\": 12}'",
    ),
)
@click.argument("ids", nargs=-1, metavar="[ID]...")
@_letter_filters
@option("--all", "everything", is_flag=True, help="All that were not replayed yet.")
@option(
    "--params", type=JsonObject(), metavar="JSON", help="Parameters to change: a JSON object, @FILE, or - for stdin."
)
@option("--dry-run", is_flag=True, help="Say what would be sent, and send nothing.")
@option(
    "--force",
    is_flag=True,
    help="Send also what was aborted, came back too often, lacks its headers, or cannot be read.",
)
@_place_options
@click.pass_context
def replay(
    ctx: click.Context,
    ids: Sequence[str],
    filters: dict[str, Any],
    everything: bool,
    params: dict[str, Any] | None,
    dry_run: bool,
    force: bool,
    group: str | None,
    connection: Connection,
    output: str,
) -> None:
    """Send messages back to where they failed, and their operations go on from there.

    Name dead letters by their ids, or choose them by the options of `kser dlq list`; chosen so, those that were
    replayed already, or aborted, are left out. Whoever else replays the same one meanwhile: it is run once.

    Exit code 1 when one is refused or not confirmed, else 0.
    """
    letters = _letters(connection, group)
    with connection.patience():
        chosen = found = _chosen(letters, ids, filters, everything, replayed=False)
        if not ids and not force:
            chosen = [letter for letter in found if not letter.aborted]
        outcomes = letters.replay(chosen, dry_run=dry_run, force=force, params=params)
    if output == "json":
        write_json([outcome_as_json(outcome) for outcome in outcomes])
    else:
        for line in outcome_lines(outcomes):
            click.echo(line)
        click.echo(_replay_sum(outcomes, len(found) - len(chosen), dry_run=dry_run))
    if any(outcome.status in ("refused", "failed") for outcome in outcomes):
        ctx.exit(FAILED)


def _replay_sum(outcomes: Sequence[Replay], aborted: int, *, dry_run: bool) -> str:
    if not outcomes and aborted:
        return f"Nothing to replay: {aborted} that match were aborted (--force replays them, or name them by their ids)"
    if not outcomes:
        return "Nothing to replay: no dead letter matches that was not replayed already"
    numbers = {status: sum(it.status == status for it in outcomes) for status in ("ready", "sent", "refused", "failed")}
    words = {"ready": "would be sent", "sent": "sent", "refused": "refused", "failed": "not confirmed"}
    told = ", ".join(f"{number} {words[status]}" for status, number in numbers.items() if number)
    if aborted:
        told += f"; {aborted} left out that were aborted"
    return f"{told}; nothing was sent (--dry-run)" if dry_run else told


@dlq.command(
    "purge",
    epilog=example(
        "kser dlq purge --group shop --until 30d --bootstrap-servers 127.0.0.1:9092",
        "kser dlq purge --group shop --replayed --dry-run",
        "kser dlq purge 0:12 --group shop --yes",
    ),
)
@click.argument("ids", nargs=-1, metavar="[ID]...")
@_letter_filters
@option("--replayed", is_flag=True, help="Only those that were replayed.")
@option("--all", "everything", is_flag=True, help="All of them.")
@option("--dry-run", is_flag=True, help="Say what would be deleted, and delete nothing.")
@option("--force", is_flag=True, help="Delete what lies before them, too, where it is in the way.")
@option("--yes", is_flag=True, help="Do not ask.")
@_place_options
def purge(
    ids: Sequence[str],
    filters: dict[str, Any],
    replayed: bool,
    everything: bool,
    dry_run: bool,
    force: bool,
    yes: bool,
    group: str | None,
    connection: Connection,
    output: str,
) -> None:
    """Delete dead letters for good, chosen by their ids or by the options of `kser dlq list`.

    Kafka deletes the oldest records of a partition, up to one of them: a dead letter stays when an older one in its
    partition is not to be deleted. A terminal is asked first; without one --yes is needed.
    """
    letters = _letters(connection, group)
    with connection.patience():
        chosen = _chosen(letters, ids, filters, everything or replayed, replayed=True if replayed else None)
        plan = letters.purge(chosen, force=force, dry_run=True)
    if plan.deleted and not dry_run:
        _ask(f"Delete {_told(len(plan.deleted), plan.others)} of group {letters.group} for good?", yes=yes)
        with connection.patience():
            plan = letters.purge(chosen, force=force)
    if output == "json":
        write_json(
            {
                "deleted": [letter.id for letter in plan.deleted],
                "kept": [letter.id for letter in plan.kept],
                "others": plan.others,
                "dry_run": dry_run,
            }
        )
        return
    verb = "would be deleted" if dry_run else "deleted"
    click.echo(f"{_told(len(plan.deleted), plan.others)} {verb}" if plan.deleted else "Nothing to delete")
    if len(plan.kept) == 1:
        click.echo(
            "1 dead letter stays: an older one before it in its partition was not chosen; --force deletes that, too"
        )
    elif plan.kept:
        click.echo(
            f"{len(plan.kept)} dead letters stay: older ones before them in their partitions were not chosen; --force "
            "deletes those, too"
        )


def _told(deleted: int, others: int) -> str:
    return f"{count(deleted, 'dead letter')}{f' ({others} of them not chosen)' if others else ''}"


def _is_terminal() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()


def _ask(question: str, *, yes: bool) -> None:
    if yes:
        return
    if not _is_terminal():
        raise CommandFailed(f"{question} There is no terminal to ask: add --yes", code=MISUSE)
    if not click.confirm(question, err=True):
        raise CommandFailed("Nothing was deleted")


# -- shared ------------------------------------------------------------------------------------------------------------


def _letters(connection: Connection, group: str | None) -> DeadLetters:
    return DeadLetters(connection.transport(), connection.group(group))


def _chosen(
    letters: DeadLetters, ids: Sequence[str], filters: dict[str, Any], everything: bool, *, replayed: bool | None
) -> list[DeadLetter]:
    """The letters named, or chosen. Raises ValidationError when it is neither, or both."""
    if ids and (filters or everything):
        raise ValidationError("Name dead letters by their ids or choose them by options, not both")
    if ids:
        return letters.several(ids)
    if not filters and not everything:
        raise ValidationError(
            "Say which dead letters: by their ids, by --task, --error, --since, --until, --operation, --limit, or --all"
        )
    return letters.list(**filters, replayed=replayed)
