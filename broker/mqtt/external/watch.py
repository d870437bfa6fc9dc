"""Tries the rules of an external MQTT server at the start and every hour, and tells what it must not allow.

Whether a client without a password connects is always tried. All else needs the devices of the canary.
They are there once `ordain mqtt passwd-file` or `ordain doctor --canary` has registered them.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import structlog

from broker.core import Core
from broker.domain.errors import Refusal, Unavailable
from broker.domain.mqtt_rules import MqttRules
from broker.engine.commands import Caller, Order
from broker.engine.registry import NewDevice
from broker.operations.passwords import CANARIES, CANARY_PROJECT, TOKENS, keep
from broker.seams import UNREADABLE, Link
from devices.canary import Canary, Login, Server, Untried, strangers

logger = structlog.get_logger()

EVERY_SEC = 3_600.0
LOOK_AGAIN_SEC = 0.25
AGAIN_SEC = 30.0  # at first, after a trial that could not be made
ME = Caller(actor="operator:canary", project=None)


class Watch:
    def __init__(self, core: Core, link: Link, server: Server, directory: Path, rules: MqttRules) -> None:
        self._core, self._link, self._server = core, link, server
        self._tokens = directory / TOKENS
        self.rules = rules

    async def run(self) -> None:
        """Tries the rules for ever. After a trial that could not be made, the pause doubles."""
        pause = AGAIN_SEC
        while True:
            while not self._link.up:  # noqa: ASYNC110
                await asyncio.sleep(LOOK_AGAIN_SEC)
            try:
                await self._look()
            except (Untried, Refusal, Unavailable, OSError, msgspec.MsgspecError, *UNREADABLE) as error:
                logger.warning("mqtt.rules_not_tried", why=str(error))
                await asyncio.sleep(pause)
                pause = min(2 * pause, EVERY_SEC)
            except Exception:
                logger.exception("mqtt.trial_failed")  # a trial must never end the broker
                await asyncio.sleep(EVERY_SEC)
            else:
                pause = AGAIN_SEC
                await asyncio.sleep(EVERY_SEC)

    async def _look(self) -> None:
        logins = await self._logins()
        if logins is None:
            breaches = await strangers(self._server)
        else:
            prefix = self._core.commands.prefix
            canary = Canary(self._server, prefix, *logins, self._send, self._outcome)
            breaches = await canary.breaches()
        rules = self.rules
        rules.breaches, rules.as_device = breaches, logins is not None
        rules.checked_at = self._core.writer.now()
        for breach in breaches:
            logger.warning("mqtt.rule_broken", what=breach, do="ordain doctor --canary")

    async def _logins(self) -> tuple[Login, Login, Login] | None:
        """The canary's devices; None if the operator has not registered any. Those that a release added since
        then are registered now."""
        if not self._tokens.exists():
            return None
        kept = msgspec.json.decode(self._tokens.read_bytes(), type=dict[str, str])
        new = {name: await self._token(name, type) for name, type in CANARIES.items() if not kept.get(name)}
        if new:
            keep(self._tokens, kept := kept | new)
        thief, victim, bought = (Login(name, kept[name]) for name in CANARIES)
        return thief, victim, bought

    async def _token(self, name: str, type_name: str) -> str:
        registry, live = self._core.registry, self._core.live
        await live.bring(self._core.storage, [name])
        if live.device(name) is not None:
            return (await registry.rotate_token(ME, name)).token
        new = NewDevice(hardware_id=name, type=type_name, project=CANARY_PROJECT)
        return (await registry.register(ME, new)).token

    async def _send(self, hardware_id: str, name: str) -> str:
        order = Order(device=hardware_id, type=name, ttl_sec=60)
        return (await self._core.commands.create(ME, order)).state.id

    async def _outcome(self, command_id: str) -> str:
        while (state := self._core.live.command(command_id)) is not None and not state.closed:  # noqa: ASYNC110
            await asyncio.sleep(LOOK_AGAIN_SEC)
        return "unknown" if state is None else state.state.value


def untrusted(rules: MqttRules) -> list[str]:
    """Why the server's rules cannot be relied on, as reasons for not being ready."""
    if rules.breaches:
        return [f"mqtt: {breach}" for breach in rules.breaches]
    if not rules.tried:
        do = "; the canary needs its devices: ordain doctor --canary" if rules.breaches == [] else ""
        return [f"mqtt: the rules of its server were not tried yet{do}"]
    return []
