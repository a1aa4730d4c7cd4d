"""``kser tasks``: what is registered."""

import inspect
from typing import Any

import click

from kser.cli.options import example, format_option, log_level_option, registry_argument
from kser.cli.output import columns, write_json
from kser.entry import Entrypoint
from kser.loading import load, names_of
from kser.sequencing.operation import Operation
from kser.sequencing.registry import OperationRegistry
from kser.sequencing.task import Task

__all__ = ["tasks"]


@click.command(
    "tasks",
    short_help="Show what a registry holds.",
    epilog=example("kser tasks shop.tasks:registry", "kser tasks app.py --format json"),
)
@registry_argument
@format_option
@log_level_option("warning")
def tasks(registry: str, output: str) -> None:
    """Show the tasks and operations of a registry: names in messages, topics, required parameters."""
    loaded = load(registry)
    rows = [_describe(loaded, cls, names) for cls, names in names_of(loaded).items()]
    rows.sort(key=lambda row: (row["kind"], row["name"]))
    if output == "json":
        write_json(rows)
    elif not rows:
        click.echo(f"Nothing is registered in {registry}")
    else:
        for line in columns(("name", "kind", "topic", "required", ""), [_cells(row) for row in rows]):
            click.echo(line)


def _describe(registry: OperationRegistry, cls: type[Entrypoint], names: list[str]) -> dict[str, Any]:
    operation = issubclass(cls, Operation)
    owners: list[type[Entrypoint]] = [cls, *cls.TASKS] if issubclass(cls, Operation) else [cls]
    return {
        "name": names[0],
        "aliases": names[1:],
        "kind": "operation" if operation else "task",
        "topic": (cls.topic if issubclass(cls, Task) else None) or registry.topic,
        "required": list(dict.fromkeys(name for owner in owners for name in owner.REQUIRED_FIELDS)),
        "doc": next(iter(inspect.cleandoc(cls.__doc__ or "").splitlines()), ""),
    }


def _cells(row: dict[str, Any]) -> list[str]:
    return [row["name"], row["kind"], row["topic"] or "-", ", ".join(row["required"]) or "-", row["doc"]]
