"""Settings: read once, checked at start, passed as values. A file in TOML, then the environment.

Unknown keys are refused; an error names the place, the key, the value and what would be right.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from broker.mqtt_url import is_host, parse_url
from devices.names import is_name


class BadSetting(Exception):
    """A setting is wrong; the message names it."""


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Bounds on what is taken in, kept and under way at a time; sizes in bytes."""

    queue_per_name: Annotated[int, Meta(ge=1)] = 100
    queue_per_device: Annotated[int, Meta(ge=1)] = 1_000
    params_bytes: Annotated[int, Meta(ge=2)] = 65_536
    body_bytes: Annotated[int, Meta(ge=1_024)] = 262_144
    default_ttl_sec: Annotated[int, Meta(ge=1, le=31_536_000)] = 300
    idempotency_sec: Annotated[int, Meta(ge=86_400)] = 604_800
    send_slots: Annotated[int, Meta(ge=1, le=100)] = 100
    unmatched_per_device: Annotated[int, Meta(ge=1)] = 100
    unmatched_in_all: Annotated[int, Meta(ge=1)] = 10_000


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that can be set. `mqtt_url` empty: an MQTT server of our own, at `mqtt_listen`."""

    data: str = "./data"
    http: str = "127.0.0.1:8080"
    mqtt_listen: str = "127.0.0.1:1883"
    mqtt_url: str = ""
    mqtt_server: Literal["embedded", "mosquitto"] = "embedded"
    prefix: str = "iotee"
    issuer: str = "ordain"
    types: str = ""
    limits: Limits = Limits()


ENVIRONMENT = {
    "data": "ORDAIN_DATA",
    "http": "ORDAIN_HTTP",
    "mqtt_listen": "ORDAIN_MQTT_LISTEN",
    "mqtt_url": "ORDAIN_MQTT_URL",
    "mqtt_server": "ORDAIN_MQTT_SERVER",
    "types": "ORDAIN_TYPES",
}
CONFIG = "ORDAIN_CONFIG"


def load(flags: Mapping[str, str | None], environment: Mapping[str, str], config: str | None) -> Settings:
    """Flags win over the environment, the environment over the file, the file over the defaults.

    Raises:
        BadSetting: naming file or variable, key, value and what would be right.
    """
    values: dict[str, object] = {}
    place = config or environment.get(CONFIG) or ""
    if place:
        try:
            values |= tomllib.loads(Path(place).read_text())
        except OSError as error:
            raise BadSetting(f"{place}: cannot be read: {error.strerror}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise BadSetting(f"{place}: is not TOML: {error}") from error
    values |= {key: environment[name] for key, name in ENVIRONMENT.items() if environment.get(name)}
    values |= {key: value for key, value in flags.items() if value is not None}
    settings = _converted(place, values)
    for key in ("http", "mqtt_listen"):
        address(key, getattr(settings, key))
    if settings.mqtt_url:
        try:
            parse_url(settings.mqtt_url)
        except ValueError as error:  # the URL itself may hold a password
            raise BadSetting(f"mqtt_url: {error}") from error
    if not is_name(settings.prefix):
        raise BadSetting(f"prefix = {settings.prefix!r}: must be one topic level of letters, digits, _ and -")
    return settings


def _converted(place: str, values: dict[str, Any]) -> Settings:
    """A wrong setting is named with its value, but for the URL and unknown ones: they may be secrets."""
    where = f"{place}: " if place else ""
    limits = values.get("limits")
    tables = [("", values, Settings), ("limits.", limits if isinstance(limits, dict) else {}, Limits)]
    for above, table, kind in tables:
        known = kind.__struct_fields__
        for key in table:
            if key not in known:
                raise BadSetting(f"{where}{above}{key}: unknown key; known are: {', '.join(known)}")
    try:
        return msgspec.convert(values, Settings)
    except msgspec.ValidationError as error:
        right, _, path = str(error).partition(" - at `$.")
        key, value = path.rstrip("`"), values
        for part in key.split("."):
            value = value[part]
        shown = "" if key == "mqtt_url" else f" = {value!r}"
    raise BadSetting(f"{where}{key}{shown}: {right}")


def address(key: str, text: str) -> tuple[str, int]:
    """`HOST:PORT`; port 0 takes a free one.

    Raises:
        BadSetting: it is not of that form.
    """
    host, colon, port = text.rpartition(":")
    if not colon or not is_host(host) or not port.isdecimal() or int(port) > 65_535:
        raise BadSetting(f"{key} = {text!r}: must be HOST:PORT, such as 127.0.0.1:8080")
    return host.strip("[]"), int(port)
