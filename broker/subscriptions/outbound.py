"""HTTP requests to webhook URLs, which customers choose: the real `Outbound`.

It protects against server-side request forgery (SSRF). Each connection looks the host name up once, checks
every address found, and connects to one of the checked addresses. Private addresses are refused unless
`webhook_allow` names them. It follows no redirects and uses no proxy and no cookies.
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

from broker.seams import Answer, of_project
from broker.settings import Limits
from devices.mqtt_url import joined

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network
Lookup = Callable[[str, int], Awaitable[Sequence[str]]]

URL_CHARS = 2_048
# OSError: the system's authorities cannot be read.
FAILED = (httpcore2.NetworkError, httpcore2.TimeoutException, httpcore2.ProtocolError, OSError)
# What one response may cost. Its body is not used: it is read only so that the connection can be used again.
ANSWER_BYTES = 32_768  # head, 1xx responses and body together
PIECE_BYTES = 1_024  # read at a time: in so few bytes, even the smallest chunks take 3 ms
PIECES_AT_ONCE = 2  # pieces that may be handled in one turn of the loop, of all responses together
CHUNKS = 64
KEPT_CONNECTIONS = 64
KEPT_SEC = 15.0  # idle connections are closed after this time, so the name is looked up again
FAILED_SEC = 10.0  # so long a name without an address is not looked up again
FAILED_NAMES = 1_000
ADDRESSES = 4
# Letters, digits, dots and dashes, or an IPv6 address. Any other host is an attack or needs IDNA.
HOST = re.compile(r"[A-Za-z0-9._-]{1,253}|[0-9A-Fa-f:.]{2,45}")
VISIBLE = re.compile(r"[!-~]+")
GLOBAL_V6 = IPv6Network("2000::/3")
NAT64 = IPv6Network("64:ff9b::/96")
TEREDO = IPv6Network("2001::/32")
# Some Python releases call these public. 168.63.129.16 is a cloud's metadata service, which gives secrets.
NOT_PUBLIC = (IPv4Network("192.0.0.0/24"), IPv4Network("168.63.129.16/32"), IPv6Network("3fff::/20"))


class Refused(Exception):
    """The URL must not be used. The message says why; it is the end of a sentence that begins "the URL"."""


class Target(NamedTuple):
    tls: bool
    host: str
    port: int
    path: str


def target_of(url: str) -> Target:
    """Parses a URL. It is parsed only once, so the checked host is the host of the connection.

    Raises:
        Refused: it is not a plain http or https URL.
    """
    if len(url) > URL_CHARS:
        raise Refused(f"is longer than {URL_CHARS} characters")
    if not VISIBLE.fullmatch(url) or "\\" in url:
        raise Refused("must be printable ASCII; write a host name with other letters in its xn-- form")
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
    """Parses networks such as 10.0.0.0/8.

    Raises:
        ValueError: one of them is not a network.
    """
    return tuple(ip_network(text) for text in texts)


def is_public(address: Address) -> bool:
    """Whether this is an address of the public internet; an embedded IPv4 address is checked instead."""
    if isinstance(address, IPv6Address):
        if (inner := _embedded(address)) is not None:
            return is_public(inner)
        if address not in GLOBAL_V6 or address in TEREDO:
            return False
    if any(address in network for network in NOT_PUBLIC):
        return False
    return address.is_global and not address.is_multicast and not address.is_reserved


def _embedded(address: IPv6Address) -> IPv4Address | None:
    """The IPv4 address inside an IPv4-mapped, 6to4 or NAT64 address."""
    if address in NAT64:
        return IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour


class HttpOutbound:
    """`allow`: private networks that may be reached, also with plain http. `lookup` returns the addresses of
    a host name and raises OSError if there are none. `verify`: the SSL context that checks certificates;
    None: the system's authorities."""

    def __init__(
        self,
        allow: Iterable[str] = (),
        lookup: Lookup | None = None,
        verify: ssl.SSLContext | None = None,
        limits: Limits | None = None,
    ) -> None:
        bounds = limits or Limits()
        self._allow = networks(allow)
        self.lookups = Lookups(bounds.lookups, bounds.lookups_per_project)
        self._lookup = lookup or self.lookups
        self._verify = verify
        self.closing = set[asyncio.Task[None]]()
        # One pool per scheme, because plain http is allowed only to some addresses.
        self._pools: dict[bool, httpcore2.AsyncConnectionPool] = {}

    async def fault(self, url: str) -> str | None:
        try:
            target = target_of(url)
            await self.addresses(target.host, target.port, tls=target.tls)
        except Refused as refused:
            return str(refused)
        return None

    async def addresses(self, host: str, port: int, *, tls: bool) -> list[str]:
        """The addresses of a host. If one of them must not be reached, the host is refused.

        Raises:
            Refused: the host has no address, or one that must not be reached.
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
                raise Refused("must begin with https; plain http needs an address that webhook_allow names")
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
        except FAILED as error:
            return Answer(error=f"{type(error).__name__}: {error}"[:200])

    async def _pool(self, *, tls: bool) -> httpcore2.AsyncConnectionPool:
        """Made at its first use: the system's authorities take 0.06 s to read."""
        if tls and self._verify is None:
            self._verify = await asyncio.to_thread(ssl.create_default_context)
        if tls not in self._pools:
            self._pools[tls] = httpcore2.AsyncConnectionPool(
                ssl_context=self._verify if tls else None,
                network_backend=_Guarded(self, tls=tls),
                max_connections=None,
                max_keepalive_connections=KEPT_CONNECTIONS,
                keepalive_expiry=KEPT_SEC,
            )
        return self._pools[tls]

    async def _post(self, target: Target, headers: Mapping[str, str], body: bytes) -> Answer:
        scheme, usual = (b"https", 443) if target.tls else (b"http", 80)
        name = joined(target.host, None if target.port == usual else target.port)
        fields = {"host": name, "content-length": str(len(body)), **headers}
        pool = await self._pool(tls=target.tls)
        async with pool.stream(
            "POST",
            httpcore2.URL(
                scheme=scheme, host=target.host.encode(), port=target.port, target=target.path.encode()
            ),
            headers=[(key.encode(), value.encode()) for key, value in fields.items()],
            content=body,
        ) as response:
            with suppress(httpcore2.NetworkError, httpcore2.ProtocolError):
                chunks = 0
                async for _ in response.aiter_stream():
                    if (chunks := chunks + 1) > CHUNKS:
                        break
            found = (value for key, value in response.headers if key.lower() == b"retry-after")
            after = next(found, None)
            return Answer(
                status=response.status, retry_after=None if after is None else after.decode("latin-1")[:100]
            )

    async def aclose(self) -> None:
        for pool in self._pools.values():
            await pool.aclose()
        await asyncio.gather(*self.closing)


class _Guarded(httpcore2.AsyncNetworkBackend):
    """Connects only to checked addresses. The host name is used only for TLS."""

    def __init__(self, outbound: HttpOutbound, *, tls: bool) -> None:
        self._outbound = outbound
        self._tls = tls
        self._network = httpcore2.AnyIOBackend()
        self._turn = asyncio.Semaphore(PIECES_AT_ONCE)

    async def connect_tcp(
        self, host: str, port: int, timeout: float | None = None, *more: Any, **options: Any
    ) -> httpcore2.AsyncNetworkStream:
        failure: Exception | None = None
        for address in await self._outbound.addresses(host, port, tls=self._tls):
            try:
                stream = await self._network.connect_tcp(address, port, timeout, *more, **options)
                return _Slow(stream, self._turn, self._outbound.closing)
            except httpcore2.ConnectError as error:
                failure = error
        assert failure is not None, "there was an address"
        raise failure

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


class _Slow(httpcore2.AsyncNetworkStream):
    """A connection whose responses are read in small pieces, and only up to a limit.

    A receiver may answer with thousands of tiny chunks or 1xx responses. The HTTP parser handles all that was
    read in one go, so a large piece would stop the loop. `turn` is common to all connections, and so is
    `closing`: those that are being closed.
    """

    def __init__(
        self, stream: httpcore2.AsyncNetworkStream, turn: asyncio.Semaphore, closing: set[asyncio.Task[None]]
    ) -> None:
        self._stream = stream
        self._turn = turn
        self._closing = closing
        self._left = ANSWER_BYTES

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        if self._left <= 0:
            raise httpcore2.RemoteProtocolError(f"the answer is longer than {ANSWER_BYTES} bytes")
        data = await self._stream.read(min(max_bytes, PIECE_BYTES), timeout)
        self._left -= len(data)
        async with self._turn:
            await asyncio.sleep(0)
        return data

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._left = ANSWER_BYTES  # a new request
        await self._stream.write(buffer, timeout)

    async def aclose(self) -> None:
        # In a task of its own: a pool closes several connections in turn. If it could be cancelled at one of
        # them, it would lose the others.
        task = asyncio.create_task(self._stream.aclose())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore2.AsyncNetworkStream:
        try:
            secured = await self._stream.start_tls(ssl_context, server_hostname, timeout)
        except BaseException:
            await self.aclose()
            raise
        return _Slow(secured, self._turn, self._closing)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


class Lookups:
    """Looks host names up with the system's resolver, each name at most once at a time.

    Each lookup runs in a daemon thread: a name server that never answers must delay neither other lookups nor
    the end of the process. A project's lookups beyond `per_project` wait for each other. Beyond `in_all`
    they fail at once. A name without an address is not looked up again for some seconds.
    """

    def __init__(
        self, in_all: int, per_project: int, resolve: Callable[..., Any] = socket.getaddrinfo
    ) -> None:
        self._in_all = in_all
        self._per_project = per_project
        self._resolve = resolve
        self._turns: dict[str, asyncio.Semaphore] = {}
        self._under_way: dict[tuple[str, int], asyncio.Future[Sequence[str]]] = {}
        self._failed: dict[tuple[str, int], float] = {}
        self.refused = 0

    @property
    def under_way(self) -> int:
        return len(self._under_way)

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        key, loop = (host, port), asyncio.get_running_loop()
        if (found := self._known(key, loop)) is None:
            turn = self._turns.setdefault(of_project.get(), asyncio.Semaphore(self._per_project))
            await turn.acquire()
            if (found := self._known(key, loop)) is not None:
                turn.release()
            elif len(self._under_way) >= self._in_all:
                turn.release()
                self.refused += 1
                raise OSError("too many names are being looked up")
            else:
                found = self._under_way[key] = loop.create_future()
                found.add_done_callback(lambda done: self._ended(key, turn, done))
                threading.Thread(target=self._work, args=(host, port, found), daemon=True).start()
        return await asyncio.shield(found)

    def _known(
        self, key: tuple[str, int], loop: asyncio.AbstractEventLoop
    ) -> asyncio.Future[Sequence[str]] | None:
        if (until := self._failed.get(key)) is not None:
            if loop.time() < until:
                raise OSError("the name had no address some seconds ago")
            del self._failed[key]
        return self._under_way.get(key)

    def _ended(
        self, key: tuple[str, int], turn: asyncio.Semaphore, done: asyncio.Future[Sequence[str]]
    ) -> None:
        # Here, not when the request ends: the thread runs until the resolver gives up.
        del self._under_way[key]
        turn.release()
        if not done.cancelled() and not done.result():
            if len(self._failed) >= FAILED_NAMES:
                del self._failed[next(iter(self._failed))]
            self._failed[key] = done.get_loop().time() + FAILED_SEC

    def _work(self, host: str, port: int, future: asyncio.Future[Sequence[str]]) -> None:
        try:
            found = self._resolve(host, port, type=socket.SOCK_STREAM)
            addresses = list(dict.fromkeys(str(each[4][0]) for each in found))
        except (OSError, UnicodeError):
            addresses = []
        with suppress(RuntimeError):  # the event loop is already closed
            future.get_loop().call_soon_threadsafe(_settle, future, addresses)


def _settle(future: asyncio.Future[Sequence[str]], addresses: Sequence[str]) -> None:
    if not future.done():
        future.set_result(addresses)
