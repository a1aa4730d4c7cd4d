"""MemoryStorage: a storage that is gone with its process."""

from kser.storage.sql import SqlStorage

__all__ = ["MemoryStorage"]


class MemoryStorage(SqlStorage):
    """See StorageBase. An sqlite database in memory, with its tables: the same code, so it behaves the same.

    Args:
        url: ``memory:``, with ``?table_prefix=x_`` if need be. Each object has a database of its own.
    """

    def __init__(self, url: str = "memory:") -> None:
        super().__init__(url)
        self.install()
