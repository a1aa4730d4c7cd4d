"""``kser topics``: create the topics of a group ahead of time, and check them."""

from collections.abc import Sequence
from dataclasses import asdict

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
from kser.errors import ConfigurationError
from kser.worker.topic_findings import Finding, count
from kser.worker.topic_plan import DEFAULT_PARTITIONS, TopicPlan
from kser.worker.topics import check_topics, create_topics

__all__ = ["topics"]

_COLOURS = {"error": "red", "warning": "yellow"}


def _topic_options(partitions_help: str, replication_help: str) -> Decorator:
    decorators: list[Decorator] = [
        group_option,
        option(
            "--topics",
            type=TopicWithPartitions(many=True),
            metavar="A:6,B",
            help="Task topics, each with its number of partitions if it matters.",
        ),
        option("--partitions", type=click.IntRange(min=1), metavar="N", help=partitions_help),
        option("--replication", type=click.IntRange(min=1), metavar="N", help=replication_help),
        kafka_options,
        format_option,
        log_level_option("warning"),
    ]

    def decorate(command: Function) -> Function:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return decorate


@click.group(
    "topics",
    invoke_without_command=True,
    subcommand_metavar="COMMAND [ARGS]...",
    short_help="Create or check the topics of a group.",
    epilog=example(
        "kser topics create --group shop --topics shop:6,mails:3",
        "kser topics check --group shop --topics shop:6,mails:3",
    ),
)
@click.pass_context
def topics(ctx: click.Context) -> None:
    """Create or check the topics of a group: those its tasks are sent to, and its own ({group}.events, ...)."""
    need_command(ctx)


@topics.command(
    "create",
    epilog=example(
        "kser topics create --group shop --topics shop:6,mails:3 --bootstrap-servers 127.0.0.1:9092",
        "kser topics create --group shop --topics shop:24 --replication 3 --config-file kser.yml",
    ),
)
@_topic_options(
    f"Partitions of topics for which none are said.  [default: {DEFAULT_PARTITIONS}]",
    "Copies of each.  [default: the broker's, and for the group's own as many as its task topics have]",
)
def create(
    group: str | None,
    topics: list[tuple[str, int | None]] | None,
    partitions: int | None,
    replication: int | None,
    connection: Connection,
    output: str,
) -> None:
    """Create what is missing of the task topics and the group's own, with the right settings.

    What exists stays as it is: `kser topics check` says what is wrong with it.
    """
    plan = _plan(connection, group, topics, partitions, replication)
    admin = connection.transport().admin()
    with connection.patience():
        if not admin.can_create():
            raise CommandFailed(
                "This is the embedded broker: it makes topics by itself and takes no orders. To choose their "
                f"partitions, start it with them: {plan.broker_command({})}"
            )
        there, made = create_topics(admin, plan)
    rows = [there[name] for name in plan.names]
    if output == "json":
        write_json(
            {
                "topics": [
                    {
                        "name": t.name,
                        "partitions": t.partitions,
                        "replication": t.replication,
                        "created": t.name in made,
                    }
                    for t in rows
                ]
            }
        )
    else:
        cells = [
            [t.name, str(t.partitions), str(t.replication), "created" if t.name in made else "existed"] for t in rows
        ]
        for line in columns(("topic", "partitions", "replicas", ""), cells):
            click.echo(line)
    with connection.patience():
        wrong = check_topics(admin, plan)
    if wrong:
        click.echo(f"kser: {count(len(wrong), 'finding')}, told by: {plan.check_command()}", err=True)


@topics.command(
    "check",
    epilog=example("kser topics check --group shop --topics shop:6,mails:3 --bootstrap-servers 127.0.0.1:9092"),
)
@_topic_options(
    "Partitions that topics for which none are said have to have.  [default: any number]",
    "Copies that each has to have.  [default: any number]",
)
@click.pass_context
def check(
    ctx: click.Context,
    group: str | None,
    topics: list[tuple[str, int | None]] | None,
    partitions: int | None,
    replication: int | None,
    connection: Connection,
    output: str,
) -> None:
    """Say what is wrong with the topics (partitions, replicas, retention and other settings) and how to cure it.

    An error is what a worker refuses to start with, or what differs from what is said here; a warning is what works
    until something happens. Exit code 1 when there is an error, else 0.
    """
    plan = _plan(connection, group, topics, partitions, replication)
    admin = connection.transport().admin()
    with connection.patience():
        embedded = not admin.can_create()
        findings = check_topics(admin, plan)
    if embedded:
        click.echo("kser: This is the embedded broker, which keeps no settings: only partitions were checked", err=True)
    errors = sum(found.level == "error" for found in findings)
    if output == "json":
        write_json([asdict(found) for found in findings])
    else:
        for line in _lines(findings):
            click.echo(line)
        click.echo(_sum(len(plan.topics), errors, len(findings) - errors))
    if errors:
        ctx.exit(FAILED)


def _lines(findings: Sequence[Finding]) -> list[str]:
    """The findings, errors first; a cure is told once, below all that it cures."""
    cures: dict[str, list[Finding]] = {}
    for found in sorted(findings, key=lambda found: found.level):
        cures.setdefault(found.cure, []).append(found)
    width = max((len(found.topic) for found in findings), default=0)
    lines = []
    for cure, cured in cures.items():
        for found in cured:
            word = click.style(f"{found.level:7}", fg=_COLOURS[found.level])
            lines.append(f"{word}  {found.topic:{width}}  {found.finding}")
        lines.append(f"{'':7}  {cure}")
    return lines


def _sum(topics: int, errors: int, warnings: int) -> str:
    if not errors and not warnings:
        return f"{count(topics, 'topic')}, all as they should be"
    return f"{count(topics, 'topic')}: {count(errors, 'error')}, {count(warnings, 'warning')}"


def _plan(
    connection: Connection,
    group: str | None,
    topics: list[tuple[str, int | None]] | None,
    partitions: int | None,
    replication: int | None,
) -> TopicPlan:
    tasks = connection.topics_with_partitions(topics)
    if patterns := [name for name, _ in tasks if name.startswith("^")]:
        raise ConfigurationError(f"{', '.join(patterns)} is a pattern: name the task topics with --topics a:6,b")
    return TopicPlan(
        group=connection.group(group),
        tasks=dict(tasks),
        partitions=partitions,
        replication=replication,
        servers=connection.config["bootstrap.servers"],
    )
