"""The processes of a soak: a real broker, a real Mosquitto and the fleet. Each can be killed and restarted.

This module also reads their memory and CPU time. It judges nothing. `close` ends all processes.
"""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from subprocess import DEVNULL, PIPE

import httpx2
import msgspec

from broker.world import open_for_reading
from scripts.bench import processes
from scripts.soak.fleet import Books

WITHIN_SEC = 60
LOOK_AGAIN_SEC = 0.05
# Time limit for one order to the fleet, which may have to open thousands of connections.
TOLD_WITHIN_SEC = 120
# The limits and persistence of mosquitto.conf. Only the soak's processes connect, so anonymous is allowed.
MOSQUITTO = """
user root
listener {port} 127.0.0.1
allow_anonymous true
persistence true
persistence_location {home}/
autosave_interval {every}
set_tcp_nodelay true
max_inflight_messages 1000
max_queued_messages 100000
log_dest none
"""
TRACED = "from scripts.soak.trace import main; main({path!r})"
STEPPED = "from scripts.soak.stepped import main; main({path!r})"


async def until(fact: Callable[[], bool], what: str, within: float = WITHIN_SEC) -> None:
    """Polls until `fact` is true.

    Raises:
        TimeoutError: it was not true in time; the message contains `what`.
    """
    try:
        async with asyncio.timeout(within):
            while not fact():  # noqa: ASYNC110 - a fact about another process
                await asyncio.sleep(LOOK_AGAIN_SEC)
    except TimeoutError:
        raise TimeoutError(f"not within {within:g} s: {what}") from None


class Program:
    """A program that can be started several times, one process after the other. All write to one log file."""

    def __init__(self, name: str, arguments: Sequence[str], home: Path) -> None:
        self.log = home / f"{name}.log"
        self._arguments = arguments
        self._process: asyncio.subprocess.Process | None = None
        self._spent_sec = 0.0
        self._peak_mb = 0.0

    async def start(self, *, pipes: bool = False) -> asyncio.subprocess.Process:
        with self.log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *self._arguments,
                cwd=processes.ROOT,
                stdin=PIPE if pipes else DEVNULL,
                stdout=PIPE if pipes else log,
                stderr=log,
            )
        return self._process

    async def end(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Sends a signal to the process and waits for its end. Does nothing if no process runs."""
        if self._process is None:
            return
        if self._process.returncode is None:
            self._peak_mb, self._spent_sec = self.peak_mb(), self.cpu_sec()
            self._process.send_signal(number)
        await self._process.wait()
        self._process = None

    @property
    def running(self) -> asyncio.subprocess.Process:
        if self._process is None or self._process.returncode is not None:
            raise ConnectionError(f"the process is not running; see {self.log}")
        return self._process

    def cpu_sec(self) -> float:
        """CPU time of all its processes together, s."""
        return self._spent_sec + processes.cpu_sec(self.running.pid)

    def rss_mb(self) -> float:
        return self._memory_mb("VmRSS")

    def peak_mb(self) -> float:
        """The largest RSS of all its processes, MB."""
        return max(self._peak_mb, self._memory_mb("VmHWM"))

    def _memory_mb(self, field: str) -> float:
        lines = Path(f"/proc/{self.running.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1_024 for line in lines if line.startswith(f"{field}:"))


class World:
    """The processes of one run, in its directory.

    `child`: the broker runs Mosquitto as its child process. `via`: ports through which broker and fleet reach
    Mosquitto, if not its own. `clock`: a file with the step of the broker's wall clock. `config`: more
    settings of the broker.
    """

    def __init__(
        self,
        home: Path,
        device_type: str,
        *,
        child: bool = False,
        trace: Path | None = None,
        data: Path | None = None,
        via: tuple[int, int] | None = None,
        clock: Path | None = None,
        config: str = "",
    ) -> None:
        self.home, self.data, self.names = home, data or home / "data", list[str]()
        self.port, self.mqtt_port = processes.unused_port(), processes.unused_port()
        broker_via, self._fleet_via = via or (self.mqtt_port, self.mqtt_port)
        self.key = ""
        (home / "types").mkdir(parents=True)
        (home / "types" / "soak.toml").write_text(device_type)
        (home / "soak.toml").write_text(f'types = "{home}/types"\n{config}')
        (home / "mosquitto.conf").write_text(MOSQUITTO.format(port=self.mqtt_port, home=home, every=10))
        serve = ["serve", "--data", str(self.data), "--config", str(home / "soak.toml")]
        serve += ["--http", f"127.0.0.1:{self.port}"]
        serve += (
            ["--mqtt-server", "mosquitto", "--mqtt-listen", f"127.0.0.1:{self.mqtt_port}"]
            if child
            else ["--mqtt-url", f"mqtt://127.0.0.1:{broker_via}"]
        )
        server = [processes.mosquitto(), "-c", str(home / "mosquitto.conf")]
        self.mosquitto = None if child else Program("mosquitto", server, home)
        code = processes.ORDAIN if trace is None else TRACED.format(path=str(trace.absolute()))
        code = code if clock is None else STEPPED.format(path=str(clock.absolute()))
        self.broker = Program("broker", [sys.executable, "-c", code, *serve], home)
        self._fleet: Program | None = None

    async def open(
        self, devices: int, *, slow: float = 0.0, slow_sec: tuple[float, float] = (1, 5), doubled: float = 0.0
    ) -> None:
        """Starts the servers, registers the devices, and starts the fleet, which is still offline. `slow` and
        `doubled`: the shares of the commands that take long, and that are answered twice."""
        await self.start_mosquitto()
        await self.start_broker()
        self.key = await asyncio.to_thread(
            processes.ordain, "keys", "create", "--project", "soak", "--scope", "devices:read",
            "--scope", "devices:write", "--data", str(self.data),
        )  # fmt: skip
        tokens = await self._register(devices)
        self.names = list(tokens)
        (self.home / "tokens.json").write_bytes(msgspec.json.encode(tokens))
        fleet = [sys.executable, "-m", "scripts.soak.fleet", "--port", str(self._fleet_via)]
        fleet += ["--tokens", str(self.home / "tokens.json"), "--slow", str(slow)]
        fleet += ["--slow-sec", *map(str, slow_sec), "--doubled", str(doubled)]
        self._fleet = Program("fleet", fleet, self.home)
        await self._fleet.start(pipes=True)

    async def close(self) -> None:
        """Ends all processes. The broker gets SIGTERM, so that it also stops its Mosquitto."""
        if self._fleet is not None:
            await self._fleet.end()
        await self.broker.end(signal.SIGTERM)
        if self.mosquitto is not None:
            await self.mosquitto.end()

    async def start_mosquitto(self) -> None:
        if self.mosquitto is not None:
            await self.mosquitto.start()
            await until(self._mqtt_accepts, "Mosquitto accepts connections")

    async def start_broker(self) -> None:
        """Starts the broker; returns when it is ready."""
        await self.broker.start()
        await self.ready()

    async def ready(self) -> None:
        async with httpx2.AsyncClient(base_url=self._url, trust_env=False) as client:
            async with asyncio.timeout(WITHIN_SEC):
                while self.broker.running:
                    try:
                        if (await client.get("/readyz")).status_code == 200:
                            return
                    except httpx2.TransportError:
                        pass
                    await asyncio.sleep(LOOK_AGAIN_SEC)

    async def tell_fleet(self, words: str) -> None:
        """Sends an order to the fleet; returns when it is done."""
        assert self._fleet is not None, "the world is open"
        fleet = self._fleet.running
        assert fleet.stdin is not None
        assert fleet.stdout is not None
        fleet.stdin.write(f"{words}\n".encode())
        async with asyncio.timeout(TOLD_WITHIN_SEC):
            if not await fleet.stdout.readline():
                raise ConnectionError(f"the fleet ended; see {self._fleet.log}")

    async def books(self) -> Books:
        """The devices' records of what they executed."""
        path = self.home / "books.json"
        await self.tell_fleet(f"books {path}")
        return msgspec.json.decode(path.read_bytes(), type=Books)

    def ask(self, question: str) -> list[tuple[int | str | None, ...]]:
        """Runs a query on the current log. It opens the log each time, because a reader that stays open would
        change the state of the files after a kill."""
        log = open_for_reading(self.data)
        try:
            return log.execute(question).fetchall()
        finally:
            log.close()

    def open_commands(self) -> int:
        return self._number("SELECT count(*) FROM commands WHERE closed_at IS NULL")

    def recorded(self, event: str) -> int:
        """How many events of this type are in the log. It scans the whole log."""
        return self._number(f"SELECT count(*) FROM events WHERE type = '{event}'")

    def _number(self, question: str) -> int:
        return int(self.ask(question)[0][0] or 0)

    async def _register(self, count: int) -> dict[str, str]:
        headers = {"Authorization": f"Bearer {self.key}"}
        tokens: dict[str, str] = {}
        async with httpx2.AsyncClient(
            base_url=self._url, headers=headers, timeout=WITHIN_SEC, trust_env=False
        ) as client:
            for number in range(count):
                name = f"soak-{number:04}"
                answer = await client.post("/v1/devices", json={"hardware_id": name, "type": "soak"})
                tokens[name] = answer.raise_for_status().json()["device_token"]
        return tokens

    @property
    def _url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def _mqtt_accepts(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.mqtt_port)) == 0
