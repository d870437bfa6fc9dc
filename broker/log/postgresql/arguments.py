"""A batch as the arguments of the function `append`: one array for each column.

Arrays of texts and numbers are sent as PostgreSQL writes them (`{"a",NULL}`): the driver asks of each element
whether it is an array itself, and that takes longer than all else that the owner does for an append.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import sha256
from typing import Any

from broker.domain.events import SCHEMA, encode
from broker.domain.fleet import DeviceState
from broker.domain.lifecycle import CommandState
from broker.log.postgresql.statements import statements
from broker.seams import Batch, Newest, SideRow
from projections import commands, devices

TEXT, NUMBER, FLAG, BYTES = "text", "bigint", "boolean", "bytea"
# The arrays: stream, version, type, schema, decided_at, project, device_id, actor, data, salt;
OF_EVENTS = (TEXT, NUMBER, TEXT, NUMBER, NUMBER, TEXT, TEXT, TEXT, BYTES, BYTES)
# id, over, first, last, opened, project, device_id, type, state, version, closed_at, later;
OF_COMMANDS = (TEXT, *[NUMBER] * 3, FLAG, *[TEXT] * 4, NUMBER, NUMBER, BYTES)
# id, over, first, last, project, hardware_id, deleted, version, online, body.
OF_DEVICES = (TEXT, *[NUMBER] * 3, TEXT, TEXT, FLAG, NUMBER, NUMBER, BYTES)


def _arrays(first: int, kinds: Sequence[str]) -> str:
    """The parameters from `$first` on that stand for these columns."""
    return ", ".join(
        f"${number}" if kind is BYTES else f"${number}::text::{kind}[]"
        for number, kind in enumerate(kinds, first)
    )


_LAST = 6 + len(OF_EVENTS) + len(OF_COMMANDS) + len(OF_DEVICES)
APPEND = (
    f"SELECT * FROM append($1, $2, $3, $4, $5, {_arrays(6, (*OF_EVENTS, *OF_COMMANDS, *OF_DEVICES))}, "
    f"${_LAST}, ${_LAST + 1})"
)
PUT_NEWEST = f"SELECT put_newest($1, {_arrays(2, (*OF_COMMANDS, *OF_DEVICES))})"
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
        *_columns(_events(batch), OF_EVENTS),
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


def states(newest: Iterable[Newest]) -> list[Any]:
    """The columns of `put_newest`: of commands, then of devices."""
    of_commands: list[tuple[Any, ...]] = []
    of_devices: list[tuple[Any, ...]] = []
    for each in newest:
        places = (each.over, each.first, each.last)
        match each.state:
            case CommandState() as s:
                header = (s.id, *places, each.opened, s.project, s.device_id, s.type, s.state.value)
                of_commands.append((*header, s.version, s.closed_at if s.closed else None, commands.later(s)))
            case DeviceState() as d:
                about = (d.id, *places, d.project, d.hardware_id, d.deleted_at is not None, d.version)
                of_devices.append((*about, int(d.online), devices.body(d)))
    return [*_columns(of_commands, OF_COMMANDS), *_columns(of_devices, OF_DEVICES)]


def _columns(rows: list[tuple[Any, ...]], kinds: Sequence[str]) -> list[Any]:
    columns = zip(*rows, strict=True) if rows else [()] * len(kinds)
    return [_array(column, kind) for column, kind in zip(columns, kinds, strict=True)]


def _array(values: tuple[Any, ...], kind: str) -> Any:
    if kind is BYTES:
        return values
    texts: Iterable[str]
    if None in values:
        texts = ["NULL" if each is None else _quoted(each) if kind is TEXT else str(each) for each in values]
    elif kind is not TEXT:
        texts = map(str, values)
    else:
        # Few texts have a character that must be quoted, and one look at all of them is faster.
        together = '","'.join(values)
        if "\\" not in together and together.count('"') == 2 * (len(values) - 1):
            return f'{{"{together}"}}'
        texts = map(_quoted, values)
    return "{" + ",".join(texts) + "}"


def _quoted(text: str) -> str:
    if "\\" in text or '"' in text:
        text = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{text}"'


def rows(beside: Iterable[SideRow]) -> tuple[list[str], list[str]]:
    """The arguments of `PUT_ROWS` after the first one."""
    return statements(beside)
