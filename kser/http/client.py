"""ApiClient: calls to the REST API, each within a time. What it answers badly is an Error of kser."""

from typing import Any, Final
from urllib.parse import urlsplit

import orjson
import urllib3

from kser.errors import (
    ConfigurationError,
    DeliveryError,
    Error,
    InternalError,
    NotFound,
    StatusError,
    TransportError,
    ValidationError,
)

__all__ = ["ApiClient", "error_of"]

_CONNECT_S: Final = 10.0
_ERRORS: Final[dict[int, type[Error]]] = {
    400: ValidationError,
    401: ConfigurationError,
    403: ConfigurationError,
    404: NotFound,
    409: StatusError,
    413: ValidationError,
    422: ValidationError,
    503: TransportError,
    504: DeliveryError,
}


class ApiClient:
    """Posts JSON to one server. May be shared by threads; connections are kept and used again.

    Args:
        url: of the server, such as ``http://127.0.0.1:5000``; what is called stands below it.
        token: sent as ``Authorization: Bearer``.

    Raises ConfigurationError when the url cannot be. Nothing is connected before the first call.
    """

    def __init__(self, url: str, token: str | None = None) -> None:
        parts = urlsplit(url) if isinstance(url, str) else None
        if parts is None or parts.scheme not in ("http", "https") or not parts.hostname or parts.query:
            raise ConfigurationError(f"url={url!r}: write where the API is, as in http://127.0.0.1:5000")
        if parts.username or parts.password:
            raise ConfigurationError("The url has a user or password in it: the API takes a token, token=...")
        self.url = url.rstrip("/")
        self._headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if token:
            self._headers["Authorization"] = f"Bearer {token}"
        self._pool = urllib3.PoolManager(retries=False, maxsize=4)

    def post(self, path: str, body: bytes, timeout_s: float) -> tuple[int, dict[str, Any]]:
        """The status and the document of the answer.

        Raises:
            TransportError: nobody answers there; the request was not made.
            DeliveryError: it was made, and there is no answer within ``timeout_s``, or none that can be read.
        """
        timeout = urllib3.Timeout(connect=min(timeout_s, _CONNECT_S), total=timeout_s)
        try:
            answer = self._pool.request(
                "POST", f"{self.url}{path}", body=body, headers=self._headers, timeout=timeout, redirect=False
            )
        except (urllib3.exceptions.ConnectTimeoutError, urllib3.exceptions.NewConnectionError) as exc:
            raise TransportError(f"{self.url} cannot be reached: {_why(exc)}", retriable=True) from exc
        except (urllib3.exceptions.HTTPError, OSError) as exc:
            raise DeliveryError(f"{self.url} did not answer within {timeout_s:g} s: {_why(exc)}") from exc
        return answer.status, _document(answer.data, answer.status, self.url)

    def close(self) -> None:
        """Let go of the connections."""
        self._pool.clear()


def error_of(status: int, document: dict[str, Any]) -> Error:
    """The Error that an answer with this status tells."""
    told = str(document.get("detail") or document.get("title") or f"HTTP status {status}")
    errors = document.get("errors")
    text = f"{told}: {errors}" if errors else told
    if status in (401, 403):
        text = f"The API refuses: {told}"
    kind = _ERRORS.get(status, TransportError if status in (429, 502) else InternalError)
    return kind(text, code=status if status in (413, 504) else None)


def _why(exc: Exception) -> str:
    text = str(exc).partition(": ")[2] or str(exc)
    return text or type(exc).__name__


def _document(raw: bytes, status: int, url: str) -> dict[str, Any]:
    try:
        data = orjson.loads(raw)
    except orjson.JSONDecodeError:
        data = None
    if isinstance(data, dict):
        return data
    told = f"{url} answered with status {status} and no JSON object: is it the API of kser?"
    if status < 400:
        raise DeliveryError(told)
    return {"detail": told}
