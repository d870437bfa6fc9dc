"""Passwords for an MQTT server of one's own: its password file, and the tokens of the canary's devices.

A Mosquitto of one's own lets devices in by a password file. The log has the digest of each device's token in
the form that Mosquitto reads.
"""

from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path

import msgspec

from broker.domain.fleet import DeviceState
from broker.engine.ids import is_token, token_digest
from broker.engine.speech.access_rules import whole_file
from broker.log.driven import read_now
from broker.opening import open_to_read
from broker.operations.asking import Client, call
from broker.settings import Settings, discovery
from broker.world import SystemEntropy
from devices.canary import BOUGHT_TYPE, Login
from devices.mqtt_url import parse_url
from devices.types import DeviceType
from projections import devices as devices_view

CANARY_PROJECT = "ordain-canary"
CANARIES = {
    "ordain-canary-thief": "generic",
    "ordain-canary-victim": "generic",
    "ordain-canary-bought": BOUGHT_TYPE,
}
TOKENS = "canary.tokens"
EVERY = 1_000_000_000
BROKER = "ordain"
ROUNDS = 10_000  # a person may have chosen this password


async def canaries(client: Client, settings: Settings) -> list[Login]:
    """The canary's thief, victim and bought device, in a project of their own. They are registered if they
    are not there.

    Their tokens are kept in the data directory, readable for its owner only: an external server must know
    them before the canary runs. If a token was lost or replaced, a new one is made.

    Raises:
        Failed: the broker refused, for example because a canary device was deleted.
        OSError: the file cannot be read or written.
    """
    path = Path(settings.data) / TOKENS
    kept: dict[str, str] = msgspec.json.decode(path.read_bytes()) if path.exists() else {}
    tokens = {}
    for name, type_name in CANARIES.items():
        digest = _digests(settings).get(name)
        if digest is not None and name in kept and is_token(kept[name], digest):
            tokens[name] = kept[name]
            continue
        body = {"hardware_id": name, "type": type_name, "project": CANARY_PROJECT}
        there = "/v1/devices" if digest is None else f"/v1/devices/{name}/token"
        made = await call(client, "POST", there, body if digest is None else None)
        tokens[name] = made["device_token"]
    if tokens != kept:
        keep(path, tokens)
    return [Login(name, tokens[name]) for name in CANARIES]


def keep(path: Path, tokens: dict[str, str]) -> None:
    """Writes the tokens of the canary's devices. Only the owner can read them."""
    with open(path, "wb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        file.write(msgspec.json.encode(tokens))


def passwords(settings: Settings) -> dict[str, str]:
    """The digests of all devices' tokens by user name, and of the user of `mqtt_url` if that has a password.
    In the form of mosquitto_passwd(1).

    Raises:
        Broken: there is no log, or it cannot be read.
    """
    users = dict(sorted(_digests(settings).items()))
    broker = parse_url(settings.mqtt_url) if settings.mqtt_url else None
    if broker is not None and broker.username and broker.password:
        users[broker.username] = token_digest(broker.password, SystemEntropy(), ROUNDS)
    return users


def access_rules(settings: Settings, types: dict[str, DeviceType]) -> list[str]:
    """The lines of Mosquitto's ACL file for all devices, the broker and programs that read events.

    Raises:
        Broken: there is no log, or it cannot be read.
    """
    broker = parse_url(settings.mqtt_url).username if settings.mqtt_url else None
    lines = whole_file(settings.prefix, types, _devices(settings), broker or BROKER)
    # The first line names the broker's user; its rules follow.
    return [lines[0], *(f"topic write {each}" for each in discovery(settings)), *lines[1:]]


def _digests(settings: Settings) -> dict[str, str]:
    own = (device for device in _devices(settings) if device.gateway is None)
    return {device.hardware_id: device.token_digest for device in own}


def _devices(settings: Settings) -> list[DeviceState]:
    with closing(open_to_read(settings)) as sql:
        found = read_now(sql, devices_view.newest, None, None, EVERY)
    return [device for device in found if device.deleted_at is None]
