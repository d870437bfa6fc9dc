"""Keeps the password file of a Mosquitto of one's own in step with the devices; SIGHUP tells Mosquitto.

Mosquitto then disconnects the clients that are no longer in the file. Users that are no devices keep their
lines. The log has the digest of each device's token in the form that Mosquitto reads.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterable
from pathlib import Path

import structlog

from broker.domain.fleet import DeviceState
from broker.domain.mqtt_rules import MqttRules

logger = structlog.get_logger()

PAUSE_SEC = 0.1  # collects many registrations into one reload
AGAIN_SEC = 5.0


class PasswordFile:
    """`pid_file`: where Mosquitto writes its process id (`pid_file` in mosquitto.conf). Fills `fault` of
    `rules`."""

    def __init__(self, path: Path, pid_file: Path, devices: Iterable[DeviceState], rules: MqttRules) -> None:
        self._path, self._pid_file = path, pid_file
        self._users: dict[str, str | None] = {}  # by hardware id: digest, or None: it must not connect
        self._stale = asyncio.Event()
        self._rules = rules
        rules.fault = "the password file was not written yet"
        for device in devices:
            self.entitled(device)
        self._stale.set()

    def entitled(self, device: DeviceState) -> None:
        gone = device.deleted_at is not None or device.gateway is not None  # its gateway speaks for it
        self._users[device.hardware_id] = None if gone else device.token_digest
        self._stale.set()

    async def run(self) -> None:
        """Writes the file after each change, for ever."""
        while True:
            await self._stale.wait()
            await asyncio.sleep(PAUSE_SEC)
            self._stale.clear()
            try:
                if self._write():
                    os.kill(int(self._pid_file.read_text()), signal.SIGHUP)
                self._rules.fault = None
            except (OSError, ValueError, UnicodeError) as error:
                self._rules.fault = f"{self._path}: {error}"
                logger.warning("passwords.not_written", file=str(self._path), why=str(error))
                self._stale.set()
                await asyncio.sleep(AGAIN_SEC)

    def _write(self) -> bool:
        """Replaces the file atomically. False: it was right already."""
        old = self._path.read_text() if self._path.exists() else ""
        lines = [line for line in old.splitlines() if line.partition(":")[0] not in self._users]
        lines += [f"{name}:{digest}" for name, digest in self._users.items() if digest is not None]
        text = "".join(f"{line}\n" for line in lines)
        if text == old and self._rules.fault is None:
            return False
        mode = self._path.stat() if old else None
        new = self._path.with_name(self._path.name + ".new")
        with open(new, "w", opener=lambda path, flags: os.open(path, flags | os.O_TRUNC, 0o600)) as file:
            file.write(text)
            if mode is not None:  # Mosquitto runs as a user of its own
                os.fchmod(file.fileno(), mode.st_mode & 0o777)
                os.fchown(file.fileno(), mode.st_uid, mode.st_gid)
        os.replace(new, self._path)
        return True
