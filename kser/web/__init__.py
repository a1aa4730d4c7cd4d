"""The REST API of a group: create_app() makes the Flask program that serves it."""

from kser.web.app import create_app
from kser.web.site import WebSettings

__all__ = ["WebSettings", "create_app"]
