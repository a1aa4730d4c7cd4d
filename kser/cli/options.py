"""Options that commands share: one spelling, one variable, one meaning each."""

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from kser.cli import logs
from kser.cli.connection import Connection, Drivers, parse_topic
from kser.cli.errors import MISUSE
from kser.transport.names import TOPIC_NAME_RULE, is_topic_name

__all__ = [
    "EPILOG",
    "Decorator",
    "JsonObject",
    "TopicName",
    "TopicWithPartitions",
    "example",
    "format_option",
    "group_option",
    "kafka_options",
    "key_option",
    "log_level_option",
    "need_command",
    "option",
    "outer_log_level_option",
    "params_option",
    "registry_argument",
    "topic_option",
]

#: A command function before or after an option was put on it.
Function = Callable[..., Any]
Decorator = Callable[[Function], Function]

EPILOG = "\b\nExample:\n"


def example(*lines: str) -> str:
    """The epilog of a command's help: these lines as they are, to be copied."""
    return EPILOG + "\n".join(f"  {line}" for line in lines)


def option(*declarations: str, variable: str = "", **settings: Any) -> Decorator:
    """click.option() which also reads KSER_<NAME>, or the ``variable`` given, and says so in --help."""
    long = next(d for d in declarations if d.startswith("--"))
    name = long.split("/")[0].removeprefix("--")
    variable = variable or "KSER_" + name.replace("-", "_").upper()
    return click.option(*declarations, envvar=variable, show_envvar=True, **settings)


def need_command(ctx: click.Context) -> None:
    """Show the help of a group that was called without a command, and end as misused."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help(), err=True)
        ctx.exit(MISUSE)


# -- kinds of values -------------------------------------------------------------------------------------------------


class TopicWithPartitions(click.ParamType):  # type: ignore[type-arg]  # not generic before click 8.4
    """``a:6`` -> ("a", 6); ``a`` -> ("a", None). With ``many``, a list of these from ``a:6,b``."""

    def __init__(self, *, many: bool = False) -> None:
        self.many = many
        self.name = "name:partitions,..." if many else "name:partitions"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The topics in ``value``."""
        if not isinstance(value, str):
            return value
        try:
            if not self.many:
                return parse_topic(value)
            return [parse_topic(part) for part in value.split(",") if part.strip()] or self.fail(
                f"{value!r} has no name in it: write a,b", param, ctx
            )
        except ValueError as exc:
            self.fail(str(exc), param, ctx)


class TopicName(click.ParamType):  # type: ignore[type-arg]  # not generic before click 8.4
    """The name of one topic."""

    name = "topic"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The name."""
        if not is_topic_name(value):
            self.fail(f"{value!r} {TOPIC_NAME_RULE}", param, ctx)
        return str(value)


class JsonObject(click.ParamType):  # type: ignore[type-arg]  # not generic before click 8.4
    """JSON text, ``@FILE`` or ``-`` (stdin) -> dict."""

    name = "json"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict[str, Any]:
        """The object in ``value``. What is wrong is told by its place, not by its text, which may hold a secret."""
        if isinstance(value, dict):
            return value
        text, source = self._read(value, param, ctx)
        try:
            data = json.loads(text, parse_constant=self._refuse)
        except json.JSONDecodeError as exc:
            shown = "the text" if source == "it" else source
            self.fail(
                f"{shown} is not JSON: {exc.msg} at line {exc.lineno} column {exc.colno}. "
                """Write an object, as in '{"name": "value"}'""",
                param,
                ctx,
            )
        except (ValueError, RecursionError) as exc:
            self.fail(f"{source} cannot be used: {exc}", param, ctx)
        if not isinstance(data, dict):
            self.fail(
                f"{source} is a JSON {_kind(data)}, and parameters have names: write an object, as in "
                """'{"name": "value"}'""",
                param,
                ctx,
            )
        return data

    def _read(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        try:
            if value == "-":
                return _standard_input().decode("utf-8"), "standard input"
            if value.startswith("@"):
                return Path(value[1:]).read_text("utf-8"), value[1:]
        except OSError as exc:
            self.fail(f"{value[1:] or 'standard input'} cannot be read: {exc.strerror or exc}", param, ctx)
        except UnicodeDecodeError as exc:
            self.fail(f"{value[1:] or 'standard input'} is not UTF-8 text: {exc.reason} at {exc.start}", param, ctx)
        return value, "it"

    @staticmethod
    def _refuse(constant: str) -> None:
        raise ValueError(f"JSON has no {constant}")


def _standard_input() -> bytes:
    return sys.stdin.buffer.read() if sys.stdin is not None else b""


def _kind(data: Any) -> str:
    return {list: "array", str: "text", bool: "boolean", type(None): "null"}.get(type(data), "number")


# -- options ---------------------------------------------------------------------------------------------------------


def kafka_options(function: Function) -> Function:
    """--bootstrap-servers, -X and --config-file; the command gets ``connection``, a Connection."""

    @option(
        "--bootstrap-servers",
        metavar="HOST:PORT,...",
        help="Addresses of Kafka brokers. `kser broker` starts one without installing anything.",
    )
    @click.option(
        "-X",
        "properties",
        multiple=True,
        metavar="NAME=VALUE",
        help="Any librdkafka property; may be repeated.  [env var: KSER_KAFKA_<NAME>, dots as underscores]",
    )
    @option(
        "--config-file",
        type=click.Path(path_type=Path),
        help="YAML file: librdkafka properties under `kafka:`, and `topics:`. Options and variables win over it.",
    )
    @functools.wraps(function)
    def wrapper(
        *args: Any,
        bootstrap_servers: str | None,
        properties: tuple[str, ...],
        config_file: Path | None,
        **kwargs: Any,
    ) -> Any:
        ctx = click.get_current_context()
        typed = ctx.get_parameter_source("bootstrap_servers") is ParameterSource.COMMANDLINE
        connection = Connection(
            ctx.ensure_object(Drivers),
            bootstrap_servers=bootstrap_servers,
            typed=typed,
            properties=properties,
            config_file=config_file,
        )
        return function(*args, connection=connection, **kwargs)

    return wrapper


def group_option(function: Function) -> Function:
    """--group; None when nobody said it: Connection.group() then decides."""
    return option("--group", metavar="NAME", help="Consumer group; its topics are named after it.  [default: kser]")(
        function
    )


def topic_option(function: Function) -> Function:
    """--topic, for what is sent."""
    return option("--topic", type=TopicName(), metavar="NAME", help="Topic to send to.")(function)


def key_option(function: Function) -> Function:
    """--message-key, for what is sent."""
    return option(
        "--message-key", metavar="TEXT", help="Message key (a customer, an order): what has the same stays in order."
    )(function)


def params_option(function: Function) -> Function:
    """--params, a JSON object."""
    return option(
        "--params",
        type=JsonObject(),
        default="{}",
        metavar="JSON",
        help="Parameters: a JSON object, @FILE, or - for stdin.",
    )(function)


def registry_argument(function: Function) -> Function:
    """The argument REGISTRY, as load.load() takes it."""
    return click.argument("registry", metavar="MODULE_OR_FILE:REGISTRY")(function)


def format_option(function: Function) -> Function:
    """--format, which the command gets as ``output``; one given to `kser` itself counts for all commands."""
    return option(
        "--format",
        "output",
        type=click.Choice(["human", "json"]),
        default="human",
        show_default=True,
        callback=lambda ctx, param, value: _effective(ctx, param, value)[0],
        help="How data is printed.",
    )(function)


def log_level_option(default: str) -> Decorator:
    """--log-level; logging is set up when the command line has been read."""

    def configure(ctx: click.Context, param: click.Parameter, value: str) -> None:
        level, source = _effective(ctx, param, value)
        logs.configure(level or default, chosen=source is not ParameterSource.DEFAULT)

    return _log_level(default=default, show_default=True, expose_value=False, callback=configure)


def outer_log_level_option(function: Function) -> Function:
    """--log-level of `kser` itself: counts for all commands, and sets up nothing."""
    return _log_level()(function)


def _log_level(**settings: Any) -> Decorator:
    levels = click.Choice(["debug", "info", "warning", "error"], case_sensitive=False)
    return option("--log-level", type=levels, help="Log lines from this level on, to stderr.", **settings)


def _effective(ctx: click.Context, param: click.Parameter, value: Any) -> tuple[Any, ParameterSource | None]:
    """The value and where it is from: one typed for `kser` itself counts when none was typed for the command."""
    name = param.name or ""
    source = ctx.get_parameter_source(name)
    root = ctx.find_root()
    if source is not ParameterSource.COMMANDLINE and root.get_parameter_source(name) is ParameterSource.COMMANDLINE:
        return root.params[name], ParameterSource.COMMANDLINE
    return value, source
