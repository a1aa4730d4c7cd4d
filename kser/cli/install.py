"""``kser install`` and ``kser uninstall``: the tables of a storage."""

import click

from kser.cli.options import example, log_level_option
from kser.cli.storage import need_file, open_storage, storage_option
from kser.storage.urls import safe_url

__all__ = ["install", "uninstall"]


@click.command(
    "install",
    short_help="Make the tables of a storage.",
    epilog=example("kser install --storage postgresql://kser:secret@127.0.0.1:5432/kser"),
)
@storage_option
@log_level_option("warning")
def install(storage: str) -> None:
    """Make the tables of a storage, or bring them to the version of this release. Doing it again changes nothing."""
    with open_storage(storage) as opened:
        opened.install()
    click.echo(f"Installed: {safe_url(storage)}")


@click.command(
    "uninstall",
    short_help="Drop the tables of a storage.",
    epilog=example("kser uninstall --storage sqlite:///kser.db"),
)
@storage_option
@log_level_option("warning")
def uninstall(storage: str) -> None:
    """Drop the tables of a storage WITH ALL THAT IS IN THEM, without any further warning. Other tables stay."""
    with open_storage(storage) as opened:
        need_file(opened)
        opened.uninstall()
    click.echo(f"Uninstalled: {safe_url(storage)}")
