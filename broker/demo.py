"""`--demo`: a few simulated devices and a key, so that a new user can send a command within a minute.

Devices and key are created once per data directory. Their secrets are stored in it; only its owner can
read them.
"""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import structlog

from broker.core import Core
from broker.domain.errors import Refusal
from broker.domain.lanes import Presence
from broker.engine.commands import Caller
from broker.engine.registry import NewDevice
from devices.fleet.demo import run_demo
from devices.tls import Tls

logger = structlog.get_logger()

PROJECT = "demo"
# Name, type, and a command to try.
DEVICES = (
    ("demo_lock", "generic", "lock"),
    ("demo_recorder", "recorder", "start_recording"),
    ("ABC123", "iotee_device", "lock"),
)
ONLINE_WITHIN_SEC = 10
OPERATOR = Caller(actor="operator:demo", project=None)


class Demo:
    """The demo devices of one broker."""

    def __init__(self, core: Core, data: Path) -> None:
        self._core = core
        self._home = data / "demo"
        os.makedirs(self._home, mode=0o700, exist_ok=True)

    async def run(self, url: str, base: str, say: Callable[[str], None], tls: Tls | None = None) -> None:
        """Runs the devices until cancelled. Prints what to try as soon as they are online, at the latest
        after 10 s."""
        devices = []
        for name, kind, _ in DEVICES:
            token = await self._token(name, kind)
            if token is not None:
                devices.append((name, token, kind))
        settings = self._core.settings
        jwks = f"{base}/.well-known/jwks.json"
        async with asyncio.TaskGroup() as group:
            running = run_demo(
                url,
                devices,
                prefix=settings.prefix,
                memory_dir=self._home,
                tls=tls,
                jwks=jwks,
                issuer=settings.issuer,
            )
            group.create_task(running)
            await self._wait_for([name for name, _, _ in devices])
            say(self._welcome(base, [name for name, _, _ in devices], await self._secret_key()))

    async def _wait_for(self, names: list[str]) -> None:
        recorded = asyncio.Event()
        listeners = self._core.writer.listeners

        def heard(*_: object) -> None:
            recorded.set()

        listeners.append(heard)
        try:
            with suppress(TimeoutError):  # an external MQTT server may learn their passwords later
                async with asyncio.timeout(ONLINE_WITHIN_SEC):
                    while not all(map(self._online, names)):
                        await recorded.wait()
                        recorded.clear()
        finally:
            listeners.remove(heard)

    def _online(self, name: str) -> bool:
        device = self._core.live.device(name)
        return device is not None and self._core.live.presence.get(device.id) is Presence.ONLINE

    async def _token(self, name: str, kind: str) -> str | None:
        """The device's token. None if the name belongs to another project or to a deleted device."""
        kept = _read(self._home / f"{name}.token")
        core = self._core
        if kept and await core.registry.authenticate(name, kept) is not None:
            return kept
        try:
            issued = await core.registry.register(
                OPERATOR, NewDevice(hardware_id=name, type=kind, project=PROJECT, name=f"demo {kind}")
            )
        except Refusal as taken:
            known = core.live.device(name)
            if known is None or known.deleted_at is not None or known.project != PROJECT:
                logger.warning("demo.device_left_out", hardware_id=name, why=taken.message)
                return None
            issued = await core.registry.rotate_token(OPERATOR, name)  # registered before, token file lost
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

    def _welcome(self, base: str, names: list[str], key: str) -> str:
        """Lines to be pasted into a shell one by one; what is only to be read begins with `#`."""
        where = shlex.quote(self._core.settings.data)
        device, command = next(((name, what) for name, _, what in DEVICES if name in names), ("", ""))
        bearer = '-H "Authorization: Bearer $KEY"'
        body = json.dumps({"type": command})
        url = f"{base}/v1/devices/{device}/commands"
        tries = [
            f"curl -s {shlex.quote(url)} {bearer} -H 'Content-Type: application/json' -d '{body}'",
            f'curl -s "{url}?limit=1" {bearer}',
        ]
        lines = [
            f"# Ordain is ready. Demo devices: {', '.join(names) or 'left out, their names are taken'}.",
            "# Paste these lines into another terminal: an API key, a command, and its outcome.",
            f"export KEY={key}",
            *(tries if device else []),
            f"{shlex.quote(sys.argv[0])} log tail --data {where}",
            f"# docs {base}/docs",
        ]
        return "\n" + "\n".join(lines) + "\n"


def _read(path: Path) -> str:
    return path.read_text().strip() if path.exists() else ""


def _write(path: Path, secret: str) -> None:
    with open(path, "w", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        file.write(secret)
