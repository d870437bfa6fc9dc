"""The reference relay: what a phone does for a nearby BLE device.

It claims commands over HTTP, sends each to the device in the same form as MQTT would, and reports the
device's answers. It stores nothing. If it dies before the device has the command, the lease ends and a relay
claims the command again. If it dies before it reports an answer, the device still has the answer, because it
was not confirmed.
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
# HTTP statuses of a report that mean: retry. All other statuses are final.
AGAIN = frozenset({429, 503})


class Peer(Protocol):
    """A connection to one nearby device. Messages arrive whole and in order. Methods raise ConnectionError
    after the connection is lost.

    The device sends unconfirmed answers again at the next connection, also to a different relay.
    """

    async def send(self, message: bytes) -> None: ...

    async def receive(self) -> bytes: ...

    async def confirm(self, answer: bytes) -> None: ...


class Relay:
    """`http`: a client with the broker's address as base URL, and an API key with `devices:write` or a device
    token.

    `poll_sec`: if no command was due, how long to listen for late answers before the next claim.
    `patience_sec`: how long to wait for the answers to claimed commands.
    """

    def __init__(self, http: httpx2.AsyncClient, *, poll_sec: float = 5, patience_sec: float = 60) -> None:
        self._http = http
        self._poll_sec, self._patience_sec = poll_sec, patience_sec

    async def run(self, peers: Mapping[str, Peer]) -> None:
        """Serves the devices (keys: id or hardware id) until all their connections are lost."""
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
        """One round: claims commands, sends them, reports the answers. Returns how many commands finished.

        A command that does not finish within `patience_sec` is left; a later round gets its answer.

        Raises:
            ConnectionError: the connection to the device is lost.
            httpx2.TransportError: the broker could not be reached.
        """
        claimed = await self._claim(device)
        for message in claimed.values():
            await peer.send(message)
        waiting = set(claimed)
        end = asyncio.get_running_loop().time() + (self._patience_sec if waiting else self._poll_sec)
        while waiting or not claimed:
            # The time-out covers only `receive`, so that a received answer is always reported.
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
        """Claims the due commands: the device's message by command id."""
        answer = await self._http.post(f"/v1/devices/{device}/commands/claim")
        if answer.status_code != 200:
            log.warning("relay.not_claimed: %s: %s", device, answer.status_code)
            return {}
        return {command["id"]: message_of(command) for command in answer.json()["commands"]}

    async def _report(self, device: str, answer: Answer) -> bool:
        """Reports an answer; retries while the broker cannot be reached or answers 429 or 503.

        Returns whether the broker gave a final response, which can also be a refusal.
        """
        path = f"/v1/devices/{device}/commands/{answer.id}"
        said: dict[str, Any]
        if answer.token is not None:
            said = {"signed": answer.token}  # only the device can sign, so the relay passes it on as it is
        else:
            said = {"result": answer.result, "error": answer.error}
        if answer.status in ("acknowledged", "progress"):
            path += "/ack"
        else:
            path, said = f"{path}/result", said | {"status": answer.status}
        body = {key: value for key, value in said.items() if value is not None} or None
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
    """Converts a command of the HTTP API into the message that MQTT would deliver."""
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
    """Decodes an answer; None if it is malformed or has no command id, so that it cannot be reported."""
    try:
        answer = decode_answer(payload, None, {})
    except Malformed as fault:
        log.warning("relay.not_understood: %s", fault.reason)
        return None
    return answer if answer.id is not None else None
