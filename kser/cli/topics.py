"""``kser topics``: create the topics of a group ahead of time, and check them."""

import click

from kser.cli.connection import Connection
from kser.cli.errors import FAILED, CommandFailed
from kser.cli.options import (
    Decorator,
    Function,
    TopicWithPartitions,
    example,
    format_option,
    group_option,
    kafka_options,
    log_level_option,
    need_command,
    option,
)
from kser.cli.output import columns, write_json
from kser.transport import TopicSpec
from kser.worker.topics import DEFAULT_PARTITIONS, check_topics, group_topics, task_topic

__all__ = ["topics"]


def _topic_options(command: Function) -> Function:
    decorators: list[Decorator] = [
        group_option,
        option(
            "--topics",
            type=TopicWithPartitions(many=True),
            metavar="A:6,B",
            help="Task topics, each with its number of partitions if it is not --partitions.",
        ),
        option(
            "--partitions",
            type=click.IntRange(min=1),
            default=DEFAULT_PARTITIONS,
            show_default=True,
            metavar="N",
            help="Partitions of topics that name none.",
        ),
        option(
            "--replication", type=click.IntRange(min=1), metavar="N", help="Copies of each.  [default: the broker's]"
        ),
        kafka_options,
        format_option,
        log_level_option("warning"),
    ]
    for decorator in reversed(decorators):
        command = decorator(command)
    return command


@click.group(
    "topics",
    invoke_without_command=True,
    subcommand_metavar="COMMAND [ARGS]...",
    short_help="Create or check the topics of a group.",
)
@click.pass_context
def topics(ctx: click.Context) -> None:
    """Create or check the topics of a group: those its tasks are sent to, and its own ({group}.events)."""
    need_command(ctx)


@topics.command(
    "create",
    epilog=example("kser topics create --group shop --topics shop:6,mails:3 --bootstrap-servers 127.0.0.1:9092"),
)
@_topic_options
def create(
    group: str | None,
    topics: list[tuple[str, int | None]] | None,
    partitions: int,
    replication: int | None,
    connection: Connection,
    output: str,
) -> None:
    """Create what is missing of the task topics and the group's own, with the right settings.

    What exists stays as it is: `kser topics check` says what is wrong with it.
    """
    specs = _wanted(connection, group, topics, partitions, replication)
    admin = connection.transport().admin()
    with connection.patience():
        orders_taken = admin.can_create()
    if not orders_taken:
        orders = " ".join(f"--topic {spec.name}:{spec.partitions}" for spec in specs)
        raise CommandFailed(
            "This is the embedded broker: it makes topics by itself and takes no orders. To choose their partitions, "
            f"start it with them: kser broker {orders}"
        )
    with connection.patience():
        made = set(admin.create(specs))
        there = admin.describe([spec.name for spec in specs])
    rows = [(s.name, there[s.name].partitions if s.name in there else s.partitions, s.name in made) for s in specs]
    if output == "json":
        write_json({"topics": [{"name": name, "partitions": n, "created": new} for name, n, new in rows]})
        return
    cells = [[name, str(n), "created" if new else "existed"] for name, n, new in rows]
    for line in columns(("topic", "partitions", ""), cells):
        click.echo(line)


@topics.command(
    "check",
    epilog=example("kser topics check --group shop --topics shop:6,mails:3 --bootstrap-servers 127.0.0.1:9092"),
)
@_topic_options
@click.pass_context
def check(
    ctx: click.Context,
    group: str | None,
    topics: list[tuple[str, int | None]] | None,
    partitions: int,
    replication: int | None,
    connection: Connection,
    output: str,
) -> None:
    """Say what is wrong with the topics: partitions, replicas, retention. Exit code 0 when nothing is, else 1."""
    specs = _wanted(connection, group, topics, partitions, replication)
    with connection.patience():
        findings = check_topics(connection.transport().admin(), specs)
    if output == "json":
        write_json({"topics": [spec.name for spec in specs], "findings": findings})
    else:
        for line in findings or [f"{len(specs)} topics are as they should be: {', '.join(s.name for s in specs)}"]:
            click.echo(line)
    if findings:
        ctx.exit(FAILED)


def _wanted(
    connection: Connection,
    group: str | None,
    topics: list[tuple[str, int | None]] | None,
    partitions: int,
    replication: int | None,
) -> list[TopicSpec]:
    tasks = connection.topics_with_partitions(topics)
    specs = [task_topic(name, number or partitions, replication) for name, number in tasks]
    return specs + group_topics(connection.group(group), partitions, replication)
