"""The tables of all devices ever registered, of their names, and of the definitions of commands.

Rows are written in the transaction of the events that changed them. Names are never used again, so the
rows of deleted devices stay. `deleted`: the position of the `deleted` event, or 0.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from broker.domain.fleet import DeviceSet, DeviceState
from broker.seams import Sql

TABLES = (
    """CREATE TABLE IF NOT EXISTS devices (
        id TEXT PRIMARY KEY, position INTEGER NOT NULL UNIQUE, project TEXT NOT NULL,
        hardware_id TEXT NOT NULL, deleted INTEGER NOT NULL, body BLOB NOT NULL) WITHOUT ROWID""",
    "CREATE INDEX IF NOT EXISTS devices_project ON devices (project, position)",
    "CREATE TABLE IF NOT EXISTS names (name TEXT PRIMARY KEY, device_id TEXT NOT NULL) WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS definitions (digest TEXT PRIMARY KEY, body BLOB NOT NULL) WITHOUT ROWID",
)
KEYS = {"devices": "id", "names": "name", "definitions": "digest"}
UPSERT = """INSERT INTO devices (id, position, project, hardware_id, deleted, body) VALUES (?,?,?,?,?,?)
    ON CONFLICT (id) DO UPDATE SET deleted = excluded.deleted, body = excluded.body"""

_encode = msgspec.json.Encoder(order="deterministic").encode
_decode = msgspec.json.Decoder(DeviceState).decode


def upsert(sql: Sql, states: Iterable[DeviceState]) -> None:
    """Writes the latest state of each device."""
    sql.executemany(
        UPSERT,
        [(s.id, s.position, s.project, s.hardware_id, _deleted(s), _encode(s)) for s in states],
    )


def _deleted(state: DeviceState) -> int:
    return 0 if state.deleted_at is None else state.last_position


def name(sql: Sql, names: Iterable[tuple[str, str]]) -> None:
    """Gives names to devices, for ever. Each item is (name, device id).

    Raises (from the storage): Conflict, if a device already has the name.
    """
    sql.executemany("INSERT INTO names VALUES (?, ?)", names)


def define(sql: Sql, definitions: Iterable[tuple[str, dict[str, Any]]]) -> None:
    sql.executemany(
        "INSERT INTO definitions VALUES (?, ?)", [(digest, _encode(body)) for digest, body in definitions]
    )


def definitions(sql: Sql) -> dict[str, bytes]:
    """All definitions that commands were ever accepted with, as JSON, by digest."""
    return {row[0]: bytes(row[1]) for row in sql.execute("SELECT digest, body FROM definitions").fetchall()}


def by_name(sql: Sql, names: Iterable[str]) -> dict[str, DeviceState]:
    """The devices that have these names (id or hardware id), by that name. Includes deleted devices."""
    found = {}
    for name in names:
        row = sql.execute(
            "SELECT d.body FROM names n JOIN devices d ON d.id = n.device_id WHERE n.name = ?", (name,)
        ).fetchone()
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
        return "1", []
    encoded = [
        msgspec.json.encode(part, order="sorted").decode() for part in (devices.names, devices.prefixes)
    ]
    return IN_SET.format(column), encoded


def newest(
    sql: Sql, project: str | None, before: int | None, limit: int, within: DeviceSet | None = None
) -> list[DeviceState]:
    """Devices that are not deleted, newest first."""
    condition, values = in_set(within, "id")
    where = ["NOT deleted", condition]
    if project is not None:
        where.append("project = ?")
        values.append(project)
    bounds: list[Any] = []
    if before is not None:
        where.append("position < ?")
        bounds.append(before)
    found = sql.execute(
        f"SELECT body FROM devices WHERE {' AND '.join(where)} ORDER BY position DESC LIMIT ?",
        (*values, *bounds, limit),
    )
    return [_decode(row[0]) for row in found.fetchall()]


def believed_online(sql: Sql) -> list[DeviceState]:
    """Devices whose last presence event says online."""
    # CAST to text, because LIKE never matches a BLOB in Debian's SQLite.
    found = sql.execute(
        "SELECT body FROM devices WHERE NOT deleted AND CAST(body AS TEXT) LIKE '%\"online\":true%'"
    )
    states = [_decode(row[0]) for row in found.fetchall()]
    return [state for state in states if state.online]


def dump(sql: Sql) -> list[tuple[Any, ...]]:
    """Every row of the three tables; used to compare a rebuilt projection with the maintained one."""
    found: list[tuple[Any, ...]] = []
    for table, order in (("devices", "id"), ("names", "name"), ("definitions", "digest")):
        rows = sql.execute(f"SELECT * FROM {table} ORDER BY {order}").fetchall()
        found += [(table, *row) for row in rows]
    return found
