"""Producer that posts to the REST API, for services that do not reach Kafka."""

from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import quote

import orjson

from kser import results
from kser.errors import ConfigurationError, Error, ValidationError
from kser.http.client import ApiClient, error_of
from kser.http.sink import HttpSink
from kser.producer import BaseProducer
from kser.results import Result

__all__ = ["Producer"]

_OPTIONS: Final = frozenset({"url", "token", "request_s"})


class Producer(BaseProducer):
    """Sends messages through the REST API (`kser web`) or an `kser.http.consumer.Consumer`. May be shared by threads.

    A retcode of 0 means what it does with the other drivers: the broker behind the API has confirmed the message. From
    a Consumer that runs messages itself it means: it was run, whatever came of it.

    Args:
        url: where the API is, ``http://127.0.0.1:5000``; or, as the other drivers take it, a config with ``url`` and
            maybe ``token`` and ``request_s``.
        token: what the API asks for.
        request_s: longest wait for the answer to one request, in seconds. What send() and its like are given bounds
            their own wait; a request that is under way goes on behind them for so long.

    Raises ConfigurationError for an url that cannot be, or an unknown option. A server that is away is no error here:
    each send says whether it was confirmed.
    """

    def __init__(self, url: str | Mapping[str, Any], *, token: str | None = None, request_s: float = 30) -> None:
        config: dict[str, Any] = {"token": token, "request_s": request_s}
        config |= {"url": url} if isinstance(url, str) else dict(url)
        if unknown := sorted(map(str, set(config) - _OPTIONS)):
            raise ConfigurationError(f"Unknown option {', '.join(unknown)}: there are {', '.join(sorted(_OPTIONS))}")
        seconds = config["request_s"]
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not seconds > 0:
            raise ConfigurationError(f"request_s={seconds!r}: give a number of seconds, more than 0")
        self._client = ApiClient(config.get("url", ""), config["token"])
        super().__init__(HttpSink(self._client, seconds))

    def abort(self, uuid: str, *, group: str = "kser", why: str = "", timeout: float = 60) -> Result:
        """Tell the workers of a group that an operation, or a task of none, is to end.

        See `kser.operating.OperatingProducer.abort`. Never raises because of the server or the broker.
        """
        return self._act(uuid, "abort", group, {"why": why}, timeout)

    def resume(
        self,
        uuid: str,
        *,
        group: str = "kser",
        params: Mapping[str, Any] | None = None,
        step: str | int | None = None,
        timeout: float = 60,
    ) -> Result:
        """Begin a new run of a failed operation at the step that failed it, with the results it had.

        See `kser.operating.OperatingProducer.resume`. Never raises because of the server or the broker.
        """
        asked = {"params": None if params is None else dict(params), "step": None if step is None else str(step)}
        return self._act(uuid, "resume", group, asked, timeout)

    def _act(self, uuid: str, action: str, group: str, asked: Mapping[str, Any], timeout: float) -> Result:
        try:
            path = f"/api/1/operations/{quote(uuid, safe='')}/{action}?group={quote(group, safe='')}"
            status, document = self._client.post(path, orjson.dumps(asked), timeout)
            if status >= 400:
                raise error_of(status, document)
        except Error as exc:
            return results.from_exception(exc, uuid)
        except (TypeError, ValueError) as exc:  # no text, no JSON, no time
            return results.from_exception(ValidationError(f"{action}() of {uuid} cannot be posted: {exc}"), str(uuid))
        return Result(uuid=uuid, stdout=str(document.get("detail", "")), retval={"run": document.get("run")})
