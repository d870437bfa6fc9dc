"""The reference relay: what a phone does for a BLE device that it stands next to.

It claims over HTTP, hands each command to the device as it would have come by MQTT, and reports what the
device says. It remembers nothing. If it dies on the way to the device, the lease ends and somebody claims
again; if on the way back, the device still has every answer that was not confirmed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any, Protocol

import httpx2
import msgspec

from devices.wire import Answer, CommandMessage, Malformed, decode_answer

log = logging.getLogger("ordain.relay")

TRY_AGAIN_SEC = (1, 2, 4, 8, 15)
# An answer to a report that says: ask again. All others are the broker's last word on it.
AGAIN = frozenset({429, 503})


class Peer(Protocol):
    """A connection to one device nearby: whole messages, in order; ConnectionError once it is gone.

    An answer that was not confirmed is sent again at the next connection, whoever makes it.
    """

    async def send(self, message: bytes) -> None: ...

    async def receive(self) -> bytes: ...

    async def confirm(self, answer: bytes) -> None: ...


class Relay:
    """`http` has the broker's address as its base URL and a key that may write, or a device's token.

    `poll_sec`: how long it listens for late answers before it asks again when nothing was due.
    """

    def __init__(self, http: httpx2.AsyncClient, *, poll_sec: float = 5, patience_sec: float = 60) -> None:
        self._http = http
        self._poll_sec, self._patience_sec = poll_sec, patience_sec

    async def run(self, peers: Mapping[str, Peer]) -> None:
        """Serves the devices, by id or hardware id, until all their connections are gone."""
        async with asyncio.TaskGroup() as tasks:
            for device, peer in peers.items():
                tasks.create_task(self._stay(device, peer))

    async def _stay(self, device: str, peer: Peer) -> None:
        while True:
            try:
                await self.serve(device, peer)
            except ConnectionError as gone:
                log.info("relay.device_gone: %s: %s", device, gone)
                return
            except httpx2.TransportError as error:
                log.warning("relay.broker_unreachable: %s", error)
                await asyncio.sleep(self._poll_sec)

    async def serve(self, device: str, peer: Peer) -> int:
        """One round: claims, hands over, reports. How many commands were finished.

        What a device does not finish within the patience is left: a later round gets its answer.

        Raises:
            ConnectionError: the device is gone.
            httpx2.TransportError: the broker could not be reached.
        """
        claimed = await self._claim(device)
        for message in claimed.values():
            await peer.send(message)
        waiting = set(claimed)
        end = asyncio.get_running_loop().time() + (self._patience_sec if waiting else self._poll_sec)
        while waiting or not claimed:
            # Only the listening may be broken off: an answer that was heard is reported.
            try:
                async with asyncio.timeout_at(end):
                    heard = await peer.receive()
            except TimeoutError:
                break
            answer = _understood(heard)
            if answer is None or await self._report(device, answer):
                await peer.confirm(heard)
            if answer is not None and answer.status in ("executed", "failed"):
                waiting.discard(answer.id or "")
        return len(claimed) - len(waiting)

    async def _claim(self, device: str) -> dict[str, bytes]:
        """What is due, as the device understands it, by id."""
        answer = await self._http.post(f"/v1/devices/{device}/commands/claim")
        if answer.status_code != 200:
            log.warning("relay.not_claimed: %s: %s", device, answer.status_code)
            return {}
        return {command["id"]: message_of(command) for command in answer.json()["commands"]}

    async def _report(self, device: str, answer: Answer) -> bool:
        """Insists while the broker cannot be reached; another refusal is its last word. Has it the report?"""
        path = f"/v1/devices/{device}/commands/{answer.id}"
        if answer.status in ("acknowledged", "progress"):
            path, body = f"{path}/ack", None
        else:
            said = {"status": answer.status, "result": answer.result, "error": answer.error}
            path, body = f"{path}/result", {key: value for key, value in said.items() if value is not None}
        for pause in TRY_AGAIN_SEC:
            try:
                status = (await self._http.post(path, json=body)).status_code
            except httpx2.TransportError as error:
                log.warning("relay.broker_unreachable: %s", error)
            else:
                if status not in AGAIN:
                    if status != 200:
                        log.warning("relay.report_refused: %s: %s", answer.id, status)
                    return True
            await asyncio.sleep(pause)
        return False


def message_of(command: dict[str, Any]) -> bytes:
    """A command of the API in the form in which MQTT would have brought it."""
    return msgspec.json.encode(
        CommandMessage(
            id=command["id"],
            type=command["type"],
            params=command["params"],
            attempt=command["attempts"],
            expires_at=command["expires_at"],
            grant=command["grant_token"],
        )
    )


def _understood(payload: bytes) -> Answer | None:
    """An answer that names its command; nobody could tell which one is meant by any other."""
    try:
        answer = decode_answer(payload, None, {})
    except Malformed as fault:
        log.warning("relay.not_understood: %s", fault.reason)
        return None
    return answer if answer.id is not None else None
