"""The reference agent at Ordain's own MQTT server: it checks grants and signs its answers."""

from __future__ import annotations

import asyncio
import base64
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from broker.domain.events import Acknowledged, Executed, Progressed
from broker.engine.commands import Order
from broker.engine.registry import NewDevice
from broker.log import sqlite as log
from broker.mqtt.door import mqtt_door
from broker.settings import Settings
from broker.world import SqliteStorage
from devices.agent import Agent, Call
from devices.grant import secret_key
from devices.types import load_type
from tests.integration.core_support import ME, PROJECT, new_core, until

KIND = load_type('name = "vault"\nopen = true\nanswers_signed = "required"\n')
TYPES = {"vault": KIND}
PRIVATE = Ed25519PrivateKey.from_private_bytes(b"p" * 32)
PUBLIC = base64.urlsafe_b64encode(PRIVATE.public_key().public_bytes_raw()).decode().rstrip("=")


@pytest.mark.parametrize("key", [PUBLIC, None])
async def test_an_agent_with_a_key_signs_all_that_it_says(tmp_path: Path, key: str | None) -> None:
    storage = await SqliteStorage.open(tmp_path)
    core = new_core(storage, types=TYPES)
    await core.open(embedded=True)
    settings = Settings(mqtt_listen="127.0.0.1:0")
    async with (
        mqtt_door(settings, core, TYPES, asyncio.Event(), None, None) as door,
        core.running("embedded"),
    ):
        new = NewDevice(hardware_id="vault-1", type="vault", project=PROJECT, answer_key=key)
        _, token, secret = await core.registry.register(ME, new)
        signs_with = PRIVATE if secret is None else secret_key(secret)
        jwks = core.grants.jwks()
        agent = Agent("vault-1", token, door.devices_url, device_type=KIND, jwks=jwks, signs_with=signs_with)

        @agent.command("open")
        async def _(call: Call) -> dict[str, Any]:
            await call.progress(50, "half")
            return {"open": True}

        running = asyncio.create_task(agent.run())
        made = (await core.commands.create(ME, Order(device="vault-1", type="open"))).state
        await until(lambda: (found := core.live.command(made.id)) is None or found.closed)
        await core.writer.barrier()
        rows = await storage.read(lambda sql: log.stream(sql, made.id))
        events = [log.recorded(row).event for row in rows][2:]
        assert [type(each) for each in events] == [Acknowledged, Progressed, Executed]
        assert [getattr(each, "signed", None) for each in events] == [True] * 3
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    await storage.close()


def test_an_agent_whose_type_takes_no_signed_answers_does_not_start_with_a_key() -> None:
    plain = load_type('name = "plain"\nopen = true\n')
    with pytest.raises(ValueError, match="not signed"):
        Agent("vault-1", "t", "mqtt://h", device_type=plain, grants="none", signs_with=PRIVATE)
