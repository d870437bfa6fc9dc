"""`--demo`: a few simulated devices and a key, so that the first command works a minute after the clone.

Made once per data directory; their secrets lie in it, readable by its owner alone.
"""

from __future__ import annotations

import asyncio
import os
import shlex
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from broker.commands import Caller
from broker.core import Core
from broker.errors import Refusal
from broker.lanes import Presence
from broker.registry import NewDevice
from devices.demo import run_demo

PROJECT = "demo"
DEVICES = (("demo_lock", "generic"), ("demo_recorder", "recorder"), ("ABC123", "iotee_device"))
ONLINE_WITHIN_SEC = 10
OPERATOR = Caller(actor="operator:demo", project=None)


class Demo:
    """The devices of one broker's demo."""

    def __init__(self, core: Core, data: Path) -> None:
        self._core = core
        self._home = data / "demo"
        self._key = ""
        os.makedirs(self._home, mode=0o700, exist_ok=True)

    async def run(self, url: str) -> None:
        """Runs the devices until cancelled."""
        devices = [(name, await self._token(name, kind), kind) for name, kind in DEVICES]
        await run_demo(url, devices, prefix=self._core.settings.prefix, memory_dir=self._home)

    async def greet(self, base: str, say: Callable[[str], None]) -> None:
        """Says what to try, once there is a key and the devices are online, or late."""
        recorded = asyncio.Event()
        self._core.writer.listeners.append(lambda _: recorded.set())
        self._key = await self._secret_key()
        with suppress(TimeoutError):  # they may still come: an external server may not know them yet
            async with asyncio.timeout(ONLINE_WITHIN_SEC):
                while not all(self._online(name) for name, _ in DEVICES):
                    await recorded.wait()
                    recorded.clear()
        say(self._welcome(base))

    def _online(self, name: str) -> bool:
        device = self._core.live.device(name)
        return device is not None and self._core.live.presence.get(device.id) is Presence.ONLINE

    async def _token(self, name: str, kind: str) -> str:
        kept = _read(self._home / f"{name}.token")
        registry = self._core.registry
        if kept and await registry.authenticate(name, kept) is not None:
            return kept
        try:
            issued = await registry.register(
                OPERATOR, NewDevice(hardware_id=name, type=kind, project=PROJECT, name=f"demo {kind}")
            )
        except Refusal:
            issued = await registry.rotate_token(OPERATOR, name)  # it was made before, its file is gone
        _write(self._home / f"{name}.token", issued.token)
        return issued.token

    async def _secret_key(self) -> str:
        kept = _read(self._home / "key")
        if kept and self._core.keys.caller(kept) is not None:
            return kept
        scopes = ("devices:read", "devices:write", "events:read")
        _, secret = await self._core.keys.create(PROJECT, scopes, "demo")
        _write(self._home / "key", secret)
        return secret

    def _welcome(self, base: str) -> str:
        where = shlex.quote(self._core.settings.data)
        return f"""
Ordain is ready, with the demo devices {", ".join(name for name, _ in DEVICES)}.

  key      {self._key}
  send     curl -s {base}/v1/devices/demo_lock/commands -H 'Authorization: Bearer {self._key}' \\
             -H 'Content-Type: application/json' -d '{{"type": "lock"}}'
  look     curl -s {base}/v1/devices/demo_lock/commands -H 'Authorization: Bearer {self._key}'
  docs     {base}/docs
  log      .venv/bin/ordain log tail --data {where}
"""


def _read(path: Path) -> str:
    return path.read_text().strip() if path.exists() else ""


def _write(path: Path, secret: str) -> None:
    with open(path, "w", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        file.write(secret)
