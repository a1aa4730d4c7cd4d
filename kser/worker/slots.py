"""Placeholder until the helper's file lands."""

import contextlib
import os
import socket
import types


@contextlib.contextmanager
def take_slot(group, name=None):
    """A slot."""
    yield types.SimpleNamespace(id=name or f"{socket.gethostname()}-{os.getpid()}")
