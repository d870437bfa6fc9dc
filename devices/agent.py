"""The reference device: a `Core` with a clock, handlers, and an MQTT connection that reconnects.

`devices.core` makes all decisions. The agent must never send a PUBACK for a command that is not yet in its
memory, and must never drop an answer without a PUBACK.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import logging
import random
import secrets
import socket
import ssl
import time
import urllib.request
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Literal

import aiomqtt
from paho.mqtt.client import MQTT_CLEAN_START_FIRST_ONLY
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from devices.core import Core, Effect, Send
from devices.grant import GrantVerifier, keys_from_jwks
from devices.memory import Memory, RamMemory
from devices.mqtt_url import parse_url
from devices.names import status_topic
from devices.speech.signing import SigningKey
from devices.tls import trust
from devices.types import DeviceType, shipped_types
from devices.wire import CommandMessage, encode_status

log = logging.getLogger("ordain.device")
# paho logs an error when a connection ends; the agent logs that itself.
silent = logging.getLogger("ordain.device.mqtt")
silent.setLevel(logging.CRITICAL)

# Older unsent answers are dropped. The memory still has them, and sends them when the command comes again.
MAX_UNSENT = 1_000
KEEPALIVE_SEC = 15
SESSION_EXPIRY_SEC = 86_400  # in MQTT 5, of a session that is not a clean one
KEYS_AGAIN_SEC = 300
KEYS_RETRY_SEC = 2
KEYS_WITHIN_SEC = 10
# For a grant that names an unknown key. Commands behind it wait meanwhile, and anyone can name a key.
LEARN_WITHIN_SEC = 3
LEARN_AGAIN_SEC = 5
LEARN_AFTER_FAILURE_SEC = 60
KEYS_BYTES = 65_536
RECONNECT_FIRST_SEC = 0.5
RECONNECT_CAP_SEC = 30
FAREWELL_SEC = 2


class CommandFailed(Exception):
    """A handler raises this when the command fails. The broker gets its code, message and details."""

    def __init__(self, code: str, message: str, details: Any = None) -> None:
        self.error = {"code": code, "message": message} | ({} if details is None else {"details": details})
        super().__init__(message)


class Call:
    """One command, as its handler receives it."""

    def __init__(self, command: CommandMessage, report: Callable[[float, str | None], None]) -> None:
        self.id, self.type, self.params, self.attempt = (
            command.id,
            command.type,
            command.params,
            command.attempt,
        )
        self._report = report

    async def progress(self, percent: float, note: str | None = None) -> None:
        self._report(percent, note)


Handler = Callable[[Call], Awaitable[Any]]


class Agent:
    """A device that connects as `hardware_id` with its token, and executes only commands with a grant.

    `url` is `mqtt://host:port` or `mqtts://host:port`, with `?v=5` for MQTT 5, else MQTT 3.1.1 is spoken. A
    user and a password in it are not used. `tls`: how an `mqtts` server is verified, else by the system's
    authorities. `session` is part of its status messages. The broker uses it to ignore the last will of an
    older session.

    `jwks` holds the public keys of grants: the document itself, or the address of the broker's
    `/.well-known/jwks.json`, which is read before the first connection, every 5 minutes, and when a grant
    names an unknown key. `verifier` replaces it, for a device with a secret (HS256). `signs_with`: the
    device's own key, an Ed25519 private key or the bytes of its secret; then it signs its answers, as its
    type must allow. With `grants="none"` everyone who may publish on the MQTT server can make the device act:
    only for device types whose commands carry no grant.

    Raises:
        ValueError: the URL is wrong, grants are required and there are no keys, or the type has no signed
            answers and `signs_with` is given. The message never contains
            a password.
    """

    def __init__(
        self,
        hardware_id: str,
        token: str,
        url: str,
        *,
        prefix: str = "iotee",
        device_type: DeviceType | None = None,
        memory: Memory | None = None,
        grants: Literal["required", "none"] = "required",
        jwks: str | Mapping[str, Any] | None = None,
        issuer: str = "ordain",
        verifier: GrantVerifier | None = None,
        signs_with: SigningKey | None = None,
        session: str | None = None,
        clean_session: bool = False,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._hardware_id, self._token, self._server = hardware_id, token, parse_url(url)
        self._tls = (tls or trust()) if self._server.tls else None
        self._status_topic = status_topic(prefix, hardware_id)
        self._session, self._clean_session = session or secrets.token_hex(4), clean_session
        self._handlers: dict[str, Handler] = {}
        self._idempotent: dict[str, bool] = {}
        kind = device_type or shipped_types()["generic"]
        self._bare = kind.payload == "bare"
        self._jwks = jwks if isinstance(jwks, str) and verifier is None else None
        _check_grants(grants, kind, jwks, verifier)
        if verifier is None and jwks is not None:
            keys = {} if isinstance(jwks, str) else keys_from_jwks(jwks)
            verifier = GrantVerifier(keys, issuer, hardware_id, time.time)
        self._verifier = verifier
        self._memory = RamMemory() if memory is None else memory
        self._core = Core(
            hardware_id,
            kind,
            self._memory,
            self._idempotent,
            prefix=prefix,
            verifier=verifier,
            signs_with=signs_with,
        )
        self._runs: asyncio.Queue[CommandMessage] = asyncio.Queue()
        self._unsent: deque[Send] = deque(maxlen=MAX_UNSENT)
        self._something_to_send = asyncio.Event()
        self._connections = 0
        self._failures = 0
        self._leaving = False
        self._reading_keys = asyncio.Lock()  # so that an older document never replaces a newer one
        self._learn_from = 0.0

    def command(self, name: str, *, idempotent: bool = False) -> Callable[[Handler], Handler]:
        """Registers a handler. `idempotent`: if the device crashes during the command, it is run again."""

        def register(handler: Handler) -> Handler:
            self._handlers[name] = handler
            self._idempotent[name] = idempotent
            return handler

        return register

    async def run(self) -> None:
        """Runs the device until cancelled, also while disconnected. Call it once: it closes the memory."""
        with contextlib.closing(self._memory):
            await self._run()

    async def _run(self) -> None:
        if self._jwks is not None:
            while not await self._read_keys(self._jwks):  # noqa: ASYNC110 - the other side is a server
                await asyncio.sleep(KEYS_RETRY_SEC)
        # After the keys: a command that a crash interrupted is run again only if its grant is good.
        self._apply(self._core.recover(_now_ms()))
        async with asyncio.TaskGroup() as tasks:
            if self._jwks is not None:
                tasks.create_task(self._keep_keys(self._jwks))
            tasks.create_task(self._work())
            tasks.create_task(self._stay_connected())
            try:
                await asyncio.Future()
            finally:
                self._leaving = True

    async def _keep_keys(self, address: str) -> None:
        while True:
            await asyncio.sleep(KEYS_AGAIN_SEC)
            await self._read_keys(address)

    async def _read_keys(self, address: str, within: float = KEYS_WITHIN_SEC) -> bool:
        """Reads the keys of grants; returns whether that worked. Otherwise the old ones stay."""
        assert self._verifier is not None
        try:
            async with asyncio.timeout(within), self._reading_keys:
                self._verifier.use(keys_from_jwks(await asyncio.to_thread(_fetched, address)))
        except (OSError, ValueError, http.client.HTTPException) as error:
            log.warning(
                "device.no_keys: %s: %s: %s", self._hardware_id, address, error or type(error).__name__
            )
            return False
        return True

    async def _learn_keys(self, topic: str, payload: bytes) -> None:
        """Reads the keys again for a grant of an unknown key: the broker may sign with a new one."""
        if self._jwks is None or time.monotonic() < self._learn_from:
            return
        if self._core.needs_keys(topic, payload):
            read = await self._read_keys(self._jwks, LEARN_WITHIN_SEC)
            pause = LEARN_AGAIN_SEC if read else LEARN_AFTER_FAILURE_SEC
            self._learn_from = time.monotonic() + pause

    def _apply(self, effects: list[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Send):
                self._unsent.append(effect)
                self._something_to_send.set()
            else:
                self._runs.put_nowait(effect.command)

    async def _work(self) -> None:
        while not self._leaving:
            command = await self._runs.get()
            result, error = await self._execute(command)
            self._apply(self._core.finish(_now_ms(), command, result, error))

    async def _execute(self, command: CommandMessage) -> tuple[Any, dict[str, Any] | None]:
        def report(percent: float, note: str | None) -> None:
            self._apply(self._core.progress(_now_ms(), command, percent, note))

        try:
            return await self._handlers[command.type](Call(command, report)), None
        except CommandFailed as failed:
            return None, failed.error
        except Exception as error:
            log.exception("device.handler_failed", extra={"command_id": command.id, "command": command.type})
            return None, {"code": "device_error", "message": str(error) or type(error).__name__}

    async def _stay_connected(self) -> None:
        while True:
            try:
                await self._one_connection()
            except* aiomqtt.MqttError as lost:
                log.warning("device.disconnected: %s: %s", self._hardware_id, lost.exceptions[0])
            if self._leaving:
                return
            ceiling = min(RECONNECT_CAP_SEC, RECONNECT_FIRST_SEC * 2 ** min(self._failures, 16))
            self._failures += 1
            await asyncio.sleep(random.uniform(ceiling / 4, ceiling))  # noqa: S311 # nosec B311 - jitter

    async def _one_connection(self) -> None:
        self._connections += 1
        session = f"{self._session}-{self._connections}"
        async with self._client(encode_status(False, session)) as client:
            try:
                await self._converse(client, session)
            except asyncio.CancelledError:
                # After a DISCONNECT the server does not send the last will, so the agent sends `offline`.
                with contextlib.suppress(aiomqtt.MqttError, TimeoutError):
                    async with asyncio.timeout(FAREWELL_SEC):
                        await self._say(client, encode_status(False, session))
                raise

    async def _converse(self, client: aiomqtt.Client, session: str) -> None:
        # A private option of paho, used in the broker's link too: without it paho sends the PUBACK before the
        # message is processed.
        client._client.manual_ack_set(True)
        granted = await client.subscribe([(topic, 1) for topic in self._core.command_topics])
        if any((code if isinstance(code, int) else code.value) >= 0x80 for code in granted):
            raise aiomqtt.MqttError("the MQTT server refused the subscription to the device's own topic")
        await self._say(client, encode_status(True, session))
        self._leave_if_asked()
        self._failures = 0
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._listen(client))
            tasks.create_task(self._speak(client))

    def _leave_if_asked(self) -> None:
        """Raises the cancellation again. In Python 3.11 `wait_for`, which aiomqtt uses, swallows a
        cancellation that arrives together with its result."""
        if self._leaving:
            raise asyncio.CancelledError

    def _client(self, will: bytes) -> aiomqtt.Client:
        """A new client for each connection: a reused paho client resends its messages with new ids."""
        five, properties = self._server.version == "5", Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        properties.SessionExpiryInterval = 0 if self._clean_session else SESSION_EXPIRY_SEC
        return aiomqtt.Client(
            self._server.host,
            self._server.port,
            protocol=aiomqtt.ProtocolVersion.V5 if five else aiomqtt.ProtocolVersion.V311,
            identifier=self._hardware_id,
            username=self._hardware_id,
            password=self._token,
            logger=silent,
            will=aiomqtt.Will(self._status_topic, will, qos=1, retain=True),
            clean_session=None if five else self._clean_session,
            clean_start=self._clean_session if five else MQTT_CLEAN_START_FIRST_ONLY,
            properties=properties if five else None,
            keepalive=KEEPALIVE_SEC,
            tls_context=self._tls,
            socket_options=[(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)],
        )

    async def _say(self, client: aiomqtt.Client, status: bytes) -> None:
        await client.publish(self._status_topic, status, qos=1, retain=True)

    async def _listen(self, client: aiomqtt.Client) -> None:
        async for message in client.messages:
            # A bare device cannot recognise a repeated command, so a retained one would run at every connect.
            if isinstance(message.payload, bytes) and not (self._bare and message.retain):
                await self._learn_keys(message.topic.value, message.payload)
                self._apply(self._core.receive(_now_ms(), message.topic.value, message.payload))
            client._client.ack(message.mid, message.qos)

    async def _speak(self, client: aiomqtt.Client) -> None:
        while True:
            self._something_to_send.clear()
            while self._unsent:
                answer = self._unsent[0]
                await client.publish(answer.topic, answer.payload, qos=1)
                if self._unsent[0] is answer:
                    self._unsent.popleft()
                self._leave_if_asked()
            await self._something_to_send.wait()


def _check_grants(
    grants: str, kind: DeviceType, jwks: str | Mapping[str, Any] | None, verifier: GrantVerifier | None
) -> None:
    if grants not in ("required", "none"):
        raise ValueError(f"grants = {grants!r}: must be 'required' or 'none'")
    given = jwks is not None or verifier is not None
    if grants == "none" and given:
        raise ValueError("grants='none' takes no jwks and no verifier: grants would not be verified")
    if grants == "required" and kind.payload == "bare":
        raise ValueError(f"commands of the type {kind.name} carry no grant: say grants='none'")
    if grants == "required" and not given:
        raise ValueError(
            "grants are required, and there are no keys to verify them: give jwks, such as "
            "'http://127.0.0.1:8080/.well-known/jwks.json', or say grants='none'"
        )
    if isinstance(jwks, str) and not jwks.startswith(("http://", "https://")):
        raise ValueError(f"jwks = {jwks[:200]!r}: must be an http or https address")


def _fetched(address: str) -> Any:
    """Raises OSError or ValueError."""
    with urllib.request.urlopen(address, timeout=KEYS_WITHIN_SEC) as answer:  # noqa: S310 # nosec B310 - http only
        return json.loads(answer.read(KEYS_BYTES))


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
