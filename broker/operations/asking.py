"""HTTP requests to a broker as its operator. They return the response's JSON, or raise `Failed`."""

from __future__ import annotations

from typing import Any, Protocol

DONE, REFUSED, USAGE, UNREACHABLE = 0, 1, 2, 3
POLL_SEC = 0.1


class Failed(Exception):
    """The command line could not do what was asked. `code` is the exit code."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


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
        raise Failed(code, answer["error"]["message"])
    return answer


async def pages(client: Client, path: str) -> list[dict[str, Any]]:
    """All items of a paged list of `/v1`."""
    found: list[dict[str, Any]] = []
    cursor: str | None = ""
    while cursor is not None:
        page = await call(client, "GET", f"{path}?limit=100" + (f"&cursor={cursor}" if cursor else ""))
        found += page["data"]
        cursor = page["next_cursor"]
    return found
