from typing import Any

from marshmallow import Schema

class Result:
    retcode: int
    stdout: str
    stderr: str
    retval: dict[str, Any]
    uuid: str
    def __init__(
        self,
        retcode: int = 0,
        stdout: str = "",
        stderr: str = "",
        retval: dict[str, Any] | None = None,
        uuid: str | None = None,
    ) -> None: ...
    def print(self, data: Any) -> None: ...
    def print_err(self, data: Any) -> None: ...
    @staticmethod
    def from_exception(exc: Exception, uuid: str | None = None) -> Result: ...
    def search_value(self, xpath: str, default: Any = None, fail_if_no_match: bool = False) -> Any: ...

class ResultSchema(Schema): ...
