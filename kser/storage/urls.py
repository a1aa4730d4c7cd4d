"""Storages by URL."""

import importlib
import os
import re

from kser.errors import ConfigurationError
from kser.masking import MASK, looks_secret
from kser.storage.base import StorageBase
from kser.storage.views import Execution

__all__ = ["STORAGE_VARIABLE", "get_storage_from_url", "load_execution", "safe_url"]

#: Environment variable with the URL of the storage.
STORAGE_VARIABLE = "KSER_STORAGE"

#: Scheme -> module and class. Loaded when one is asked for: SQLAlchemy is not light.
_KNOWN = {
    "memory": ("kser.storage.memory", "MemoryStorage"),
    "sqlite": ("kser.storage.sql", "SqlStorage"),
    "postgresql": ("kser.storage.sql", "SqlStorage"),
    "postgresql+psycopg": ("kser.storage.sql", "SqlStorage"),
}
_FORMS = "memory:, sqlite:///FILE, postgresql://USER:PASSWORD@HOST:PORT/DB, or package.module:Class+scheme://..."
_PASSWORD = re.compile(r"(://[^:/@]*):.*@")
_OPTION = re.compile(r"([?&]([^?&=]*)=)[^&]*")


def get_storage_from_url(url: str) -> StorageBase:
    """The storage at a URL. Nothing is connected yet.

    ``memory:``, ``sqlite:///relative.db``, ``sqlite:////absolute.db``, ``postgresql://user:password@host:5432/db``
    (user, password and database URL-encoded), each with ``?table_prefix=x_`` if need be (default ``jobcontrol_``);
    ``package.module:Class+scheme://...`` loads a class of yours and calls its ``from_url("scheme://...")``.

    Raises ConfigurationError for anything else.
    """
    if not isinstance(url, str) or not url:
        raise ConfigurationError(f"storage={url!r} is no URL: write {_FORMS}")
    before, plus, rest = url.partition("+")
    if plus and ":" in before and "://" not in before:
        return _load(before).from_url(rest)
    scheme = url.partition(":")[0].lower()
    if scheme not in _KNOWN or ":" not in url:
        raise ConfigurationError(
            f"Unknown storage {safe_url(url)!r}: use one of {', '.join(f'{name}:' for name in _KNOWN)} as in {_FORMS}"
        )
    module, name = _KNOWN[scheme]
    return _load(f"{module}:{name}").from_url(url)


def load_execution(uuid: str, storage: StorageBase | str | None = None) -> Execution:
    """What a storage knows of the operation or task with this uuid.

    Args:
        uuid: of the operation or task.
        storage: where to look, or its URL; None: at the URL in KSER_STORAGE.

    Raises ConfigurationError when there is no storage, NotFound when it does not know the uuid, StorageError.
    """
    if isinstance(storage, StorageBase):
        return storage.history.get_operation(uuid)
    url = storage or os.environ.get(STORAGE_VARIABLE)
    if not url:
        raise ConfigurationError(
            f"{uuid} cannot be looked up: no storage is configured. Set {STORAGE_VARIABLE} to a URL such as "
            "sqlite:///kser.db, or call registry.configure(storage=...)"
        )
    opened = get_storage_from_url(url)
    try:
        return opened.history.get_operation(uuid)
    finally:
        opened.close()


def safe_url(url: str) -> str:
    """The URL without its password, wherever in it that stands."""
    url = _PASSWORD.sub(r"\1:********@", url)
    return _OPTION.sub(lambda found: found[1] + MASK if looks_secret(found[2]) else found[0], url)


def _load(name: str) -> type[StorageBase]:
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as exc:
        raise ConfigurationError(f"Storage class {name} cannot be loaded: {exc}") from exc
    if not isinstance(found, type) or not issubclass(found, StorageBase):
        raise ConfigurationError(f"Storage class {name} is no class derived from kser.storage.StorageBase")
    return found
