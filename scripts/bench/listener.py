"""Part e: devices on our own MQTT server: round trips, many connections, and full lives over HTTP.

Beside it, in the same run: a bare server as the floor, amqtt as the server was before, and Mosquitto. Devices
are MQTT 3.1.1 clients with one connection each; each server is a separate process.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import ssl
import subprocess
import sys
import time
import zipfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from scripts.bench import life as bench_life
from scripts.bench.mqtt import Client
from scripts.bench.processes import ROOT

DEVICES, MANY, MANY_TLS, LIVING = 1_000, 10_000, 2_000, 100
AMQTT_COMMIT = "6cd96464e36b8b626cd39c27f1e71516ef25b112"
SLOWER = {"floor": 1, "listener": 1, "amqtt": 5}  # a round of each server then takes about the same time
TRIPS_PER_LIFE = 5
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
        if process.returncode is None:
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
    await _trips(figures, rounds, count, home)
    await _crowds(figures, home)
    await _lives(figures, rounds, count // TRIPS_PER_LIFE, home)
    return figures


async def _trips(figures: Figures, rounds: int, count: int, home: Path) -> None:
    """Round trips on each server in turn, so that all are measured while the machine is equally busy."""
    kinds = {"floor": ["scripts.bench.server", "floor"], "listener": ["scripts.bench.server", "listener"]}
    old = _old_code(home)
    if old is not None:
        kinds["amqtt"] = ["scripts.bench.amqtt", str(old)]
    async with AsyncExitStack() as stack:
        servers = {}
        for kind, command in kinds.items():
            server = servers[kind] = await stack.enter_async_context(serving(*command))
            stack.callback(_close, await fleet(server.port, DEVICES))
            await server.ask(connected=DEVICES)
            await server.ask(count=count // SLOWER[kind], window=WINDOW)
        for _ in range(rounds):
            for kind, server in servers.items():
                found = await server.ask(count=count // SLOWER[kind], window=WINDOW)
                _note(figures, f"{kind}: round trips/s", found["trips_per_sec"])
                _note(figures, f"{kind}: CPU µs each", found["cpu_us"])
        for kind in ("floor", "listener"):
            for _ in range(rounds):
                paced = await servers[kind].ask(count=count, window=WINDOW, rate=PACED)
                _note(figures, f"{kind}: p99 ms at {PACED:,.0f}/s", paced["p99_ms"])
    _compare(figures, "round trips/s", "listener", "floor")
    _compare(figures, "CPU µs each", "listener", "floor")
    if old is not None:
        _compare(figures, "round trips/s", "listener", "amqtt")
        _compare(figures, "CPU µs each", "amqtt", "listener")


async def _crowds(figures: Figures, home: Path) -> None:
    """Many connected devices."""
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


async def _lives(figures: Figures, rounds: int, count: int, home: Path) -> None:
    """Full lives over HTTP, in turn with the listener and with a Mosquitto. Devices share no connection."""
    async with AsyncExitStack() as stack:
        kinds = {}
        for kind, own in (("listener", True), ("Mosquitto", False)):
            (home / kind).mkdir()
            living = bench_life.living(home / kind, count, LIVING, LIVING, own=own)
            kinds[kind] = await stack.enter_async_context(living)
            await kinds[kind]()
        for _ in range(rounds):
            for kind, one_round in kinds.items():
                found = await one_round()
                cpu = [found.get(f"{name} CPU µs per life", 0.0) for name in ("broker", "Mosquitto")]
                _note(figures, f"{kind}: lives/s", found["lives/s"])
                _note(figures, f"{kind}: CPU µs per life, server too", sum(cpu))
    _compare(figures, "lives/s", "listener", "Mosquitto")
    _compare(figures, "CPU µs per life, server too", "listener", "Mosquitto")


def _old_code(home: Path) -> Path | None:
    """The code of the last commit with amqtt as the server. None without this repository's history."""
    packed = home / "old.zip"
    git = [
        "git",
        "-C",
        str(ROOT),
        "archive",
        "-o",
        str(packed),
        AMQTT_COMMIT,
        "broker",
        "devices",
        "projections",
    ]
    if shutil.which("git") is None or subprocess.run(git, capture_output=True, check=False).returncode:
        print("e  amqtt is not measured: its commit is not in this repository", flush=True)
        return None
    with zipfile.ZipFile(packed) as archive:
        archive.extractall(home / "old")
    return home / "old"


def _compare(figures: Figures, name: str, over: str, under: str) -> None:
    pairs = zip(figures[f"{over}: {name}"], figures[f"{under}: {name}"], strict=True)
    figures[f"{over} / {under}: {name}"] = [a / b for a, b in pairs]


def _note(figures: Figures, name: str, value: float) -> None:
    figures.setdefault(name, []).append(value)


def _close(devices: list[Device]) -> None:
    for device in devices:
        device.close()


def _certificate(path: Path) -> Path:
    """A self-signed certificate for 127.0.0.1, followed by its key."""
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
