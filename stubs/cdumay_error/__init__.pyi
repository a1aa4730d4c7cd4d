from typing import Any

class Error(Exception):
    MSGID: str
    CODE: int
    MESSAGE: str | None
    message: str
    code: int
    extra: dict[str, Any]
    stack: str | None
    msgid: str
    name: str
    def __init__(
        self,
        message: str | None = None,
        extra: dict[str, Any] | None = None,
        msgid: str | None = None,
        stack: str | None = None,
        name: str | None = None,
        code: int | None = None,
        **kwargs: Any,
    ) -> None: ...
    def to_dict(self) -> dict[str, Any]: ...
