"""`/v1/system`: identity and state of the broker, for people and consoles.

Counts cover only the projects that the caller can see.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple

import msgspec
from litestar import Router, get
from msgspec import Meta

from broker import __version__
from broker.domain.events import SYSTEM, Started, decode
from broker.domain.lanes import Presence
from broker.http.edge.auth import Call, authorize, needs
from broker.http.edge.errors import documented
from broker.http.v1.views import Time
from broker.log import sqlite as log
from broker.mqtt_url import parse_url
from broker.seams import Sql
from broker.settings import Settings, listened
from devices.clock import rfc3339


class Mqtt(msgspec.Struct, frozen=True, kw_only=True):
    """The MQTT server behind this broker."""

    kind: Annotated[
        Literal["embedded", "external", "none"],
        Meta(description="`none`: no broker has served this log yet."),
    ]
    up: bool
    url: Annotated[str, Meta(description="Without user and password.")]


class DeviceCount(msgspec.Struct, frozen=True, kw_only=True):
    """The number of devices."""

    known: int
    online: int


class ClockView(msgspec.Struct, frozen=True, kw_only=True):
    """The broker's clock."""

    now: Annotated[Time, Meta(description="The broker's time. It never goes back.")]
    step_ms: Annotated[
        int, Meta(description="Milliseconds that the wall clock was stepped away from the broker's time.")
    ]


class System(msgspec.Struct, frozen=True, kw_only=True):
    """The state of the broker and its log."""

    release: str
    log_id: str
    position: Annotated[int, Meta(description="The position of the last event in the log.")]
    started_at: Time | None
    uptime_sec: Annotated[int | None, Meta(description="Since `started_at`.")]
    not_ready: Annotated[
        list[str], Meta(description="The reasons why the broker is not ready; empty if it is ready.")
    ]
    mqtt: Mqtt
    devices: DeviceCount
    open_commands: int
    clock: ClockView
    settings: Annotated[dict[str, Any], Meta(description="The settings that matter to clients and devices.")]


class _Found(NamedTuple):
    position: int
    started: Started | None
    started_at: int | None
    known: int
    online: int
    open_commands: int


@get("/system", opt=needs("devices:read"), responses=documented())
async def read_system(request: Call) -> System:
    """Read the state of the broker

    Counts the devices and commands of the key's project; for an admin key, those of all projects.
    """
    services, project = request.services, request.user.project
    writer, live, settings = services.commands.writer, services.commands.live, services.settings
    online = {device_id for device_id, known in live.presence.items() if known is Presence.ONLINE}
    found = await writer.storage.read(lambda sql: _find(sql, project, online))
    kind = "none" if found.started is None else found.started.mqtt
    now = writer.now()
    return System(
        release=__version__,
        log_id=services.log_id,
        position=found.position,
        started_at=None if found.started_at is None else rfc3339(found.started_at),
        uptime_sec=None if found.started_at is None else (now - found.started_at) // 1_000,
        not_ready=services.ready(),
        mqtt=Mqtt(kind=kind, up=services.link.up, url=shown_url(settings)),
        devices=DeviceCount(known=found.known, online=found.online),
        open_commands=found.open_commands,
        clock=ClockView(now=rfc3339(now), step_ms=writer.wall_step_ms()),
        settings={
            "prefix": services.commands.prefix,
            "issuer": settings.issuer,
            "limits": msgspec.to_builtins(services.limits),
        },
    )


def _find(sql: Sql, project: str | None, online: set[str]) -> _Found:
    whose, values = ("", ()) if project is None else (" AND project = ?", (project,))
    ids = sql.execute(f"SELECT id FROM devices WHERE NOT deleted{whose}", values).fetchall()
    open_commands = sql.execute(
        f"SELECT count(*) FROM lanes l JOIN commands c ON c.position = l.position WHERE 1{whose}", values
    ).fetchone()[0]
    start = sql.execute(
        "SELECT recorded_at, data, schema FROM events WHERE stream = ? AND type = 'started' "
        "ORDER BY version DESC LIMIT 1",
        (SYSTEM,),
    ).fetchone()
    started = None if start is None else decode("started", bytes(start[1]), start[2])
    assert started is None or isinstance(started, Started)
    return _Found(
        position=log.head(sql).position,
        started=started,
        started_at=None if start is None else start[0],
        known=len(ids),
        online=sum(row[0] in online for row in ids),
        open_commands=open_commands,
    )


def shown_url(settings: Settings) -> str:
    if settings.mqtt_url:
        return parse_url(settings.mqtt_url).shown
    return str(listened(settings)[0])


routes = Router("/v1", route_handlers=[read_system], before_request=authorize, tags=["System"])
