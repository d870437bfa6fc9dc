"""Bugs of the log, of the order of commands, and of answers that come twice, planted on purpose.

Most are found by one checker only, and no bug in `planted` or `planted_outside` needs that checker.
"""

from __future__ import annotations

from typing import Any

from broker.domain import decisions, lanes
from broker.domain.decisions import Cell
from broker.domain.errors import Refusal
from broker.domain.fleet import DeviceState
from broker.domain.lanes import Lane, Member
from broker.domain.lifecycle import CommandState, Input, Request, State
from broker.engine.commands import Caller, Commands
from broker.engine.dispatch import Dispatch
from broker.engine.writer import Writer
from broker.log import sqlite as log
from broker.seams import Receipt, Sqlite
from tests.simulation.network import MOSQUITTO
from tests.simulation.planted import BUGS, Bug
from tests.simulation.planted_outside import MORE_BUGS, bug
from tests.simulation.tide import ALL

_cancel = Commands.cancel


async def _always_cancelled(
    self: Commands, caller: Caller, command_id: str, reason: str | None = None
) -> CommandState:
    """Answers 200 although the command was handed over before."""
    try:
        return await _cancel(self, caller, command_id, reason)
    except Refusal as refusal:
        if refusal.kind != "conflict":
            raise
        return self.seen(caller, command_id)


_due = lanes.due


def _newest_first(lane: Lane, *more: Any) -> list[Member]:
    pending = {key: each for key, each in lane.members.items() if each.state.state is State.PENDING}
    others = {key: each for key, each in lane.members.items() if key not in pending}
    members = others | dict(reversed(pending.items()))
    return _due(Lane(lane.device_id, members, lane.late, lane.shut_until), *more)


_receipt, _link_up = Dispatch._receipt, Dispatch.link_up


def _kept_for_later(self: Dispatch, send: Any, receipt: Receipt, held: bool) -> None:
    _receipt(self, send, receipt, held)
    if receipt.reason is None:
        self.__dict__.setdefault("unsure", []).append(send)


def _sent_again(self: Dispatch) -> None:
    """What the MQTT server did not confirm is written again when the link is up, whatever became of it."""
    _link_up(self)
    for send in self.__dict__.pop("unsure", ()):
        self.link.publish(send.outgoing, lambda got: None)


def _every_copy(state: CommandState, request: Request) -> Cell:
    return decisions.record("progressed")


_PROGRESS = decisions.TABLE[Input.ANSWER_PROGRESS] | {State.ACKNOWLEDGED: _every_copy}

_create = log.create


def _last_one_lost(sql: Sqlite, *ids: str) -> None:
    """A start removes the last event, if it is about a device, and makes the projections anew."""
    _create(sql, *ids)
    last = "(SELECT max(position) FROM events)"
    sql.execute(f"DELETE FROM events WHERE position = {last} AND stream LIKE 'device/%'")
    sql.execute("DELETE FROM meta WHERE key = 'projections'")


_operated = Writer.operated


def _with_gaps(self: Writer, *what: str, **details: Any) -> None:
    """Every second version of the stream `audit` is left out."""
    self._operated += 1
    _operated(self, *what, **details)


_touch = Writer.touch


def _where_it_was_first(self: Writer, state: CommandState | DeviceState) -> None:
    """A projection keeps the position of the first event of a commit, and not of the last one."""
    known = self._batch.states.get(state.id)
    last = None if known is None else known.last
    _touch(self, state)
    if known is not None and last is not None:
        known.last = last


LOG_BUGS: tuple[Bug, ...] = (
    bug("cancelled after it was handed over", "R6", (Commands, "cancel", _always_cancelled)),
    bug("the newest command first", "D6", (lanes, "due", _newest_first)),
    bug(
        "unconfirmed messages are sent again",
        "D8",
        (Dispatch, "_receipt", _kept_for_later),
        (Dispatch, "link_up", _sent_again),
        kind=MOSQUITTO,
    ),
    bug(
        "progress is recorded twice",
        "A2",
        (decisions, "TABLE", decisions.TABLE | {Input.ANSWER_PROGRESS: _PROGRESS}),
        kind=MOSQUITTO,
        parts=ALL,
    ),
    bug("a start loses the last event", "S1", (log, "create", _last_one_lost)),
    bug(
        "versions with gaps",
        "S2",
        (Writer, "operated", _with_gaps),
        (log, "VERSIONS", "SELECT v.column1 FROM (VALUES {}) v"),
    ),
    bug("a projection has the first position of a commit", "S4", (Writer, "touch", _where_it_was_first)),
)
EVERY_BUG = (*BUGS, *MORE_BUGS, *LOG_BUGS)
