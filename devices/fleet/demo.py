"""Demo devices, to try Ordain without hardware. Each command waits a short time and reports progress.

They print nothing. Do not use them as a benchmark: their work is only waiting.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from devices.agent import Agent, Call, CommandFailed
from devices.memory import RamMemory, SqliteMemory
from devices.tls import Tls
from devices.types import shipped_types


async def run_demo(
    url: str,
    devices: Sequence[tuple[str, str, str]],
    *,
    prefix: str = "iotee",
    clean_session: bool = True,
    memory_dir: Path | None = None,
    work_sec: float = 0.4,
    tls: Tls | None = None,
    jwks: str | None = None,
    issuer: str = "ordain",
) -> None:
    """Runs the devices (hardware_id, token, type) until cancelled. With `memory_dir`, their memory survives
    restarts. With `jwks` they verify grants."""
    async with asyncio.TaskGroup() as tasks:
        for hardware_id, token, type_name in devices:
            memory = SqliteMemory(memory_dir / f"{hardware_id}.sqlite3") if memory_dir else RamMemory()
            kind = shipped_types()[type_name]
            signed = jwks is not None and kind.payload != "bare"
            agent = Agent(
                hardware_id,
                token,
                url,
                prefix=prefix,
                device_type=kind,
                grants="required" if signed else "none",
                jwks=jwks if signed else None,
                issuer=issuer,
                memory=memory,
                clean_session=clean_session,
                tls=tls,
            )
            (_recorder if type_name == "recorder" else _lock)(agent, work_sec)
            tasks.create_task(agent.run())


def _lock(agent: Agent, work_sec: float) -> None:
    state = {"locked": True, "boots": 1}

    async def turn(call: Call) -> dict[str, Any]:
        await asyncio.sleep(work_sec / 2)
        await call.progress(50, "the bolt is moving")
        await asyncio.sleep(work_sec / 2)
        state["locked"] = call.type == "lock"
        return {"locked": state["locked"]}

    agent.command("lock", idempotent=True)(turn)
    agent.command("unlock", idempotent=True)(turn)

    @agent.command("reboot")
    async def reboot(call: Call) -> dict[str, Any]:
        for percent in (25, 50, 75):
            await call.progress(percent, "rebooting")
            await asyncio.sleep(work_sec)
        state["boots"] += 1
        return {"boots": state["boots"]}

    @agent.command("ping", idempotent=True)
    async def ping(call: Call) -> dict[str, Any]:
        return {"pong": call.params}


def _recorder(agent: Agent, work_sec: float) -> None:
    recording: dict[str, Any] = {}

    @agent.command("start_recording")
    async def start(call: Call) -> dict[str, Any]:
        if recording:
            raise CommandFailed("already_recording", "a recording is running", dict(recording))
        await asyncio.sleep(work_sec)
        recording["command_id"] = call.id
        return {"recording": True, "max_duration_sec": call.params["max_duration_sec"]}

    @agent.command("stop_recording")
    async def stop(call: Call) -> dict[str, Any]:
        if not recording:
            raise CommandFailed("not_recording", "no recording is running")
        await asyncio.sleep(work_sec)
        started_by = recording.pop("command_id")
        return {"recording": False, "started_by": started_by}
