"""The rules of an external MQTT server are tried at the start and every hour. The hour is not waited for: the
loop's clock is moved."""

from __future__ import annotations

import asyncio
from pathlib import Path

from broker.domain.mqtt_rules import MqttRules
from broker.mqtt.external.watch import EVERY_SEC, Watch, untrusted
from broker.operations.passwords import CANARIES, TOKENS, keep
from devices.canary import server_of
from tests.conftest import Mosquitto
from tests.integration.core_support import running, until

OPEN = ["it accepts clients without user name and password"]


class MovedLoop(asyncio.SelectorEventLoop):
    """A real loop whose clock a test can move on."""

    moved = 0.0

    def time(self) -> float:
        return super().time() + self.moved


def test_the_rules_are_tried_again_every_hour(mosquitto: Mosquitto, tmp_path: Path) -> None:
    loop = MovedLoop()

    async def move(seconds: float) -> None:
        loop.moved += seconds
        for _ in range(10):  # what is due now runs
            await asyncio.sleep(0)

    async def main() -> None:
        async with running(tmp_path / "data", embedded=False) as bench:
            rules = MqttRules(users="none")
            watch = Watch(bench.core, bench.wire, server_of(mosquitto.url), tmp_path, rules)
            watching = asyncio.create_task(watch.run())
            await until(lambda: rules.breaches is not None)
            assert rules.breaches == OPEN
            assert untrusted(rules) == [f"mqtt: {OPEN[0]}"]

            # Somebody closes it. That is noticed at the next trial, not before.
            mosquitto.kill()
            config = mosquitto.home / "test.conf"
            config.write_text(config.read_text().replace("anonymous true", "anonymous false"))
            mosquitto.start()
            await move(EVERY_SEC - 60)
            assert rules.breaches == OPEN
            await move(61)
            await until(lambda: rules.breaches == [])

            # Somebody opens it again.
            mosquitto.kill()
            config.write_text(config.read_text().replace("anonymous false", "anonymous true"))
            mosquitto.start()
            await move(EVERY_SEC)
            await until(lambda: rules.breaches == OPEN)
            watching.cancel()

    (tmp_path / "data").mkdir()
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        runner.run(main())


async def test_the_devices_that_an_older_release_did_not_have_are_registered(tmp_path: Path) -> None:
    old = {name: f"dtok_{name}" for name in list(CANARIES)[:2]}
    keep(tmp_path / TOKENS, old)
    async with running(tmp_path / "data", embedded=False) as bench:
        for lost in (False, True):  # a device whose token was lost gets a new one
            watch = Watch(bench.core, bench.wire, server_of("mqtt://h"), tmp_path, MqttRules(users="none"))
            logins = await watch._logins()
            assert logins is not None
            assert {login.hardware_id: login.token for login in logins[:2]} == old
            assert await bench.core.registry.authenticate(*logins[2]) is not None, lost
            assert await watch._logins() == logins
            keep(tmp_path / TOKENS, old)
