"""The services that use the simulated broker, over the real HTTP app. They never rely on an answer that may
be lost.

Every request and its outcome goes into the history. An answer is recorded when it leaves the broker.
"""

from __future__ import annotations

import asyncio
import contextvars
import itertools
from contextlib import suppress
from functools import partial
from typing import Any, Protocol

import msgspec
from litestar.types import ASGIApp

from tests.simulation.fleet import COMMANDS, Device
from tests.simulation.history import Call, History
from tests.simulation.loop import Node, SimLoop
from tests.simulation.tide import Tide

PATIENCE_SEC = 15
TTLS = (5, 20, 60, 60, 300, 300, 600, None)


class _Exchange:
    """One request to the app in one broker process."""

    def __init__(self, history: History, node: Node, call: Call, scope: dict[str, Any], body: bytes) -> None:
        self._node = node
        self.status = 0
        self.gone = asyncio.Event()
        self.over = asyncio.Event()
        self._history, self._call, self._scope = history, call, scope
        self._incoming = [body]
        self._outgoing = b""

    async def run(self, app: Any) -> None:
        await app(self._scope, self._receive, self._send)

    async def _receive(self) -> dict[str, Any]:
        if self._incoming:
            return {"type": "http.request", "body": self._incoming.pop(), "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        if not self._node.alive:
            return  # what coroutines of a dead process do when they are freed reaches nobody
        if message["type"] == "http.response.start":
            self.status = message["status"]
            return
        self._outgoing += message.get("body", b"")
        if not message.get("more_body"):
            answer = msgspec.json.decode(self._outgoing)
            ids: tuple[str, ...] = ()
            if self._call.kind in ("create", "retry") and self.status in (200, 201):
                ids = (answer["id"],)
            elif self._call.kind in ("relay", "heartbeat") and self.status == 200:
                for each in answer["commands"]:
                    named = each["hardware_id"], each["id"], each["attempts"]
                    self._history.handed(self._call.kind, *named)
            elif self._call.kind == "fan_out" and self.status == 200:
                ids = tuple(each["command_id"] for each in answer.values() if "command_id" in each)
            elif self._call.kind == "cancel" and self.status == 200:
                ids = tuple(answer.get("cancelled", ()))
            self._learn(answer)
            self._history.returned(self._call, self.status, ids=ids, answer=answer)
            self.gone.set()
            self.over.set()

    def _learn(self, answer: Any) -> None:
        """Which secrets this answer makes or ends."""
        history, call = self._history, self._call
        named = call.body.split(" ")[0].split("?")[0].split("/")
        if call.kind == "rotate" and self.status == 201:
            history.secret(f"{named[3]}'s token", answer["device_token"])
        elif call.kind == "delete" and self.status == 200:
            history.end_secret(f"{named[3]}'s token")
        elif call.kind == "key" and self.status == 201:
            history.secret(answer["id"], answer["key"], f"key:{answer['id']}")
        elif call.kind == "revoke" and self.status == 200:
            history.end_secret(answer["id"])


class Asks(Protocol):
    """The other project. A protocol, because `strangers` imports this module."""

    async def pry(self, command_id: str) -> None: ...


class Stream(Protocol):
    """The client's end of an event stream; `over` is set when the stream is cut."""

    over: asyncio.Event

    async def run(self, app: Any, scope: dict[str, Any]) -> None: ...


class Door:
    """The HTTP connection to the broker. `listening`: the process that listens, and its app, or None."""

    def __init__(self, loop: SimLoop, history: History) -> None:
        self.listening: tuple[Node, ASGIApp] | None = None
        self.secret = ""
        self.failures: list[str] = []
        self._loop, self._history = loop, history
        self._random = loop.rng("door")
        self._numbers = itertools.count()
        self._open: dict[int, tuple[Node, _Exchange | Stream]] = {}

    def reset(self) -> None:
        """Closes all connections, because the process died."""
        self.listening = None
        for _, exchange in self._open.values():
            exchange.over.set()

    def _listening(self) -> tuple[Node, ASGIApp] | None:
        """Who takes the next connection: a process, and its app; None: nobody."""
        return self.listening

    async def call(
        self,
        kind: str,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        *,
        key: str | None = None,
        ids: tuple[str, ...] = (),
        patience: float = PATIENCE_SEC,
        secret: str | None = None,
    ) -> Call:
        """Sends a request and waits at most `patience` seconds. If the call has no `status`, its outcome is
        unknown."""
        raw = b"" if body is None else msgspec.json.encode(body)
        secret = secret or self.secret
        call = self._history.invoked(kind, key=key, body=f"{path} {raw.decode()}", ids=ids, secret=secret)
        await asyncio.sleep(self._random.uniform(0.0003, 0.01))
        if (listening := self._listening()) is None:
            return call
        node, app = listening
        exchange = _Exchange(self._history, node, call, self._scope(method, path, key, secret), raw)
        task = self._loop.spawn(node, exchange.run(app))
        task.add_done_callback(partial(self._ended, exchange), context=contextvars.Context())
        number = next(self._numbers)
        self._open[number] = node, exchange
        try:
            async with asyncio.timeout(patience):
                await exchange.over.wait()
        except TimeoutError:
            exchange.gone.set()
            if self._random.random() < 0.5:
                task.cancel()
        finally:
            del self._open[number]
        await asyncio.sleep(self._random.uniform(0.0003, 0.01))
        return call

    async def answered(self, within_sec: float) -> None:
        """Waits until all open requests and streams have ended, at most this long."""
        end = self._loop.time() + within_sec
        for _, each in list(self._open.values()):
            with suppress(TimeoutError):
                async with asyncio.timeout_at(end):
                    await each.over.wait()

    async def follow(self, stream: Stream, path: str, headers: dict[str, str]) -> None:
        """Opens an event stream and holds it until one of the two sides ends it."""
        if (listening := self._listening()) is None:
            return
        node, app = listening
        scope = self._scope("GET", path, None, self.secret)
        scope["headers"] += [(name.encode(), value.encode()) for name, value in headers.items()]
        task = self._loop.spawn(node, stream.run(app, scope))
        task.add_done_callback(partial(self._ended, stream), context=contextvars.Context())
        number = next(self._numbers)
        self._open[number] = node, stream
        await stream.over.wait()
        del self._open[number]

    def _ended(self, exchange: _Exchange | Stream, task: asyncio.Task[None]) -> None:
        exchange.over.set()  # the server closes a connection whose answer is not whole
        if not task.cancelled() and (error := task.exception()) is not None:
            self.failures.append(f"HTTP: a request raised {error!r}")

    def _scope(self, method: str, path: str, key: str | None, secret: str) -> dict[str, Any]:
        path, _, query = path.partition("?")
        headers = [(b"x-api-key", secret.encode()), (b"content-type", b"application/json")]
        if key is not None:
            headers.append((b"idempotency-key", key.encode()))
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": query.encode(),
            "root_path": "",
            "headers": headers,
            "client": ("127.0.0.1", 40_000),
            "server": ("127.0.0.1", 8080),
            "state": {},
        }


class Clients:
    """Several services that use one fleet until `stopped` is set."""

    def __init__(
        self, loop: SimLoop, door: Door, tide: Tide, devices: list[Device], count: int, pause: float
    ) -> None:
        self.stopped = False
        self.sent: list[tuple[str, str]] = []  # hardware id, command id
        self._loop, self._door, self._devices = loop, door, devices
        self._pause, self._tide = pause, tide
        self._random = loop.rng("clients")
        self._keys = itertools.count(1)
        self._levels = itertools.count(1_000)
        self._spares: list[tuple[str, str]] = []  # id and secret of keys that are revoked now and then
        self.stranger: Asks | None = None
        self._orders: list[tuple[str, str, dict[str, Any]]] = []
        for device in devices:
            device.on_end = self._device_ended
        for _ in range(count):
            loop.create_task(self._work())

    async def _work(self) -> None:
        requests = {
            self._create: 10,
            self._crowd: 3,
            self._queue: 2,
            self._again: 3,
            self._many: 2,
            self._cancel: 3,
            self._read: 4,
            self._list: 1,
            self._retry: 3,
            self._abandon: 1,
            self._cancel_many: 1,
            self._delete: 2,
            self._purge: 0.5,
            self._mistake: 2,
            self._pry: 1,
            self._spare: 1.5,
            self._look: 1,
        }
        while True:
            await self._tide.busy.wait()
            await asyncio.sleep(self._random.expovariate(1 / self._pause))
            if self.stopped:
                return
            request = self._random.choices(list(requests), list(requests.values()))[0]
            if self._tide.allows(request.__name__):
                await request()

    # --- what they ask ---

    def _order(self, device: Device | None = None) -> tuple[str, dict[str, Any]]:
        device = device or self._random.choice(self._devices)
        name = self._random.choice(list(COMMANDS[device.kind]))
        params = COMMANDS[device.kind][name]
        if "level" in params:
            params = {"level": next(self._levels)}  # by which the order is known again
        body = {"type": name, "params": params, "ttl_sec": self._random.choice(TTLS)}
        return device.hardware_id, body

    async def _create(self) -> None:
        hardware_id, body = self._order()
        if self._random.random() < 0.4:
            await self._post(hardware_id, body, None)
        else:
            key = self._new_key(hardware_id, body)
            await self._insist(hardware_id, body, key)

    async def _crowd(self) -> None:
        """Sends the same request several times at once; the broker must make one command."""
        hardware_id, body = self._order()
        key = self._new_key(hardware_id, body)
        async with asyncio.TaskGroup() as group:
            for _ in range(self._random.randint(2, 4)):
                group.create_task(self._insist(hardware_id, body, key))

    async def _queue(self) -> None:
        """Creates several commands for one device, so that some wait in its lane."""
        device = self._random.choice(self._devices)
        for _ in range(self._random.randint(2, 6)):
            await self._post(*self._order(device), None)

    async def _many(self) -> None:
        """Fans out one command to several devices and an unknown one. Repeats the request with one more
        device, like a client that lost the answer."""
        hardware_id, body = self._order()
        names = self._random.sample([each.hardware_id for each in self._devices], len(self._devices))
        names.remove(hardware_id)
        names = [hardware_id, "stranger", *names]
        if self._random.random() < 0.5:
            body["collapse_key"] = "latest"
        key = f"many-{next(self._keys)}" if self._random.random() < 0.7 else None
        for count in range(self._random.randint(2, 4), 7):
            call = await self._door.call(
                "fan_out",
                "POST",
                "/v1/commands",
                body | {"devices": names[:count]},
                key=key,
                patience=self._patience(),
            )
            if call.status == 200:
                sent = ((name, each.get("command_id")) for name, each in call.answer.items())
                self.sent += [(name, command_id) for name, command_id in sent if command_id is not None]
            if key is None or (call.status == 200 and self._random.random() < 0.5):
                return
            await asyncio.sleep(self._random.uniform(0.05, 5))

    async def _again(self) -> None:
        """Sends an old idempotency key again; in one of five cases with another body, which must conflict."""
        if not self._orders:
            return
        hardware_id, key, body = self._random.choice(self._orders)
        if self._random.random() < 0.2:
            body = {**body, "ttl_sec": 77}
            if "level" in body["params"]:
                body["params"] = {"level": next(self._levels)}
        await self._post(hardware_id, body, key)

    async def _cancel(self) -> None:
        if self.sent:
            hardware_id, command_id = self._random.choice(self.sent[-10:])
            await self._ask(
                "cancel", "DELETE", f"/v1/devices/{hardware_id}/commands/{command_id}", command_id
            )

    async def _retry(self) -> None:
        """Retries a command in any state; the broker must decide whether that is allowed."""
        if self.sent:
            hardware_id, old = self._random.choice(self.sent[-20:])
            key = f"retry-{next(self._keys)}" if self._random.random() < 0.5 else None
            path = f"/v1/devices/{hardware_id}/commands/{old}/retry"
            for _ in range(self._random.randint(1, 2)):
                call = await self._door.call("retry", "POST", path, key=key, patience=self._patience())
                if call.status == 201:
                    self.sent.append((hardware_id, call.ids[0]))

    async def _abandon(self) -> None:
        if self.sent:
            _, command_id = self._random.choice(self.sent[-10:])
            await self._ask("abandon", "POST", f"/v1/commands/{command_id}/abandon", command_id)

    async def _delete(self) -> None:
        if self.sent:
            _, command_id = self._random.choice(self.sent[-30:])
            await self._ask("erase", "DELETE", f"/commands/{command_id}", command_id)

    async def _purge(self) -> None:
        body = {"older_than_days": 0}
        await self._door.call("purge", "POST", "/commands/purge", body, patience=self._patience())

    async def _cancel_many(self) -> None:
        body = {"device": self._random.choice(self._devices).hardware_id}
        await self._door.call("cancel", "POST", "/v1/commands/cancel", body, patience=self._patience())

    async def _read(self) -> None:
        if self.sent:
            _, command_id = self._random.choice(self.sent[-30:])
            await self._ask("read", "GET", f"/v1/commands/{command_id}", command_id)

    async def _mistake(self) -> None:
        """Sends an order that must be refused."""
        device = self._random.choice(self._devices)
        body: dict[str, Any] = {"type": "set", "params": {"level": next(self._levels)}, "ttl_sec": 60}
        wrong = self._random.choice(({"ttl_sec": 0}, {"type": "no_such_command"}, {"unknown_field": 1}))
        await self._post(device.hardware_id, body | wrong, None)

    async def _pry(self) -> None:
        if self.sent and self.stranger is not None:
            await self.stranger.pry(self._random.choice(self.sent[-20:])[1])

    async def _spare(self) -> None:
        """Uses keys of its own, revokes them, and then tries them again."""
        if len(self._spares) < 2:
            body = {"project": "acme", "scopes": ["devices:read", "devices:write"]}
            call = await self._door.call("key", "POST", "/v1/keys", body)
            if call.status == 201:
                self._spares.append((call.answer["id"], call.answer["key"]))
            return
        key_id, secret = self._random.choice(self._spares)
        if self._random.random() < 0.4:
            await self._door.call("revoke", "DELETE", f"/v1/keys/{key_id}")
            await asyncio.sleep(self._random.uniform(0, 12))
        hardware_id, body = self._order()
        path = f"/v1/devices/{hardware_id}/commands"
        call = await self._door.call("create", "POST", path, body, secret=secret)
        if call.status == 201:
            self.sent.append((hardware_id, call.ids[0]))
        if self._random.random() < 0.2:
            self._spares.remove((key_id, secret))

    def probe(self) -> None:
        for work in (self._look, self._read, self._list, self._create):
            self._loop.create_task(work(), context=contextvars.Context())

    async def _look(self) -> None:
        await self._door.call("ready", "GET", "/readyz")

    async def _list(self) -> None:
        await self._door.call("list", "GET", "/v1/commands?limit=5")

    def _device_ended(self, hardware_id: str, command_id: str) -> None:
        """Cancels the next command at the moment when the device becomes free for it."""
        sent = [named for device, named in self.sent if device == hardware_id]
        behind = sent[sent.index(command_id) + 1 :] if command_id in sent else sent[-2:]
        if not self.stopped and behind and self._random.random() < 0.6:
            for _ in range(2):
                self._loop.create_task(self._snatch(hardware_id, behind[0]), context=contextvars.Context())

    async def _snatch(self, hardware_id: str, command_id: str) -> None:
        await asyncio.sleep(self._random.uniform(0, 0.03))
        await self._ask("cancel", "DELETE", f"/v1/devices/{hardware_id}/commands/{command_id}", command_id)

    # --- how they ask ---

    def _new_key(self, hardware_id: str, body: dict[str, Any]) -> str:
        key = f"key-{next(self._keys)}"
        self._orders.append((hardware_id, key, body))
        return key

    async def _insist(self, hardware_id: str, body: dict[str, Any], key: str) -> None:
        """Repeats a request whose outcome is unknown, which is safe because it has an idempotency key."""
        for _ in range(4):
            call = await self._post(hardware_id, body, key)
            if call.status not in (None, 503):
                return
            await asyncio.sleep(self._random.uniform(0.05, 5))

    async def _post(self, hardware_id: str, body: dict[str, Any], key: str | None) -> Call:
        path = f"/v1/devices/{hardware_id}/commands"
        call = await self._door.call("create", "POST", path, body, key=key, patience=self._patience())
        if call.status == 201:
            self.sent.append((hardware_id, call.ids[0]))
        return call

    async def _ask(self, kind: str, method: str, path: str, command_id: str) -> None:
        await self._door.call(kind, method, path, ids=(command_id,), patience=self._patience())

    def _patience(self) -> float:
        """Seconds that a client waits; some clients hang up at any moment."""
        return self._random.uniform(0, 0.012) if self._random.random() < 0.1 else PATIENCE_SEC
