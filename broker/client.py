"""The Python SDK for services: send commands, follow events, wait for the outcome of a command.

It uses only the HTTP API of a broker. A request whose outcome is unknown is repeated only with the same
idempotency key, so no command is created twice.
"""

from __future__ import annotations

import asyncio
import json
import random
import secrets
import ssl
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Final, Self
from urllib.parse import quote, urlsplit

import httpx2

from broker.client_types import (
    AppError,
    Command,
    CommandError,
    Conflict,
    DeviceDeleted,
    Event,
    Explanation,
    Forbidden,
    Gone,
    HistoryParams,
    IdempotencyConflict,
    InvalidRequest,
    NotFound,
    NotSent,
    Place,
    QueueFull,
    RateLimited,
    Record,
    Retried,
    SendParams,
    Sent,
    Timeout,
    TooLarge,
    Unauthorized,
    Unavailable,
    failure,
    is_temporary,
    position,
)

__all__ = [
    "App",
    "AppError",
    "Command",
    "CommandError",
    "Commands",
    "Conflict",
    "DeviceDeleted",
    "Event",
    "Explanation",
    "Forbidden",
    "Gone",
    "HistoryParams",
    "IdempotencyConflict",
    "InvalidRequest",
    "NotFound",
    "NotSent",
    "QueueFull",
    "RateLimited",
    "Record",
    "Retried",
    "SendParams",
    "Sent",
    "Timeout",
    "TooLarge",
    "Unauthorized",
    "Unavailable",
    "position",
]

DEVICES_PER_CALL: Final = 10_000
# The broker writes to each stream at least every 15 s. After three times that the connection counts as lost.
QUIET_SEC: Final = 45.0
WITHOUT_GRANT: Final = {"grant": "false"}  # a grant is for the device, and signing it takes time
CLOSED: Final = frozenset({"executed", "failed", "timed_out", "expired", "cancelled"})

# It does not repeat the URL, because a part of it could be a password.
WRONG_URL: Final = (
    "url: must be an http or https URL such as http://127.0.0.1:8080, "
    "without user, password, query and fragment"
)


class App:
    """A client of one broker and one project. Use `async with App(url, api_key) as app`, or call
    `await app.aclose()` at the end.

    Temporary failures (no connection, 408, 429, 5xx) are retried up to `retries` times. Before each retry the
    client pauses for a random time of at most `backoff_sec`, doubled each time up to `backoff_cap_sec`, and
    at least for the broker's Retry-After. If Retry-After is longer than `backoff_cap_sec`, the error is
    raised instead. `timeout_sec` limits each try.

    Raises:
        ValueError: `url` is not an http or https URL of host, port and path only, or `api_key` has characters
            that no key has.
    """

    def __init__(
        self,
        url: str,
        api_key: str,
        *,
        retries: int = 5,
        backoff_sec: float = 0.5,
        backoff_cap_sec: float = 30.0,
        timeout_sec: float = 30.0,
        transport: httpx2.AsyncBaseTransport | None = None,
    ) -> None:
        if not _is_base(url):
            raise ValueError(WRONG_URL)
        if not api_key or not api_key.isascii() or not api_key.isprintable():
            raise ValueError("api_key: must be a key such as sk_live_…")
        self._retries, self._timeout_sec = retries, timeout_sec
        self._backoff_sec, self._backoff_cap_sec = backoff_sec, backoff_cap_sec
        self._http = httpx2.AsyncClient(
            base_url=url,
            # For plain http a context that trusts nobody; the usual one takes 0.06 s to make.
            verify=urlsplit(url).scheme == "https" or ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT),
            headers={"Authorization": f"Bearer {api_key}"},
            timeout=timeout_sec,
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=20),
            transport=transport,
        )
        self.command = Commands(self)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        await self._http.aclose()

    async def _request(
        self, method: str, path: str, body: object = None, query: dict[str, str] | None = None
    ) -> Any:
        """Sends a request, with retries, and returns the answer's JSON.

        Raises:
            AppError: the broker refused the request, or no try got an answer.
        """
        content = None if body is None else json.dumps(body, allow_nan=False).encode()
        headers = {} if body is None else {"Content-Type": "application/json"}
        failures = 0
        while True:
            try:
                answer = await self._http.request(
                    method, path, content=content, headers=headers, params=query
                )
                if answer.is_success:
                    return answer.json()
                error = failure(answer.status_code, answer.headers.get("Retry-After"), answer.content)
            except httpx2.TransportError as broken:
                error = unreachable(broken)
            except ValueError as broken:
                raise AppError("unexpected_answer", f"the answer is not from a broker: {broken}") from broken
            failures += 1
            floor = error.retry_after or 0.0
            if not is_temporary(error) or failures > self._retries or floor > self._backoff_cap_sec:
                raise error
            await self._pause(failures, floor)

    async def _stream(self, after: str | None, query: dict[str, str]) -> AsyncGenerator[Event, None]:
        """The events after a place, or from now on if it is None. Reconnects after a lost connection."""
        place = None if after is None else Place(after)
        failures, opened, reconnect_sec = 0, False, 0.0
        timeout = httpx2.Timeout(self._timeout_sec, read=max(QUIET_SEC, self._timeout_sec))
        while True:
            headers = {"Accept": "text/event-stream"}
            if place is not None:
                query = {**query, "after": place.text}
                headers["Last-Event-ID"] = place.text
            floor = reconnect_sec
            try:
                async with self._http.stream(
                    "GET", "/v1/events", headers=headers, params=query, timeout=timeout
                ) as answer:
                    if not answer.is_success:
                        told = answer.headers.get("Retry-After")
                        raise failure(answer.status_code, told, await answer.aread())
                    if not answer.headers.get("Content-Type", "").startswith("text/event-stream"):
                        raise httpx2.TransportError("the answer is not an event stream")
                    failures, opened = 0, True
                    async for message in httpx2.EventSource(answer, max_event_size=None):
                        if message.retry is not None:
                            reconnect_sec = floor = message.retry / 1_000
                        if not Place.SAID.fullmatch(message.id):
                            continue
                        before, place = place, Place(message.id)
                        if before is not None:
                            place = place.following(before)
                        # An id without data is no event; it only gives the stream's position.
                        if message.data and (before is None or place.position > before.position):
                            yield json.loads(message.data)
                failures += 1
            except (httpx2.TransportError, AppError) as broken:
                error = broken if isinstance(broken, AppError) else unreachable(broken)
                failures += 1
                # `retries` limits only the first connection. A stream that was open is retried without limit.
                if not is_temporary(error) or (failures > self._retries and not opened):
                    raise error from None
                floor = max(floor, error.retry_after or 0.0)
            await self._pause(failures, floor)

    async def _pause(self, failures: int, floor: float) -> None:
        most = ceiling(failures, self._backoff_sec, self._backoff_cap_sec)
        await asyncio.sleep(floor + random.uniform(0.0, most))  # noqa: S311 # nosec B311 - jitter


def _is_base(url: str) -> bool:
    """True for a URL of scheme, host, port and path, and nothing else."""
    try:
        parts = urlsplit(url)
        there = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False
    return there and not any(mark in url for mark in "@?#\\") and url.isprintable() and " " not in url


class Commands:
    """`app.command`."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def send(self, params: SendParams) -> dict[str, Sent | NotSent]:
        """Sends one command to one or more devices; returns the outcome for each device.

        A sent command is durable and is delivered when the device is online. More than 10,000 devices are
        split into several requests with the same idempotency key. Without `idempotency_key` one is generated.

        Raises:
            AppError: not all commands were sent. Call `send` again with the error's `idempotency_key`: it
                sends the missing ones and nothing twice.
        """
        body: dict[str, Any] = {"idempotency_key": secrets.token_urlsafe(16), **params}
        sent: dict[str, Sent | NotSent] = {}
        try:
            for part in batches(params.get("device_ident", [])):
                body["device_ident"] = part
                sent |= await self._app._request("POST", "/v1/app/command/send", body)
        except AppError as error:
            error.idempotency_key = body["idempotency_key"]
            raise
        return sent

    async def history(self, params: HistoryParams) -> dict[str, list[Record]]:
        """The commands with one name that were sent to the devices, oldest first; `[]` if there are none.

        Raises:
            AppError: the broker refused the request, or no try got an answer.
        """
        history: dict[str, list[Record]] = await self._app._request("POST", "/v1/app/command/history", params)
        return history

    def events(
        self,
        *,
        after: int | str | Event | None = None,
        device: str | None = None,
        type: str | None = None,
        event: str | None = None,
        command: str | None = None,
    ) -> AsyncGenerator[Event, None]:
        """Yields every event of the project as it is recorded, in order, each one once. It does not end by
        itself: leave the loop to stop it.

        `after`: 0 for all events in the log; an event, or the text that `position(event)` gives, for the
        events after it; None for events from now on. Store that text to continue later: unlike a bare `id`,
        it also names the log, and after a restore from a backup you get `Gone` instead of a gap.

        Filters: `device`, `type` (a command's name), `event` (such as `executed`) and `command` (an id).
        After a lost connection it reconnects and continues where it was. Only if the first connection fails,
        it gives up after `retries`.

        Raises:
            AppError: the broker refuses the stream. `Gone`: the events after that position are no longer
                stored, or the broker's log was restored or replaced: read the state again. `NotFound`: there
                is no such device or command.
        """
        query = {"device": device, "type": type, "event": event, "command": command}
        start = position(after) if isinstance(after, Mapping) else after
        text = None if start is None else str(start)
        return self._app._stream(text, {key: value for key, value in query.items() if value is not None})

    async def get(self, command_id: str) -> Command:
        """The command as it is now, without its grant.

        Raises:
            NotFound: there is no such command.
            AppError: the broker refused the request, or no try got an answer.
        """
        command: Command = await self._app._request("GET", _path(command_id), query=WITHOUT_GRANT)
        return command

    async def cancel(self, command_id: str) -> Command:
        """Cancels a command that was never handed over. Cancelling it again changes nothing.

        Raises:
            Conflict: the device may already have it; the message names the state.
            NotFound: there is no such command.
            AppError: the broker refused the request, or no try got an answer.
        """
        device = (await self.get(command_id))["device_id"]
        cancelled: Command = await self._app._request(
            "DELETE", f"/v1/devices/{device}/commands/{quote(command_id, safe='')}"
        )
        return cancelled

    async def retry(self, command_id: str, idempotency_key: str | None = None) -> Retried:
        """Sends a command again that failed, timed out, expired or was cancelled; returns the new command.

        Without `idempotency_key` one is generated.

        Raises:
            Conflict: the command is in another state; `DeviceDeleted`: its device was deleted.
            NotFound: there is no such command.
            AppError: it is not known whether a new command exists. Call `retry` again with the error's
                `idempotency_key`: it creates nothing twice.
        """
        key = idempotency_key or secrets.token_urlsafe(16)
        try:
            retried: Retried = await self._app._request(
                "POST", f"{_path(command_id)}/retry", {"idempotency_key": key}
            )
        except AppError as error:
            error.idempotency_key = key
            raise
        return retried

    async def explain(self, command_id: str) -> Explanation:
        """Why the command is in its state, and what happens next.

        Raises:
            NotFound: there is no such command.
            AppError: the broker refused the request, or no try got an answer.
        """
        explained: Explanation = await self._app._request("GET", f"{_path(command_id)}/explain")
        return explained

    async def wait(self, command_id: str, timeout: float | None = None) -> Command:
        """Waits until a command is closed and returns it. Its `state` is then executed, failed, timed_out,
        expired or cancelled.

        `timeout`: in seconds; None waits without limit. The key needs the scopes `devices:read` and
        `events:read`. A late answer of the device can still change `timed_out`.

        Raises:
            Timeout: the command was not closed in time. It is still open; you can wait again.
            NotFound: there is no such command.
            AppError: the broker refused the request, or no try got an answer.
        """
        path = _path(command_id)
        try:
            async with asyncio.timeout(timeout) as limit:
                created = await self._app._request("GET", f"{path}/events", query={"limit": "1"})
                position = created["data"][0]["position"]
                async with aclosing(self.events(after=position, command=command_id)) as events:
                    async for event in events:
                        if event["type"].split(".")[2] in CLOSED:
                            command = await self.get(command_id)
                            if command["state"] in CLOSED:
                                return command
        except TimeoutError:
            if not limit.expired():
                raise
            raise Timeout("timeout", f"{command_id} was not closed within {timeout} s") from None
        raise AssertionError("the event stream ended")


def _path(command_id: str) -> str:
    return f"/v1/commands/{quote(command_id, safe='')}"


def batches(devices: Sequence[str]) -> list[Sequence[str]]:
    """Splits the devices into one list per request. A wrong type is passed on; the broker refuses it."""
    if not isinstance(devices, list | tuple) or len(devices) <= DEVICES_PER_CALL:
        return [devices]
    return [devices[first : first + DEVICES_PER_CALL] for first in range(0, len(devices), DEVICES_PER_CALL)]


def ceiling(failures: int, base_sec: float, cap_sec: float) -> float:
    """The longest pause after `failures` failures in a row, in seconds: exponential, up to `cap_sec`."""
    return min(cap_sec, base_sec * 2.0 ** min(failures - 1, 32))


def unreachable(broken: httpx2.TransportError) -> Unavailable:
    return Unavailable("unavailable", f"no answer: {str(broken) or type(broken).__name__}")
