"""Times as people write them on a command line."""

import re
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import click

__all__ = ["Moment"]

_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


class Moment(click.ParamType):  # type: ignore[type-arg]  # not generic before click 8.4
    """``2h`` (ago), ``2026-07-29`` or ``2026-07-29T18:00`` (of this machine's time zone) -> aware datetime."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> datetime:
        """The moment."""
        if isinstance(value, datetime):
            return value
        text = str(value).strip()
        try:
            if found := re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)\s*([smhdw])", text.lower()):
                return datetime.now(UTC) - timedelta(seconds=float(found[1]) * _UNITS[found[2]])
            return datetime.fromisoformat(text).astimezone()
        except (ValueError, OverflowError):
            self.fail(
                f"{value!r} is no time: write how long ago, as in 90s, 15m, 2h or 7d, or a date, as in 2026-07-29 or "
                "2026-07-29T18:00",
                param,
                ctx,
            )
