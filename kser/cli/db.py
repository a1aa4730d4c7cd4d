"""``kser db``: the version of a storage's tables."""

import click

from kser.cli.options import example, format_option, log_level_option, need_command
from kser.cli.output import write_json
from kser.cli.storage import open_sql, storage_option
from kser.storage.urls import safe_url

__all__ = ["db"]


@click.group(
    "db",
    invoke_without_command=True,
    subcommand_metavar="COMMAND [ARGS]...",
    short_help="Bring the tables of a storage to a new release.",
    epilog=example("kser db upgrade --storage sqlite:///kser.db"),
)
@click.pass_context
def db(ctx: click.Context) -> None:
    """The tables of a storage."""
    need_command(ctx)


@db.command("upgrade", epilog=example("kser db upgrade --storage postgresql://kser:secret@127.0.0.1:5432/kser"))
@storage_option
@format_option
@log_level_option("warning")
def upgrade(storage: str, output: str) -> None:
    """Bring the tables to the version of this release of kser, in one transaction; make them if there are none."""
    with open_sql(storage) as opened:
        before, newest = opened.version()
        opened.install()
    if output == "json":
        write_json({"storage": safe_url(storage), "before": before, "version": newest})
    elif before == newest:
        click.echo(f"{safe_url(storage)} has version {newest} already")
    else:
        click.echo(f"{safe_url(storage)}: from version {before or 'none'} to {newest}")
