"""Bugs planted on purpose. The checkers must find each one; a bug that no checker finds fails the test.

Each bug replaces methods of the real broker or device during a run and lists the invariants that may detect
it. Nothing here is imported outside the simulation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import msgspec

from broker.domain import attempts, decisions, lanes
from broker.domain.cloudevents import Entry
from broker.domain.decisions import Cell, Verdict, decide
from broker.domain.events import Erased
from broker.domain.lanes import Flight, Lane, Member, Presence
from broker.domain.lifecycle import CommandState, Input, Request, State
from broker.engine import dispatch as dispatching
from broker.engine.attempts import Attempts
from broker.engine.commands import Accepted, Caller, Commands, Order, conflict
from broker.engine.dispatch import Dispatch
from broker.engine.erasures import Erasures
from broker.engine.intake import OWN, Intake
from broker.engine.live import Key, Live
from broker.engine.writer import Writer
from broker.mqtt.access import Peer
from broker.mqtt.listener import Listener
from broker.mqtt.packets import Packet, Publish
from broker.mqtt.routes import Routes
from broker.mqtt.session import Session
from broker.mqtt.shell import Connection as Shell
from broker.seams import Message, Placed, Put
from broker.subscriptions.feed import Subscription
from broker.subscriptions.webhook_queue import Progress, Window
from broker.subscriptions.webhook_worker import Attempt
from devices.memory import RamMemory, Remembered
from devices.types import Definition
from projections import commands as commands_view
from tests.reading import plain
from tests.simulation.network import ServerKind
from tests.simulation.pipes import LISTENER
from tests.simulation.planting import Planted
from tests.simulation.tide import ALL, Parts
from tests.simulation.world import Outcome, Synchronous, simulate

FOUND_BY = Path(__file__).parent / "planted.json"
FIRST: dict[str, int] = msgspec.json.decode(FOUND_BY.read_bytes())
SHORT = Parts(spells=1)  # enough for most bugs, and a third of the time


class Bug(Planted, frozen=True, kw_only=True):
    """Each of the invariants must be reported in one seed: the docs say that the bug shows them."""

    synchronous: Synchronous = "FULL"
    kind: ServerKind | None = None  # drawn, if it is not given
    parts: Parts = SHORT
    within: int = 100  # the seeds that must be enough

    @property
    def seeds(self) -> Iterator[int]:
        """All its seeds. The one that found it when `planted.json` was written comes first."""
        first = FIRST.get(self.name, 0)
        return chain([first], (seed for seed in range(self.within) if seed != first))

    def names(self, found: list[str]) -> bool:
        return self.caught_by <= {sentence.partition(":")[0] for sentence in found}

    def run(self, seed: int, parts: Parts | None = None) -> Outcome:
        parts = self.parts if parts is None else parts
        with self.planted():
            return simulate(seed, synchronous=self.synchronous, kind=self.kind, parts=parts)


async def _no_barrier(self: Writer) -> None:
    """Answers at once, before the commit."""


_message = Intake.message


def _puback_first(self: Intake, message: Message) -> None:
    if message.token is not OWN:
        self.link.puback(message)
    _message(self, message)


_then = Writer.then


def _send_first(self: Writer, done: Callable[[], None], failed: Callable[[], None] | None = None) -> None:
    """Hand-overs are the only callers without a `failed` callback: only they are called before the commit."""
    if failed is None:
        done()
    else:
        _then(self, done, failed)


def _forgotten(self: RamMemory, command_id: str) -> Remembered | None:
    return None


async def _cancel_by_projection(
    self: Commands, caller: Caller, command_id: str, reason: str | None = None
) -> CommandState:
    """Decides on the durable state and misses a hand-over that is staged but not durable yet."""
    await self.ready(command_ids=[command_id])
    durable = await self.writer.storage.read(lambda sql: commands_view.get(sql, command_id))
    await self.ready(command_ids=[command_id])
    state = self.seen(caller, command_id)
    decision = decide(durable, Request(input=Input.CANCEL, now=self.writer.now(), by=caller.actor))
    if decision.event is not None:
        state = self.apply(state, decision, caller.actor)
    await self.writer.barrier()
    if decision.verdict is Verdict.CONFLICT:
        raise conflict(state, Input.CANCEL)
    return state


async def _check_then_act(
    self: Commands, caller: Caller, order: Order, retry_of: str | None = None
) -> Accepted:
    """Waits between the lookup of the key and its insertion."""
    key = ("acme", order.idempotency_key or "", "")
    await self.ready([order.device], keys=[key])
    first = self.live.keys.get(key) if order.idempotency_key is not None else None
    if first is not None:
        return await self._replay(first, order.fingerprint)
    await self.writer.storage.read(plain(lambda sql: None))
    await self.ready([order.device])
    device = self.device(caller, order.device)
    state = self._accept(caller, device, order, *self.check(device, order), retry_of)
    if order.idempotency_key is not None:
        self.keep_key(key, order.fingerprint, state)
    await self.writer.barrier()
    return Accepted(state)


_keep_key = Commands.keep_key


def _for_one_only(self: Commands, key: Key, fingerprint: bytes, state: CommandState) -> None:
    if key[2] == "":
        _keep_key(self, key, fingerprint, state)


def _none_gives_way(lane: Lane, key: str | None) -> list[Member]:
    return []


def _keep_last(self: Commands, key: Key, fingerprint: bytes, state: CommandState) -> None:
    """Overwrites the key, so that the unique index does not refuse the second command."""
    self.live.keys.put(key, (fingerprint, state.id))
    self.writer.also(Put("idempotency", (*key, fingerprint, state.id, state.created_at)))


async def _replay_at_once(self: Commands, first: tuple[bytes, str], fingerprint: bytes) -> Accepted:
    await self.ready(command_ids=[first[1]])
    state = self.live.command(first[1])
    assert state is not None
    return Accepted(state, replayed=True)


def _never_again(member: Member, presence: Presence, now: int) -> bool:
    return False


def _never_timed(self: Attempts, member: Member) -> None:
    """Sets no result timer when a command is acknowledged; only a restart sets it."""
    if member.state.state is not State.ACKNOWLEDGED:
        self._deadlines.set(member.state.id, lanes.wake_at(member, self._writer.now()))


def _always_there(definition: Definition, presence: Presence) -> bool:
    return True


def _left_open(lane: Lane, member: Member, now: int) -> None:
    """Takes the command out of its lane without a pause: the next one follows at once."""
    shut_until = lane.shut_until
    _closed(lane, member, now)
    lane.shut_until = shut_until


_closed = lanes.closed
_send = Dispatch._send


def _done_when_sent(self: Dispatch, send: Any) -> None:
    _send(self, send)
    member = self._at(send)
    if member is not None and member.flight.written_at is not None:
        self.attempts.end(member, Input.ACCEPTED)


def _never_checked(self: Commands, caller: Caller, command_id: str) -> None:
    self.seen(caller, command_id)


def _no_waiting(self: Dispatch, now: int, device_id: str) -> bool:
    return True


def _no_lease(member: Member, now: int) -> bool:
    return False


_recovered = attempts.recovered


def _lease_forgotten(
    state: CommandState, definition: Definition, now: int, uniform: Callable[[float, float], float]
) -> Flight:
    """After a restart, treats commands fetched by heartbeat or relay as if they went by MQTT."""
    return _recovered(msgspec.structs.replace(state, transport="mqtt"), definition, now, uniform)


def _never_exhausted(member: Member) -> bool:
    return False


def _no_pause(definition: Definition, tried: int) -> int:
    return 0


def _take_their_word(state: CommandState | None, request: Request, cell: Cell) -> Cell:
    """Takes in every report, and says so of one that cannot be recorded too."""
    return decisions.ALREADY if cell.verdict is Verdict.UNMATCHED else cell


def _all_delivered(self: Window) -> Progress:
    """Ignores the deliveries that are still open."""
    reached = max(self.reached, self._before_until)
    return Progress(cursor=reached + 1, reached=reached)


_looked = Window.looked


def _each_for_itself(self: Window, entries: Iterable[tuple[int, str]], reached: int, now: int) -> None:
    """Treats every event as if it belonged to its own device, so that the order per device is lost."""
    _looked(self, [(position, f"{device_id}/{position}") for position, device_id in entries], reached, now)


def _unsaid(self: Erasures, event: Erased, project: str, actor: str) -> tuple[int, int]:
    """Erases without an event in the log."""
    return self._writer.durable, self._writer.now()


def _kept_in_memory(self: Live, state: CommandState) -> None:
    """Leaves erased commands in memory."""


async def _never_resumed(self: Erasures) -> None:
    """Does not resume a purge that a crash interrupted."""
    await _load(self)
    self._wake.clear()


_load = Erasures.load


_commit = Writer._commit


async def _told_first(self: Writer, batch: Any) -> None:
    """Notifies the listeners before the events are durable."""
    for listener in self.listeners:
        listener(batch.events, Placed(self.durable + 1, [each.decided_at for each in batch.events]))
    listeners, self.listeners = self.listeners, []
    try:
        await _commit(self, batch)
    finally:
        self.listeners = listeners


_next = Subscription.next


async def _deaf_while_reading(self: Subscription, idle_sec: float | None = None) -> list[Entry] | None:
    """Ignores events that are committed while the history is read."""
    reads = self.reached < self._since
    entries = await _next(self, idle_sec)
    if reads and self.reached == self._since:
        self.reached = self._feed.head
    return entries


_published = Session._published


def _acknowledged_at_once(self: Session, packet: Publish) -> None:
    _published(self, packet)
    self.acknowledge(packet.packet_id)


def _always_the_same(self: Session) -> int:
    return 1


def _left_where_it_was(self: Routes, connection: Shell, peer: Peer, old: Peer) -> tuple[list[str], list[str]]:
    """A later connection of the same device does not take its topics over."""
    connection.routes = dict.fromkeys(peer.commands, 1)
    for topic in peer.commands:
        self._to.setdefault(topic, connection)
    return list(peer.devices), []


def _not_taken_over(self: Listener, connection: Shell, reason: int, why: str) -> None:
    """Leaves the old connection open."""


_connect = Session._connect


def _one_more(self: Session, packet: Packet) -> None:
    _connect(self, packet)
    self._window += 1


def _never_silent(self: Session, now: float, *, read: bool = True) -> None:
    """Waits for ever."""


# These two are planted in a story of their own, in `test_pipes`: dead connections are rare in a seed.
TAKEOVER_BUG = Bug(
    name="a takeover delivers to the old connection",
    caught_by=frozenset({"M3"}),
    patches=(
        (Routes, "renew", _left_where_it_was),
        (Listener, "_end", _not_taken_over),
    ),
    kind=LISTENER,
)
KEEPALIVE_BUG = Bug(
    name="keepalive never fires",
    caught_by=frozenset({"M4"}),
    patches=((Session, "tick", _never_silent),),
    kind=LISTENER,
)
LISTENER_BUGS = (
    Bug(
        name="the listener's PUBACK before the commit",
        caught_by=frozenset({"A1"}),
        patches=((Session, "_published", _acknowledged_at_once),),
        kind=LISTENER,
    ),
    Bug(
        name="a packet id is used twice",
        caught_by=frozenset({"M1"}),
        patches=((Session, "_next_id", _always_the_same),),
        kind=LISTENER,
    ),
    Bug(
        name="the window is one too large",
        caught_by=frozenset({"M2"}),
        patches=((Session, "_connect", _one_more),),
        kind=LISTENER,
    ),
    Bug(
        name="a slot is held until the device's PUBACK",
        caught_by=frozenset({"M5"}),
        patches=((Listener, "direct", False),),
        kind=LISTENER,
    ),
)
REPORT_BUG = Bug(  # found by A6 too, in a story of its own (test_reports.py)
    name="anybody may report",
    caught_by=frozenset({"R9"}),
    patches=((decisions, "_as_report", _take_their_word),),
)
BUGS = (
    *LISTENER_BUGS,
    Bug(
        name="erased without the event",
        caught_by=frozenset({"S3", "E1"}),
        patches=((Erasures, "_record", _unsaid),),
    ),
    Bug(
        name="erased and still in memory",
        caught_by=frozenset({"E2"}),
        patches=((Live, "forget", _kept_in_memory),),
    ),
    Bug(
        name="a purge ends with its process",
        parts=ALL,
        caught_by=frozenset({"E3"}),
        patches=((Erasures, "load", _never_resumed),),
    ),
    Bug(
        name="answer before commit",
        caught_by=frozenset({"R1"}),
        patches=((Writer, "barrier", _no_barrier),),
    ),
    Bug(
        name="PUBACK before commit",
        caught_by=frozenset({"A1"}),
        patches=((Intake, "message", _puback_first),),
    ),
    Bug(
        name="publish before published",
        caught_by=frozenset({"D1"}),
        patches=((Writer, "then", _send_first),),
    ),
    Bug(
        name="no device de-duplication",
        caught_by=frozenset({"D3"}),
        patches=((RamMemory, "get", _forgotten),),
    ),
    Bug(
        name="cancel race",
        caught_by=frozenset({"L1", "L2"}),
        patches=((Commands, "cancel", _cancel_by_projection),),
    ),
    Bug(
        name="idempotency race",
        caught_by=frozenset({"R3"}),
        patches=((Commands, "create", _check_then_act), (Commands, "keep_key", _keep_last)),
    ),
    Bug(
        name="a fan-out forgets its key",
        caught_by=frozenset({"R3"}),
        patches=((Commands, "keep_key", _for_one_only),),
    ),
    Bug(
        name="successors end nothing",
        parts=ALL,
        caught_by=frozenset({"R10"}),
        patches=((lanes, "collapsing", _none_gives_way),),
    ),
    Bug(
        name="synchronous=NORMAL",
        caught_by=frozenset({"R1"}),
        synchronous="NORMAL",
    ),
    Bug(
        name="no resend",
        caught_by=frozenset({"L4"}),
        patches=((lanes, "resendable", _never_again),),
    ),
    Bug(
        name="no commit barrier on a replay",
        caught_by=frozenset({"R1"}),
        patches=((Commands, "_replay", _replay_at_once),),
    ),
    Bug(
        name="no result timer",
        caught_by=frozenset({"L4"}),
        patches=((Attempts, "set_timer", _never_timed),),
    ),
    Bug(
        name="presence ignored",
        caught_by=frozenset({"D9"}),
        patches=((lanes, "reachable", _always_there),),
    ),
    Bug(
        name="attempts that end by going offline are not bounded",
        caught_by=frozenset({"D12"}),
        patches=(
            (attempts, "is_exhausted", _never_exhausted),
            (dispatching, "is_exhausted", _never_exhausted),
            (attempts, "drop_pause_ms", _no_pause),
        ),
    ),
    Bug(
        name="id-less lanes never shut",
        caught_by=frozenset({"A3"}),
        patches=((lanes, "closed", _left_open),),
    ),
    Bug(
        name="one-way done before the PUBACK",
        caught_by=frozenset({"D10"}),
        patches=((Dispatch, "_send", _done_when_sent),),
    ),
    Bug(
        name="retry of an open command",
        caught_by=frozenset({"R8"}),
        patches=((Commands, "_check_retry", _never_checked),),
    ),
    Bug(
        name="timers fire while the link is down",
        caught_by=frozenset({"A5"}),
        patches=((Dispatch, "drained", _no_waiting),),
    ),
    Bug(
        name="leases ignored",
        caught_by=frozenset({"D11"}),
        patches=((lanes, "in_the_air", _no_lease),),
    ),
    Bug(
        name="leases forgotten at a restart",
        caught_by=frozenset({"D11"}),
        patches=((attempts, "recovered", _lease_forgotten),),
    ),
    REPORT_BUG,
    Bug(
        name="webhook's cursor beyond what is undelivered",
        caught_by=frozenset({"S5"}),
        patches=((Window, "progress", _all_delivered),),
    ),
    Bug(
        name="webhooks out of order",
        caught_by=frozenset({"S5"}),
        patches=((Window, "looked", _each_for_itself),),
    ),
    Bug(
        name="subscribers are told before the commit",
        caught_by=frozenset({"S5"}),
        patches=((Writer, "_commit", _told_first),),
    ),
    Bug(
        name="a gap between history and live",
        caught_by=frozenset({"S5"}),
        patches=((Subscription, "next", _deaf_while_reading),),
    ),
    Bug(
        name="any answer is a delivery",
        caught_by=frozenset({"S5"}),
        patches=((Attempt, "delivered", True),),
    ),
)
