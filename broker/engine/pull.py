"""Delivery over HTTP: a device fetches its commands by heartbeat, or a relay (a phone) fetches for it.

`lanes.fetched` says which commands are due; `decide` hands them over under a lease. A command is
returned only after its `published` is durable, and not at all if it was closed during that wait.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import msgspec

from broker.domain import lanes
from broker.domain.decisions import Verdict, decide
from broker.domain.errors import Refusal, invalid, not_found
from broker.domain.fleet import DeviceState, News, same_attributes
from broker.domain.lanes import Lane, Member
from broker.domain.lifecycle import CommandState, Input, Request, State
from broker.engine.commands import Caller, conflict
from broker.engine.dispatch import Dispatch
from broker.engine.grants import Grants
from broker.engine.intake import SAYS, Intake
from broker.engine.registry import Registry
from broker.engine.speech.answers import request_of
from broker.seams import Message
from devices.speech.signing import looks_signed
from devices.wire import MAX_ANSWER_BYTES, Answer, Malformed, Unsendable, decode_answer

ME = "me"

PullTransport = Literal["heartbeat", "relay"]


class Fetched(NamedTuple):
    """A command that is handed over, with its grant."""

    state: CommandState
    grant: str | None


class Pull:
    """Fetching and reporting over HTTP, for the device itself and for API keys with write scope."""

    def __init__(self, registry: Registry, grants: Grants, dispatch: Dispatch, intake: Intake) -> None:
        self.registry = registry
        self.commands = registry.commands
        self.live = registry.live
        self.writer = registry.writer
        self.grants = grants
        self.dispatch = dispatch
        self.intake = intake

    def device(self, caller: Caller, name: str) -> DeviceState:
        """The named device, from memory: call `Commands.ready` first. A device can name only itself.

        Raises:
            Refusal: not_found.
        """
        device = self.commands.device(caller, self.name(caller, name))
        if caller.device_id not in (None, device.id):
            raise not_found("device", name)
        return device

    def name(self, caller: Caller, name: str) -> str:
        return caller.device_id if name == ME and caller.device_id is not None else name

    # --- fetching ---

    async def fetch(
        self, caller: Caller, name: str, transport: PullTransport, attributes: dict[str, Any] | None = None
    ) -> list[Fetched]:
        """The commands that are due by this transport, under a lease.

        `attributes`: values that the device sent with its heartbeat; they are merged into its attributes.

        Raises:
            Refusal: not_found; too_large, if the merged attributes exceed `attributes_bytes`.
            Unavailable: the log could not be written.
        """
        await self.commands.ready([self.name(caller, name)], project=caller.project)
        device = self.device(caller, name)
        if attributes:
            self.registry.check_attributes(attributes)
            self._keep(caller, device, attributes)
        taken = self._take(caller, device, transport)
        await self.writer.barrier()
        now = self.writer.now()
        return [fetched for fetched in taken if self._may_leave(fetched.state, now)]

    def _keep(self, caller: Caller, device: DeviceState, attributes: dict[str, Any]) -> None:
        """Takes in changed attributes. Equal ones record no event, so that heartbeats do not grow the log."""
        newest = self.registry.told.newest(device.id) or device
        merged = newest.attributes | attributes
        if not same_attributes(merged, newest.attributes):
            self.registry.check_attributes(merged)
            self.registry.told.tell(device.id, News(attributes=merged, actor=caller.actor))

    def _take(self, caller: Caller, device: DeviceState, transport: PullTransport) -> list[Fetched]:
        """Stages the hand-over of all due commands. Never awaits."""
        lane = self.live.lanes.get(device.id)
        if lane is None or self.dispatch.halted:
            return []
        now, taken = self.writer.now(), []
        for member, grant in self._speakable(lane, transport, now):
            state, flight = member.state, member.flight
            open_now = lanes.in_the_air(member, now)
            request = Request(
                input=Input.FETCH,
                now=now,
                transport=transport,
                attempt_open=open_now,
                lease_open=open_now and flight.lease_until is not None,
                repeatable=member.definition.repeatable,
            )
            decision = decide(state, request)
            if decision.verdict is Verdict.RECORD:
                flight.open, flight.written_at, flight.counts = True, None, False
                flight.lease_until = now + lanes.lease_ms(member.definition, transport)
                flight.holder = caller.actor
                state = self.commands.apply(state, decision, caller.actor)
            elif decision.verdict is not Verdict.ATTEMPT:
                continue
            taken.append(Fetched(state, grant))
        return taken

    def _speakable(self, lane: Lane, transport: PullTransport, now: int) -> list[tuple[Member, str | None]]:
        """The due commands with their grants.

        A command whose grant cannot be signed is closed as unsendable. Then the lane is checked again,
        because the next command may be due.
        """
        while True:
            found: list[tuple[Member, str | None]] = []
            ended = False
            for member in lanes.fetched(lane, transport, now, self.dispatch.drained(now, lane.device_id)):
                mint = self.grants.mint if member.definition.carries_grant else self.grants.shown
                try:
                    found.append((member, mint(member.state, now)))
                except Unsendable as error:
                    if lanes.in_the_air(member, now):
                        continue
                    request = Request(input=Input.UNSENDABLE, now=now, reason=error.reason)
                    self.commands.apply(member.state, decide(member.state, request), "broker")
                    ended = True
            if not ended:
                return found

    def _may_leave(self, handed: CommandState, now: int) -> bool:
        """Checked when `published` is durable: is this attempt still open, and has the command time left?"""
        member = self.live.members.get(handed.id)
        if (
            member is None
            or member.state.state is not State.PUBLISHED
            or member.state.attempts != handed.attempts
            or not lanes.in_the_air(member, now)
            or not lanes.has_time(member.state, now)
        ):
            return False
        if member.flight.written_at is None:
            member.flight.written_at = now
        return True

    # --- reporting ---

    async def report(
        self,
        caller: Caller,
        name: str,
        command_id: str,
        status: str,
        result: Any = None,
        error: Any = None,
        signed: str | None = None,
    ) -> CommandState:
        """Takes in an answer to one command, from the device itself or from a relay. `signed`: the answer as
        the device signed it, instead of its result or error.

        Raises:
            Refusal: not_found; conflict, which names the state; invalid_request; too_large.
            Unavailable: the log could not be written.
        """
        said = {"id": command_id, "status": status, "result": result, "error": error}
        payload = msgspec.json.encode(said) if signed is None else signed.encode()
        answer = _read(payload, command_id, status, signed=signed is not None)
        await self.commands.ready([self.name(caller, name)], [command_id], project=caller.project)
        device = self.device(caller, name)
        state = self.commands.seen(caller, command_id)
        if state.device_id != device.id:
            raise not_found("command", command_id)
        itself = caller.device_id == device.id
        own_word = "device_ack" if status == "acknowledged" else "device_result"
        definition = self.live.definitions[state.definition]
        if signed is not None and definition.answers_signed == "none":
            raise invalid("signed", f"answers of the type {state.device_type} are not signed")
        request = request_of(
            answer,
            definition,
            device,
            self.registry.secrets,
            now=self.writer.now(),
            evidence=own_word if itself else "relay_report",
            over_http=True,
            may_report=itself,
        )
        decision = decide(state, request)
        if decision.verdict is Verdict.RECORD:
            state = self.commands.apply(state, decision, caller.actor)
            self.intake.check_result(state, answer)
        elif decision.verdict is Verdict.UNMATCHED or decision.word == "promise_broken":
            message = Message(topic=f"http/{caller.actor}", payload=payload)
            self.intake.unmatched(message, device, decision.word, state.id)
        await self.writer.barrier()
        if decision.verdict is Verdict.UNMATCHED:
            raise invalid("signed", SAYS[decision.word][1])
        if decision.verdict is Verdict.CONFLICT:
            by_mqtt = "" if itself or state.pulled else " (no relay or heartbeat has fetched it)"
            raise conflict(state, request.input, by_mqtt)
        return state


def _read(payload: bytes, command_id: str, status: str, *, signed: bool) -> Answer:
    """The answer in a report.

    Raises:
        Refusal: not_found; invalid_request; too_large.
    """
    if len(payload) > MAX_ANSWER_BYTES:
        raise Refusal("too_large", f"the report has {len(payload)} bytes; at most {MAX_ANSWER_BYTES}")
    if signed and not looks_signed(payload):
        raise invalid("signed", "must be a JWS in compact form")
    try:
        answer = decode_answer(payload, None, {})
    except Malformed as fault:
        if signed:
            raise invalid("signed", fault.reason) from fault
        if "command id" in fault.reason:
            raise not_found("command", command_id) from fault
        raise invalid("error" if status == "failed" else "result", fault.reason) from fault
    told = "acknowledged" if answer.status == "progress" else answer.status
    if signed and (answer.id, told) != (command_id, status):
        raise invalid("signed", f"it is about {answer.id} ({answer.status}), not {command_id} ({status})")
    return answer
