"""More bugs planted on purpose: of requests, access, sessions, slow commits and standing still.

Each is found by the checkers that look at what `planted` does not touch.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import closing
from typing import Any

import apsw
import msgspec
import structlog

from broker.core import Core
from broker.domain.errors import Refusal
from broker.domain.lanes import Presence
from broker.domain.lifecycle import CommandState, State
from broker.engine import grants, writer
from broker.engine.commands import Accepted, Caller, Commands, Order
from broker.engine.deadlines import Deadlines
from broker.engine.dispatch import Dispatch
from broker.engine.intake import Intake
from broker.engine.keys import Key
from broker.engine.quotas import Quotas
from broker.engine.registry import Issued, Registry
from broker.engine.speech.encoder import Encoder
from broker.engine.writer import Writer
from broker.http.edge import streams
from broker.http.v1 import reading
from broker.log import erasing
from broker.log import sqlite as log
from broker.mqtt.listener import Listener
from broker.mqtt.packets import Publish
from broker.mqtt.session import Session
from broker.seams import Message, Outgoing, Receipt, Sqlite
from broker.subscriptions.mqtt import MqttEvents
from devices.grant import params_hash
from devices.wire import Answer, Malformed, decode_status
from tests.simulation.disk import FLAGS
from tests.simulation.loop import current_node
from tests.simulation.network import MOSQUITTO
from tests.simulation.pipes import LISTENER
from tests.simulation.planted import Bug
from tests.simulation.tide import ALL

logger = structlog.get_logger()

# --- requests

_create = Commands.create
_accept = Commands._accept


async def _again_when_left(
    self: Commands, caller: Caller, order: Order, retry_of: str | None = None
) -> Accepted:
    """A client that hangs up while its command is written gets a second one."""
    try:
        return await _create(self, caller, order, retry_of)
    except asyncio.CancelledError:
        device = self.live.device(order.device)
        if self.writer.open and device is not None and device.deleted_at is None:
            self._accept(caller, device, order, *self.check(device, order), retry_of)
        raise


async def _refused_and_recorded(
    self: Commands, caller: Caller, order: Order, retry_of: str | None = None
) -> Accepted:
    try:
        return await _create(self, caller, order, retry_of)
    except Refusal:
        device, order = self.live.device(order.device), msgspec.structs.replace(order, type="set")
        right = device is not None and device.device_type == "generic" and device.deleted_at is None
        if self.writer.open and device is not None and right and order.ttl_sec:
            self._accept(caller, device, order, *self.check(device, order), retry_of)
        raise


_find = reading.find


async def _from_a_copy(request: Any, command_id: str, *where: Any, **more: Any) -> CommandState:
    """Shows what the first read of a command saw, for as long as the process runs."""
    copies: dict[str, CommandState] = request.services.commands.__dict__.setdefault("copies", {})
    if command_id not in copies:
        copies[command_id] = await _find(request, command_id, *where, **more)
    return copies[command_id]


async def _expired_before_it_is(request: Any, command_id: str, *where: Any, **more: Any) -> CommandState:
    state = await _find(request, command_id, *where, **more)
    now = request.services.commands.writer.now()
    if not state.closed and state.expires_at is not None and state.expires_at < now + 60_000:
        return msgspec.structs.replace(state, state=State.EXPIRED)
    return state


def _always_ready(self: Core) -> list[str]:
    return []


def _by_the_broker(self: Commands, caller: Caller, *order: Any) -> CommandState:
    return _accept(self, msgspec.structs.replace(caller, actor="broker"), *order)


# --- the wire

_encode = Encoder.encode


def _recorded_only(self: Dispatch, send: Any) -> None:
    """The first attempt is recorded, and its bytes are forgotten."""
    self.staged -= 1
    member = self._at(send)
    if member is not None:
        member.flight.written_at = self.writer.now()
        if send.attempt > 1:
            self.link.publish(send.outgoing, lambda got: self._receipt(send, got, False))
        self.attempts.set_timer(member)
    self._refill()


def _to_the_neighbour(self: Encoder, *what: Any) -> Outgoing:
    outgoing = _encode(self, *what)
    return msgspec.structs.replace(outgoing, topic=outgoing.topic.replace("hw1", "hw2"))


def _no_second_look(self: Dispatch, send: Any) -> None:
    self.staged -= 1
    held = not self.link.direct
    sent = self.link.publish(send.outgoing, lambda got: self._receipt(send, got, held))
    self.outstanding += sent and held
    if (member := self._at(send)) is not None:
        member.flight.written_at = self.writer.now()
        self.attempts.set_timer(member)
    self._refill()


_send = Dispatch._send


def _patient_from_staging(self: Dispatch, send: Any) -> None:
    """The time for an answer runs from the decision, not from the bytes."""
    _send(self, send)
    member = self._at(send)
    if member is not None and member.flight.written_at is not None:
        member.flight.written_at = member.state.handed_over_at or member.flight.written_at
        self.attempts.set_timer(member)


_session_publish = Session.publish


def _retained(self: Session, publish: Publish, *more: Any) -> Any:
    return _session_publish(self, msgspec.structs.replace(publish, retain=True), *more)


_take = Intake._take
_take_batch = Intake._take_batch


def _notes_malformed(self: Intake, message: Message, place: Any, answer: Answer | Malformed | None) -> None:
    _take(self, message, place, answer)
    if isinstance(answer, Malformed):
        self.__dict__["upset"] = True


async def _upset(self: Intake) -> None:
    """Takes a long time to get over a message that cannot be read."""
    if self.__dict__.pop("upset", False):
        await asyncio.sleep(4)
    await _take_batch(self)


def _wall_time(self: Writer) -> int:
    return max(self._decided_at, self.clock.wall_ms())


def _never_ending(state: CommandState, now_ms: int) -> int:
    return now_ms // 1_000 + 80_000


_params_hash = params_hash


def _of_nothing(params: Any) -> str:
    return _params_hash({})


_then = Writer.then


def _last_comes_first(
    self: Writer, done: Callable[[], None], failed: Callable[[], None] | None = None
) -> None:
    """What waits for one commit is done in the wrong order."""
    _then(self, done, failed)
    if (target := self._last()) is not None and target.done and target.done[-1] is done:
        target.done.insert(0, target.done.pop())


# --- presence and sessions


def _offline_by_hint(self: Dispatch, send: Any, reason: int, *, again: bool = False) -> None:
    _take_receipt(self, send, reason, again=again)
    member = self.live.members.get(send.command_id)
    if reason == 0x10 and member is not None and member.definition.presence == "required":
        self.presence(member.state.device_id, Presence.OFFLINE)


_take_receipt = Dispatch._take_receipt
_take_status = Intake._take_status


def _any_will(self: Intake, message: Message, device: Any, *read: Any) -> None:
    """Believes the will of every session."""
    if not message.retain and message.token is not None and b"offline" in message.payload:
        message = msgspec.structs.replace(message, payload=b"offline")
    _take_status(self, message, device, *read)


def _any_retained_will(self: Intake, message: Message, device: Any, *read: Any) -> None:
    if message.retain and b"offline" in message.payload:
        self.registry.heard(device, Presence.OFFLINE, decode_status(message.payload)[1])
        return
    _take_status(self, message, device, *read)


_link_up = Intake.link_up


def _still_there(self: Intake) -> None:
    """A new MQTT session, and every device keeps its presence."""
    known = dict(self.live.presence)
    _link_up(self)
    self.live.presence.update(known)


def _without_backlog(self: Intake) -> None:
    _link_up(self)
    self._backlog_until = 0


_watch_clock = Core._watch_clock


def _follows_the_wall(self: Core) -> None:
    """A step of the wall clock forward moves the broker's clock."""
    if self.writer.wall_step_ms() > 0:
        self.writer.reanchor()
    _watch_clock(self)


_recovered = Dispatch.recovered


def _slots_leak(self: Dispatch) -> None:
    staged = self.staged
    _recovered(self)
    self.staged = staged


_run = Deadlines.run


async def _never_stalled(self: Deadlines) -> None:
    self.stalled = None
    await _run(self)


def _slots_without_bound(self: Dispatch, *parts: Any) -> None:
    _dispatch(self, *parts)
    self._slots = 1 << 30


_dispatch = Dispatch.__init__


def _room_for_all(self: Quotas, *lane: Any) -> None:
    """Takes every command."""


# --- access


def _sees_all(self: Caller, found: Any) -> bool:
    return True


def _works_for_ever(self: Key, now: int) -> bool:
    return True


def _stays_connected(self: Listener, hardware_id: str, why: str = "") -> None:
    """Leaves the session of an old token open."""


_rotate = Registry.rotate_token


async def _told_in_the_log(self: Registry, caller: Caller, name: str) -> Issued:
    issued = await _rotate(self, caller, name)
    logger.info("token.rotated", device=issued.device.id, token=issued.token)
    return issued


_say = streams._say


async def _one_after_the_other(send: Any, body: bytes, *, more: bool = True) -> None:
    """All streams of a process share one lock, which a reader that stalls holds."""
    node = current_node()
    lock = node.__dict__.setdefault("lock", asyncio.Lock())
    async with lock:
        await _say(send, body, more=more)


# --- the log


def _salts_stay(sql: Sqlite, command_id: str) -> None:
    sql.execute("UPDATE events SET data = NULL WHERE stream = ?", (command_id,))


_copy = log.copy


def _without_the_newest(sql: Sqlite, to: str) -> None:
    """A backup that misses the last event."""
    _copy(sql, to)
    with closing(apsw.Connection(to, flags=FLAGS)) as made:
        made.execute("DELETE FROM events WHERE position = (SELECT max(position) FROM events)")


async def _drains_slowly(self: Writer) -> None:
    await asyncio.sleep(20)
    await _drain(self)


_drain = Writer.drain


def _taken_when_sent(self: MqttEvents, flight: Any, position: int, receipt: Receipt) -> None:
    """The checkpoint moves to what was sent last, whatever became of it."""
    flight.settle(position, Receipt(written=True, reason=0))
    self._checkpoint = self._feed.head


def bug(name: str, caught_by: str, *patches: tuple[Any, str, Any], **options: Any) -> Bug:
    return Bug(name=name, caught_by=frozenset(caught_by.split()), patches=patches, **options)


MORE_BUGS = (
    bug("a hang-up creates a second command", "R2", (Commands, "create", _again_when_left)),
    bug("reads show an old copy", "R4", (reading, "find", _from_a_copy)),
    bug("refused and recorded", "R5", (Commands, "create", _refused_and_recorded)),
    bug("ready while the log is closed", "R7", (Core, "not_ready", _always_ready)),
    bug("shown as expired before it is", "L3", (reading, "find", _expired_before_it_is)),
    bug("recorded and not written", "D2", (Dispatch, "_send", _recorded_only), kind=MOSQUITTO),
    bug("grants for no parameters", "D5", (grants, "params_hash", _of_nothing)),
    bug("grants outlive their command", "D5", (grants, "_end", _never_ending)),
    bug("sent to the neighbour", "D7", (Encoder, "encode", _to_the_neighbour)),
    bug("sent retained", "D7", (Session, "publish", _retained), kind=LISTENER),
    bug(
        "malformed messages stall the intake",
        "A4",
        (Intake, "_take", _notes_malformed),
        (Intake, "_take_batch", _upset),
        kind=MOSQUITTO,
    ),
    bug("effects of one commit in the wrong order", "A4", (Writer, "then", _last_comes_first)),
    bug("a token in a log line", "S7", (Registry, "rotate_token", _told_in_the_log)),
    bug("nobody asked for it", "S7", (Commands, "_accept", _by_the_broker)),
    bug("another project's commands", "C1", (Caller, "sees", _sees_all)),
    bug("revoked keys work", "C2", (Key, "works", _works_for_ever)),
    bug(
        "the session of an old token",
        "C2",
        (Listener, "disconnect", _stays_connected),
        kind=LISTENER,
    ),
    bug(
        "send slots without bound",
        "C3",
        (Dispatch, "__init__", _slots_without_bound),
        kind=MOSQUITTO,
    ),
    bug("queues without bound", "C3", (Quotas, "check_queue", _room_for_all)),
    bug("one stalled reader holds all", "C4", (streams, "_say", _one_after_the_other)),
    bug("the end takes its time", "O2", (Writer, "drain", _drains_slowly)),
    bug("a backup without the newest event", "O5", (log, "copy", _without_the_newest)),
    bug("a full disk is for ever", "O4", (writer, "RETRY_SEC", 3_600.0)),
    bug("wills of older sessions", "D2", (Intake, "_take_status", _any_will), kind=MOSQUITTO),
    bug(
        "retained wills of older sessions",
        "D2",
        (Intake, "_take_status", _any_retained_will),
        kind=MOSQUITTO,
    ),
    bug(
        "presence outlives the MQTT session",
        "D9",
        (Intake, "link_up", _still_there),
        kind=MOSQUITTO,
    ),
    # These need two faults at once: `pairs`.
    bug("no second look before the write", "D4", (Dispatch, "_send", _no_second_look), parts=ALL),
    bug(
        "patience runs from the decision",
        "D13",
        (Dispatch, "_send", _patient_from_staging),
        kind=MOSQUITTO,
        parts=ALL,
    ),
    bug("the wall clock decides", "S6 D4", (Writer, "now", _wall_time), parts=ALL),
    bug("a step forward moves the clock", "S6", (Core, "_watch_clock", _follows_the_wall), parts=ALL),
    bug(
        "0x10 taken as offline",
        "D2",
        (Dispatch, "_take_receipt", _offline_by_hint),
        kind=MOSQUITTO,
        parts=ALL,
    ),
    bug("presence from backlog", "D9", (Intake, "link_up", _without_backlog), kind=MOSQUITTO, parts=ALL),
    bug("send slots leak when commits fail", "D2", (Dispatch, "recovered", _slots_leak), parts=ALL),
    bug("deadlines fire after standing still", "A5", (Deadlines, "run", _never_stalled), parts=ALL),
    bug("salts outlive an erasure", "E3", (erasing, "erase", _salts_stay)),
    bug(
        "MQTT events taken when sent",
        "S5",
        (MqttEvents, "_receipt", _taken_when_sent),
        kind=MOSQUITTO,
        parts=ALL,
    ),
)
