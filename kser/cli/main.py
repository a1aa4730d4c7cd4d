"""The command ``kser``."""

import contextlib
import io
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import click

from kser.cli.broker import broker
from kser.cli.control import abort, pause, paused, resume
from kser.cli.db import db
from kser.cli.demo import demo
from kser.cli.dev import dev
from kser.cli.dlq import dlq
from kser.cli.errors import FAILED, explain, interrupt
from kser.cli.install import install, uninstall
from kser.cli.lag import lag
from kser.cli.launch import launch
from kser.cli.operations import operations
from kser.cli.options import example, format_option, need_command, outer_log_level_option
from kser.cli.prune import prune
from kser.cli.recorder import recorder
from kser.cli.send import send
from kser.cli.task_logs import logs
from kser.cli.tasks import tasks
from kser.cli.topics import topics
from kser.cli.web import web
from kser.cli.worker import worker
from kser.cli.workers import workers
from kser.version import kser_version

__all__ = ["cli", "main"]


class _Group(click.Group):
    """Tells each error in one line, and ends with an exit code that means something."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Run, and exit: 0 done, 1 failed, 2 misused, 130 interrupted."""
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
        try:
            code = super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
            if sys.stdout is not None:
                sys.stdout.flush()
        except BrokenPipeError:
            code = _reader_is_gone()
        except (Exception, KeyboardInterrupt) as exc:  # noqa: BLE001 - the last resort: nobody is shown a traceback
            code = explain(exc)
        sys.exit(code if isinstance(code, int) else 0)

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's interface
        """In the order of use, not of the alphabet."""
        return list(self.commands)


def _reader_is_gone() -> int:
    """As in ``kser tasks app.py | head -1``: nothing to say, and nobody to say it to."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is still buffered goes nowhere, without a word
    return FAILED


def _print_version(ctx: click.Context, param: click.Parameter, value: bool) -> None:  # noqa: ARG001
    if value:
        click.echo(f"kser {kser_version()}")
        ctx.exit()


@click.group(
    cls=_Group,
    invoke_without_command=True,
    subcommand_metavar="COMMAND [ARGS]...",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog=example(
        "kser demo",
        "kser broker --topic shop:6",
        "kser worker app.py:registry --topics shop --bootstrap-servers 127.0.0.1:9092",
    ),
)
@click.option(
    "--version",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_print_version,
    help="Show the version and exit.",
)
@format_option
@outer_log_level_option
@click.pass_context
def cli(ctx: click.Context, output: str, log_level: str | None) -> None:  # noqa: ARG001 - the commands look at them
    """Kafka message-driven operations: run workers, launch operations, see them advance.

    Every option can be set by the variable that --help shows. Exit codes: 0 done, 1 failed, 2 misused.
    KSER_DEBUG=1 shows tracebacks.
    """
    need_command(ctx)


for _command in (demo, dev, worker, launch, send, operations, dlq, tasks, topics, web, broker):
    cli.add_command(_command)
for _command in (workers, lag, abort, pause, resume, paused):
    cli.add_command(_command)
for _command in (logs, recorder, install, uninstall, db, prune):
    cli.add_command(_command)


def main() -> NoReturn:
    """Entry point of the console script."""
    _open_standard_files()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # what a task printed is shown, whatever the terminal takes
    if (
        signal.getsignal(signal.SIGINT) is signal.default_int_handler
    ):  # and not ignored, as in the background of a shell
        signal.signal(signal.SIGINT, interrupt)
    cli(prog_name="kser")
    raise AssertionError("unreachable: the group exits")


def _open_standard_files() -> None:
    """Fill closed descriptors 0 to 2: else the next pipe or socket takes such a number, and prints go into it."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
