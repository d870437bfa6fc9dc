"""Services that follow the event stream. They leave, stall or are cut off, and resume from the last event
id."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec

from tests.simulation.clients import Door
from tests.simulation.history import History
from tests.simulation.loop import SimLoop
from tests.simulation.tide import Tide

# Reader name to the one event type it wants, or None for all.
READERS = {"every event": None, "what was executed": "executed"}
STAYS_SEC, STALLS_SEC, PAUSE_SEC = (1, 200), (1, 40), (0.01, 3)
IN_THE_QUIET = 10  # times as long


class Stream:
    """One connection of a reader."""

    def __init__(self, reader: Reader) -> None:
        self.gone = asyncio.Event()
        self.over = asyncio.Event()
        self.begun = False
        self._reader = reader
        self._asked = False
        self._rest = b""

    async def run(self, app: Any, scope: dict[str, Any]) -> None:
        await app(scope, self.receive, self.send)

    async def receive(self) -> dict[str, Any]:
        if not self._asked:
            self._asked = True
            return {"type": "http.request", "body": b"", "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: dict[str, Any]) -> None:
        await self._reader.reading.wait()
        if self.over.is_set():
            return
        if message["type"] == "http.response.start":
            self.begun = True
            self._reader.reads(True)
        if message["type"] == "http.response.body":
            *blocks, self._rest = (self._rest + message["body"]).split(b"\n\n")
            for block in blocks:
                self._reader.take(block)
            if not message["more_body"]:
                self.over.set()


class Reader:
    """Follows the stream until `stop`; after `heal` it no longer leaves or stalls."""

    def __init__(self, loop: SimLoop, door: Door, tide: Tide, history: History, name: str) -> None:
        self.stopped = self.calm = False
        self.reading = asyncio.Event()
        self.reading.set()
        self._loop, self._door, self._tide = loop, door, tide
        self._history, self._name = history, name
        self._random = loop.rng(f"reader/{name}")
        history.readers[name] = READERS[name]
        self._leaves_at_night = self._random.random() < 0.7
        self._last = 0
        self._stream: Stream | None = None

    def start(self) -> None:
        self._loop.create_task(self._run())

    def heal(self) -> None:
        self.calm = True
        self._wake_up()

    def stop(self) -> None:
        self.stopped = True
        self._leave()

    def take(self, block: bytes) -> None:
        for line in block.split(b"\n"):
            field, _, value = line.partition(b": ")
            if field == b"data":
                event = msgspec.json.decode(value)
                self._last = int(event["id"])
                self._history.streamed(self._name, self._last, event["type"])

    async def _run(self) -> None:
        while not self.stopped:
            if not self.calm and self._leaves_at_night:
                await self._tide.busy.wait()
            self._stream = stream = Stream(self)
            wanted = READERS[self._name]
            query = "" if wanted is None else f"?event={wanted}"
            headers = {"accept": "text/event-stream", "last-event-id": str(self._last)}
            timer = self._loop.call_later(self._stays(), self._tire)
            await self._door.follow(stream, f"/v1/events{query}", headers)
            self.reads(False)
            timer.cancel()
            self.reading.set()
            await asyncio.sleep(self._random.uniform(*PAUSE_SEC))

    def reads(self, on: bool) -> None:
        self._history.reads(self._name, on=on)

    def _tire(self) -> None:
        """Leaves the stream, or stops reading for a while."""
        if self.calm:
            return
        if self._random.random() < 0.5:
            self._leave()
        else:
            self.reading.clear()
            self.reads(False)
            self._loop.call_later(self._random.uniform(*STALLS_SEC), self._wake)

    def _wake_up(self) -> None:
        self.reading.set()
        self.reads(self._stream is not None and self._stream.begun and not self._stream.over.is_set())

    def _wake(self) -> None:
        self._wake_up()
        self._loop.call_later(self._stays(), self._tire)

    def _stays(self) -> float:
        """For how many seconds it reads on."""
        return self._random.uniform(*STAYS_SEC) * (1 if self._tide.busy.is_set() else IN_THE_QUIET)

    def _leave(self) -> None:
        if self._stream is not None:
            self._stream.over.set()
            self._stream.gone.set()
