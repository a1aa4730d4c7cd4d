"""``kser recorder``: keep the history of a group in a storage."""

from typing import Final

import click

from kser.cli.connection import Connection
from kser.cli.options import example, group_option, kafka_options, log_level_option, option
from kser.cli.storage import open_sql, storage_option
from kser.storage.urls import safe_url
from kser.worker.shutdown import stopping_on_signals
from kser.worker.topic_plan import TopicPlan

__all__ = ["recorder"]

#: Longest wait for the broker, in seconds: a new controller may be about to be elected.
_ANSWER_S: Final = 30.0


@click.command(
    "recorder",
    short_help="Keep the history of a group in a database.",
    epilog=example(
        "kser recorder --group shop --storage sqlite:///kser.db --bootstrap-servers 127.0.0.1:9092",
        "kser recorder --group shop --storage postgresql://kser:secret@db/kser --rebuild",
    ),
)
@option(
    "--rebuild",
    is_flag=True,
    help="Forget what the topics still prove, and read them again from their starts. What they do not prove any more "
    "is kept.",
)
@group_option
@storage_option
@kafka_options
@log_level_option("info")
def recorder(rebuild: bool, group: str | None, storage: str, connection: Connection) -> None:
    """Put what the workers of a group tell into a storage, until SIGTERM or Ctrl-C.

    It makes the tables if there are none. Run as many as you like: they share the work. Killed at any moment, nothing
    is lost or stored twice: how far it has come stands in the storage itself.
    """
    from kser.storage.recorder import FEATURES, Recorder  # here: it loads SQL

    named, transport = connection.group(group), connection.transport()
    topics = TopicPlan(group=named, tasks={}, features=FEATURES).names
    with open_sql(storage) as opened:
        running = Recorder(transport, opened, group=named)
        with stopping_on_signals(running.stop):
            with connection.patience():  # told before tables are made
                transport.admin().describe(topics, _ANSWER_S)
            opened.prepare()
            said = f"Recording group {named} into {safe_url(storage)}; Ctrl-C ends it"
            running.run(rebuild=rebuild, on_start=lambda: click.echo(said, err=True))
    click.echo(f"{running.recorded} record(s) stored", err=True)
