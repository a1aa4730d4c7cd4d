"""``kser operations resume``: run again what failed or was aborted."""

from typing import Any

import click

from kser.cli.connection import Connection
from kser.cli.errors import CommandFailed
from kser.cli.letters_view import outcome_lines
from kser.cli.options import (
    JsonObject,
    example,
    format_option,
    group_option,
    kafka_options,
    log_level_option,
    option,
)
from kser.cli.output import write_json
from kser.dead_letters import DeadLetters
from kser.errors import StatusError
from kser.letters_json import outcome_as_json

__all__ = ["resume"]


@click.command(
    "resume",
    short_help="Run it again from the step that failed it.",
    epilog=example(
        "kser operations resume 5f0c6d4e-9a3b-4f0e-8a53-0d6f3f1f2b11 --group shop --bootstrap-servers 127.0.0.1:9092",
        "kser operations resume 5f0c6d4e-9a3b-4f0e-8a53-0d6f3f1f2b11 --group shop --params '{\"amount\": 12}'",
        "kser operations resume 5f0c6d4e-9a3b-4f0e-8a53-0d6f3f1f2b11 --group shop --from Ship --dry-run",
    ),
)
@click.argument("uuid")
@option(
    "--params", type=JsonObject(), metavar="JSON", help="Parameters to change: a JSON object, @FILE, or - for stdin."
)
@option(
    "--from",
    "step",
    metavar="STEP",
    help="Begin at this step and not at the failed one: its name, its class alone, or its position (0 is the first).",
)
@option("--dry-run", is_flag=True, help="Say what would be sent, and send nothing.")
@group_option
@kafka_options
@format_option
@log_level_option("warning")
def resume(
    uuid: str,
    params: dict[str, Any] | None,
    step: str | None,
    dry_run: bool,
    group: str | None,
    connection: Connection,
    output: str,
) -> None:
    """Run an operation again from the step that failed it, or at which it was aborted, with the results it had.

    It is a new run of the same operation. Refused, with the reason, while the last run goes on, and when it ended well.
    Resumed twice at once, it is run once.

    Of the UUID its first 8 characters will do, when no other begins so.

    A later step leaves out what lies between; an earlier one is run again with the message that it had.
    """
    letters = DeadLetters(connection.transport(), connection.group(group))
    try:
        with connection.patience():
            outcome = letters.resume(letters.complete(uuid), params=params, step=step, dry_run=dry_run)
    except StatusError as exc:  # a ValidationError, but of the operation, not of the command line
        raise CommandFailed(str(exc.message)) from exc
    if output == "json":
        write_json(outcome_as_json(outcome))
    else:
        for line in outcome_lines([outcome]):
            click.echo(line)
        if dry_run:
            click.echo("Nothing was sent (--dry-run)")
