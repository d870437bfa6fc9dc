"""Both SDKs behind one function, so that a test says once what holds for either."""

from __future__ import annotations

import ast
import asyncio
import inspect
import io
import json
import os
import shutil
import subprocess
from contextlib import aclosing, closing, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from broker.client import App, AppError

ROOT = Path(__file__).parents[1]
MODULE = ROOT / "broker" / "sdk" / "app.mjs"
DRIVER = ROOT / "tests" / "sdk_driver.mjs"
WITHIN_SEC = 300  # a whole story, on a machine with other things to do
LINE_BYTES = 2**24  # an answer for thousands of devices is one line
LANGUAGES = ("python", "javascript")


class Thrown(Exception):
    """What the JavaScript SDK threw, if it is none of its own errors."""


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

    async def events(self, take: int, into: Outcome | None = None, **filters: Any) -> Outcome:
        """The first `take` events, put into an outcome as they come; then the stream is left."""
        outcome = into or Outcome()
        await self._run(outcome, "events", (filters,), take)
        return outcome

    async def call(self, name: str, *arguments: Any) -> Outcome:
        outcome = Outcome()
        await self._run(outcome, name, arguments, 0)
        return outcome

    async def _run(self, outcome: Outcome, name: str, arguments: tuple[Any, ...], take: int) -> None:
        run = self._python if self.language == "python" else self._javascript
        async with asyncio.timeout(WITHIN_SEC):
            await run(outcome, name, arguments, take)

    async def _python(self, outcome: Outcome, name: str, arguments: tuple[Any, ...], take: int) -> None:
        try:
            async with App(self.url, self.key, **self.options) as app:  # type: ignore[arg-type]
                if name == "events":
                    async with aclosing(app.command.events(**arguments[0])) as events:
                        async for event in events:
                            outcome.events.append(dict(event))
                            if len(outcome.events) == take:
                                break
                else:
                    outcome.answer = await getattr(app.command, name)(*arguments)
        except AppError as error:
            outcome.error = {"name": type(error).__name__, **vars(error)}

    async def _javascript(self, outcome: Outcome, name: str, arguments: tuple[Any, ...], take: int) -> None:
        asked = {
            "module": MODULE.as_uri(),
            "url": self.url,
            "key": self.key,
            "options": {camel(option): value for option, value in self.options.items()},
            "call": name,
            "arguments": arguments,
            "take": take,
        }
        reader, writer = await asyncio.open_connection("127.0.0.1", driver(), limit=LINE_BYTES)
        with closing(writer):
            writer.write(json.dumps(asked).encode() + b"\n")
            said: dict[str, Any] = {}
            async for line in reader:  # to the end, when nothing of the call is left
                said = json.loads(line)
                if not said.keys() & {"answer", "error", "thrown"}:
                    outcome.events.append(said)
        if "thrown" in said:
            raise Thrown(said["thrown"])
        assert said.keys() & {"answer", "error"}, "the call ended without an outcome"
        outcome.answer, outcome.error = said.get("answer"), said.get("error", {})


_driver: list[tuple[subprocess.Popen[bytes], int]] = []


def driver() -> int:
    """The port of the node that makes the calls of this test process. It is started at the first use: a start
    takes longer than a call."""
    if not _driver:
        started = subprocess.Popen([node(), DRIVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert started.stdout is not None
        _driver.append((started, int(started.stdout.readline())))
    process, port = _driver[0]
    assert process.poll() is None, f"an earlier call ended node, with exit code {process.returncode}"
    return port


def end_driver() -> None:
    """Node ends with its standard input. Another exit code than 0 means an error that no call has caught."""
    for process, _ in _driver:
        process.communicate(timeout=WITHIN_SEC)
        assert process.returncode == 0, f"a call ended node, with exit code {process.returncode}"
    _driver.clear()


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


async def run_python(source: str, **names: Any) -> str:
    """What a program prints that may await wherever it likes."""
    code = compile(source, "example.py", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    printed = io.StringIO()
    with redirect_stdout(printed):
        result = eval(code, names)
        if inspect.isawaitable(result):
            await result
    return printed.getvalue()


def run_javascript(source: str, directory: Path, **names: Any) -> str:
    """What a program prints that imports `./app.mjs`."""
    shutil.copy(MODULE, directory)
    given = "".join(f"const {name} = {json.dumps(value)};\n" for name, value in names.items())
    (directory / "example.mjs").write_text(given + source)
    done = subprocess.run(
        [node(), "example.mjs"], cwd=directory, capture_output=True, text=True, timeout=WITHIN_SEC
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
