"""The release of kser that runs."""

import functools
import importlib.metadata

__all__ = ["kser_version"]


@functools.cache
def kser_version() -> str:
    """The version, as ``1.0.0``; "unknown" when kser is run from its source, not installed."""
    try:
        return importlib.metadata.version("kser")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
