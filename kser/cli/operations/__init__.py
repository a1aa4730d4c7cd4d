"""``kser operations``: the operations that were launched: list them, look at one, watch, resume and abort it."""

import click

from kser.cli.control import abort
from kser.cli.operations.list import list_
from kser.cli.operations.resume import resume
from kser.cli.operations.show import show
from kser.cli.operations.watch import watch
from kser.cli.options import example, need_command

__all__ = ["operations"]


@click.group(
    "operations",
    invoke_without_command=True,
    subcommand_metavar="COMMAND [ARGS]...",
    short_help="List operations, look at one, watch, resume, abort it.",
    epilog=example(
        "kser operations list --storage sqlite:///kser.db --state failed --since 2h",
        "kser operations show 5f0c6d4e --storage sqlite:///kser.db",
        "kser operations watch 5f0c6d4e-9a3b-4f0e-8a53-0d6f3f1f2b11 --group shop",
        "kser operations resume 5f0c6d4e-9a3b-4f0e-8a53-0d6f3f1f2b11 --group shop",
    ),
)
@click.pass_context
def operations(ctx: click.Context) -> None:
    """Operations that were launched, and tasks that belong to none."""
    need_command(ctx)


for _command in (list_, show, watch, resume, abort):
    operations.add_command(_command)
