"""The listening sockets for MQTT: TCP and TLS, with or without a PROXY header before the first byte.

Connections from the addresses of `trusted_proxies` must begin with a PROXY header of version 2. It contains
the address of the client, and is read from the socket before TLS begins. From other addresses a header is not
MQTT and ends the connection.

Connections with TLS or through a proxy are accepted here, one task each: so their handshakes are bounded like
all connections that are not authenticated, and each gets the certificates that are valid now.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable, Coroutine, Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import Any, Literal

import structlog

from broker.mqtt.listener import Listener
from broker.mqtt.shell import Connection
from broker.mqtt.tls import Certificates, identity
from broker.often import Often
from devices.mqtt_url import Endpoint

logger = structlog.get_logger()

BACKLOG = 4_096
LOOK_SEC = 5.0
NO_FILES_LEFT_SEC = 0.1
SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
LONGEST_HEADER = 2_048
LOCAL, PROXIED = 0x20, 0x21
FAMILIES = {0x11: 4, 0x21: 16}


class NotProxied(Exception):
    """A trusted proxy did not send a PROXY header of version 2."""


class Sockets:
    """Listens on `endpoints` for one listener, until closed. After `open`, their ports are the real ones."""

    def __init__(
        self,
        listener: Listener,
        endpoints: Sequence[Endpoint],
        *,
        certificates: Certificates | None = None,
        identity_field: Literal["cn", "san"] = "cn",
        trusted_proxies: Sequence[str] = (),
    ) -> None:
        self.endpoints = list(endpoints)
        self.certificates = certificates
        self._listener = listener
        self._field = identity_field
        self._trusted = [ip_network(text) for text in trusted_proxies]
        self._servers: list[asyncio.Server] = []
        self._sockets: list[socket.socket] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._often = Often(asyncio.get_running_loop().time)

    async def open(self) -> None:
        """Starts to listen.

        Raises:
            OSError: an address is in use or not available; the message names it.
        """
        try:
            for number, endpoint in enumerate(self.endpoints):
                bound = _bound(endpoint)
                self._sockets.append(bound)
                self.endpoints[number] = endpoint._replace(port=bound.getsockname()[1])
                await self._serve(bound, tls=endpoint.tls)
        except OSError:
            await self.close()
            raise
        if self.certificates is not None:
            self._spawn(self._watch(self.certificates))

    async def _serve(self, bound: socket.socket, *, tls: bool) -> None:
        if self._trusted or tls:
            self._spawn(self._accept(bound, tls=tls))
            return
        loop = asyncio.get_running_loop()
        self._servers.append(await loop.create_server(self._protocol(None), sock=bound, backlog=BACKLOG))

    def _protocol(self, address: str | None) -> Callable[[], Connection]:
        def make() -> Connection:
            connection = self._listener.connection(address)
            connection.identify = lambda certificate: identity(certificate, self._field)
            return connection

        return make

    async def close(self) -> None:
        """Stops to listen. Open connections stay open."""
        for server in self._servers:
            server.close()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        for each in self._sockets:
            each.close()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _watch(self, certificates: Certificates) -> None:
        while True:
            await asyncio.sleep(LOOK_SEC)
            certificates.look()

    # --- TLS and proxies ---

    async def _accept(self, bound: socket.socket, *, tls: bool) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                client, found = await loop.sock_accept(bound)
            except OSError as error:
                self._often.warn("mqtt.not_accepted", {"why": str(error)})
                await asyncio.sleep(NO_FILES_LEFT_SEC)
                continue
            peer = str(found[0])
            proxied = self._is_trusted(peer)
            if self._listener.knocks(peer, many=proxied):
                client.setblocking(False)
                self._spawn(self._begin(client, peer, tls=tls, proxied=proxied))
            else:
                client.close()

    async def _begin(self, client: socket.socket, peer: str, *, tls: bool, proxied: bool) -> None:
        """Reads the PROXY header and makes the TLS handshake of one connection."""
        loop = asyncio.get_running_loop()
        wait, address, begun = self._listener.bounds.connect_sec, peer, False
        context = self.certificates.for_mqtt if tls and self.certificates is not None else None
        try:
            if proxied:
                async with asyncio.timeout(wait):
                    address = await _proxied(client) or peer
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await loop.connect_accepted_socket(
                self._protocol(address), client, ssl=context, ssl_handshake_timeout=wait if context else None
            )
            begun = True
        except (OSError, NotProxied) as error:  # a time-out and an error of TLS are OSErrors
            self._listener.counts["not_begun"] += 1
            why = str(error) or f"nothing came within {wait:g} s"
            self._often.warn("mqtt.not_begun", {"address": address, "why": why})
        finally:
            self._listener.crowd.answered(peer)
            if not begun:
                client.close()

    def _is_trusted(self, address: str) -> bool:
        found: IPv4Address | IPv6Address = ip_address(address.partition("%")[0])
        if isinstance(found, IPv6Address) and found.ipv4_mapped is not None:
            found = found.ipv4_mapped
        return any(found in network for network in self._trusted)


async def _proxied(client: socket.socket) -> str | None:
    """The client's address in a PROXY header. None if the proxy connects for itself (a health check).

    Source: the PROXY protocol, version 2, section 2.2.

    Raises:
        NotProxied: the bytes are not such a header.
    """
    head = await _exactly(client, 16)
    signature, command, family, length = struct.unpack("!12sBBH", head)
    if signature != SIGNATURE or command not in (LOCAL, PROXIED) or length > LONGEST_HEADER:
        raise NotProxied("a trusted proxy must send a PROXY header of version 2 first")
    body = await _exactly(client, length)
    size = FAMILIES.get(family)
    if command == LOCAL or size is None:
        return None
    if length < 2 * size + 4:
        raise NotProxied("a PROXY header that ends too early")
    return str(ip_address(body[:size]))


async def _exactly(client: socket.socket, size: int) -> bytes:
    loop, found = asyncio.get_running_loop(), b""
    while len(found) < size:
        more = await loop.sock_recv(client, size - len(found))
        if not more:
            raise NotProxied("the connection ended within the PROXY header")
        found += more
    return found


def _bound(endpoint: Endpoint) -> socket.socket:
    family, _, _, _, where = socket.getaddrinfo(endpoint.host, endpoint.port, type=socket.SOCK_STREAM)[0]
    found = socket.socket(family)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # With MQTT keepalive 0, only TCP keepalive shows that the peer has vanished.
        found.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        found.setblocking(False)
        found.bind(where)
        found.listen(BACKLOG)
    except OSError as error:
        found.close()
        raise OSError(error.errno, f"{endpoint} cannot be listened on: {error.strerror}") from error
    return found
