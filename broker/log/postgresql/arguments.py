"""A batch as the arguments of the function `append`: its rows, in the order of `tables.ROWS`."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import sha256
from typing import Any

from broker.domain.events import SCHEMA, encode
from broker.domain.fleet import DeviceState
from broker.domain.lifecycle import CommandState
from broker.log.postgresql.statements import statements
from broker.seams import Batch, Newest, SideRow
from projections import commands, devices

APPEND = "SELECT * FROM append($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)"
PUT_NEWEST = "SELECT put_newest($1, $2, $3)"
PUT_ROWS = "SELECT put_rows($1, $2, $3)"


def arguments(batch: Batch, incarnation: str, of_tables: str) -> list[Any]:
    """The arguments of `APPEND`, in order. `of_tables`: `making.TABLES`."""
    texts, payloads = statements(batch.rows)
    return [
        incarnation,
        batch.number,
        _digest(batch, payloads),
        batch.term,
        of_tables,
        _events(batch),
        *states(batch.states),
        texts,
        payloads,
    ]


def _events(batch: Batch) -> list[tuple[Any, ...]]:
    return [
        (
            *(e.stream, e.version, e.type, SCHEMA, e.decided_at, e.project, e.device_id, e.actor),
            *(encode(e.event), batch.salts[16 * index : 16 * index + 16]),
        )
        for index, e in enumerate(batch.events)
    ]


def _digest(batch: Batch, payloads: list[str]) -> bytes:
    """What tells this batch from another one with its number. Every event has a salt of its own."""
    digest = sha256(batch.salts)
    for payload in payloads:
        digest.update(payload.encode())
    return digest.digest()


def states(newest: Iterable[Newest]) -> tuple[list[tuple[Any, ...]], list[tuple[Any, ...]]]:
    """The rows of `put_newest`: of commands, and of devices."""
    of_commands: list[tuple[Any, ...]] = []
    of_devices: list[tuple[Any, ...]] = []
    for each in newest:
        places = (each.over, each.first, each.last)
        match each.state:
            case CommandState() as s:
                header = (s.id, *places, s.project, s.device_id, s.type, s.state.value)
                of_commands.append((*header, s.version, s.closed_at if s.closed else None, commands.later(s)))
            case DeviceState() as d:
                about = (d.id, *places, d.project, d.hardware_id, d.deleted_at is not None, d.version)
                of_devices.append((*about, int(d.online), devices.body(d)))
    return of_commands, of_devices


def rows(beside: Iterable[SideRow]) -> tuple[list[str], list[str]]:
    """The arguments of `PUT_ROWS` after the first one."""
    return statements(beside)
