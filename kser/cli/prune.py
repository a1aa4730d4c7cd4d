"""``kser prune``: delete old log records."""

import logging
import re
from typing import Any

import click

from kser.cli.options import example, format_option, log_level_option, option
from kser.cli.output import write_json
from kser.cli.storage import need_file, open_storage, storage_option

__all__ = ["prune"]

_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_AGE = re.compile(r"(\d+(?:\.\d+)?)\s*([smhdw]?)\Z")


class _Age(click.ParamType):  # type: ignore[type-arg]  # not generic before click 8.4
    """``30d`` -> seconds."""

    name = "age"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The seconds."""
        if isinstance(value, float):
            return value
        found = _AGE.match(value.strip())
        if found is None:
            self.fail(f"{value!r}: write seconds, or a number with s, m, h, d or w behind it, as in 30d", param, ctx)
        return float(found[1]) * _UNITS[found[2]]


@click.command(
    "prune",
    short_help="Delete old log records from a storage.",
    epilog=example(
        "kser prune --storage sqlite:///kser.db --max-age 30d",
        "kser prune --storage sqlite:///kser.db --max-age 7d --level debug --job shop.Order",
    ),
)
@option("--max-age", type=_Age(), metavar="AGE", help="Only what is older: seconds, or 90m, 12h, 30d, 4w.")
@option(
    "--level",
    type=click.Choice(["debug", "info", "warning", "error", "critical"], case_sensitive=False),
    help="Only this level and those below.",
)
@option("--job", metavar="NAME", help="Only of this job, operation or task: its name in messages.")
@option("--build", type=int, metavar="N", help="Only of the build with this number.")
@option("--all", "everything", is_flag=True, help="All log records, when nothing else says which.")
@storage_option
@format_option
@log_level_option("warning")
def prune(
    max_age: float | None,
    level: str | None,
    job: str | None,
    build: int | None,
    everything: bool,
    storage: str,
    output: str,
) -> None:
    """Delete the log records that meet all of the given conditions. Operations, results and events stay."""
    if not everything and max_age is None and level is None and job is None and build is None:
        raise click.UsageError("Say which log records: --max-age, --level, --job or --build, or --all of them")
    number = None if level is None else logging.getLevelNamesMapping()[level.upper()]
    with open_storage(storage) as opened:
        need_file(opened)
        deleted = opened.prune_log_messages(job_id=job, build_id=build, max_age=max_age, level=number)
    if output == "json":
        write_json({"deleted": deleted})
    else:
        click.echo(f"{deleted} log record(s) deleted")
