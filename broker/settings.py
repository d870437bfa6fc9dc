"""Settings: read once from a TOML file and the environment, checked at start, passed as values.

Unknown keys are refused. An error names the file or variable, the key, the value and what would be right.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from ipaddress import ip_network
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from broker.limits import Limits as Limits
from broker.limits import MqttLimits as MqttLimits
from broker.limits import ProjectLimits as ProjectLimits
from broker.limits import limits_of as limits_of
from broker.log_url import Address
from broker.log_url import address as parse_log_url
from devices import toml
from devices.allowed import reason
from devices.mqtt_url import Endpoint, parse_endpoint, parse_url, parted
from devices.names import is_name

T = TypeVar("T", bound=msgspec.Struct)


class BadSetting(Exception):
    """A setting is wrong; the message names it."""


def within_files(settings: Settings, files: int) -> Settings:
    """The same settings with bounds of connections that a process with so many open files can hold: three
    quarters for our own MQTT server, an eighth for HTTP connections without a key, the rest for all else."""
    http, mqtt = settings.limits, settings.mqtt_limits
    strangers = min(http.strangers, max(files // 8, 2))
    per_address = http.strangers_per_address
    if strangers < http.strangers:
        per_address = min(per_address, strangers // 2)
    return msgspec.structs.replace(
        settings,
        limits=msgspec.structs.replace(http, strangers=strangers, strangers_per_address=per_address),
        mqtt_limits=msgspec.structs.replace(mqtt, connections=min(mqtt.connections, max(files * 3 // 4, 1))),
    )


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All settings. `mqtt_url` empty: the broker starts its own MQTT server at `mqtt_listen`. `log` empty:
    the log is a file in `data`."""

    data: str = "./data"
    log: str = ""
    log_password_file: str = ""
    node: str = ""
    advertise: str = ""
    cluster_secret_file: str = ""
    http: str = "127.0.0.1:8080"
    https: str = ""
    https_client_ca: str = ""
    http_trusted_proxies: list[str] = []
    http_keep_alive_sec: Annotated[int, Meta(ge=1, le=3_600)] = 75
    metrics: str = "open"
    mqtt_listen: str | list[str] = "127.0.0.1:1883"
    mqtt_url: str = ""
    mqtt_ca: str = ""
    mqtt_certificate: str = ""
    mqtt_key: str = ""
    mqtt_users: Literal["none", "dynsec", "password_file"] = "none"
    mqtt_password_file: str = ""
    mqtt_pid_file: str = ""
    require_mqtt_acl: bool = False
    mqtt_server: Literal["embedded", "mosquitto"] = "embedded"
    mqtt_events: bool = True
    home_assistant: str = ""
    prefix: str = "iotee"
    issuer: str = "ordain"
    key_pepper_file: str = ""
    types: str = ""
    tls_certificate: str = ""
    tls_key: str = ""
    tls_client_ca: str = ""
    tls_client_identity: Literal["cn", "san"] = "cn"
    trusted_proxies: list[str] = []
    cors_origins: list[str] = []
    webhook_allow: list[str] = []
    webhook_ca: str = ""
    webhook_certificate: str = ""
    webhook_key: str = ""
    webhook_timeout_sec: Annotated[float, Meta(ge=1, le=60)] = 15
    log_level: Literal["debug", "info", "warning", "error", "critical"] = "info"
    log_format: Literal["text", "json"] = "text"
    limits: Limits = Limits()
    mqtt_limits: MqttLimits = MqttLimits()
    projects: dict[str, ProjectLimits] = {}


ENVIRONMENT = {
    "data": "ORDAIN_DATA",
    "log": "ORDAIN_LOG",
    "log_password_file": "ORDAIN_LOG_PASSWORD_FILE",  # nosec B105 - a name
    "node": "ORDAIN_NODE",
    "advertise": "ORDAIN_ADVERTISE",
    "cluster_secret_file": "ORDAIN_CLUSTER_SECRET_FILE",  # nosec B105 - a name
    "key_pepper_file": "ORDAIN_KEY_PEPPER_FILE",
    "http": "ORDAIN_HTTP",
    "mqtt_listen": "ORDAIN_MQTT_LISTEN",
    "mqtt_url": "ORDAIN_MQTT_URL",
    "mqtt_server": "ORDAIN_MQTT_SERVER",
    "types": "ORDAIN_TYPES",
    "log_level": "ORDAIN_LOG_LEVEL",
    "log_format": "ORDAIN_LOG_FORMAT",
}
CONFIG = "ORDAIN_CONFIG"
METRICS = ("open", "key", "off")
ORIGIN = re.compile(r"https?://[a-z0-9.\-\[\]:]+")


def load(flags: Mapping[str, str | None], environment: Mapping[str, str], config: str | None) -> Settings:
    """Reads all settings. Flags override the environment, the environment the file, the file the defaults.

    Raises:
        BadSetting: its message names the file or variable, the key, the value and what would be right.
    """
    values: dict[str, object] = {}
    place = config or environment.get(CONFIG) or ""
    if place:
        try:
            values |= toml.parse(Path(place).read_text("utf-8-sig"))
        except OSError as error:
            raise BadSetting(f"{place}: cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise BadSetting(f"{place}: cannot be read as TOML: {error}") from error
    values |= {key: environment[name] for key, name in ENVIRONMENT.items() if environment.get(name)}
    values |= {key: value for key, value in flags.items() if value is not None}
    settings = _converted(place, values)
    for key in ("http", "https"):
        if key == "http" or settings.https:
            address(key, getattr(settings, key))
    if settings.metrics not in METRICS and parted(settings.metrics) is None:
        raise BadSetting(f"metrics = {settings.metrics!r}: must be {', '.join(METRICS)} or HOST:PORT")
    _check_tls(settings, listened(settings))
    _check_mqtt_url(settings)
    if settings.log:
        log_address(settings, read=False)
    _check_node(settings)
    for origin in settings.cors_origins:
        if not ORIGIN.fullmatch(origin):
            raise BadSetting(
                f"cors_origins = {origin!r}: must be an origin, such as https://console.example.org"
            )
    for key, networks in (
        ("webhook_allow", settings.webhook_allow),
        ("trusted_proxies", settings.trusted_proxies),
        ("http_trusted_proxies", settings.http_trusted_proxies),
    ):
        for text in networks:
            try:
                ip_network(text)
            except ValueError as error:
                raise BadSetting(f"{key}: {error}; must be networks, such as 10.0.0.0/8") from error
    if not is_name(settings.prefix):
        raise BadSetting(f"prefix = {settings.prefix!r}: must be one topic level of letters, digits, _ and -")
    return settings


def differing(settings: Settings) -> dict[str, Any]:
    """The settings that differ from the defaults, without a password."""
    usual = msgspec.to_builtins(Settings())
    found = {key: value for key, value in msgspec.to_builtins(settings).items() if value != usual[key]}
    if settings.mqtt_url:
        found["mqtt_url"] = parse_url(settings.mqtt_url).shown
    if settings.log:
        found["log"] = log_address(settings, read=False).shown
    return found


def log_address(settings: Settings, *, read: bool = True) -> Address:
    """Where the log is, if it is in PostgreSQL. `read`: with its password. Raises BadSetting if it cannot."""
    try:
        return parse_log_url(settings.log, password_of(settings) if read else None)
    except ValueError as error:  # do not show the URL: it may contain a password
        raise BadSetting(f"log: {error}") from error


def password_of(settings: Settings) -> str | None:
    """The password of PostgreSQL, from its file. BadSetting, if that cannot be read."""
    if not (place := settings.log_password_file):
        return None
    try:
        return Path(place).read_text().strip()
    except OSError as error:
        raise BadSetting(f"log_password_file = {place!r}: cannot be read: {error.strerror}") from error


def _converted(place: str, values: dict[str, Any]) -> Settings:
    where = f"{place}: " if place else ""
    tables = values.get("projects", {})
    if not isinstance(tables, dict):
        raise BadSetting(f"{where}projects = {tables!r}: must be tables, [projects.<name>]")
    projects = {}
    for name, table in tables.items():
        if not is_name(name):
            raise BadSetting(f"{where}projects.{name}: must be letters, digits, _ and -, at most 64")
        projects[name] = _table(where, f"projects.{name}", table, ProjectLimits)
    limits = _table(where, "limits", values.get("limits", {}), Limits)
    mqtt_limits = _table(where, "mqtt_limits", values.get("mqtt_limits", {}), MqttLimits)
    rest = {key: value for key, value in values.items() if key not in ("projects", "limits", "mqtt_limits")}
    settings = _table(where, "", rest, Settings)
    return msgspec.structs.replace(settings, limits=limits, mqtt_limits=mqtt_limits, projects=projects)


def _table(where: str, name: str, table: Any, kind: type[T]) -> T:
    """Converts one table. An error shows the value, except of URLs and of unknown keys: these may
    contain secrets."""
    if not isinstance(table, dict):
        raise BadSetting(f"{where}{name} = {table!r}: must be a table, [{name}]")
    above, known = f"{name}." if name else "", kind.__struct_fields__
    for key in table:
        if key not in known:
            raise BadSetting(f"{where}{above}{key}: unknown key; known are: {', '.join(known)}")
        if (wrong := _useless(table[key])) is not None:
            raise BadSetting(f"{where}{above}{key}{_shown(key, table)}: {wrong}")
    try:
        return msgspec.convert(table, kind)
    except msgspec.ValidationError as error:
        right, _, path = str(error).partition(" - at `$.")
        right = reason(kind, f".{path}".rstrip("`"), right)
        key = path.rstrip("`").partition("[")[0]
    raise BadSetting(f"{where}{above}{key}{_shown(key, table)}: {right}")


def _shown(key: str, table: dict[str, Any]) -> str:
    return "" if key in ("mqtt_url", "log") else f" = {table[key]!r:.200}"


def _useless(value: Any) -> str | None:
    """Why no setting can use a value that TOML allows; None if one may."""
    if isinstance(value, float) and not math.isfinite(value):
        return "must be a finite number"
    texts = value if isinstance(value, list) else [value]
    if any(isinstance(text, str) and "\0" in text for text in texts):
        return "must not contain U+0000"
    return None


def listened(settings: Settings) -> list[Endpoint]:
    """The addresses of our own MQTT server, from a list or a text with commas.

    Raises:
        BadSetting: one is not of the form, or there is none.
    """
    given = settings.mqtt_listen
    texts = given.split(",") if isinstance(given, str) else given
    found = []
    for text in texts:
        try:
            found.append(parse_endpoint(text.strip()))
        except ValueError as error:
            raise BadSetting(f"mqtt_listen = {text!r}: {error}") from error
    if not found:
        raise BadSetting("mqtt_listen = []: at least one address is needed")
    return found


def discovery(settings: Settings) -> list[str]:
    """The filter of the topics on which the broker announces devices to Home Assistant, if it does."""
    prefix = settings.home_assistant
    return [f"{prefix}/binary_sensor/ordain/+/config"] if prefix else []


def _check_mqtt_url(settings: Settings) -> None:
    try:
        tls = settings.mqtt_url != "" and parse_url(settings.mqtt_url).tls
    except ValueError as error:  # do not show the URL: it may contain a password
        raise BadSetting(f"mqtt_url: {error}") from error
    if settings.mqtt_users != "none" and not settings.mqtt_url:
        raise BadSetting(f"mqtt_users = {settings.mqtt_users!r}: needs mqtt_url, a server of your own")
    if settings.home_assistant and not (settings.mqtt_url and settings.mqtt_events):
        raise BadSetting(f"home_assistant = {settings.home_assistant!r}: needs mqtt_url and mqtt_events")
    if settings.home_assistant and not is_name(settings.home_assistant):
        raise BadSetting(f"home_assistant = {settings.home_assistant!r}: must be one topic level")
    if (settings.mqtt_users == "password_file") != bool(settings.mqtt_password_file):
        raise BadSetting("mqtt_users = 'password_file' and mqtt_password_file, its path, need each other")
    for key in ("mqtt_ca", "mqtt_certificate", "mqtt_key"):
        if getattr(settings, key) and not tls:
            raise BadSetting(
                f"{key} = {getattr(settings, key)!r}: needs an mqtt_url that begins with mqtts://"
            )
    for key, needed, what in (
        ("mqtt_key", "mqtt_certificate", "the certificate of this key"),
        ("webhook_key", "webhook_certificate", "the certificate of this key"),
        ("mqtt_password_file", "mqtt_pid_file", "the pid_file of mosquitto.conf"),
        ("https_client_ca", "https", "the address where clients with a certificate connect"),
    ):
        if getattr(settings, key) and not getattr(settings, needed):
            raise BadSetting(f"{key} = {getattr(settings, key)!r}: needs {needed}, {what}")


def _check_node(settings: Settings) -> None:
    """One of several nodes on a log: what it needs, and what all of them must have in common."""
    if not settings.advertise:
        for key in ("node", "cluster_secret_file"):
            if getattr(settings, key):
                raise BadSetting(
                    f"{key} = {getattr(settings, key)!r}: needs advertise, HOST:PORT of this node"
                )
        return
    address("advertise", settings.advertise)
    if settings.node and not is_name(settings.node):
        raise BadSetting(f"node = {settings.node!r}: must be letters, digits, _ and -, at most 64")
    for key, what in (
        ("log", "a log in PostgreSQL, which the nodes share"),
        ("mqtt_url", "an MQTT server that every node can reach"),
        ("cluster_secret_file", "a file with the secret that the nodes share"),
        ("key_pepper_file", "a file with the pepper of API keys that the nodes share"),
    ):
        if not getattr(settings, key):
            raise BadSetting(f"advertise = {settings.advertise!r}: needs {key}, {what}")


def _check_tls(settings: Settings, endpoints: list[Endpoint]) -> None:
    wanted = [str(endpoint) for endpoint in endpoints if endpoint.tls]
    wanted += [f"https = {settings.https!r}"] if settings.https else []
    if wanted and not settings.tls_certificate:
        raise BadSetting(f"{wanted[0]} needs tls_certificate, the path of a PEM file (and tls_key)")
    if settings.mqtt_server == "mosquitto" and (len(endpoints) > 1 or endpoints[0].tls):
        raise BadSetting("mqtt_listen: the Mosquitto child takes one address without TLS")


def address(key: str, text: str) -> tuple[str, int]:
    """Parses `HOST:PORT`; port 0 means any free port.

    Raises:
        BadSetting: the text does not have this form.
    """
    place = parted(text)
    if place is None:
        right = "must be HOST:PORT, such as 127.0.0.1:8080, with an IPv6 address in brackets"
        raise BadSetting(f"{key} = {text!r}: {right}")
    return place
