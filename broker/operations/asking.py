"""HTTP requests to a broker as its operator. They return the response's JSON, or raise `Failed`."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Protocol
from urllib.parse import urlencode

DONE, REFUSED, USAGE, UNREACHABLE = 0, 1, 2, 3
POLL_SEC = 0.1


class Failed(Exception):
    """The command line could not do what was asked. `code` is the exit code. `error`: what the broker
    answered, with its `code` and `message`; None if it was not asked."""

    def __init__(self, code: int, message: str, error: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.code, self.error = code, error


class Answer(Protocol):
    @property
    def status_code(self) -> int: ...

    @property
    def is_error(self) -> bool: ...

    def json(self) -> Any: ...


class Client(Protocol):
    """What asking needs of a client: `SocketClient` has it, and `httpx2.AsyncClient`."""

    async def request(self, method: str, url: str, /, *, json: Any = None) -> Answer: ...


async def call(client: Client, method: str, path: str, body: object = None) -> Any:
    """The response's JSON.

    Raises:
        Failed: the broker answered with an error; the message is the broker's.
    """
    response = await client.request(method, path, json=body)
    answer = response.json()
    if response.is_error:
        code = UNREACHABLE if response.status_code >= 500 else REFUSED
        raise Failed(code, answer["error"]["message"], answer["error"])
    return answer


async def pages(
    client: Client, path: str, filters: Mapping[str, str | None] = MappingProxyType({}), most: int = 0
) -> list[dict[str, Any]]:
    """The first `most` items of a paged list of `/v1`; 0: all. A filter of None is left out."""
    found: list[dict[str, Any]] = []
    query: dict[str, str | int] = {key: value for key, value in filters.items() if value is not None}
    cursor: str | None = ""
    while cursor is not None and (not most or len(found) < most):
        query["limit"] = min(100, most - len(found)) if most else 100
        page = await call(client, "GET", f"{path}?{urlencode(query)}")
        found += page["data"]
        cursor = query["cursor"] = page["next_cursor"]
    return found
