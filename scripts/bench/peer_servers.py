"""Ordain and the plain scripts beside it, as servers that `peers` gives the same work."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import httpx2
import msgspec

from broker.world import open_for_reading
from scripts.bench import processes
from scripts.bench.devices import PREFIX
from scripts.bench.mqtt import Client
from scripts.soak.load import Load
from scripts.soak.world import Program, until

WINDOW = 100  # commands that a plain script publishes before it waits for their PUBACKs
READY_WITHIN_SEC = 90


class Server(Protocol):
    """`executed`: how many commands have an answer that is recorded durably."""

    devices: Devices

    async def start(self) -> None: ...
    async def kill(self) -> None: ...
    async def order(self, count: int) -> None:
        """Returns when so many commands are accepted durably."""

    async def arrive(self) -> None:
        """All devices connect, and say that they are there."""

    async def once(self) -> None:
        """One command to one connected device, until its answer is recorded."""

    async def stop_recording(self) -> None: ...
    async def record_again(self) -> None: ...
    def executed(self) -> int: ...


class Devices:
    """The devices' connections. They answer each command, also a repeated one. `seen`: ids of commands."""

    def __init__(self, names: Sequence[str], command: str, answer: str) -> None:
        self._names, self._command, self._answer = names, command, answer
        self._clients: list[Client] = []
        self.seen: set[str] = set()

    async def arrive(self, port: int, tokens: dict[str, str] | None) -> None:
        for name in self._names:
            answer_topic = self._answer.format(name).encode()

            def told(
                _: bytes, payload: bytes, topic: bytes = answer_topic, at: int = len(self._clients)
            ) -> None:
                id = msgspec.json.decode(payload)["id"]
                self.seen.add(id)
                self._clients[at].publish(topic, b'{"id":"%s","status":"executed"}' % id.encode())

            client = Client(told)
            self._clients.append(client)
            password = tokens[name] if tokens else None
            await client.enter(port, name, password=password, clean=bool(tokens))
            await client.subscribe([self._command.format(name)])
            if tokens:
                client.publish(f"{PREFIX}/{name}/status".encode(), b"online")
                client.flush()

    async def settled(self) -> None:
        """Returns when the server has confirmed all answers."""
        for client in self._clients:
            await client.settled()

    def leave(self) -> None:
        for client in self._clients:
            client.close()
        self._clients.clear()


class Plain:
    """Plain scripts and an MQTT server that keeps sessions."""

    def __init__(self, program: Sequence[str], home: Path, port: int, names: Sequence[str]) -> None:
        self._program, self._home, self._port = program, home, port
        self._process: asyncio.subprocess.Process | None = None
        self.devices = Devices(names, "commands/{}", "answers/{}")
        self._names = names
        self._sql = sqlite3.connect(home / "answers.db", isolation_level=None)
        self._sql.executescript(
            "PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL;"
            "CREATE TABLE answers (id TEXT PRIMARY KEY, said BLOB)"
        )
        self._said: list[tuple[str, bytes]] = []
        self._number = 0
        self._news = asyncio.Event()
        self._publisher, self._service = Client(lambda *_: None), Client(self._heard)

    async def start(self) -> None:
        with (self._home / "server.log").open("ab") as log:
            # RabbitMQ starts other processes. In a group of their own all of them can be killed.
            self._process = await asyncio.create_subprocess_exec(
                *self._program, cwd=self._home, stdout=log, stderr=log, start_new_session=True
            )
        async with asyncio.timeout(READY_WITHIN_SEC):
            while True:
                self._publisher = Client(lambda *_: None)
                with suppress(OSError):  # some servers accept connections before they are ready
                    await self._publisher.enter(self._port, "publisher", password=None)
                    return
                await asyncio.sleep(0.1)

    async def kill(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            await self._process.wait()
            self._process = None

    async def order(self, count: int) -> None:
        for number in range(count):
            self._publish(number)
            if number % WINDOW == WINDOW - 1:
                await self._publisher.settled()
        await self._publisher.settled()

    def _publish(self, number: int) -> None:
        self._number += 1
        body = b'{"id":"c%d","type":"lock","params":{"duration_sec":30,"reason":"door 7","by":"bench"}}'
        topic = f"commands/{self._names[number % len(self._names)]}"
        self._publisher.publish(topic.encode(), body % self._number)

    async def arrive(self) -> None:
        await self.devices.arrive(self._port, None)

    async def once(self) -> None:
        before = self.executed()
        self._publish(0)
        self._publisher.flush()
        while self.executed() == before:
            await self._news.wait()
            self._news.clear()

    async def stop_recording(self) -> None:
        self._service.close()

    async def record_again(self) -> None:
        self._service = Client(self._heard)
        await self._service.enter(self._port, "service", password=None, clean=False)
        await self._service.subscribe(["answers/+"])

    def _heard(self, _: bytes, payload: bytes) -> None:
        if not self._said:  # all answers of one turn in one transaction
            asyncio.get_running_loop().call_soon(self._record)
        self._said.append((msgspec.json.decode(payload)["id"], payload))

    def _record(self) -> None:
        self._sql.execute("BEGIN")
        self._sql.executemany("INSERT OR IGNORE INTO answers VALUES (?, ?)", self._said)
        self._sql.execute("COMMIT")
        self._said.clear()
        self._news.set()

    def executed(self) -> int:
        (count,) = self._sql.execute("SELECT count(*) FROM answers").fetchone()
        return int(count)


class Ordain:
    """The broker with its own MQTT server; commands come over HTTP."""

    def __init__(self, home: Path, names: Sequence[str]) -> None:
        self._home, self._names = home, names
        self._http, self._port = processes.unused_port(), processes.unused_port()
        (home / "bench.toml").write_text(processes.CONFIG)
        serve = ["serve", "--data", str(home), "--config", str(home / "bench.toml")]
        serve += ["--http", f"127.0.0.1:{self._http}", "--mqtt-listen", f"127.0.0.1:{self._port}"]
        self._program = Program("ordain", [sys.executable, "-c", processes.ORDAIN, *serve], home)
        self.devices = Devices(names, f"{PREFIX}/{{}}/rls", f"{PREFIX}/{{}}/ack")
        self._tokens: dict[str, str] = {}
        self._load: Load
        self._client: httpx2.AsyncClient
        self._log: sqlite3.Connection

    async def start(self) -> None:
        await self._program.start()
        ready = lambda: processes.accepts(self._http) and processes.ready(self._http)  # noqa: E731
        await until(ready, "the broker is ready", READY_WITHIN_SEC)
        if self._tokens:
            return
        scopes = ["--scope", "devices:read", "--scope", "devices:write"]
        key = processes.ordain("keys", "create", "--project", "bench", *scopes, "--data", str(self._home))
        headers = {"Authorization": f"Bearer {key}"}
        self._client = httpx2.AsyncClient(
            base_url=f"http://127.0.0.1:{self._http}", headers=headers, timeout=60
        )
        for name in self._names:
            answer = await self._client.post("/v1/devices", json={"hardware_id": name, "type": "generic"})
            self._tokens[name] = answer.raise_for_status().json()["device_token"]
        self._load = Load(self._http, key, self._names)
        self._log = open_for_reading(self._home)

    async def kill(self) -> None:
        await self._program.end()

    async def order(self, count: int) -> None:
        await self._load.run(count)

    async def arrive(self) -> None:
        await self.devices.arrive(self._port, self._tokens)

    async def once(self) -> None:
        path, body = f"/v1/devices/{self._names[0]}/commands?wait=30", {"type": "lock"}
        answer = (await self._client.post(path, json=body)).raise_for_status()
        assert answer.json()["state"] == "executed", answer.text

    async def stop_recording(self) -> None:
        pass  # the broker itself records

    async def record_again(self) -> None:
        pass

    def executed(self) -> int:
        (count,) = self._log.execute("SELECT count(*) FROM events WHERE type = 'executed'").fetchone()
        return int(count)
