"""Ordain as a user runs it: real processes, observed by their output, HTTP, MQTT and the command line.

No function here sleeps for a guessed time: each wait is for a fact, with a deadline. The fixtures in
`conftest.py` kill all started processes.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, ClassVar, TypeVar

import httpx2
import pytest

from broker.private_socket import socket_path
from devices.agent import Agent
from tests.conftest import program, unused_port
from tests.system.zygote import Forked

T = TypeVar("T")

ROOT = Path(__file__).parents[2]
# These limits end a hang; they do not judge speed.
WITHIN_SEC = 400
END_WITHIN_SEC = 60
LOOK_AGAIN_SEC = 0.02
# A key, a device token, a webhook secret or a JWT: none of these may be in a log line.
SECRET = re.compile(r"sk_live_[\w-]{16,}|dtok_[\w-]{16,}|whsec_[\w+/-]{16,}|eyJ[\w-]+\.[\w-]+\.[\w-]+")


def _ordain() -> str:
    places = os.pathsep.join([str(Path(sys.executable).parent), str(ROOT / ".venv" / "bin")])
    found = shutil.which("ordain", path=places)
    assert found is not None, "ordain is not installed: run `make setup`"
    return found


ORDAIN = _ordain()


def environment(**more: str) -> dict[str, str]:
    """The environment without any ORDAIN_ setting of the person who runs the tests."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("ORDAIN_")}
    return kept | more


def until(fact: Callable[[], T | None], about: object = "", within: float = WITHIN_SEC) -> T:
    """Returns the first true value of `fact`; fails at the deadline (`within`, in seconds)."""
    deadline = time.monotonic() + within
    pause = threading.Event()
    while not (found := fact()):
        assert time.monotonic() < deadline, f"not within {within} s: {about() if callable(about) else about}"
        pause.wait(LOOK_AGAIN_SEC)
    return found


class Lines:
    """The lines that a process prints, read as they come."""

    def __init__(self, stream: IO[str]) -> None:
        self._lines: list[str] = []
        self._news = threading.Condition()
        self._ended = False
        self._reader = threading.Thread(target=self._read, args=(stream,), daemon=True)
        self._reader.start()

    def _read(self, stream: IO[str]) -> None:
        with stream:
            for line in stream:
                with self._news:
                    self._lines.append(line)
                    self._news.notify_all()
        with self._news:
            self._ended = True
            self._news.notify_all()

    def wait(self, words: str, within: float = WITHIN_SEC) -> str:
        """The first line that contains `words`."""
        with self._news:
            self._news.wait_for(lambda: self._ended or self._find(words) is not None, within)
            found = self._find(words)
            assert found is not None, f"{words!r} is not in:\n{''.join(self._lines)}"
            return found

    def _find(self, words: str) -> str | None:
        return next((line for line in self._lines if words in line), None)

    def all(self, within: float = WITHIN_SEC) -> str:
        """The whole output, after the process has ended."""
        self._reader.join(within)
        return self.so_far()

    def so_far(self) -> str:
        with self._news:
            return "".join(self._lines)


def _started(
    command: tuple[str, ...], cwd: Path | None, env: dict[str, str]
) -> subprocess.Popen[str] | Forked:
    if command[0] == ORDAIN:
        return Forked(list(command), cwd, env)
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env=env,
    )


class Process:
    """A program that runs beside the test. A fixture ends those that a test leaves running."""

    started: ClassVar[list[Process]] = []

    def __init__(self, *command: str, cwd: Path | None = None, env: dict[str, str] | None = None) -> None:
        self.process = _started(command, cwd, env or environment())
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self.started.append(self)
        self.out, self.err = Lines(self.process.stdout), Lines(self.process.stderr)

    def wait(self, within: float = WITHIN_SEC) -> int:
        return self.process.wait(within)

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        """Sends SIGKILL; does nothing if the process has ended."""
        self.process.kill()
        self.process.wait()


class Broker:
    """`ordain serve` on a data directory and free ports; a restart uses the same MQTT port."""

    def __init__(self, data: Path, *options: str, cwd: Path) -> None:
        self.data = data
        self.cwd = cwd
        self.options = options
        self.program = ORDAIN
        self.url = ""
        self.mqtt_port = unused_port()
        self.key = ""
        self.runs: list[Process] = []

    def launch(self, *more: str) -> Process:
        """Starts the process without waiting."""
        options = [*self.options, *more]
        if "--http" not in options:
            options += ["--http", "127.0.0.1:0"]
        if "--mqtt-url" not in options and "--mqtt-listen" not in options:
            options += ["--mqtt-listen", f"127.0.0.1:{self.mqtt_port}"]
        self.runs.append(Process(self.program, "serve", "--data", str(self.data), *options, cwd=self.cwd))
        return self.runs[-1]

    def start(self, *more: str) -> Broker:
        """Starts the process and waits until it serves."""
        run = self.launch(*more)
        serving = run.err.wait("event=broker.serving")
        self.url = serving.split("http=")[1].split()[0]
        if "event=mqtt.listening" in run.err.so_far():
            self.mqtt_port = int(run.err.wait("event=mqtt.listening").split()[-1].rpartition(":")[2])
        return self

    @property
    def run(self) -> Process:
        return self.runs[-1]

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Sends a signal and returns the exit code."""
        self.run.signal(number)
        return self.run.wait(END_WITHIN_SEC)

    def kill(self) -> None:
        for run in self.runs:
            run.kill()

    def said(self) -> str:
        """All log lines of all runs so far."""
        return "".join(run.err.so_far() for run in self.runs)

    def ordain(self, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        return ordain(*arguments, data=self.data, **env)

    # --- HTTP ---

    def http(self, method: str, path: str, body: object = None, **headers: str) -> httpx2.Response:
        if not self.key:
            self.key = self._make_key()
        headers = {"Authorization": f"Bearer {self.key}"} | headers
        # `verify=False` because it is plain http: to read the authorities to trust takes 0.06 s of CPU.
        return httpx2.request(
            method,
            self.url + path,
            json=body,
            headers=headers,
            timeout=WITHIN_SEC,
            verify=False,
            trust_env=False,
        )

    def _make_key(self) -> str:
        """Creates a key over the local socket, like `ordain keys create`, but without the half second of a
        process start."""
        wanted = {"project": "default", "scopes": ["devices:read", "devices:write", "events:read"]}
        key: str = self.operator("POST", "/v1/keys", wanted).json()["key"]
        return key

    def operator(self, method: str, path: str, body: object = None) -> httpx2.Response:
        """Through the private socket, as the operator of the machine."""
        with socket_path(self.data) as door:
            transport = httpx2.HTTPTransport(uds=door, verify=False)
            with httpx2.Client(
                transport=transport, base_url="http://ordain", timeout=WITHIN_SEC, trust_env=False
            ) as client:
                return client.request(method, path, json=body)

    def device(self, hardware_id: str, type: str = "generic") -> str:
        """Registers a device and returns its token."""
        answer = self.http("POST", "/v1/devices", {"hardware_id": hardware_id, "type": type})
        assert answer.status_code == 201, answer.text
        token: str = answer.json()["device_token"]
        return token

    def create(self, hardware_id: str, type: str = "lock", **fields: object) -> str:
        """Creates a command and returns its id."""
        answer = self.http("POST", f"/v1/devices/{hardware_id}/commands", {"type": type} | fields)
        assert answer.status_code == 201, answer.text
        command_id: str = answer.json()["id"]
        return command_id

    def command(self, command_id: str) -> dict[str, Any]:
        answer = self.http("GET", f"/v1/commands/{command_id}")
        assert answer.status_code == 200, answer.text
        command: dict[str, Any] = answer.json()
        return command

    def events(self, command_id: str) -> list[str]:
        found = self.http("GET", f"/v1/commands/{command_id}/events").json()["data"]
        return [event["type"] for event in found]

    def reaches(self, command_id: str, state: str) -> dict[str, Any]:
        """Waits until the command is in this state and returns it."""

        def there() -> dict[str, Any] | None:
            command = self.command(command_id)
            return command if command["state"] == state else None

        return until(there, lambda: self.command(command_id))

    def not_ready(self) -> list[str]:
        """The reasons in the answer of /readyz; empty if the broker is ready."""
        answer = self.http("GET", "/readyz")
        return [] if answer.status_code == 200 else answer.json()["error"]["details"]["reasons"]

    def canary(self) -> str:
        """What the doctor's canary finds. On a busy machine its trial may find no time, and it says so; then
        it is asked again."""

        def tried() -> str | None:
            said = self.ordain("doctor", "--canary").stdout
            return None if "could not be checked" in said else said

        return until(tried)

    def verified(self) -> bool:
        checked = self.ordain("log", "verify")
        assert checked.returncode == 0, checked.stderr
        return "no fault" in checked.stdout


def ordain(*arguments: str, data: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs one command line to its end."""
    where = {} if data is None else {"ORDAIN_DATA": str(data)}
    process = Forked([ORDAIN, *arguments], None, environment(**(where | env)))
    out, err = process.communicate(WITHIN_SEC * 2)
    return subprocess.CompletedProcess(process.args, process.wait(), out, err)


def made(done: subprocess.CompletedProcess[str]) -> str:
    """The only word that a successful command printed."""
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert re.fullmatch(r"\S+\n", done.stdout)
    return done.stdout.strip()


def refused(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    """Asserts the exit code, and one sentence on standard error that contains `words`."""
    one_sentence(done.stderr, *words)
    assert done.returncode == code, done.stderr


def one_sentence(said: str, *words: str) -> None:
    lines = [line for line in said.splitlines() if not line.startswith("timestamp=")]
    assert len(lines) == 1, said
    assert lines[0].startswith("ordain: ")
    assert "Traceback" not in said
    for word in words:
        assert word in lines[0]


# --- a device made of Mosquitto's tools ------------------------------------------------------------


class Device:
    """A device made of shell tools: mosquitto_sub listens, mosquitto_pub sends."""

    def __init__(self, port: int, hardware_id: str, token: str = "", *, own_server: bool = True) -> None:
        self.port = port
        self.hardware_id = hardware_id
        self.token = token
        self._login = ["-u", hardware_id, "-P", token] if token else []
        # If the client id must be the hardware id, a second connection would end the first.
        self.separate = not own_server
        self._speaker = f"{hardware_id}-speaks" if self.separate else hardware_id

    def topic(self, suffix: str) -> str:
        return f"iotee/dev/{self.hardware_id}/{suffix}"

    def listen(self, suffix: str = "rls", *more: str, topic: str = "") -> Process:
        """Waits for one message, prints it and ends."""
        return Process(
            program("mosquitto_sub"), "-p", str(self.port), "-i", self.hardware_id, *self._login, "-q", "1",
            "-C", "1", "-W", str(WITHIN_SEC), "-t", topic or self.topic(suffix), *more,
        )  # fmt: skip

    def next(self, listening: Process | None = None) -> str:
        """Returns the next message to this device."""
        listening = listening or self.listen()
        assert listening.wait() == 0, listening.err.all()
        return listening.out.all().removesuffix("\n")

    def say(self, *messages: str, suffix: str = "ack", topic: str = "", retain: bool = False) -> int:
        """Sends the messages in order and returns mosquitto_pub's exit code."""
        done = subprocess.run(
            [program("mosquitto_pub"), "-p", str(self.port), "-i", self._speaker, *self._login, "-q", "1",
             "-t", topic or self.topic(suffix), "-l", *(["-r"] if retain else [])],
            input="".join(message + "\n" for message in messages), text=True, capture_output=True,
            timeout=WITHIN_SEC,
        )  # fmt: skip
        return done.returncode

    def online(self) -> None:
        assert self.say("online", suffix="status", retain=True) == 0

    def subscribe(self, suffix: str = "rls") -> None:
        """Leaves a session at the server that queues messages for this device."""
        done = Process(
            program("mosquitto_sub"), "-p", str(self.port), "-i", self.hardware_id, *self._login, "-c", "-E",
            "-q", "1", "-t", self.topic(suffix),
        )  # fmt: skip
        assert done.wait() == 0


def executed(command_id: str, **result: object) -> str:
    return json.dumps({"id": command_id, "status": "executed", "result": result})


@contextmanager
def running(make: Callable[[], Agent]) -> Iterator[None]:
    """Runs the reference device in its own thread and event loop."""
    ready: list[tuple[asyncio.AbstractEventLoop, asyncio.Task[None]]] = []

    async def run() -> None:
        task = asyncio.create_task(make().run())
        ready.append((asyncio.get_running_loop(), task))
        await asyncio.wait({task})

    thread = threading.Thread(target=asyncio.run, args=(run(),))
    thread.start()
    until(lambda: bool(ready))
    loop, task = ready[0]
    try:
        yield
    finally:
        loop.call_soon_threadsafe(task.cancel)
        thread.join(WITHIN_SEC)
        if thread.is_alive():
            pytest.fail("the agent did not end")
