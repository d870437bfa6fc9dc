"""Hands commands over by MQTT and runs their timers.

`lanes.due` says which commands are due. For each: encode it, stage `published`, and write the bytes only
after that event is durable. All that can end an attempt (receipt, timer, presence) goes through `decide`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import NamedTuple

import structlog

from broker.domain import lanes
from broker.domain.attempts import interrupted, is_exhausted
from broker.domain.decisions import Verdict, decide
from broker.domain.explain import Explanation, Situation, explain
from broker.domain.lanes import Lane, Member, Presence
from broker.domain.lifecycle import CommandState, Input, Request, State
from broker.engine.attempts import NO_SUBSCRIBER, Attempts
from broker.engine.commands import Commands
from broker.engine.deadlines import Deadlines, Drain
from broker.engine.grants import Grants
from broker.engine.speech.encoder import Encoder
from broker.engine.speech.gateways import speaker_of
from broker.engine.speech.queries import TIMER, Queries
from broker.seams import Link, Outgoing, Receipt
from devices.wire import Unsendable

logger = structlog.get_logger()

SILENCE = "silence/"


class _Send(NamedTuple):
    """One hand-over whose `published` event is staged and whose bytes are not written yet."""

    command_id: str
    attempt: int
    outgoing: Outgoing


class Dispatch:
    """All decisions about hand-over that the broker makes by itself. Synchronous: it stages and sends."""

    def __init__(self, commands: Commands, grants: Grants, link: Link) -> None:
        self.commands = commands
        self.live = commands.live
        self.writer = commands.writer
        self.grants = grants
        self.link = link
        self.deadlines = Deadlines(self.writer.now, self._fire, self.writer.space)
        self.deadlines.stalled = self._stalled
        self.attempts = Attempts(commands, self.deadlines, self.pump)
        self.queries = Queries(commands, self.deadlines)
        self.encoder = Encoder(commands, grants)
        self.embedded = False  # the MQTT server is the embedded one; set by the intake
        self.halted: str | None = None  # the reason why hand-over is stopped, shown by /readyz
        self._slots = commands.limits.send_slots
        self.staged = 0  # slots taken by hand-overs that are not durable yet
        self.outstanding = 0  # slots taken by publishes without a receipt
        self._waiting: dict[str, None] = {}  # devices whose lane waits for the link or a slot, in order
        self._dirty: deque[str] = deque()
        self._pumping = False
        self.waits = False  # the intake takes the messages that waited while the log could not be written
        # Receipts that came while the log could not be written, or whose event was in a failed commit.
        self._untaken: list[tuple[_Send, int]] = []
        self._undrained: dict[str, None] = {}  # commands whose timer fired before the drain ended
        self._drain = Drain()
        # Records the presence that waits for its event, before a hand-over that was decided on it.
        self.settle: Callable[[str], bool] = lambda device_id: True
        # The ids of the devices that a gateway speaks for, by its own id.
        self.others: Callable[[str], Iterable[str]] = lambda device_id: ()
        commands.changed = self.changed

    # --- state changes ---

    def changed(self, member: Member) -> None:
        """Called after every event of a command: sets its timer and hands over what its lane now allows."""
        state = member.state
        if state.closed:
            self.deadlines.set(state.id, None)
        else:
            self.attempts.set_timer(member)
        if state.closed or state.state is State.PENDING:
            self.pump(state.device_id)

    def recovered(self) -> None:
        """After a start or a reload: sets every timer again and checks every lane."""
        self.staged = 0
        self._undrained.clear()
        now = self.writer.now()
        members = self.live.members
        self.deadlines.replace(
            {key: at for key, each in members.items() if (at := lanes.wake_at(each, now)) is not None}
        )
        self.pump_all()

    def go_on(self) -> None:
        """The log can be written, and the intake has taken all messages from before."""
        self.waits = False
        untaken, self._untaken = self._untaken, []
        for send, reason in untaken:
            self._take_receipt(send, reason, again=True)
        self.pump_all()

    def link_up(self) -> None:
        drained_at = self._wait_for_answers(direct=self.link.direct)
        self._waiting.clear()
        for member in self.live.members.values():
            if interrupted(member, drained_at, self.writer.entropy.uniform):
                self.attempts.set_timer(member)
        self.pump_all()

    def link_down(self) -> None:
        self._drain.away()

    def clock_set(self) -> None:
        """The broker's clock stood, and may have jumped: timers wait until queued answers have been read."""
        if self.link.up:
            self._wait_for_answers(direct=self.link.direct)
        self.pump_all()
        self.deadlines.look_again()

    def _stalled(self) -> None:
        """The event loop was blocked: reads the answers in the buffers before any timer counts again."""
        if self._drain.ends("") is not None:
            self._wait_for_answers(direct=False)

    def _wait_for_answers(self, *, direct: bool) -> int:
        """Delays timers until queued answers have been read. Returns that time, in broker ms."""
        until = self._drain.begin(self.writer.now(), direct=direct)
        for command_id in self._undrained:
            self.deadlines.set(command_id, until)
        self._undrained.clear()
        return until

    def presence(self, device_id: str, presence: Presence) -> None:
        """Takes in a device's new presence and applies it to the commands of its lane."""
        before = self.live.presence.get(device_id, Presence.NEVER)
        self.live.presence[device_id] = presence
        if self.link.direct and presence is Presence.ONLINE:
            self._drain.came(device_id, self.writer.now())
        lane = self.live.lanes.get(device_id)
        if lane is None or before is presence:
            return
        if presence in (Presence.ONLINE, Presence.OFFLINE):
            came, drained = presence is Presence.ONLINE, self.drained(self.writer.now(), device_id)
            for member in [each for each in lane.members.values() if each.state.state is not State.PENDING]:
                if came:
                    self.attempts.end(member, Input.CAME_ONLINE)
                elif member.definition.presence == "none" or member.flight.lease_until is not None:
                    continue
                elif drained or not is_exhausted(member):
                    self.attempts.end(member, Input.WENT_OFFLINE)
                # else: an answer may be waiting, and the attempt timer ends the command
        self.pump(device_id)

    async def explain(self, state: CommandState) -> Explanation:
        """Explains the state of a command and what happens next. `state`: the command as it was read."""
        await self.live.bring(self.writer.storage, [state.device_id])
        await self.writer.barrier()
        member = self.live.members.get(state.id)
        device = self.live.device(state.device_id)
        presence = self.live.presence.get(state.device_id, Presence.NEVER)
        gateway = None if device is None else await speaker_of(device, self.live, self.writer.storage)
        return explain(
            Situation(
                state=self.live.command(state.id) or state,
                now=self.writer.now(),
                member=member,
                lane=self.live.lanes.get(state.device_id),
                presence=presence,
                offline_since=device.seen_at if device is not None and not device.online else None,
                link_up=self.link.up,
                halted=self.halted,
                slots_free=self._slots > self.staged + self.outstanding,
                status_topic=None
                if self.embedded
                else self.commands.addresses.status_topic(state.hardware_id),
                listens=self.link.listens(state.topic),
                definition=self.live.definitions.get(state.definition),
                gateway=gateway,
            )
        )

    def alive(self, device_id: str) -> None:
        """The device sent a live message: makes commands that are in back-off due now."""
        lane = self.live.lanes.get(device_id)
        if lane is None:
            return
        for member in list(lane.members.values()):
            if member.state.state is State.PENDING:
                break
            if member.state.state is State.PUBLISHED and not member.flight.open:
                self.attempts.end(member, Input.CAME_ONLINE)
                self.pump(device_id)

    def reported(self, member: Member, seq: int | None) -> None:
        """A progress report that was not recorded (over the limit) still restarts the result timer, but not
        an old signed one that somebody sends again."""
        if seq is not None:
            if seq <= max(member.flight.seq, -1 if member.state.seq is None else member.state.seq):
                return
            member.flight.seq = seq
        member.flight.heard_at = self.writer.now()
        self.attempts.set_timer(member)

    # --- handing over ---

    def pump_all(self) -> None:
        for device_id in list(self.live.lanes):
            self.pump(device_id)

    def pump(self, device_id: str) -> None:
        """Hands over what is due in a lane. Staging calls `pump` again: the queue prevents the recursion."""
        self._dirty.append(device_id)
        if self._pumping:
            return
        self._pumping = True
        try:
            while self._dirty:
                self._pump_lane(self._dirty.popleft())
        finally:
            self._pumping = False

    def _pump_lane(self, device_id: str) -> None:
        lane = self.live.lanes.get(device_id)
        if lane is None:
            return
        now = self.writer.now()
        self.live.forget_late(lane, now)
        ends = [*map(lanes.late_until, lane.late.values()), lane.shut_until, self._drain.ends(device_id) or 0]
        self.deadlines.set(f"lane/{device_id}", min([at for at in ends if at > now], default=None))
        if not lane.members:
            return
        free = self._slots - self.staged - self.outstanding
        if not self.link.up or self.halted or free <= 0 or not self.writer.open or self.waits:
            self._waiting[device_id] = None
            return
        presence = self.live.presence.get(device_id, Presence.NEVER)
        found = lanes.due(lane, presence, now, free, self.drained(now, device_id), self.link.listens)
        if found and not self.settle(device_id):
            return  # the device must be read from the log first; then its lane is pumped again
        for member in found:
            self._hand_over(lane, member, presence, now)
        if len(found) == free:
            self._waiting[device_id] = None

    def _hand_over(self, lane: Lane, member: Member, presence: Presence, now: int) -> None:
        state = member.state
        flight = member.flight
        request = Request(
            input=Input.HAND_OVER,
            now=now,
            counts=lanes.counts(member, presence),
            attempt_open=flight.open,
            repeatable=member.definition.repeatable,
            number=self.encoder.number(member),
        )
        decision = decide(state, request)
        if decision.verdict is not Verdict.RECORD:
            return
        try:
            outgoing = self.encoder.encode(member, now, request.number)
        except Unsendable as error:
            request = Request(input=Input.UNSENDABLE, now=now, reason=error.reason)
            self.commands.apply(state, decide(state, request), "broker")
            return
        flight.open, flight.written_at, flight.sent_at, flight.lease_until = True, None, None, None
        flight.counts = request.counts
        state = self.commands.apply(state, decision, "broker")
        self.staged += 1
        send = _Send(state.id, state.attempts, outgoing)
        self.writer.then(lambda: self._send(send))

    def _send(self, send: _Send) -> None:
        """`published` is durable: writes the bytes, unless the command expired or was closed since."""
        self.staged -= 1
        member = self._at(send)
        now = self.writer.now()
        if member is not None:
            presence, sent = self.live.presence.get(member.state.device_id, Presence.NEVER), False
            if lanes.has_time(member.state, now) and lanes.reachable(member.definition, presence):
                held = not self.link.direct  # a publish straight to the device takes no slot after its write
                sent = self.link.publish(send.outgoing, lambda got: self._receipt(send, got, held))
                self.outstanding += sent and held
                if sent:
                    member.flight.sent_at = now
                    self.queries.written(member, now)
                member.flight.unconfirmed = held or not sent
            member.flight.unsent += not sent
            # Also set if nothing was written: the attempt timer must end the attempt in both cases.
            member.flight.written_at = now
            self.attempts.set_timer(member)
        self._refill()

    def _at(self, send: _Send, *, closed_too: bool = False) -> Member | None:
        """The command, if this attempt is its last one and still open; else None."""
        member = self.live.members.get(send.command_id)
        if (
            member is None
            or member.state.state is not State.PUBLISHED
            or member.state.attempts != send.attempt
        ):
            return None
        return member if member.flight.open or closed_too else None

    def _refill(self) -> None:
        """Gives free send slots to the lanes that have waited longest."""
        while self._waiting and self.link.up and self._slots > self.staged + self.outstanding:
            device_id = next(iter(self._waiting))
            del self._waiting[device_id]
            self.pump(device_id)
            if device_id in self._waiting:
                return

    # --- results of an attempt ---

    def _receipt(self, send: _Send, receipt: Receipt, held: bool) -> None:
        """Takes the receipt for one publish. Never evidence about the device. `held`: it kept a slot."""
        self.outstanding -= held
        member = self.live.members.get(send.command_id)
        if member is not None and member.state.attempts == send.attempt:  # also if it has timed out meanwhile
            member.flight.confirm(self.writer.now(), known=receipt.reason is not None)
        if receipt.reason is not None:  # None: the outcome is unknown, and the attempt timer decides
            self._take_receipt(send, receipt.reason)
        self._refill()

    def _take_receipt(self, send: _Send, reason: int, *, again: bool = False) -> None:
        """`again`: it was lost with a failed commit; the attempt may have been closed by the reload."""
        if not self.writer.open or self.waits:
            self._untaken.append((send, reason))
            return
        member = self._at(send, closed_too=again)
        if member is None:
            return
        counted = (flight := member.flight).missed, flight.refused
        self.attempts.receipt(member, reason)
        held = member.definition.presence != "none"
        offline = self.live.presence.get(member.state.device_id) is Presence.OFFLINE
        if reason == NO_SUBSCRIBER and held and not offline and not self.link.direct:
            # Nobody was subscribed at one moment: the device may be away. Of an offline one it says nothing.
            self.presence(member.state.device_id, Presence.UNKNOWN)

        def lost() -> None:
            flight.missed, flight.refused = counted
            self._untaken.append((send, reason))

        self.writer.then(lambda: None, lost)

    # --- time ---

    def _fire(self, key: str) -> None:
        """Handles one timer. While the log cannot be written, or hand-over is halted, tries again in 1 s."""
        now = self.writer.now()
        if not self.writer.open or self.halted or self.waits:
            self.deadlines.set(key, now + 1_000)
            return
        if key.startswith("lane/"):
            self.pump(key.removeprefix("lane/"))
            return
        if key.startswith(TIMER):
            self.queries.ask(key, self.link)
            return
        if key.startswith(SILENCE):
            self._silent(key.removeprefix(SILENCE))
            return
        member = self.live.members.get(key)
        if member is None or member.state.closed:
            return
        due = lanes.overdue(member, now)
        by_mqtt = member.state.state is not State.PENDING and "mqtt" in member.definition.transports
        device_id = member.state.device_id
        if due is not None and by_mqtt and not self.drained(now, device_id):
            if self.link.up and (ends := self._drain.ends(device_id)) is not None:
                self.deadlines.set(key, ends)
            else:
                self._undrained[key] = None
        elif due is Input.ATTEMPT_TIMER:
            self.attempts.end(member, due)
        elif due is not None:
            decision = decide(member.state, Request(input=due, now=now))
            self.commands.apply(member.state, decision, "broker")
        else:
            self.attempts.set_timer(member)
            self.pump(member.state.device_id)

    def _silent(self, device_id: str) -> None:
        """The device said nothing for as long as its type allows: whether it is online is unknown now."""
        for each in (device_id, *self.others(device_id)):
            if self.live.presence.get(each) is Presence.ONLINE and not self.embedded:
                self.presence(each, Presence.UNKNOWN)

    def drained(self, now: int, device_id: str) -> bool:
        """True once the answers that waited during our absence have been read."""
        if self.waits or not self.link.up:
            return False
        return (ends := self._drain.ends(device_id)) is not None and now >= ends
