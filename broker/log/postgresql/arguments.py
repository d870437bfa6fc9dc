"""A batch as the arguments of the function `append`: one array for each column."""

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

OF_BATCH, OF_EVENTS, OF_COMMANDS, OF_DEVICES, OF_ROWS = 5, 10, 12, 10, 2  # how many arguments


def _numbered(count: int) -> str:
    return ", ".join(f"${number}" for number in range(1, count + 1))


APPEND = f"SELECT * FROM append({_numbered(OF_BATCH + OF_EVENTS + OF_COMMANDS + OF_DEVICES + OF_ROWS)})"
PUT_STATES = f"SELECT put_states({_numbered(1 + OF_COMMANDS + OF_DEVICES)})"
PUT_ROWS = "SELECT put_rows($1, $2, $3)"


def arguments(batch: Batch, incarnation: str, table_format: int) -> list[Any]:
    """The arguments of `APPEND`, in order."""
    events = batch.events
    texts, payloads = statements(batch.rows)
    return [
        incarnation,
        batch.number,
        _digest(batch, payloads),
        batch.term,
        str(table_format),
        [event.stream for event in events],
        [event.version for event in events],
        [event.type for event in events],
        [SCHEMA] * len(events),
        [event.decided_at for event in events],
        [event.project for event in events],
        [event.device_id for event in events],
        [event.actor for event in events],
        [encode(event.event) for event in events],
        [batch.salts[at : at + 16] for at in range(0, 16 * len(events), 16)],
        *states(batch.states),
        texts,
        payloads,
    ]


def _digest(batch: Batch, payloads: list[str]) -> bytes:
    """What tells this batch from another one with its number. Every event has a salt of its own."""
    digest = sha256(batch.salts)
    for payload in payloads:
        digest.update(payload.encode())
    return digest.digest()


def states(newest: Iterable[Newest]) -> list[list[Any]]:
    """The columns of `put_states`: of commands, then of devices."""
    of_commands: list[tuple[Any, ...]] = []
    of_devices: list[tuple[Any, ...]] = []
    for each in newest:
        places = (each.over, each.first, each.last)
        match each.state:
            case CommandState() as s:
                header = (s.id, *places, each.opened, s.project, s.device_id, s.type, s.state.value)
                of_commands.append(
                    (*header, s.version, s.closed_at if s.closed else None, commands.summary(s))
                )
            case DeviceState() as d:
                about = (d.id, *places, d.project, d.hardware_id, d.deleted_at is not None, d.version)
                of_devices.append((*about, int(d.online), devices.body(d)))
    return [*_columns(of_commands, OF_COMMANDS), *_columns(of_devices, OF_DEVICES)]


def _columns(rows: list[tuple[Any, ...]], count: int) -> list[list[Any]]:
    return [list(column) for column in zip(*rows, strict=True)] if rows else [[] for _ in range(count)]


def rows(beside: Iterable[SideRow]) -> tuple[list[str], list[str]]:
    """The arguments of `PUT_ROWS` after the first one."""
    return statements(beside)
