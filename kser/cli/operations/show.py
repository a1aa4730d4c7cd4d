"""``kser operations show``: one operation, what became of each of its tasks, and why."""

import click

from kser.cli.operations.view import details
from kser.cli.options import example, format_option, log_level_option, option
from kser.cli.output import write_json
from kser.cli.storage import open_history, storage_option
from kser.masking import mask

__all__ = ["show"]


@click.command(
    "show",
    short_help="One of them: its tasks, its error, where that came from.",
    epilog=example(
        "kser operations show 5f0c6d4e --storage sqlite:///kser.db",
        "kser operations show 5f0c6d4e-9a3b-4f0e-8a53-0d6f3f1f2b11 --storage sqlite:///kser.db --format json",
    ),
)
@click.argument("uuid")
@option(
    "--traceback",
    type=click.Choice(["full", "short", "none"]),
    default="full",
    show_default=True,
    help="Of what failed: with the code around each line and the local variables, without them, or none.",
)
@storage_option
@format_option
@log_level_option("warning")
def show(uuid: str, traceback: str, storage: str, output: str) -> None:
    """Show the operation or task UUID: its parameters, its tasks, its result, the traceback of what failed.

    The first 8 characters will do, when no other begins so. Values under names that look secret are masked.
    """
    with open_history(storage) as history:
        found = history.get_operation(history.complete_uuid(uuid))
    if output == "json":
        write_json(mask(found.to_json(details=True)))
        return
    for line in details(found, traceback):
        click.echo(line)
