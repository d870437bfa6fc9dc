"""Another project on the same broker: it tries ids that are not its own, and it works while others flood."""

from __future__ import annotations

from typing import Any

from tests.simulation.clients import Door
from tests.simulation.loop import SimLoop

NAME = "rv1"
PATHS = ("/v1/commands/{}", "/v1/commands/{}/events", "/v1/commands/{}/explain", "/commands/{}")


class Stranger:
    """Has one device, which never asks for its commands: they expire."""

    def __init__(self, loop: SimLoop, door: Door, secret: str) -> None:
        self._loop, self._door, self._secret = loop, door, secret
        self._random = loop.rng("stranger")

    async def furnish(self) -> None:
        body = {"hardware_id": NAME, "type": "tag"}
        call = await self._door.call("register", "POST", "/v1/devices", body, secret=self._secret)
        assert call.status == 201, call

    def order(self) -> None:
        body: dict[str, Any] = {"type": "beep", "params": {}, "ttl_sec": 2}
        path = f"/v1/devices/{NAME}/commands"
        call = self._door.call("create", "POST", path, body, secret=self._secret)
        self._loop.create_task(call)

    async def pry(self, command_id: str) -> None:
        """Asks for a command of the other project, and for one that does not exist."""
        path = self._random.choice(PATHS)
        for each in (command_id, "cmd_" + "".join(self._random.choices("ABCDEFGHJKMNPQRSTVWXYZ", k=26))):
            await self._door.call("pry", "GET", path.format(each), ids=(each,), secret=self._secret)
