"""Signed answers over HTTP: from the device itself, and passed on by a relay."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from devices.fleet.ble import BleDevice
from devices.grant import GrantVerifier, keys_from_jwks
from devices.memory import RamMemory
from devices.relay import Relay
from devices.speech.signing import sign
from devices.wire import CommandMessage
from tests.integration.http.pull_support import TYPES, Desk, fetched, on_desk, reported

PRIVATE = Ed25519PrivateKey.from_private_bytes(b"p" * 32)
OTHER = Ed25519PrivateKey.from_private_bytes(b"q" * 32)
SEAL = "seal-1"


def public(key: Ed25519PrivateKey) -> str:
    raw = key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")


async def seal(desk: Desk) -> dict[str, Any]:
    body = {"hardware_id": SEAL, "type": "sealed", "answer_key": public(PRIVATE)}
    made: dict[str, Any] = (await desk.key.post("/v1/devices", json=body)).json()
    assert made["answer_key"] == public(PRIVATE)
    assert "device_secret" not in made
    return made


def signed(command: str, status: str = "executed", key: Ed25519PrivateKey = PRIVATE, **fields: Any) -> str:
    said = msgspec.json.encode({"id": command, "status": status} | fields)
    return sign(said, SEAL, key).decode()


def test_a_report_must_be_signed_by_the_device_even_with_its_own_token() -> None:
    """The MQTT server knows the token: it is the password. It does not know the key."""

    async def world(desk: Desk) -> None:
        device = desk.client((await seal(desk))["device_token"])
        command = await desk.sent(SEAL, "open")
        assert await fetched(device, device=SEAL) == [(command, 1)]
        path = f"/v1/devices/{SEAL}/commands/{command}/ack"
        other = signed("cmd_01h455vb4pex5vsknk084sn02q")
        for body in (
            {"status": "executed"},
            {"status": "executed", "signed": signed(command, key=OTHER)},
            {"status": "executed", "signed": signed(command, "failed", error="hot")},
            {"status": "executed", "signed": other},
            {"status": "executed", "signed": "executed"},
            {"status": "executed", "signed": signed(command), "result": {"open": 1}},
        ):
            refused = await reported(device, command, SEAL, **body)
            assert (refused.status_code, refused.json()["error"]["details"]["field"]) == (400, "signed"), body
        assert (await device.post(path)).status_code == 400
        assert await desk.types(command) == ["created", "published"]
        assert await desk.unmatched() == ["unsigned", "bad_signature", "unsigned"]
        assert {"unsigned", "bad_signature"} <= {
            each["code"] for each in (await desk.why(command))["reasons"]
        }

        assert (await device.post(path, json={"signed": signed(command, "acknowledged")})).status_code == 200
        for _ in range(2):  # a repeated report is no error
            done = await reported(device, command, SEAL, status="executed", signed=signed(command, result=7))
            assert (done.status_code, done.json()["result"]) == (200, {"value": 7})
        why = await desk.why(command)
        assert why["reasons"][0]["signed"] is True

    on_desk(world)


def test_a_type_without_signed_answers_takes_none() -> None:
    async def world(desk: Desk) -> None:
        device = await desk.registered()
        command = await desk.sent()
        await fetched(device)
        refused = await reported(device, command, status="executed", signed=signed(command))
        assert (refused.status_code, refused.json()["error"]["details"]["field"]) == (400, "signed")

    on_desk(world)


def test_a_relay_passes_on_what_the_device_signed() -> None:
    async def world(desk: Desk) -> None:
        await seal(desk)
        now = desk.writer.clock.wall_ms
        verifier = GrantVerifier(
            keys_from_jwks(desk.core.grants.jwks()), "ordain", SEAL, lambda: now() / 1_000
        )
        done: list[str] = []

        async def work(command: CommandMessage) -> dict[str, bool]:
            done.append(command.id)
            return {"open": True}

        device = BleDevice(
            SEAL, TYPES["sealed"], RamMemory(), {"open": work}, now, verifier, signs_with=PRIVATE
        )
        command = await desk.sent(SEAL, "open")
        async with asyncio.TaskGroup() as group:
            running = group.create_task(device.run())
            assert await Relay(desk.key).serve(SEAL, device.connect()) == 1
            running.cancel()
        found = await desk.read(command)
        assert (found["status"], found["result"], done) == ("executed", {"open": True}, [command])
        assert await desk.unmatched() == []

    on_desk(world)
