"""A canary for the MQTT server's access rules: one device tries everything that it must not be able to do.

It needs three registered devices, a thief, a victim, and a bought device with topics of its own, and a
callback that sends a device a command. It judges by effects, not by the server's answers: some servers grant
subscriptions that they do not serve, and acknowledge publishes that they discard.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import NamedTuple

import aiomqtt

from devices.mqtt_url import parse_url
from devices.names import status_topic
from devices.tls import Tls, trust

silent = logging.getLogger("ordain.canary.mqtt")
silent.setLevel(logging.CRITICAL)

WITHIN_SEC = 10.0
LATE_SEC = 0.05
QUIET_SEC = 0.5  # wait for a leak this long after the victim has received the message
FORGED = b"a will of the canary"
# The bought device: its type, a command, its topics, and the states that say it was done, and that it failed.
BOUGHT_TYPE, BOUGHT_COMMAND = "home_assistant_lock", "lock"
BOUGHT_TOPIC = "homeassistant/lock/{}/{}"
DONE, NOT_DONE = "LOCKED", "JAMMED"
CLEAN_WITH_WILL_AND_LOGIN = 0xCE  # CONNECT flags of MQTT 3.1.1, section 3.1.2.3; the will with QoS 1


class Untried(Exception):
    """The server's rules could not be checked; the message says why."""


class Login(NamedTuple):
    """`hardware_id` is both user name and client id; `token` is the password. Both are empty for a client
    without a login."""

    hardware_id: str
    token: str


class Server(NamedTuple):
    """The MQTT server to check. `tls` None: without TLS."""

    host: str
    port: int
    tls: Tls | None = None


def server_of(url: str, ca: str = "") -> Server:
    """`ca`: a PEM file with the authorities to trust; empty: those of the system.

    Raises:
        ValueError: the URL is wrong.
        OSError: the file cannot be read.
    """
    address = parse_url(url)
    return Server(address.host, address.port, trust(ca) if address.tls else None)


class Ears:
    """All messages that one connection received."""

    def __init__(self, client: aiomqtt.Client) -> None:
        self.client = client
        self.heard: list[tuple[str, bytes]] = []
        self.news = asyncio.Event()

    async def listen(self) -> None:
        with suppress(aiomqtt.MqttError):
            async for message in self.client.messages:
                self.heard.append((message.topic.value, bytes(message.payload)))
                self.news.set()


class Canary:
    """Checks an MQTT server with topics under `prefix`.

    `send` sends a device a command and returns its id. `outcome` waits until the command is closed and
    returns its state.
    """

    def __init__(
        self,
        server: Server,
        prefix: str,
        thief: Login,
        victim: Login,
        bought: Login,
        send: Callable[[str, str], Awaitable[str]],
        outcome: Callable[[str], Awaitable[str]],
    ) -> None:
        self._server, self._prefix = server, prefix
        self._thief, self._victim, self._bought = thief, victim, bought
        self._send, self._outcome = send, outcome

    async def breaches(self) -> list[str]:
        """Sentences that say what the thief could do; empty if the rules hold.

        Raises:
            Untried: the victim cannot connect, or did not get its command.
        """
        try:
            return await self._breaches()
        except aiomqtt.MqttError as error:
            raise Untried(str(error)) from error
        except TimeoutError as error:
            raise Untried(f"nothing within {WITHIN_SEC:g} s") from error

    async def _breaches(self) -> list[str]:
        found = await strangers(self._server)
        if await _connects(self._server, self._thief._replace(token="wrong")):  # noqa: S106 # nosec B106
            found.append("a device connects with a wrong password")
        async with asyncio.timeout(WITHIN_SEC):
            while not await _connects(self._server, self._victim):  # noqa: ASYNC110 (its token may be on its way)
                await asyncio.sleep(QUIET_SEC)
        async with _connected(self._server, self._victim) as victim:
            # In this order, as many devices do it: the broker must not lose a device that subscribes late.
            await victim.client.publish(status_topic(self._prefix, self._victim.hardware_id), "online", qos=1)
            await asyncio.sleep(LATE_SEC)
            await victim.client.subscribe(self._topic("rls"), qos=1)
            await self._leave_a_will()
            found += await self._steals(victim)
            found += await self._takes_over(victim)
        return found + await self._steals_from_a_bought_device()

    async def _leave_a_will(self) -> None:
        """Leaves a last will on the victim's command topic, as a forged command. Some servers publish wills
        without checking their access rules.

        This method writes the MQTT bytes itself. A will is sent only when the connection breaks, and MQTT
        clients always disconnect in order.
        """
        texts = (self._thief.hardware_id, self._topic("rls"), FORGED, *self._thief)
        body = b"\x00\x04MQTT\x04" + bytes([CLEAN_WITH_WILL_AND_LOGIN, 0, 60])
        for text in texts:
            part = text if isinstance(text, bytes) else text.encode()
            body += len(part).to_bytes(2, "big") + part
        with suppress(OSError, asyncio.IncompleteReadError):
            reader, writer = await asyncio.open_connection(*self._server[:2], ssl=self._server.tls)
            try:
                writer.write(bytes([0x10, len(body) % 128 | 0x80, len(body) // 128]) + body)
                await reader.readexactly(4)
            finally:
                writer.transport.abort()

    async def _steals(self, victim: Ears) -> list[str]:
        found: list[str] = []
        async with _connected(self._server, self._thief) as thief:
            for topic in (self._topic("+"), f"{self._prefix}/#", "#", f"{self._prefix}/dev/+/rls"):
                with suppress(aiomqtt.MqttError):
                    await thief.client.subscribe(topic, qos=1)
            command_id = await self._send(self._victim.hardware_id, "canary")
            await self._hears(victim, command_id.encode())
            with suppress(aiomqtt.MqttError):
                await thief.client.publish(self._topic("ack"), _answer(command_id, "failed"), qos=1)
            await asyncio.sleep(QUIET_SEC)
            found += [
                f"a device receives messages for other devices: {topic}"
                for topic in sorted({topic for topic, _ in thief.heard})
                if f"/dev/{self._thief.hardware_id}/" not in topic
            ]
        await victim.client.publish(self._topic("ack"), _answer(command_id, "executed"), qos=1)
        if (outcome := await self._outcome(command_id)) != "executed":
            found.append(f"a device can answer for another device: its command is {outcome}")
        if any(payload == FORGED for _, payload in victim.heard):
            found.append("a device's last will reaches another device as a command")
        return found

    async def _steals_from_a_bought_device(self) -> list[str]:
        """As `_steals`, on the topics that a device type has of its own. A server whose rules do not have
        them lets nobody use them: then there is nothing to steal."""
        name, found = self._bought.hardware_id, list[str]()
        command, state, there = (BOUGHT_TOPIC.format(name, each) for each in ("set", "state", "availability"))
        if not await _connects(self._server, self._bought):
            return []
        async with (
            _connected(self._server, self._bought) as bought,
            _connected(self._server, self._thief) as thief,
        ):
            await bought.client.publish(there, "online", qos=1)
            for ears, topics in ((bought, [command]), (thief, [command, BOUGHT_TOPIC.format("+", "set")])):
                for topic in topics:
                    with suppress(aiomqtt.MqttError):
                        await ears.client.subscribe(topic, qos=1)
            command_id = await self._send(name, BOUGHT_COMMAND)
            if not await self._hears_before_its_end(bought, command_id):
                return []
            with suppress(aiomqtt.MqttError):
                await thief.client.publish(state, DONE, qos=1)
            await asyncio.sleep(QUIET_SEC)
            if any(topic == command for topic, _ in thief.heard):
                found.append(f"a device receives messages for other devices: {command}")
            await bought.client.publish(state, NOT_DONE, qos=1)
            if (outcome := await self._outcome(command_id)) != "failed":
                found.append(f"a device can answer for another device on {state}: its command is {outcome}")
        return found

    async def _takes_over(self, victim: Ears) -> list[str]:
        with suppress(aiomqtt.MqttError):
            async with _connected(self._server, self._thief, client_id=self._victim.hardware_id):
                await asyncio.sleep(0)
        try:
            await victim.client.publish(
                status_topic(self._prefix, self._victim.hardware_id), "offline", qos=1
            )
        except aiomqtt.MqttError:
            return ["a device can take over another device's connection with its client id"]
        return []

    async def _hears_before_its_end(self, bought: Ears, command_id: str) -> bool:
        """Whether the bought device gets its command. The server may refuse it, which ends the command."""
        hears = asyncio.ensure_future(self._hears(bought, b"LOCK"))
        ends = asyncio.ensure_future(self._outcome(command_id))
        await asyncio.wait((hears, ends), return_when=asyncio.FIRST_COMPLETED)
        heard = hears.done() and hears.exception() is None
        for each in (hears, ends):
            each.cancel()
        await asyncio.gather(hears, ends, return_exceptions=True)
        return heard

    async def _hears(self, victim: Ears, part: bytes) -> None:
        async with asyncio.timeout(WITHIN_SEC):
            while not any(part in payload for _, payload in victim.heard):
                victim.news.clear()
                await victim.news.wait()

    def _topic(self, suffix: str) -> str:
        return f"{self._prefix}/dev/{self._victim.hardware_id}/{suffix}"


def _answer(command_id: str, status: str) -> bytes:
    return json.dumps({"id": command_id, "status": status}).encode()


async def strangers(server: Server) -> list[str]:
    """Checks whether the server accepts a client without user name and password.

    Raises:
        Untried: no server answers at this address.
    """
    try:
        _, writer = await asyncio.open_connection(*server[:2], ssl=server.tls)
        writer.close()
    except OSError as error:
        raise Untried(f"the MQTT server does not answer: {error.strerror or error}") from error
    return (
        ["it accepts clients without user name and password"]
        if await _connects(server, Login("", ""))
        else []
    )


async def _connects(server: Server, login: Login) -> bool:
    try:
        async with _connected(server, login):
            return True
    except aiomqtt.MqttError:
        return False


@asynccontextmanager
async def _connected(server: Server, login: Login, *, client_id: str | None = None) -> AsyncIterator[Ears]:
    client = aiomqtt.Client(
        server.host,
        server.port,
        tls_context=server.tls,
        identifier=login.hardware_id if client_id is None else client_id,
        username=login.hardware_id or None,
        password=login.token or None,
        clean_session=True,
        timeout=WITHIN_SEC,
        logger=silent,
    )
    async with client:
        ears = Ears(client)
        listening = asyncio.create_task(ears.listen())
        try:
            yield ears
        finally:
            listening.cancel()
