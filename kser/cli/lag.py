"""``kser lag``: what the workers of a group have not done yet."""

from dataclasses import asdict

import click

from kser.cli.connection import Connection
from kser.cli.options import (
    TopicWithPartitions,
    example,
    format_option,
    group_option,
    kafka_options,
    log_level_option,
    option,
)
from kser.cli.output import columns, write_json
from kser.worker.lag import EXACT, lag_of

__all__ = ["lag"]


@click.command(
    "lag",
    short_help="What the workers of a group have not done yet.",
    epilog=example("kser lag --group shop --topics shop,mails --bootstrap-servers 127.0.0.1:9092"),
)
@option("--topics", type=TopicWithPartitions(many=True), metavar="A,B", help="Task topics.")
@group_option
@kafka_options
@format_option
@log_level_option("warning")
def lag(topics: list[tuple[str, int | None]] | None, group: str | None, connection: Connection, output: str) -> None:
    """Count the messages of each partition that are not finished, whether they run, wait, or were not taken yet.

    It is not the span behind the committed offset that Kafka's tools show: what was finished out of order and the
    markers of transactions are no messages to be done.
    """
    named, names = connection.group(group), list(dict.fromkeys(connection.topics(topics)))
    transport = connection.transport()
    with connection.patience():
        found = lag_of(transport, named, names)
    if output == "json":
        write_json([asdict(each) for each in found])
        return
    rows = [
        (
            each.topic,
            str(each.partition),
            str(each.committed) if each.committed >= 0 else "-",
            str(each.end),
            f"{'' if each.exact else '<= '}{each.unfinished}",
            str(each.parked),
        )
        for each in found
    ]
    for line in columns(("topic", "partition", "committed", "end", "unfinished", "of them parked"), rows):
        click.echo(line)
    exact = all(each.exact for each in found)
    click.echo(f"{'' if exact else 'At most '}{sum(each.unfinished for each in found)} unfinished")
    if not exact:
        click.echo(f"kser: more than {EXACT} messages of a partition are not counted one by one", err=True)
