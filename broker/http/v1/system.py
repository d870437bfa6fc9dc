"""`/v1/system`: identity and state of the broker, for people and consoles.

Counts cover only the projects that the caller can see.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple

import msgspec
from litestar import Router, get, post
from msgspec import Meta

from broker import __version__
from broker.domain.events import SYSTEM, Started, decode
from broker.domain.fleet import DeviceSet
from broker.domain.lanes import Presence
from broker.domain.mqtt_rules import MqttRules
from broker.engine.commands import Caller
from broker.engine.verification import Report
from broker.http.edge.auth import Call, authorize, needs
from broker.http.edge.errors import documented
from broker.http.edge.services import NodeFacts, Services
from broker.http.v1.stats import percentile
from broker.http.v1.views import Time
from broker.log import sqlite as log
from broker.metrics.metrics import Listening
from broker.seams import Sql
from broker.settings import Settings, listened
from devices.clock import rfc3339
from devices.mqtt_url import parse_url
from projections.devices import counted, in_set


class ListenerView(msgspec.Struct, frozen=True, kw_only=True):
    """Connections to Ordain's own MQTT server."""

    connections: int
    devices: Annotated[int, Meta(description="Connected devices.")]
    denied: Annotated[int, Meta(description="Uses of a topic that the client has no right to.")]
    taken_over: Annotated[
        int, Meta(description="Connections closed by a second one with the same client id.")
    ]
    ended: Annotated[
        dict[str, int],
        Meta(description="Connections that were refused or ended, by MQTT reason code such as `0x87`."),
    ]


class RulesView(msgspec.Struct, frozen=True, kw_only=True):
    """Users and rules of an MQTT server that is not Ordain's own."""

    in_step: Annotated[bool, Meta(description="It knows every device, and no deleted one.")]
    fault: Annotated[str | None, Meta(description="Why it is not in step.")]
    missing: Annotated[int, Meta(description="Devices that it does not know: they need a new token.")]
    breaches: Annotated[
        list[str] | None, Meta(description="What it allows and must refuse. Null: not tried yet.")
    ]
    tried_as_device: Annotated[bool, Meta(description="Tried with the canary's devices.")]
    checked_at: Time | None


class Mqtt(msgspec.Struct, frozen=True, kw_only=True):
    """The MQTT server behind this broker."""

    kind: Annotated[
        Literal["embedded", "external", "none"],
        Meta(description="`none`: no broker has served this log yet."),
    ]
    up: bool
    url: Annotated[str, Meta(description="Without user and password.")]
    users: Annotated[
        Literal["listener", "child", "dynsec", "password_file", "none"],
        Meta(
            description="How the server learns of devices: it is Ordain's own (`listener`, `child`), by its "
            "dynamic-security plugin, by a password file, or not at all (`none`: its file is yours). Only "
            "with `listener`, `child` and `dynsec` does a deleted device or an old token end its connection "
            "at once."
        ),
    ]
    rules: Annotated[RulesView | None, Meta(description="Only admin keys see it. Null: Ordain's own server.")]
    listener: Annotated[
        ListenerView | None, Meta(description="Only admin keys see it. Null: another MQTT server.")
    ]


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


class LogView(msgspec.Struct, frozen=True, kw_only=True):
    """The log file, and the time until an event is durable, over the last commits."""

    first_at: Annotated[Time | None, Meta(description="The time of the first event.")]
    bytes: int
    append_p50_ms: int | None
    append_p95_ms: int | None


class SubscriberView(msgspec.Struct, frozen=True, kw_only=True):
    """A reader of the log. Webhooks have their own list."""

    name: str
    lag: Annotated[int, Meta(description="Events that it has not received yet; of several, the largest.")]
    note: str


class LimitView(msgspec.Struct, frozen=True, kw_only=True):
    """A limit and how much of it is used now."""

    name: str
    used: int
    most: int


class VerifyView(msgspec.Struct, frozen=True, kw_only=True):
    """The last verification of the log, or the one that is running."""

    state: Annotated[
        Literal["running", "good", "bad", "unread"],
        Meta(description="`bad`: a row was changed; `unread`: the storage failed before the end."),
    ]
    rows: Annotated[int, Meta(description="The number of rows that are good so far.")]
    of: Annotated[int, Meta(description="The number of rows at the start, or more.")]
    started_at: Time
    finished_at: Time | None
    fault: Annotated[str | None, Meta(description="What is wrong. Only admin keys see it.")]


class NodeView(msgspec.Struct, frozen=True, kw_only=True):
    """One of several brokers on this log."""

    name: str
    address: Annotated[str | None, Meta(description="Where the other nodes reach it.")]
    role: Annotated[
        Literal["owner", "door", "leaving", "silent"],
        Meta(description="`silent`: no sign of life for 5 seconds."),
    ]
    silent_sec: Annotated[float, Meta(description="How long ago its last sign of life was seen.")]


class CallerView(msgspec.Struct, frozen=True, kw_only=True):
    """The key of this request and what it may do."""

    key_id: Annotated[str | None, Meta(description="Null: the operator, who needs no key.")]
    project: Annotated[str | None, Meta(description="Null: all projects.")]
    scopes: list[str]


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
    log: LogView
    subscribers: list[SubscriberView]
    limits: list[LimitView]
    term: Annotated[
        int | None, Meta(description="How many times the log has had an owner. Null: one broker.")
    ]
    nodes: Annotated[
        list[NodeView], Meta(description="The brokers on this log, for admin keys; empty: only this one.")
    ]
    verify: Annotated[VerifyView | None, Meta(description="Null: none since the broker started.")]
    caller: CallerView
    settings: Annotated[dict[str, Any], Meta(description="The settings that matter to clients and devices.")]


class _Found(NamedTuple):
    position: int
    started: Started | None
    started_at: int | None
    known: int
    online: int
    open_commands: int
    first_at: int | None
    bytes: int
    longest: tuple[str, int] | None


@get("/system", opt=needs("devices:read"), responses=documented())
async def read_system(request: Call) -> System:
    """Read the state of the broker

    Counts the devices that the key may see and their commands; for an admin key, those of all projects.
    """
    services, project, within = request.services, request.user.project, request.user.devices
    writer, live, settings = services.commands.writer, services.commands.live, services.settings
    online = {device_id for device_id, known in live.presence.items() if known is Presence.ONLINE}
    found = await writer.storage.read(lambda sql: _find(sql, project, within, online))
    kind = "none" if found.started is None else found.started.mqtt
    now, nodes = writer.now(), services.nodes()
    return System(
        release=__version__,
        log_id=services.log_id,
        position=found.position,
        started_at=None if found.started_at is None else rfc3339(found.started_at),
        uptime_sec=None if found.started_at is None else (now - found.started_at) // 1_000,
        not_ready=services.ready(),
        mqtt=Mqtt(
            kind=kind,
            up=services.link.up,
            url=shown_url(settings),
            users=services.mqtt_rules.users,
            rules=_rules(services.mqtt_rules) if project is None else None,
            listener=_listener(services.metrics.listener) if project is None else None,
        ),
        devices=DeviceCount(known=found.known, online=found.online),
        open_commands=found.open_commands,
        clock=ClockView(now=rfc3339(now), step_ms=writer.wall_step_ms()),
        log=_log(services, found),
        subscribers=_subscribers(services),
        limits=_limits(services, project, found),
        term=None if nodes is None else nodes.term,
        nodes=[_node(each) for each in nodes.nodes] if nodes is not None and project is None else [],
        verify=_verify(services.verification.report, request.user),
        caller=_caller(request.user),
        settings={
            "prefix": services.commands.prefix,
            "issuer": settings.issuer,
            "limits": msgspec.to_builtins(services.limits),
        },
    )


@post("/system/verify", status_code=202, opt=needs("admin"), responses=documented())
async def verify_log(request: Call) -> VerifyView:
    """Verify the log

    Checks the whole hash chain while the broker works on. `GET /v1/system` shows the progress and the
    result. If a verification is running, this starts no second one.
    """
    view = _verify(request.services.verification.start(), request.user)
    assert view is not None
    return view


def _node(node: NodeFacts) -> NodeView:
    return NodeView(
        name=node.name, address=node.address, role=node.role, silent_sec=round(node.silent_ms / 1_000, 1)
    )


def _rules(rules: MqttRules) -> RulesView | None:
    if rules.users in ("listener", "child"):
        return None
    return RulesView(
        in_step=rules.users != "none" and rules.fault is None and not rules.missing,
        fault=rules.fault,
        missing=rules.missing,
        breaches=rules.breaches,
        tried_as_device=rules.as_device,
        checked_at=None if rules.checked_at is None else rfc3339(rules.checked_at),
    )


def _listener(listening: Listening | None) -> ListenerView | None:
    if listening is None:
        return None

    def look(name: str) -> int:
        return int(listening.figures[name][1]())

    return ListenerView(
        connections=look("connections"),
        devices=look("devices_connected"),
        denied=look("denied_total"),
        taken_over=look("taken_over_total"),
        ended={f"0x{reason:02x}": count for reason, count in sorted(listening.ended.items())},
    )


def _log(services: Services, found: _Found) -> LogView:
    recent = sorted(services.metrics.recent_commits_ms)
    return LogView(
        first_at=None if found.first_at is None else rfc3339(found.first_at),
        bytes=found.bytes,
        append_p50_ms=percentile(recent, 0.5),
        append_p95_ms=percentile(recent, 0.95),
    )


def _subscribers(services: Services) -> list[SubscriberView]:
    streams, events = services.streams, services.mqtt_events
    found = [
        SubscriberView(name="projections", lag=0, note="written in the same transaction as the events"),
        SubscriberView(name="event streams", lag=streams.lag, note=f"{streams.open} open"),
    ]
    if services.settings.mqtt_events:
        found.append(SubscriberView(name="events by MQTT", lag=events.lag, note=""))
    return found


def _limits(services: Services, project: str | None, found: _Found) -> list[LimitView]:
    limits, dispatch = services.limits, services.dispatch
    in_use = dispatch.staged + dispatch.outstanding
    shown = [
        LimitView(name="send slots", used=in_use, most=limits.send_slots),
        LimitView(name="event streams", used=services.streams.of(project), most=services.streams.most),
    ]
    listening = services.metrics.listener
    if listening is not None and project is None:
        used, most = (int(listening.figures[name][1]()) for name in ("connections", "connections_limit"))
        shown.append(LimitView(name="MQTT connections", used=used, most=most))
    if found.longest is not None:
        device, count = found.longest
        shown.append(LimitView(name=f"queue of {device}", used=count, most=limits.queue_per_device))
    return shown


def _verify(report: Report | None, caller: Caller) -> VerifyView | None:
    if report is None:
        return None
    return VerifyView(
        state=report.state,
        rows=report.rows,
        of=report.of,
        started_at=rfc3339(report.started_at),
        finished_at=None if report.finished_at is None else rfc3339(report.finished_at),
        # The fault can name a command of another project.
        fault=report.fault if "admin" in caller.scopes else None,
    )


def _caller(caller: Caller) -> CallerView:
    kind, _, key_id = caller.actor.partition(":")
    return CallerView(
        key_id=key_id if kind == "key" else None, project=caller.project, scopes=sorted(caller.scopes)
    )


async def _find(sql: Sql, project: str | None, within: DeviceSet | None, online: set[str]) -> _Found:
    known, shown = await counted(sql, project, within, online)
    whose, values = ("", []) if project is None else (" AND project = ?", [project])
    condition, more = in_set(within, "c.device_id")
    whose, values = f"{whose} AND {condition}", [*values, *more]
    open_commands = (
        await sql.one(
            f"SELECT count(*) FROM commands c INDEXED BY commands_open WHERE c.closed_at IS NULL{whose}",
            values,
        )
    )[0]
    start = await sql.one(
        "SELECT recorded_at, data, schema FROM events WHERE stream = ? AND type = 'started' "
        "ORDER BY version DESC LIMIT 1",
        (SYSTEM,),
    )
    first = await sql.one("SELECT recorded_at FROM events WHERE position = 1")
    pages, size = await sql.one("SELECT page_count, page_size FROM pragma_page_count(), pragma_page_size()")
    longest = await sql.one(
        "SELECT d.hardware_id, found.n FROM (SELECT c.device_id, count(*) AS n "
        f"FROM commands c INDEXED BY commands_open WHERE c.closed_at IS NULL{whose} GROUP BY c.device_id "
        "ORDER BY n DESC LIMIT 1) found JOIN devices d ON d.id = found.device_id",
        values,
    )
    started = None if start is None else decode("started", bytes(start[1]), start[2])
    assert started is None or isinstance(started, Started)
    return _Found(
        position=(await log.head(sql)).position,
        started=started,
        started_at=None if start is None else start[0],
        known=known,
        online=shown,
        open_commands=open_commands,
        first_at=None if first is None else first[0],
        bytes=pages * size,
        longest=None if longest is None else (longest[0], longest[1]),
    )


def shown_url(settings: Settings) -> str:
    if settings.mqtt_url:
        return parse_url(settings.mqtt_url).shown
    return str(listened(settings)[0])


routes = Router("/v1", route_handlers=[read_system, verify_log], before_request=authorize, tags=["System"])
