"""ApiBlueprint: a group of resources whose arguments are checked strictly."""

import json
from typing import Any, NoReturn

import flask
from flask_smorest import Blueprint
from marshmallow import RAISE, Schema
from webargs.flaskparser import FlaskParser

__all__ = ["ApiBlueprint"]


class _Parser(FlaskParser):
    """Refuses arguments that do not exist, and JSON that says what JSON cannot: NaN, nesting without end."""

    DEFAULT_UNKNOWN_BY_LOCATION: dict[str, str | None] = {"query": RAISE, "json": RAISE}  # noqa: RUF012 - webargs' name

    def load_json(self, req: flask.Request, schema: Schema) -> Any:  # noqa: ARG002 - the interface of webargs
        raw = req.get_data(cache=True)
        if not raw:
            return {}
        if not req.is_json:
            flask.abort(415, "Send the header Content-Type: application/json")
        try:
            return json.loads(raw, parse_constant=_refuse)
        except (ValueError, RecursionError) as exc:
            flask.abort(400, f"The body is no JSON: {exc}")


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"JSON has no {constant}")


class ApiBlueprint(Blueprint):
    """A group of resources."""

    ARGUMENTS_PARSER = _Parser()
