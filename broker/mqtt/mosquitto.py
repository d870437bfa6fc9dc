"""Runs an installed Mosquitto as a child process, gives it the registered devices, restarts it if it ends.

Its configuration is the shipped `mosquitto.conf` with the paths of this data directory. Mosquitto must
stop when the broker stops. If the broker was killed, the next start stops the old Mosquitto with SIGTERM
first, so that it saves its queued messages.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
from collections.abc import Callable, Iterable
from contextlib import suppress
from importlib import resources
from pathlib import Path
from typing import IO

import structlog

from broker.domain.fleet import DeviceState
from broker.seams import Entropy
from broker.settings import BadSetting

logger = structlog.get_logger()

CONF = resources.files("broker.mqtt") / "mosquitto.conf"
LINK_USER = "ordain"
RELOAD_PAUSE_SEC = 0.1
READY_WITHIN_SEC = 10
END_WITHIN_SEC = 2  # the broker must stop within 10 s, and open HTTP requests take up to 5 s of that
LEFTOVER_WITHIN_SEC = 10  # an old Mosquitto that is killed too early loses answers that it has PUBACKed
LOOK_AGAIN_SEC = 0.02
RESTART_SEC = (0.2, 5.0)
LOG_BYTES = 4_000_000
# An MQTT 3.1.1 CONNECT without a user. Mosquitto refuses it, and its CONNACK shows that it answers.
CONNECT = b"\x10\x0c\x00\x04MQTT\x04\x02\x00\x0a\x00\x00"


class NoMosquitto(BadSetting):
    """Mosquitto cannot be started; the message says what is missing."""


class Mosquitto:
    """One Mosquitto process. It listens on `host:port` for devices and on a loopback port for the link."""

    def __init__(
        self,
        home: Path,
        host: str,
        port: int,
        *,
        link_digest: str,
        acl: str,
        acl_of: Callable[[DeviceState], list[str]] = lambda device: [],
        entropy: Entropy,
    ) -> None:
        self.host = host
        self.port = port or _free_port(host)
        self.link_port = _free_port("127.0.0.1")
        self._home = home
        self._acl = acl
        self._acl_of = acl_of
        self._rules: dict[str, list[str]] = {}  # of devices with topics of their own
        self._entropy = entropy
        self._users: dict[str, str] = {LINK_USER: link_digest}
        self._process: asyncio.subprocess.Process | None = None
        self._stale = asyncio.Event()
        self._up = asyncio.Event()
        self._program = shutil.which(
            "mosquitto", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin"
        )

    def admit(self, device: DeviceState) -> None:
        """Puts the device's token digest into the password file; removes a device that was deleted, or for
        which a gateway speaks."""
        if device.deleted_at is None and device.gateway is None:
            self._users[device.hardware_id] = device.token_digest
            self._rules[device.hardware_id] = self._acl_of(device)
        else:
            self._users.pop(device.hardware_id, None)
            self._rules.pop(device.hardware_id, None)
        self._stale.set()

    async def run(self, devices: Iterable[DeviceState], ready: asyncio.Event) -> None:
        """Keeps Mosquitto running until cancelled. Sets `ready` when Mosquitto first answers.

        Raises:
            NoMosquitto: Mosquitto is not installed, ends at once, or does not answer.
            OSError: its directory cannot be made or written.
        """
        if self._program is None:
            raise NoMosquitto(
                "mqtt_server = mosquitto: it is not installed (Debian: apt install mosquitto), or not on PATH"
            )
        for device in devices:
            self.admit(device)
        await self._prepare()
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._reload())
                await self._supervise(self._program, ready)
        finally:
            await self._end()

    async def _supervise(self, program: str, ready: asyncio.Event) -> None:
        failures = 0
        while True:
            try:
                process = await self._start(program)
                if await self._answers(process):
                    failures = 0
                    ready.set()
                    self._up.set()
                    logger.info("mosquitto.up", host=self.host, port=self.port, pid=process.pid)
                    logger.warning("mosquitto.ended", code=await process.wait())
                elif not ready.is_set():
                    raise NoMosquitto(f"mqtt_server = mosquitto: {self._why_not(process)}")
                else:
                    logger.warning("mosquitto.not_up", why=self._why_not(process))
            except OSError as error:  # such as a full disk: the broker goes on and retries
                if not ready.is_set():
                    raise
                logger.warning("mosquitto.cannot_start", error=str(error))
            self._up.clear()
            await self._end()
            failures += 1
            await asyncio.sleep(self._pause_sec(failures))

    def _pause_sec(self, failures: int) -> float:
        shortest, longest = RESTART_SEC
        return self._entropy.uniform(shortest, min(longest, shortest * 2 ** min(failures, 8)))

    async def _start(self, program: str) -> asyncio.subprocess.Process:
        self._write_users()
        with self._log() as log:
            self._process = await asyncio.create_subprocess_exec(
                *_dies_with_us(),
                program,
                "-c",
                "mosquitto.conf",
                cwd=self._home,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        (self._home / "pid").write_text(str(self._process.pid))
        return self._process

    def _log(self) -> IO[bytes]:
        path = self._home / "mosquitto.log"
        if path.exists() and path.stat().st_size > LOG_BYTES:
            os.replace(path, self._home / "mosquitto.log.1")
        return open(path, "ab")

    async def _answers(self, process: asyncio.subprocess.Process) -> bool:
        """Waits until Mosquitto answers a CONNECT, or has ended. An open port is not enough: Mosquitto
        listens before it handles SIGHUP, and a SIGHUP in that time kills it."""
        with suppress(TimeoutError):
            async with asyncio.timeout(READY_WITHIN_SEC):
                while process.returncode is None:
                    try:
                        reader, writer = await asyncio.open_connection("127.0.0.1", self.link_port)
                        writer.write(CONNECT)
                        answered = await reader.read(1)
                        writer.close()
                    except ConnectionError:
                        answered = b""
                    if answered:
                        return True
                    await asyncio.sleep(LOOK_AGAIN_SEC)
        return False

    def _why_not(self, process: asyncio.subprocess.Process) -> str:
        if process.returncode is None:
            return f"it does not answer within {READY_WITHIN_SEC} s"
        return f"it ended with code {process.returncode}: {self._last_line()}"

    async def _reload(self) -> None:
        """After a change of users: writes a new password file and sends SIGHUP to Mosquitto.

        Mosquitto then also disconnects the clients that are no longer in the file.
        """
        failures = 0
        while True:
            await self._stale.wait()
            await asyncio.sleep(RELOAD_PAUSE_SEC)  # collects many registrations into one reload
            await self._up.wait()
            self._stale.clear()
            try:
                self._write_users()
            except OSError as error:
                logger.warning("mosquitto.users_not_written", error=str(error))
                self._stale.set()
                failures += 1
                await asyncio.sleep(self._pause_sec(failures))
                continue
            failures = 0
            if self._process is not None and self._process.returncode is None:
                self._process.send_signal(signal.SIGHUP)

    async def _prepare(self) -> None:
        self._home.mkdir(mode=0o700, parents=True, exist_ok=True)
        await self._end_leftover()
        self._stale.clear()
        self._write_users()
        self._write("mosquitto.conf", self._configuration(CONF.read_text()))

    def _configuration(self, text: str) -> str:
        """The repository's configuration with the paths of this directory.

        `user root`: if Mosquitto is started as root, it otherwise switches to a user that cannot read these
        files. Started as any other user, also one without a name, it ignores the line.
        """
        places = {
            "password_file": "passwd",  # nosec B105 - the name of a file
            "acl_file": "acl",
            "persistence_location": f"{self._home.resolve()}/",
        }
        lines = ["user root", "log_type error", "log_type warning"]
        for line in text.splitlines():
            words = line.split()
            if words[:1] == ["listener"]:
                own = "127.0.0.1" in words
                line = f"listener {self.link_port} 127.0.0.1" if own else f"listener {self.port} {self.host}"
            elif words and words[0] in places:
                line = f"{words[0]} {places[words[0]]}"
            lines.append(line)
        return "\n".join(lines) + "\n"

    def _write_users(self) -> None:
        rules = (line for lines in self._rules.values() for line in lines)
        self._write("acl", self._acl + "".join(f"{line}\n" for line in rules))
        self._write("passwd", "".join(f"{name}:{digest}\n" for name, digest in self._users.items()))

    def _write(self, name: str, text: str) -> None:
        """Replaces the file atomically, because Mosquitto may read it at any time."""
        new = self._home / f"{name}.new"
        with open(new, "w", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
            file.write(text)
        os.replace(new, self._home / name)

    async def _end_leftover(self) -> None:
        """Stops the Mosquitto that a killed broker left running, if it belongs to this directory."""
        with suppress(FileNotFoundError, ValueError, ProcessLookupError):
            pid = int((self._home / "pid").read_text())
            if self._is_ours(pid):
                os.kill(pid, signal.SIGTERM)
                for _ in range(round(LEFTOVER_WITHIN_SEC / LOOK_AGAIN_SEC)):
                    await asyncio.sleep(LOOK_AGAIN_SEC)
                    if not self._is_ours(pid):
                        break
                else:
                    os.kill(pid, signal.SIGKILL)
                logger.warning("mosquitto.leftover_ended", pid=pid)
        (self._home / "pid").unlink(missing_ok=True)

    def _is_ours(self, pid: int) -> bool:
        """Whether this process is a running Mosquitto that was started in this directory."""
        try:
            here = Path(f"/proc/{pid}/cwd").resolve(strict=True) == self._home.resolve()
            return here and b"mosquitto" in Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:  # the process has ended, or belongs to another user
            return False

    async def _end(self) -> None:
        process = self._process
        if process is not None and process.returncode is None:
            process.terminate()
            ended = asyncio.create_task(process.wait())
            # Not asyncio.timeout: before Python 3.11.3 it raises no TimeoutError in a cancelled task.
            await asyncio.wait({ended}, timeout=END_WITHIN_SEC)
            if not ended.done():
                process.kill()
                await ended
        with suppress(OSError):  # a pid file that stays does no harm: `_is_ours` checks the process
            (self._home / "pid").unlink()

    def _last_line(self) -> str:
        lines = (self._home / "mosquitto.log").read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"


def _dies_with_us() -> list[str]:
    """The command prefix that makes the kernel stop Mosquitto when the broker dies.

    It needs `setpriv` (util-linux); the list is empty where that is not installed.
    """
    found = shutil.which("setpriv")
    return [] if found is None else [found, "--pdeathsig", "TERM", "--"]


def _free_port(host: str) -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as probe:
        return int(probe.getsockname()[1])
