"""What a commit records, as data, so that any storage can carry it out; and what a storage answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from broker.domain.events import Pending
from broker.domain.fleet import DeviceState
from broker.domain.lifecycle import CommandState


class At(msgspec.Struct, frozen=True):
    """The position that the log gives to an event of the same batch: to `events[index]`."""

    index: int


Value = str | int | bytes | At | None


class New(msgspec.Struct, frozen=True):
    """Adds a row: all columns, in the order of `broker.log.rows.SIDE`. `Conflict` if there is one with its
    key."""

    table: str
    values: tuple[Value, ...]


class Put(msgspec.Struct, frozen=True):
    """Adds a row, or replaces the one with its key. With `only`, that one keeps its other columns."""

    table: str
    values: tuple[Value, ...]
    only: tuple[str, ...] = ()


class Change(msgspec.Struct, frozen=True):
    """Changes some columns of the row with this key, if there is one."""

    table: str
    key: tuple[Value, ...]
    columns: dict[str, Value]


class Drop(msgspec.Struct, frozen=True):
    """Deletes the row with this key, if there is one."""

    table: str
    key: tuple[Value, ...]


class Unmatched(msgspec.Struct, frozen=True):
    """Keeps an answer that matches no command. Of these the newest stay: `per_device` and `in_all`.

    `at`: ms."""

    at: int
    project: str | None
    device_id: str | None
    reason: str
    topic: str
    command_id: str | None
    payload: bytes
    per_device: int
    in_all: int


class Erase(msgspec.Struct, frozen=True):
    """Erases a closed command: data and salt of its events, its row in the projection, and the unmatched
    answers that name it."""

    stream: str


class EraseEvents(msgspec.Struct, frozen=True):
    """Erases data and salt of these events. An `erased` event of the same batch names their positions."""

    positions: tuple[int, ...]


class Purge(msgspec.Struct, frozen=True):
    """Begins a purge: from now on, reads hide the commands created before `cutoff` and closed before `at`
    (ms). `position`: that of its `erased` event. It also erases old unmatched answers."""

    position: At
    cutoff: int
    at: int


SideRow = New | Put | Change | Drop | Unmatched | Erase | EraseEvents | Purge


class Newest(msgspec.Struct):
    """The newest state of a command or device that a batch changes.

    `first` and `last`: the indices of its first and last event in the batch. `over`: the version that its
    row in the projection must have before, or `Conflict`; 0: it has no row yet.
    """

    state: CommandState | DeviceState
    first: int
    last: int
    over: int


class Batch(msgspec.Struct, frozen=True):
    """Everything that one commit records: events, then states, then rows, each in order.

    `number`: 1, 2, 3 … for each process, so that a batch whose outcome is unknown can be asked for. `term`:
    the term in which its writer owns the log; with SQLite always 1. `salts`: 16 bytes for each event.
    """

    number: int
    term: int
    events: list[Pending]
    salts: bytes
    states: list[Newest]
    rows: list[SideRow]


class Placed(NamedTuple):
    """What the log gave the events of a batch: `events[i]` has position `first + i` and the time `times[i]`.
    Of a batch without events, `first` is the position that the next event will get."""

    first: int
    times: Sequence[int]

    @property
    def last(self) -> int:
        """The end of the log with this batch."""
        return self.first + len(self.times) - 1


class Node(msgspec.Struct, frozen=True):
    """One run of a broker on a log that several may share. `beat` rises as long as it lives."""

    incarnation: str
    name: str
    address: str | None = None
    beat: int = 0
    link_up: bool = True
    draining: bool = False


class View(msgspec.Struct, frozen=True):
    """What a node sees of the others. `owner`: the incarnation that has claimed `term`, alive or not."""

    term: int
    owner: str | None
    nodes: list[Node]
