"""The tables of all devices ever registered, of their names, and of the definitions of commands.

Rows are written in the transaction of the events that changed them. Names are never used again, so the
rows of deleted devices stay. `deleted`: the position of the `deleted` event, or 0.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from broker.domain.fleet import DeviceSet, DeviceState
from broker.seams import New, Sql

TABLES = (
    """CREATE TABLE IF NOT EXISTS devices (
        id TEXT PRIMARY KEY, position INTEGER NOT NULL UNIQUE, project TEXT NOT NULL,
        hardware_id TEXT NOT NULL, deleted INTEGER NOT NULL, version INTEGER NOT NULL,
        last_position INTEGER NOT NULL, online INTEGER NOT NULL, body BLOB NOT NULL) WITHOUT ROWID""",
    "CREATE INDEX IF NOT EXISTS devices_online ON devices (id) WHERE online = 1 AND deleted = 0",
    "CREATE INDEX IF NOT EXISTS devices_project ON devices (project, position)",
    "CREATE TABLE IF NOT EXISTS names (name TEXT PRIMARY KEY, device_id TEXT NOT NULL) WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS definitions (digest TEXT PRIMARY KEY, body BLOB NOT NULL) WITHOUT ROWID",
)
KEYS = {"devices": "id", "names": "name", "definitions": "digest"}
INSERT = """INSERT INTO devices
    (id, position, project, hardware_id, deleted, version, last_position, online, body)
    VALUES (?,?,?,?,?,?,?,?,?)"""
UPDATE = """UPDATE devices SET deleted = ?, version = ?, last_position = ?, online = ?, body = ?
    WHERE id = ? AND version = ?"""

body = _encode = msgspec.json.Encoder(order="deterministic").encode
_decode = msgspec.json.Decoder(DeviceState).decode


def added(s: DeviceState, position: int, last: int) -> tuple[Any, ...]:
    """The values of `INSERT` for a new device. `position`: of its first event; `last`: of its last one."""
    return (s.id, position, s.project, s.hardware_id, *_latest(s, last))


def changed(s: DeviceState, last: int, over: int) -> tuple[Any, ...]:
    """The values of `UPDATE` for a device whose row has the version `over`."""
    return (*_latest(s, last), s.id, over)


def _latest(s: DeviceState, last: int) -> tuple[Any, ...]:
    return 0 if s.deleted_at is None else last, s.version, last, int(s.online), _encode(s)


def defined(digest: str, body: dict[str, Any]) -> New:
    """The row of a definition."""
    return New("definitions", (digest, _encode(body)))


async def definitions(sql: Sql) -> dict[str, bytes]:
    """All definitions that commands were ever accepted with, as JSON, by digest."""
    return {row[0]: bytes(row[1]) for row in (await sql.all("SELECT digest, body FROM definitions"))}


async def by_name(sql: Sql, names: Iterable[str]) -> dict[str, DeviceState]:
    """The devices that have these names (id or hardware id), by that name. Includes deleted devices."""
    found = {}
    for name in names:
        row = await sql.one(
            "SELECT d.body FROM names n JOIN devices d ON d.id = n.device_id WHERE n.name = ?", (name,)
        )
        if row:
            found[name] = _decode(row[0])
    return found


# Condition on a column of device ids. '~' sorts after every character that a name may have.
IN_SET = """{} IN (SELECT device_id FROM names WHERE name IN (SELECT value FROM json_each(?)) UNION
    SELECT d.id FROM json_each(?) p CROSS JOIN names n ON n.name >= p.value AND n.name < p.value || '~'
    CROSS JOIN devices d ON d.id = n.device_id AND d.hardware_id = n.name)"""


def in_set(devices: DeviceSet | None, column: str) -> tuple[str, list[str]]:
    """An SQL condition that a column of device ids is in a set, and its values. None: every device is."""
    if devices is None:
        return "1 = 1", []
    encoded = [
        msgspec.json.encode(part, order="sorted").decode() for part in (devices.names, devices.prefixes)
    ]
    return IN_SET.format(column), encoded


async def newest(
    sql: Sql, project: str | None, before: int | None, limit: int, within: DeviceSet | None = None
) -> list[DeviceState]:
    """Devices that are not deleted, newest first."""
    condition, values = in_set(within, "id")
    where = ["deleted = 0", condition]
    if project is not None:
        where.append("project = ?")
        values.append(project)
    bounds: list[Any] = []
    if before is not None:
        where.append("position < ?")
        bounds.append(before)
    found = await sql.all(
        f"SELECT body FROM devices WHERE {' AND '.join(where)} ORDER BY position DESC LIMIT ?",
        (*values, *bounds, limit),
    )
    return [_decode(row[0]) for row in found]


async def counted(
    sql: Sql, project: str | None, within: DeviceSet | None, online: set[str]
) -> tuple[int, int]:
    """How many devices there are, and how many of them are shown as online. `online`: the ids of those that
    are known to be online. The first `online` of a device counts once its event is durable."""
    condition, values = in_set(within, "id")
    if project is not None:
        condition, values = f"{condition} AND project = ?", [*values, project]
    rows = await sql.all(f"SELECT id, online FROM devices WHERE deleted = 0 AND {condition}", values)
    sure = sum(row[1] for row in rows if row[0] in online)
    unsure = msgspec.json.encode([row[0] for row in rows if row[0] in online and not row[1]]).decode()
    found = await sql.all(
        "SELECT body FROM devices WHERE id IN (SELECT value FROM json_each(CAST(? AS TEXT)))", (unsure,)
    )
    return len(rows), sure + sum(_decode(row[0]).heard for row in found)


async def deleted(sql: Sql) -> list[DeviceState]:
    """All devices that were ever deleted."""
    return [_decode(row[0]) for row in await sql.all("SELECT body FROM devices WHERE deleted != 0")]


async def position(sql: Sql, device_id: str) -> int:
    """The position of the first event of a device."""
    return int((await sql.one("SELECT position FROM devices WHERE id = ?", (device_id,)))[0])


async def believed_online(sql: Sql) -> list[DeviceState]:
    """Devices whose last presence event says online."""
    found = await sql.all("SELECT body FROM devices WHERE online = 1 AND deleted = 0 ORDER BY id")
    return [_decode(row[0]) for row in found]


KIND = "json_extract(CAST(body AS TEXT), '$.device_type')"


async def types_in_use(sql: Sql) -> list[str]:
    """The types of all devices that are not deleted."""
    found = await sql.all(f"SELECT DISTINCT {KIND} FROM devices WHERE deleted = 0")
    return [row[0] for row in found]


async def of_types(sql: Sql, types: Iterable[str]) -> list[DeviceState]:
    """The devices of these types that are not deleted."""
    names = msgspec.json.encode(list(types)).decode()
    found = await sql.all(
        f"SELECT body FROM devices WHERE deleted = 0 AND {KIND} IN "
        "(SELECT value FROM json_each(CAST(? AS TEXT)))",
        (names,),
    )
    return [_decode(row[0]) for row in found]


async def with_gateway(sql: Sql) -> list[DeviceState]:
    """The devices that a gateway speaks for and that are not deleted."""
    gateway = KIND.replace("device_type", "gateway")
    found = await sql.all(f"SELECT body FROM devices WHERE deleted = 0 AND {gateway} IS NOT NULL")
    return [_decode(row[0]) for row in found]


async def dump(sql: Sql) -> list[tuple[Any, ...]]:
    """Every row of the three tables; used to compare a rebuilt projection with the maintained one."""
    found: list[tuple[Any, ...]] = []
    for table, order in (("devices", "id"), ("names", "name"), ("definitions", "digest")):
        rows = await sql.all(f"SELECT * FROM {table} ORDER BY {order}")
        found += [(table, *row) for row in rows]
    return found
