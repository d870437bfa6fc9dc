"""Requests on commands: create, cancel, abandon, retry.

Each request loads the state, decides, stages its event and waits until that is durable. There must be
no `await` between reading the state and staging the event. Every answer waits at the commit barrier,
because it may depend on events that are not durable yet. A refusal raised here has not waited: the
caller must await `Writer.barrier` before it passes the refusal on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec

from broker.domain import lanes
from broker.domain.decisions import Decision, Verdict, decide
from broker.domain.errors import Refusal, invalid, not_found
from broker.domain.events import CommandEvent, Created, Defined, definition_stream
from broker.domain.fleet import DeviceSet, DeviceState
from broker.domain.lanes import Member
from broker.domain.lifecycle import CommandState, Input, Request, State, evolve
from broker.engine.ids import new_id
from broker.engine.live import Ids, Key, Live, Recent
from broker.engine.quotas import Quotas
from broker.engine.speech.addresses import Addresses
from broker.engine.writer import Writer
from broker.seams import New
from devices.types import BadParams, Definition, DeviceType, UnknownCommand
from projections import devices as devices_view

MAX_TTL_SEC = 31_536_000


class Caller(msgspec.Struct, frozen=True, kw_only=True):
    """Who makes a request. `project` None: all projects (an admin). `device_id`: set if a device asks.

    `devices`: the key is limited to these devices. The rates are the key's own limits; None: the settings'.
    """

    actor: str
    project: str | None
    scopes: frozenset[str] = frozenset()
    device_id: str | None = None
    devices: DeviceSet | None = None
    commands_per_minute: int | None = None
    requests_per_minute: int | None = None

    def sees(self, found: DeviceState | CommandState) -> bool:
        """Whether a device, or a command of a device, is one that the caller may know of."""
        device_id = found.id if isinstance(found, DeviceState) else found.device_id
        within = self.devices is None or self.devices.covers(device_id, found.hardware_id)
        return within and self.project in (None, found.project)


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """One command as a service orders it. `ttl_sec` unset: the type's default, else it never expires.

    `fingerprint`: digest of the request; a request that repeats `idempotency_key` and `fingerprint`
    gets the first command. `collapse_key`: cancels pending commands of the device with the same key.
    """

    device: str
    type: str
    params: Any = msgspec.UNSET
    ttl_sec: int | msgspec.UnsetType | None = msgspec.UNSET
    device_type: str | None = None
    idempotency_key: str | None = None
    fingerprint: bytes = b""
    collapse_key: str | None = None


class Accepted(msgspec.Struct, frozen=True):
    """`state`: the new command as of its `created` event. If `replayed`: the first command as it is now."""

    state: CommandState
    replayed: bool = False


class Commands:
    """The command side: every event of a command is staged by `record`.

    `changed(member)` is called synchronously after each new event was staged.
    """

    def __init__(
        self, writer: Writer, live: Live, types: dict[str, DeviceType], prefix: str, quotas: Quotas
    ) -> None:
        self.writer = writer
        self.live = live
        self.types = types
        self.prefix = prefix
        self.addresses = Addresses(types, prefix, live)
        self.quotas, self.limits = quotas, quotas.limits
        # (device type, command) -> its definition and digest. Types stay the same while the broker runs.
        self._digests: Recent[tuple[str, str], tuple[Definition, str]] = Recent(1_024)
        self.changed: Callable[[Member], None] = lambda _: None

    # --- recording ---

    def record(
        self,
        event: CommandEvent,
        *,
        command_id: str,
        before: CommandState | None,
        definition: Definition,
        project: str,
        device_id: str,
        actor: str,
    ) -> CommandState:
        """Stages one event and folds it into the state. The caller has already decided that it may follow."""
        version = 1 if before is None else before.version + 1
        stage, touch = self.writer.stage, self.writer.touch
        pending = stage(command_id, version, event, project=project, device_id=device_id, actor=actor)
        state = evolve(before, pending)
        touch(state)
        self.changed(self.live.put_command(state, definition))
        return state

    def apply(self, state: CommandState, decision: Decision, actor: str) -> CommandState:
        """Records the event of a decision about a known command; does nothing if there is no event."""
        if decision.event is None:
            return state
        return self.record(
            decision.event,
            command_id=state.id,
            before=state,
            definition=self.live.definitions[state.definition],
            project=state.project,
            device_id=state.device_id,
            actor=actor,
        )

    # --- looking up ---

    async def ready(
        self, names: Ids = (), command_ids: Ids = (), keys: Iterable[Key] = (), project: str | None = None
    ) -> None:
        """Returns when the log can be written and the named items are in memory, as far as they exist.

        The caller may decide and stage until its next `await`. If the live state was reloaded meanwhile,
        everything is read again. `project`: see `Live.bring`.

        Raises:
            Unavailable: the log cannot be written now.
        """
        names, command_ids, keys = list(names), list(command_ids), list(keys)
        while True:
            await self.writer.room()
            epoch = self.live.epoch
            await self.live.bring(self.writer.storage, names, command_ids, project)
            await self.live.bring_keys(self.writer.storage, keys)
            if self.writer.open and self.live.epoch == epoch:
                return

    def device(self, caller: Caller, name: str) -> DeviceState:
        """A device of the caller's project by id or hardware id, from memory: call `ready` first.

        Raises:
            Refusal: not_found; also for a device that the caller may not see and for a deleted one.
        """
        device = self.live.device(name)
        if device is None or not caller.sees(device) or device.deleted_at is not None:
            raise not_found("device", name)
        return device

    # --- create ---

    async def create(self, caller: Caller, order: Order, retry_of: str | None = None) -> Accepted:
        """Accepts one command, or returns the one that the same idempotency key created before.

        `retry_of` is checked after the last wait, because the old command may be answered meanwhile.

        Raises:
            Refusal: not_found (device), invalid_request (type, params, ttl), too_large, queue_full,
                rate_limit_exceeded, idempotency_conflict, gone.
            Unavailable: the log could not be written.
        """
        old = [] if retry_of is None else [retry_of]
        await self.ready([order.device], old, project=caller.project)
        device = self.device(caller, order.device)
        # A key with a device set has its idempotency keys to itself: a conflict would name a foreign command.
        key = (device.project, order.idempotency_key or "", "" if caller.devices is None else caller.actor)
        if order.idempotency_key is not None:
            await self.ready([order.device], old, [key])
            device = self.device(caller, order.device)
            if (first := self.live.keys.get(key)) is not None:
                return await self._replay(first, order.fingerprint)
        if retry_of is not None:
            self._check_retry(caller, retry_of)
        params, definition = self.check(device, order)
        state = self.place(caller, device, order, params, definition, retry_of)
        if order.idempotency_key is not None:
            self.keep_key(key, order.fingerprint, state)
        await self.writer.barrier()
        return Accepted(state)

    def check(self, device: DeviceState, order: Order) -> tuple[msgspec.Raw, Definition]:
        """The encoded parameters with their defaults filled in, and the definition of the command.

        Raises:
            Refusal: invalid_request, which names the field; too_large.
        """
        kind = self.addresses.kind(device, order.device_type)
        if isinstance(order.ttl_sec, int) and not 1 <= order.ttl_sec <= MAX_TTL_SEC:
            raise invalid("ttl_sec", f"must be 1 to {MAX_TTL_SEC} seconds, or null for never", order.ttl_sec)
        try:
            known = self._digests.get((kind.name, kind.declared(order.type)))
            definition = kind.definition(order.type) if known is None else known[0]
            given = {} if order.params is msgspec.UNSET else order.params
            encoded = msgspec.json.encode(given)
            self.quotas.check_params(device.project, given, encoded)
            params = kind.check_params(order.type, given)
            if params != given:  # with defaults
                encoded = msgspec.json.encode(params)
                self.quotas.check_params(device.project, params, encoded)
        except UnknownCommand as error:
            raise invalid("type", str(error)) from error
        except BadParams as error:
            raise invalid(error.field, error.reason, error.value) from error
        except (ValueError, OverflowError, RecursionError) as error:
            raise invalid("params", f"cannot be encoded as JSON: {error}") from error
        return msgspec.Raw(encoded), definition

    def place(
        self,
        caller: Caller,
        device: DeviceState,
        order: Order,
        params: msgspec.Raw,
        definition: Definition,
        retry_of: str | None = None,
    ) -> CommandState:
        """Stages a checked order, and cancels the commands that its collapse key replaces. Never awaits.

        Raises:
            Refusal: queue_full, rate_limit_exceeded; nothing was staged.
        """
        lane = self.live.lanes.get(device.id)
        superseded: Sequence[Member] = ()
        if lane is not None:
            superseded = lanes.collapsing(lane, order.collapse_key)
            self.quotas.check_queue(device, lane, order.type, superseded)
        taken = self.quotas.take_command(caller.actor, caller.commands_per_minute, device, self.writer.now())
        state = self._accept(caller, device, order, params, definition, retry_of, superseded)
        self.writer.then(lambda: None, lambda: self.quotas.give_back(taken))
        return state

    def _accept(
        self,
        caller: Caller,
        device: DeviceState,
        order: Order,
        params: msgspec.Raw,
        definition: Definition,
        retry_of: str | None,
        superseded: Sequence[Member] = (),
    ) -> CommandState:
        """Stages `created`. Never awaits."""
        writer = self.writer
        digest = self._define(definition)
        now = writer.now()
        ttl_sec = order.ttl_sec
        if isinstance(ttl_sec, msgspec.UnsetType):
            ttl_sec = self.types[definition.device_type].default_ttl(order.type)
        ttl_ms = None if ttl_sec is None else ttl_sec * 1_000
        command_id = new_id("cmd", now, writer.entropy)
        created = Created(
            hardware_id=device.hardware_id,
            type=order.type,
            device_type=definition.device_type,
            definition=digest,
            topic=self.addresses.command_topic(device, definition),
            params=params,
            expires_at=None if ttl_ms is None else now + ttl_ms,
            ttl_ms=ttl_ms,
            retry_of=retry_of,
            collapse_key=order.collapse_key,
        )
        for member in superseded:
            request = Request(input=Input.SUPERSEDE, now=now, superseded_by=command_id)
            self.apply(member.state, decide(member.state, request), "broker")
        decision = decide(None, Request(input=Input.CREATE, created=created, now=now))
        assert isinstance(decision.event, Created)
        return self.record(
            decision.event,
            command_id=command_id,
            before=None,
            definition=definition,
            project=device.project,
            device_id=device.id,
            actor=caller.actor,
        )

    def _define(self, definition: Definition) -> str:
        """The digest of a definition. Stages `defined` if the log does not have this definition yet."""
        name = (definition.device_type, definition.command)
        known = self._digests.get(name)
        if known is not None and known[0] is definition:
            digest = known[1]
        else:
            encoded = msgspec.json.encode(msgspec.to_builtins(definition), order="sorted")
            digest = hashlib.sha256(encoded).hexdigest()[:32]
            self._digests.put(name, (definition, digest))
        if digest not in self.live.definitions:
            body = msgspec.to_builtins(definition)
            event = Defined(definition=body)
            self.writer.stage(definition_stream(digest), 1, event, project="", device_id=None, actor="broker")
            self.writer.also(devices_view.defined(digest, body))
            self.live.definitions[digest] = definition
        return digest

    def _check_retry(self, caller: Caller, command_id: str) -> None:
        state = self.seen(caller, command_id)
        if decide(state, Request(input=Input.RETRY, now=self.writer.now())).verdict is not Verdict.RENEW:
            raise conflict(state, Input.RETRY)

    # --- idempotency ---

    def keep_key(self, key: Key, fingerprint: bytes, state: CommandState) -> None:
        self.live.keys.put(key, (fingerprint, state.id))
        self.writer.also(New("idempotency", (*key, fingerprint, state.id, state.created_at)))

    def replayed(self, first: tuple[bytes, str], fingerprint: bytes) -> CommandState:
        """The command that an idempotency key created before, from memory: call `ready` first.

        `first` is the fingerprint of the first request and its command id.

        Raises:
            Refusal: idempotency_conflict (other fingerprint), or gone (the command was erased).
        """
        digest, command_id = first
        if digest != fingerprint:
            raise Refusal(
                "idempotency_conflict",
                f"this idempotency key belongs to {command_id}, which was made by a different request",
                {"command_id": command_id},
            )
        state = self.live.command(command_id)
        if state is None:
            raise Refusal("gone", f"{command_id}, made with this idempotency key, was erased")
        return state

    async def _replay(self, first: tuple[bytes, str], fingerprint: bytes) -> Accepted:
        await self.writer.barrier()
        await self.ready(command_ids=[first[1]])
        state = self.replayed(first, fingerprint)
        await self.writer.barrier()
        return Accepted(state, replayed=True)

    # --- the other requests ---

    async def request(self, caller: Caller, command_id: str, request: Request) -> CommandState:
        """Decides one request on one command; returns the new state when it is durable.

        Raises:
            Refusal: not_found; conflict, which names the state.
            Unavailable: the log could not be written.
        """
        await self.ready(command_ids=[command_id], project=caller.project)
        state = self.seen(caller, command_id)
        decision = decide(state, msgspec.structs.replace(request, now=self.writer.now(), by=caller.actor))
        if decision.event is not None:
            state = self.apply(state, decision, caller.actor)
        await self.writer.barrier()
        if decision.verdict is Verdict.CONFLICT:
            raise conflict(state, request.input)
        return state

    async def cancel(self, caller: Caller, command_id: str, reason: str | None = None) -> CommandState:
        return await self.request(caller, command_id, Request(input=Input.CANCEL, reason=reason))

    async def abandon(self, caller: Caller, command_id: str, reason: str | None = None) -> CommandState:
        return await self.request(caller, command_id, Request(input=Input.ABANDON, reason=reason))

    def seen(self, caller: Caller, command_id: str) -> CommandState:
        """A command that the caller may see, from memory: call `ready` first.

        Raises:
            Refusal: not_found; also for a command that the caller may not see.
        """
        state = self.live.command(command_id)
        if state is None or not caller.sees(state):
            raise not_found("command", command_id)
        return state


def conflict(state: CommandState, wanted: Input, hint: str = "") -> Refusal:
    """The refusal of a request that the command's state does not allow; its message names the state."""
    handed = "" if state.published_at is None else ", it was handed over to the device's transport"
    if wanted is Input.ABANDON and state.state is State.PENDING:
        hint = " (cancel it)"
    return Refusal(
        "conflict",
        f"{state.id} is {state.state.value}{handed}: {wanted.value} is not possible{hint}",
        {"state": state.state.value},
    )
