"""The reference relay and a simulated BLE device against the real broker, with phones that die on the way."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx2

from broker.settings import Settings
from devices.fleet.ble import BleDevice
from devices.grant import GrantVerifier, keys_from_jwks
from devices.memory import RamMemory
from devices.relay import Relay
from devices.types import shipped_types
from devices.wire import CommandMessage
from tests.integration.core_support import until
from tests.integration.http.pull_support import RECORDER, Desk, fetched, on_desk

HELD = 60


class Recorder:
    """A BLE device with its memory and a list of the commands it executed."""

    def __init__(self, desk: Desk, hardware_id: str = RECORDER, *, expects: str | None = None) -> None:
        self.done: list[str] = []
        self.go_on = asyncio.Event()
        self.go_on.set()
        now = desk.writer.clock.wall_ms
        keys = keys_from_jwks(desk.core.grants.jwks())
        verifier = GrantVerifier(keys, Settings().issuer, expects or hardware_id, lambda: now() / 1_000)
        self.device = BleDevice(
            hardware_id,
            shipped_types()["recorder"],
            RamMemory(),
            {"start_recording": self._start, "stop_recording": self._stop},
            now,
            verifier,
        )

    async def _start(self, command: CommandMessage) -> dict[str, Any]:
        self.done.append(command.id)
        await self.go_on.wait()
        return {"seconds": command.params["max_duration_sec"]}

    async def _stop(self, command: CommandMessage) -> None:
        self.done.append(command.id)
        raise RuntimeError("nothing is recorded")


@asynccontextmanager
async def nearby(desk: Desk, *hardware_ids: str, **fields: Any) -> AsyncIterator[list[Recorder]]:
    recorders = []
    async with asyncio.TaskGroup() as group:
        tasks = []
        for hardware_id in hardware_ids or (RECORDER,):
            await desk.registered(hardware_id)
            recorders.append(Recorder(desk, hardware_id, **fields))
            tasks.append(group.create_task(recorders[-1].device.run()))
        yield recorders
        for task in tasks:
            task.cancel()


def test_a_relay_carries_commands_to_a_device_and_answers_back() -> None:
    async def story(desk: Desk) -> None:
        async with nearby(desk) as (recorder,):
            first, second = await desk.sent(), await desk.sent(type="stop_recording")
            relay, peer = Relay(desk.key), recorder.device.connect()

            assert [await relay.serve(RECORDER, peer) for _ in range(3)] == [1, 1, 0]
            done, failed = await desk.read(first), await desk.read(second)

        assert recorder.done == [first, second]
        assert (done["status"], done["result"]) == ("executed", {"seconds": 3600})
        assert failed["error"] == {"code": "device_error", "message": "nothing is recorded"}
        assert await desk.types(first) == ["created", "published", "acknowledged", "executed"]

    on_desk(story)


def test_a_relay_serves_several_devices_until_they_are_gone() -> None:
    async def story(desk: Desk) -> None:
        names = ("rec-1", "rec-2", "rec-3")
        async with nearby(desk, *names) as recorders:
            peers = {name: each.device.connect() for name, each in zip(names, recorders, strict=True)}
            serving = asyncio.create_task(Relay(desk.key).run(peers))
            ids = [await desk.sent(name) for name in names for _ in range(2)]
            for command_id in ids:
                await desk.becomes(command_id, "executed")
            for each in recorders:
                each.device.disconnect()
            await serving

        assert sorted(done for each in recorders for done in each.done) == sorted(ids)

    on_desk(story)


def test_a_phone_that_dies_before_delivery_delays_the_command_by_a_lease() -> None:
    async def story(desk: Desk) -> None:
        async with nearby(desk) as (recorder,):
            command_id = await desk.sent()
            assert await fetched(desk.key) == [(command_id, 1)], "the phone claims and then dies"
            assert recorder.done == []
            await asyncio.sleep(HELD)

            assert await Relay(desk.key).serve(RECORDER, recorder.device.connect()) == 1
            command = await desk.read(command_id)

        assert (command["status"], command["attempts"]) == ("executed", 2)
        assert recorder.done == [command_id]

    on_desk(story)


def test_a_phone_that_dies_after_delivery_causes_no_second_execution() -> None:
    async def story(desk: Desk) -> None:
        async with nearby(desk) as (recorder,):
            command_id = await desk.sent()
            deaf = desk.client("sk_live_of_nobody")
            phone = asyncio.create_task(
                _Unreported(desk.key, deaf).serve(RECORDER, recorder.device.connect())
            )
            await until(lambda: recorder.done == [command_id])
            phone.cancel()
            recorder.device.disconnect()
            await asyncio.wait({phone})
            assert desk.state(command_id) == "published"

            relay = Relay(desk.key)
            assert await relay.serve(RECORDER, recorder.device.connect()) == 1, "still under the first lease"
            command = await desk.read(command_id)

        assert (command["status"], command["attempts"]) == ("executed", 1)
        assert recorder.done == [command_id]

    on_desk(story)


class _Unreported(Relay):
    """Its claims work; its reports do not reach the broker."""

    def __init__(self, http: httpx2.AsyncClient, deaf: httpx2.AsyncClient) -> None:
        super().__init__(http)
        self._deaf = deaf

    async def _claim(self, device: str) -> dict[str, bytes]:
        claimed = await super()._claim(device)
        self._http = self._deaf
        return claimed


def test_an_answer_not_confirmed_by_one_phone_is_given_to_the_next() -> None:
    async def story(desk: Desk) -> None:
        async with nearby(desk) as (recorder,):
            command_id = await desk.sent(ttl_sec=None)
            recorder.go_on.clear()
            phone = asyncio.create_task(Relay(desk.key).serve(RECORDER, recorder.device.connect()))
            await desk.becomes(command_id, "acknowledged")
            phone.cancel()
            recorder.device.disconnect()
            await asyncio.wait({phone})
            recorder.go_on.set()
            await asyncio.sleep(1)

            assert await Relay(desk.key).serve(RECORDER, recorder.device.connect()) == 0, (
                "acknowledged: not claimed again"
            )
            assert desk.state(command_id) == "executed"
            assert await Relay(desk.key).serve(RECORDER, recorder.device.connect()) == 0
        assert await desk.types(command_id) == ["created", "published", "acknowledged", "executed"]

    on_desk(story)


def test_reports_are_repeated_until_the_broker_is_back() -> None:
    async def story(desk: Desk) -> None:
        async with nearby(desk) as (recorder,):
            command_id = await desk.sent()
            recorder.go_on.clear()
            serving = asyncio.create_task(Relay(desk.key).serve(RECORDER, recorder.device.connect()))
            await desk.becomes(command_id, "acknowledged")
            desk.writer.open = False
            recorder.go_on.set()
            await asyncio.sleep(3)
            assert not serving.done()
            desk.writer.open = True

            assert await serving == 1
            assert desk.state(command_id) == "executed"

    on_desk(story)


def test_a_relay_leaves_a_slow_device_and_gets_its_answer_in_a_later_round() -> None:
    async def story(desk: Desk) -> None:
        async with nearby(desk) as (recorder,):
            command_id = await desk.sent(ttl_sec=None)
            recorder.go_on.clear()
            relay, peer = Relay(desk.key, patience_sec=10), recorder.device.connect()
            assert await relay.serve(RECORDER, peer) == 0
            assert desk.state(command_id) == "acknowledged"
            recorder.go_on.set()
            behind = await desk.sent(ttl_sec=None)

            serving = asyncio.create_task(relay.run({RECORDER: peer}))
            await desk.becomes(behind, "executed", 300)
            recorder.device.disconnect()
            await serving

        assert desk.state(command_id) == "executed"

    on_desk(story)


def test_a_device_refuses_a_grant_for_another_device() -> None:
    async def story(desk: Desk) -> None:
        async with nearby(desk, expects="rec-9") as (recorder,):
            command_id = await desk.sent()
            await Relay(desk.key).serve(RECORDER, recorder.device.connect())
            error = (await desk.read(command_id))["error"]

        assert (error["code"], error["details"]) == ("grant_refused", {"reason": "wrong_device"})
        assert recorder.done == []

    on_desk(story)
