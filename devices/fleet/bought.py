"""Simulated bought devices: they speak as their firmwares do, so they get no command ids.

What a device executes twice cannot be seen here, because nothing names the command. It is counted how often
each device acted, and the broker must not show more executed commands than that.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import NamedTuple

from devices.fleet.faults import Fate, Faults, fate
from devices.fleet.mqtt import Connection

Said = list[tuple[str, str]]


class Model(NamedTuple):
    """How one type speaks; `{n}` is the device's name. `commands`: those that the simulation sends.

    `answer(name, is_on, topic, payload)`: the new state and what the device says, None if it does nothing.
    `refusal`: what it says instead, if it refuses a command; "" if such a device then says nothing.
    """

    commands: tuple[str, ...]
    hears: tuple[str, ...]
    presence: tuple[str, str, str]  # topic, online, offline
    answer: Callable[[str, bool, str, bytes], tuple[bool, Said] | None]
    refusal: Callable[[str, bytes], Said] = lambda name, payload: []


def _shelly(name: str, on: bool, topic: str, payload: bytes) -> tuple[bool, Said] | None:
    asked = json.loads(payload)
    wanted = asked["params"].get("on", not on)
    answer = {"id": asked["id"], "src": name, "dst": asked["src"], "result": {"was_on": on}}
    return wanted, [(f"{asked['src']}/rpc", json.dumps(answer))]


def _shelly_refuses(name: str, payload: bytes) -> Said:
    asked = json.loads(payload)
    error = {"code": -114, "message": "Resource unavailable: overload"}
    answer = {"id": asked["id"], "src": name, "dst": asked["src"], "error": error}
    return [(f"{asked['src']}/rpc", json.dumps(answer))]


def _shelly_gen1(name: str, on: bool, topic: str, payload: bytes) -> tuple[bool, Said] | None:
    wanted = {b"on": True, b"off": False}.get(payload, on)
    return wanted, [(f"shellies/{name}/relay/0", "on" if wanted else "off")]


def _tasmota(name: str, on: bool, topic: str, payload: bytes) -> tuple[bool, Said] | None:
    if not topic.endswith("/POWER"):
        return None
    wanted = {b"ON": True, b"OFF": False}.get(payload, not on)
    word = "ON" if wanted else "OFF"
    return wanted, [(f"stat/{name}/RESULT", json.dumps({"POWER": word})), (f"stat/{name}/POWER", word)]


def _zigbee(name: str, on: bool, topic: str, payload: bytes) -> tuple[bool, Said] | None:
    wanted = {"ON": True, "OFF": False}.get(json.loads(payload).get("state"), on)
    state = {"state": "ON" if wanted else "OFF", "linkquality": 87}
    return wanted, [(f"zigbee2mqtt/{name}", json.dumps(state))]


def _texts(state: str, words: dict[bytes, str]) -> Callable[..., tuple[bool, Said] | None]:
    def answer(name: str, on: bool, topic: str, payload: bytes) -> tuple[bool, Said] | None:
        word = words.get(payload)
        return None if word is None else (not on, [(state.format(n=name), word)])

    return answer


SWITCH = ("turn_on", "turn_off")
MODELS = {
    "shelly_gen2": Model(SWITCH, ("{n}/rpc",), ("{n}/online", "true", "false"), _shelly, _shelly_refuses),
    "shelly_gen1": Model(
        SWITCH,
        ("shellies/{n}/relay/0/command", "shellies/{n}/command"),
        ("shellies/{n}/online", "true", "false"),
        _shelly_gen1,
    ),
    "tasmota": Model(
        SWITCH,
        ("cmnd/{n}/#",),
        ("tele/{n}/LWT", "Online", "Offline"),
        _tasmota,
        lambda name, payload: [(f"stat/{name}/RESULT", '{"Command":"Error"}')],
    ),
    "zigbee2mqtt": Model(
        SWITCH,
        ("zigbee2mqtt/{n}/set", "zigbee2mqtt/{n}/get"),
        ("zigbee2mqtt/{n}/availability", '{"state":"online"}', '{"state":"offline"}'),
        _zigbee,
    ),
    "esphome_switch": Model(
        SWITCH,
        ("{n}/switch/{n}/command",),
        ("{n}/status", "online", "offline"),
        _texts("{n}/switch/{n}/state", {b"ON": "ON", b"OFF": "OFF"}),
    ),
    "home_assistant_switch": Model(
        SWITCH,
        ("homeassistant/switch/{n}/set",),
        ("homeassistant/switch/{n}/availability", "online", "offline"),
        _texts("homeassistant/switch/{n}/state", {b"ON": "ON", b"OFF": "OFF"}),
    ),
    "home_assistant_lock": Model(
        ("lock", "unlock"),
        ("homeassistant/lock/{n}/set",),
        ("homeassistant/lock/{n}/availability", "online", "offline"),
        _texts("homeassistant/lock/{n}/state", {b"LOCK": "LOCKED", b"UNLOCK": "UNLOCKED"}),
        lambda name, payload: [(f"homeassistant/lock/{name}/state", "JAMMED")],
    ),
}


class BoughtDevice:
    """One device of a model, with the faults of `Faults`: its n-th message has the fate of number n."""

    def __init__(self, name: str, token: str, model: Model, faults: Faults) -> None:
        self.name, self.token, self.token_is_new = name, token, False
        self.connection: Connection | None = None
        self.away_sec = 0.0
        self.runs = self.refused = 0
        self.fates: list[Fate] = []
        self._model, self._faults = model, faults
        self._on = False
        self._heard = 0
        topic, online, offline = model.presence
        self._presence, self._words = topic.format(n=name), (online.encode(), offline.encode())

    def connect(self) -> Connection:
        """A new connection, which the caller opens."""
        topics = [topic.format(n=self.name) for topic in self._model.hears]
        return Connection(self, self.name, self.token, topics, self._presence, self._words[1])

    def leave(self) -> None:
        if self.connection is not None:
            self.connection.publish(self._presence, self._words[1], retain=True)
            self.connection.leave()

    def up(self, connection: Connection) -> None:
        self.connection, self.away_sec = connection, 0.0
        connection.publish(self._presence, self._words[0], retain=True)

    def down(self, connection: Connection) -> None:
        if self.connection is connection:
            self.connection = None

    def pubacked(self, connection: Connection, number: int) -> None:
        """Its answers are not sent again."""

    def message(self, connection: Connection, topic: str, payload: bytes, number: int) -> None:
        connection.puback(number)
        self._heard += 1
        drawn = fate(self._faults, self.name, str(self._heard))
        self.fates.append(drawn)
        if drawn.away_sec:
            self.away_sec = drawn.away_sec
            self.connection = None
            connection.vanish()
            if drawn.unread:
                return
        said = self._act(topic, payload, failed=drawn.failed)
        if drawn.lost:
            return
        asyncio.get_running_loop().call_later(drawn.slow_sec, self._say, said * (1 + drawn.doubled))

    def _act(self, topic: str, payload: bytes, *, failed: bool) -> Said:
        query = topic.endswith(("/get", "/command")) and payload in (b'{"state":""}', b"update")
        if failed and not query:
            self.refused += 1
            return self._model.refusal(self.name, payload)
        done = self._model.answer(self.name, self._on, topic, payload)
        if done is None:
            return []
        self._on, said = done
        self.runs += not query
        return said

    def _say(self, said: Said) -> None:
        for topic, payload in said:
            if self.connection is not None:
                self.connection.publish(topic, payload.encode())
