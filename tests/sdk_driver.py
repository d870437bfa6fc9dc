"""Both SDKs behind one function, so that a test says once what holds for either."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from broker.client import App, AppError

ROOT = Path(__file__).parents[1]
MODULE = ROOT / "broker" / "sdk" / "app.mjs"
DRIVER = ROOT / "tests" / "sdk_driver.mjs"
WITHIN_SEC = 30
LANGUAGES = ("python", "javascript")


@dataclass
class Outcome:
    """What a call came to: an answer, or an error's name and fields; `events` in the order they came."""

    answer: Any = None
    error: dict[str, Any] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)

    @property
    def positions(self) -> list[int]:
        return [int(event["id"]) for event in self.events]


@dataclass(frozen=True)
class Sdk:
    """One language's SDK with a broker's address and a key. Pauses are short: tests do not wait."""

    language: str
    url: str
    key: str
    options: dict[str, float]

    async def send(self, params: dict[str, Any]) -> Outcome:
        return await self.call("send", params)

    async def history(self, params: dict[str, Any]) -> Outcome:
        return await self.call("history", params)

    async def wait(self, command_id: str, timeout: float | None = None) -> Outcome:
        return await self.call("wait", command_id, timeout)

    async def events(self, take: int, **filters: Any) -> Outcome:
        """The first `take` events, after which the stream is left."""
        return await self.call("events", take=take, **filters)

    async def call(self, name: str, *arguments: Any, take: int = 0, **filters: Any) -> Outcome:
        async with asyncio.timeout(WITHIN_SEC):
            if self.language == "python":
                return await self._python(name, arguments, take, filters)
            return await self._javascript(name, arguments, take, filters)

    async def _python(self, name: str, arguments: Any, take: int, filters: dict[str, Any]) -> Outcome:
        outcome = Outcome()
        try:
            async with App(self.url, self.key, **self.options) as app:  # type: ignore[arg-type]
                if name == "events":
                    async with aclosing(app.command.events(**filters)) as events:
                        async for event in events:
                            outcome.events.append(dict(event))
                            if len(outcome.events) == take:
                                break
                else:
                    outcome.answer = await getattr(app.command, name)(*arguments)
        except AppError as error:
            outcome.error = {"name": type(error).__name__, **vars(error)}
        return outcome

    async def _javascript(self, name: str, arguments: Any, take: int, filters: dict[str, Any]) -> Outcome:
        asked = self.asked(name, *([filters] if name == "events" else arguments), take=take)
        running = await asyncio.create_subprocess_exec(
            node(),
            DRIVER,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            said, complaints = await running.communicate(asked)
        finally:
            if running.returncode is None:
                running.kill()
                await running.wait()
        assert running.returncode == 0, complaints.decode()
        *events, last = [json.loads(line) for line in said.splitlines()]
        return Outcome(**last, events=events)

    def asked(self, name: str, *arguments: Any, take: int = 0) -> bytes:
        """What makes the driver in JavaScript call this."""
        asked = {
            "module": MODULE.as_uri(),
            "url": self.url,
            "key": self.key,
            "options": {camel(option): value for option, value in self.options.items()},
            "call": name,
            "arguments": arguments,
            "take": take,
        }
        return json.dumps(asked).encode()


def sdk(language: str, url: str, key: str = "sk_live_test", **options: float) -> Sdk:
    return Sdk(language, url, key, {"backoff_sec": 0.001} | options)


def camel(name: str) -> str:
    first, *more = name.split("_")
    return first + "".join(word.title() for word in more)


def node() -> str:
    found = shutil.which("node", path=os.environ.get("PATH"))
    if found is None:
        pytest.fail("node is not installed (Debian: apt install nodejs, 20 or later)", pytrace=False)
    return found
