"""What happened, in a database: builds, their logs and progress, the events of operations, the fleet.

Nothing on the way of a message reads it. Importing this package loads no SQL: opening a storage does.
"""

from kser.storage.base import StorageBase
from kser.storage.urls import get_storage_from_url, load_execution
from kser.storage.views import Execution, LogLine, ProjectionView, TimelineEvent, WorkerView

__all__ = [
    "Execution",
    "LogLine",
    "ProjectionView",
    "StorageBase",
    "TimelineEvent",
    "WorkerView",
    "get_storage_from_url",
    "load_execution",
]
