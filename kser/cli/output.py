"""What commands print: JSON for programs, aligned columns for people."""

import json
from collections.abc import Sequence
from typing import Any

import click
import orjson

from kser import results

__all__ = ["columns", "write_json"]


def write_json(document: Any) -> None:
    """One JSON document, on one line, at once, in UTF-8 whatever the terminal's encoding."""
    try:
        text = orjson.dumps(document, default=_plain, option=orjson.OPT_NON_STR_KEYS)
    except TypeError:  # large numbers, lone surrogates: a task may give what orjson refuses
        text = json.dumps(results.json_safe(document), separators=(",", ":")).encode()
    click.echo(text)


def _plain(value: Any) -> Any:
    return results.dump(value) if isinstance(value, results.Result) else repr(value)


def columns(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """``rows`` below ``header``, as lines with aligned columns."""
    table = [[name.upper() for name in header], *rows]
    widths = [max(len(row[at]) for row in table) for at in range(len(header))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
