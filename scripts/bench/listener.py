"""Part e: devices on the listener itself: round trips, many connections, TLS, beside a bare server as floor.

Devices are 3.1.1 clients in this process, one connection each; the server is a process of its own.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from scripts.bench.mqtt import Client
from scripts.bench.processes import ROOT

DEVICES, MANY, MANY_TLS = 1_000, 10_000, 2_000
WINDOW = 100
PACED = 5_000.0
AT_ONCE = 200
ANSWER = b'{"id":"cmd_01m8cqx018ehrt8srw7z3bz3vs","status":"executed"}'
Figures = dict[str, list[float]]


class Server:
    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.port = 0
        self.rss = 0

    async def hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        found: dict[str, Any] = json.loads(await self._process.stdout.readline())
        return found

    async def ask(self, **order: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order).encode() + b"\n")
        return await self.hear()


@asynccontextmanager
async def serving(*command: str) -> AsyncIterator[Server]:
    """A server process; `command` is a module and its options."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", *command, stdin=pipe, stdout=pipe, cwd=ROOT
    )
    try:
        server = Server(process)
        first = await server.hear()
        server.port, server.rss = first["port"], first["rss"]
        yield server
    finally:
        process.kill()
        await process.wait()


class Device(Client):
    """Answers each command at once."""

    @classmethod
    async def begin(cls, port: int, name: str, tls: ssl.SSLContext | None) -> Device:
        def told(topic: bytes, payload: bytes) -> None:
            device.publish(b"iotee/dev/" + name.encode() + b"/ack", ANSWER)

        device = cls(told)
        await device.enter(port, name, tls=tls)
        await device.subscribe([f"iotee/dev/{name}/rls"])
        return device


async def fleet(port: int, count: int, tls: ssl.SSLContext | None = None) -> list[Device]:
    turn = asyncio.Semaphore(AT_ONCE)

    async def one(number: int) -> Device:
        async with turn:
            return await Device.begin(port, f"device-{number:05}", tls)

    return list(await asyncio.gather(*(one(number) for number in range(count))))


async def measured(rounds: int, count: int, home: Path) -> Figures:
    """The figures of part e. `count`: round trips in each round."""
    figures: Figures = {}
    for kind in ("floor", "listener"):
        async with serving("scripts.bench.server", kind) as server:
            devices = await fleet(server.port, DEVICES)
            await server.ask(connected=DEVICES)
            await server.ask(count=count, window=WINDOW)
            for _ in range(rounds):
                found = await server.ask(count=count, window=WINDOW)
                _note(figures, f"{kind}: round trips/s", found["trips_per_sec"])
                _note(figures, f"{kind}: CPU µs each", found["cpu_us"])
                paced = await server.ask(count=count, window=WINDOW, rate=PACED)
                _note(figures, f"{kind}: p99 ms at {PACED:,.0f}/s", paced["p99_ms"])
            _close(devices)
    pairs = zip(figures["listener: round trips/s"], figures["floor: round trips/s"], strict=True)
    figures["listener / floor"] = [a / b for a, b in pairs]
    certificate = _certificate(home / "server.pem")
    for name, many, tls in (("plain", MANY, False), ("TLS", MANY_TLS, True)):
        more = ["--certificate", str(certificate)] if tls else []
        async with serving("scripts.bench.server", "listener", *more) as server:
            context = ssl.create_default_context(cafile=str(certificate)) if tls else None
            since = time.perf_counter()
            devices = await fleet(server.port, many, context)
            after = await server.ask(connected=many)
            _note(figures, f"{many:,} {name}: seconds to connect", time.perf_counter() - since)
            _note(figures, f"{many:,} {name}: MB more", (after["rss"] - server.rss) / 1e6)
            _close(devices)
    return figures


def _note(figures: Figures, name: str, value: float) -> None:
    figures.setdefault(name, []).append(value)


def _close(devices: list[Device]) -> None:
    for device in devices:
        device.close()


def _certificate(path: Path) -> Path:
    """A certificate for 127.0.0.1 that signs itself, with its key behind it."""
    from ipaddress import ip_address

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "bench")])
    now, day = datetime.now(UTC), timedelta(days=1)
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    host = x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))])
    builder = builder.not_valid_before(now - day).not_valid_after(now + day)
    signed = builder.add_extension(host, critical=False).sign(key, hashes.SHA256())
    plain = (serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    private = key.private_bytes(serialization.Encoding.PEM, *plain)
    path.write_bytes(signed.public_bytes(serialization.Encoding.PEM) + private)
    return path
