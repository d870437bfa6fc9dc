"""HTTP to the outside, to addresses that customers chose: the real `Outbound`.

A name is looked up once per connection, every address found is judged, and the connection goes to exactly
one of those; nothing private is reached unless `webhook_allow` names it. No redirect, no proxy, no cookie.
"""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
import threading
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httpcore2

from broker.seams import Answer

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network
Lookup = Callable[[str, int], Awaitable[Sequence[str]]]

URL_CHARS = 2_048
BODY_BYTES = 65_536  # of an answer: nothing in it is used, and nobody may fill our memory with it
KEPT_CONNECTIONS = 64
KEPT_SEC = 15.0  # then the name is looked up anew
LOOKUPS = 64
ADDRESSES = 4
# Letters, digits, dots and dashes, or an IPv6 address: what else looks like a host is a trick or needs IDNA.
HOST = re.compile(r"[A-Za-z0-9._-]{1,253}|[0-9A-Fa-f:.]{2,45}")
VISIBLE = re.compile(r"[!-~]+")
GLOBAL_V6 = IPv6Network("2000::/3")
NAT64 = IPv6Network("64:ff9b::/96")
TEREDO = IPv6Network("2001::/32")
# Taken for public by some releases of Python, and where clouds tell their machines secrets.
NOT_PUBLIC = (IPv4Network("192.0.0.0/24"), IPv4Network("168.63.129.16/32"), IPv6Network("3fff::/20"))


class Refused(Exception):
    """Nothing may be sent there; the message is half a sentence that says why."""


class Target(NamedTuple):
    tls: bool
    host: str
    port: int
    path: str


def target_of(url: str) -> Target:
    """A URL, taken apart once: what is judged is what is connected to.

    Raises:
        Refused: it is not a plain http or https URL.
    """
    if len(url) > URL_CHARS:
        raise Refused(f"is longer than {URL_CHARS} characters")
    if not VISIBLE.fullmatch(url) or "\\" in url:
        raise Refused("must be printable ASCII; write a host of other letters in its xn-- form")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        raise Refused("is not a URL") from None
    if parts.scheme not in ("http", "https"):
        raise Refused("must begin with https")
    if "@" in parts.netloc:
        raise Refused("must hold no user or password")
    if "#" in url:
        raise Refused("must hold no fragment")
    if not HOST.fullmatch(host) or port == 0:
        raise Refused("must name a host, such as example.com, and may name a port")
    tls = parts.scheme == "https"
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return Target(tls, host, port or (443 if tls else 80), path)


def networks(texts: Iterable[str]) -> tuple[Network, ...]:
    """ValueError: one is no network, such as 10.0.0.0/8."""
    return tuple(ip_network(text) for text in texts)


def is_public(address: Address) -> bool:
    """Is it an address of the public internet, whatever it is wrapped in?"""
    if isinstance(address, IPv6Address):
        if (inner := _embedded(address)) is not None:
            return is_public(inner)
        if address not in GLOBAL_V6 or address in TEREDO:
            return False
    if any(address in network for network in NOT_PUBLIC):
        return False
    return address.is_global and not address.is_multicast and not address.is_reserved


def _embedded(address: IPv6Address) -> IPv4Address | None:
    """The IPv4 address that this one leads to: mapped, 6to4 or NAT64."""
    if address in NAT64:
        return IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour


class HttpOutbound:
    """`allow`: networks that may be reached though they are private, and with plain http. `lookup` gives the
    addresses of a name (OSError: it has none); `verify` is what certificates are held against."""

    def __init__(
        self,
        allow: Iterable[str] = (),
        lookup: Lookup | None = None,
        verify: ssl.SSLContext | None = None,
    ) -> None:
        self._allow = networks(allow)
        self._lookup = lookup or _Lookups()
        # One pool for each scheme: whether plain http is right is judged by the address.
        self._pools = {
            tls: httpcore2.AsyncConnectionPool(
                ssl_context=(verify or ssl.create_default_context()) if tls else None,
                network_backend=_Guarded(self, tls=tls),
                max_connections=None,
                max_keepalive_connections=KEPT_CONNECTIONS,
                keepalive_expiry=KEPT_SEC,
            )
            for tls in (False, True)
        }

    async def fault(self, url: str) -> str | None:
        try:
            target = target_of(url)
            await self.addresses(target.host, target.port, tls=target.tls)
        except Refused as refused:
            return str(refused)
        return None

    async def addresses(self, host: str, port: int, *, tls: bool) -> list[str]:
        """Where a host may be connected to. One address that may not be is enough to refuse them all.

        Raises:
            Refused: there is none, or one that may not be reached.
        """
        try:
            found = [str(ip_address(host))]
        except ValueError:
            try:
                found = list(await self._lookup(host, port))
            except OSError:
                found = []
        if not found:
            raise Refused(f"the host {host[:80]} cannot be looked up")
        for text in found:
            address = ip_address(text.partition("%")[0])
            inner = _embedded(address) if isinstance(address, IPv6Address) else None
            allowed = any(each in network for network in self._allow for each in (address, inner or address))
            if not allowed and not is_public(address):
                raise Refused(f"leads to {address}, which is not an address of the public internet")
            if not allowed and not tls:
                raise Refused("must begin with https; plain http is for addresses that webhook_allow names")
        return found[:ADDRESSES]

    async def post(self, url: str, headers: Mapping[str, str], body: bytes, timeout_sec: float) -> Answer:
        try:
            target = target_of(url)
            async with asyncio.timeout(timeout_sec):
                return await self._post(target, headers, body)
        except TimeoutError:
            return Answer(error=f"no answer within {timeout_sec:g} s")
        except Refused as refused:
            return Answer(error=f"the URL {refused}")
        except (httpcore2.NetworkError, httpcore2.TimeoutException, httpcore2.ProtocolError) as error:
            return Answer(error=f"{type(error).__name__}: {error}"[:200])

    async def _post(self, target: Target, headers: Mapping[str, str], body: bytes) -> Answer:
        scheme, usual = (b"https", 443) if target.tls else (b"http", 80)
        host = f"[{target.host}]" if ":" in target.host else target.host
        name = host if target.port == usual else f"{host}:{target.port}"
        fields = {"host": name, "content-length": str(len(body)), **headers}
        async with self._pools[target.tls].stream(
            "POST",
            httpcore2.URL(
                scheme=scheme, host=target.host.encode(), port=target.port, target=target.path.encode()
            ),
            headers=[(key.encode(), value.encode()) for key, value in fields.items()],
            content=body,
        ) as response:
            size = 0
            async for chunk in response.aiter_stream():
                if (size := size + len(chunk)) > BODY_BYTES:
                    break
            found = (value for key, value in response.headers if key.lower() == b"retry-after")
            after = next(found, None)
            return Answer(
                status=response.status, retry_after=None if after is None else after.decode("latin-1")[:100]
            )

    async def aclose(self) -> None:
        for pool in self._pools.values():
            await pool.aclose()


class _Guarded(httpcore2.AsyncNetworkBackend):
    """Connects to nothing but an address that was judged, and hands the name on for TLS alone."""

    def __init__(self, outbound: HttpOutbound, *, tls: bool) -> None:
        self._outbound = outbound
        self._tls = tls
        self._network = httpcore2.AnyIOBackend()

    async def connect_tcp(
        self, host: str, port: int, timeout: float | None = None, *more: Any, **options: Any
    ) -> httpcore2.AsyncNetworkStream:
        failure: Exception | None = None
        for address in await self._outbound.addresses(host, port, tls=self._tls):
            try:
                return await self._network.connect_tcp(address, port, timeout, *more, **options)
            except httpcore2.ConnectError as error:
                failure = error
        assert failure is not None, "there was an address"
        raise failure

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


class _Lookups:
    """The system's resolver. Each name at most once at a time, in a thread that nobody waits for at the end:
    a name server that never answers must delay neither other names nor our own end."""

    def __init__(self) -> None:
        self._under_way: dict[tuple[str, int], asyncio.Future[Sequence[str]]] = {}

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        key = (host, port)
        found = self._under_way.get(key)
        if found is None:
            if len(self._under_way) >= LOOKUPS:
                raise OSError("too many names are being looked up")
            found = self._under_way[key] = asyncio.get_running_loop().create_future()
            found.add_done_callback(lambda _: self._under_way.pop(key))
            threading.Thread(target=self._work, args=(host, port, found), daemon=True).start()
        return await asyncio.shield(found)

    def _work(self, host: str, port: int, future: asyncio.Future[Sequence[str]]) -> None:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            addresses = list(dict.fromkeys(str(each[4][0]) for each in found))
        except (OSError, UnicodeError):
            addresses = []
        with suppress(RuntimeError):  # the loop has ended meanwhile
            future.get_loop().call_soon_threadsafe(_settle, future, addresses)


def _settle(future: asyncio.Future[Sequence[str]], addresses: Sequence[str]) -> None:
    if not future.done():
        future.set_result(addresses)
