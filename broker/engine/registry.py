"""Devices: registration, changes, tokens and presence.

A name belongs to one device only, as id or as hardware id, in the whole broker and for ever.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import msgspec

from broker.domain.decisions import decide
from broker.domain.errors import Refusal, invalid
from broker.domain.events import (
    SYSTEM,
    Changed,
    ClockStepped,
    Deleted,
    DeviceEvent,
    Offline,
    Online,
    Registered,
    Reported,
    Started,
    TokenRotated,
    device_stream,
)
from broker.domain.fleet import DeviceState, News, changes_presence, evolve_device
from broker.domain.lanes import Presence
from broker.domain.lifecycle import Input, Request
from broker.engine.commands import Caller, Commands
from broker.engine.grants import Secrets
from broker.engine.ids import check_answer_key, check_name, is_token, new_id, new_secret, token_digest
from broker.engine.quotas import Told
from broker.engine.speech.addresses import Names, names_of
from broker.engine.speech.gateways import Gateways
from broker.log import sqlite as log
from broker.seams import New, Sql
from devices.names import is_name
from devices.types import DeviceType
from projections import devices as devices_view

MQTT_USERS = frozenset({"ordain", "service"})
OF_DEVICE = "dtok_"
NOBODY = "$7$1$AAAAAAAAAAAAAAAA$"  # the digest of no token


class NewDevice(msgspec.Struct, frozen=True, kw_only=True):
    """A request to register a device. `id` None: the broker makes one. `gateway`: id or hardware id."""

    hardware_id: str
    type: str
    project: str
    id: str | None = None
    name: str | None = None
    attributes: dict[str, Any] = {}
    answer_key: str | None = None
    gateway: str | None = None


class Issued(NamedTuple):
    """A device with its new token, which is shown only once. `secret`: base64url, only for types that sign
    grants or answers with it."""

    device: DeviceState
    token: str
    secret: str | None


class Registry:
    """`presence(device_id, presence)` is called when the presence of a device changes.

    `entitled(device)` is called when a device's token is created, replaced or becomes invalid, and
    `issued(device, token)` with each new one.
    `told` has what devices said of themselves and is not recorded yet.
    """

    def __init__(self, commands: Commands) -> None:
        self.commands = commands
        self.writer = commands.writer
        self.live = commands.live
        self.types = commands.types
        self.addresses = commands.addresses
        self.secrets = Secrets(commands.writer)
        self.presence: Callable[[str, Presence], None] = lambda device_id, presence: None
        self._system_version = 0
        self.entitled: Callable[[DeviceState], None] = lambda device: None
        self.issued: Callable[[DeviceState, str], None] = lambda device, token: None
        self.told = Told(commands.writer, commands.live, commands.limits, commands.ready, self._append)
        most = commands.limits.devices_per_gateway
        self.gateways = Gateways(self.live, self.types, most, self.heard, self.told.newest)

    def record(
        self, event: DeviceEvent, device_id: str, before: DeviceState | None, project: str, actor: str
    ) -> DeviceState:
        """Records an event of a device, after what still waits for its own event."""
        if device_id in self.told and self.told.settle(device_id):
            before = self.live.device(device_id)
        return self._append(event, device_id, before, project, actor)

    def _append(
        self, event: DeviceEvent, device_id: str, before: DeviceState | None, project: str, actor: str
    ) -> DeviceState:
        version = 1 if before is None else before.version + 1
        pending = self.writer.stage(
            device_stream(device_id), version, event, project=project, device_id=device_id, actor=actor
        )
        device = evolve_device(before, pending)
        self.writer.touch(device)
        if before is None:
            for name in dict.fromkeys((device.id, device.hardware_id)):
                self.writer.also(New("names", (name, device.id)))
        self.live.put_device(device)
        if not isinstance(event, Online | Offline | Reported):
            self.addresses.put(device)
            self.gateways.put(device)
        return device

    # --- requests ---

    def check_attributes(self, attributes: dict[str, Any]) -> None:
        """Checks their size.

        Raises:
            Refusal: too_large.
        """
        size, most = len(msgspec.json.encode(attributes)), self.commands.limits.attributes_bytes
        if size > most:
            raise Refusal("too_large", f"attributes: {size} bytes in all; at most {most} are allowed")

    async def register(self, caller: Caller, new: NewDevice) -> Issued:
        """Registers a device; returns its token and secret, which are shown only once.

        Raises:
            Refusal: invalid_request; too_large, if the attributes exceed `attributes_bytes`; forbidden, if
                the key is limited to other devices; conflict, if a name is taken.
            Unavailable: the log could not be written.
        """
        device_id = new.id or new_id("dev", self.writer.now(), self.writer.entropy)
        for field, value in (("hardware_id", new.hardware_id), ("id", device_id), ("project", new.project)):
            check_name(field, value)
        if new.hardware_id in MQTT_USERS:
            raise invalid("hardware_id", "ordain and service are reserved MQTT user names", new.hardware_id)
        if new.type not in self.types:
            raise invalid("type", f"must be one of {', '.join(sorted(self.types))}", new.type)
        self.check_attributes(new.attributes)
        check_answer_key(new.answer_key)
        if caller.devices is not None and not caller.devices.covers(device_id, new.hardware_id):
            raise Refusal("forbidden", f"this key is limited to devices that {new.hardware_id} is not one of")
        kind, own = self.types[new.type], [device_id, new.hardware_id, new.gateway or device_id]
        await self.commands.ready(own)
        names = Names(new.hardware_id, new.name, self.gateways.named(new.gateway))
        if rivals := self.addresses.rivals(kind, names):
            await self.commands.ready([*own, *rivals])
        for name in (device_id, new.hardware_id):
            if self.live.device(name) is not None:
                raise Refusal("conflict", f"the name {name} is taken; a name is never used again")
        gateway = self.gateways.wanted(new.gateway, caller.sees, new.type, new.project)
        self.addresses.check(kind, names, device_id)
        token = self._new_token(device_id)
        event = Registered(
            hardware_id=new.hardware_id,
            device_type=new.type,
            token_digest=token_digest(token, self.writer.entropy),
            name=new.name,
            attributes=new.attributes,
            answer_key=new.answer_key,
            gateway=gateway,
        )
        device = self.record(event, device_id, None, new.project, caller.actor)
        secret = self._new_secret(device)
        self.gateways.moved(device)
        await self.writer.barrier()
        await self._tell(token, device)
        await self.gateways.regroup(self.writer.storage, gateway)
        return Issued(device, token, secret)

    async def change(self, caller: Caller, name: str, change: Changed) -> DeviceState:
        """Changes the fields that are set in `change`; unset fields keep their value. A move to another
        gateway has an event of its own.

        Raises:
            Refusal: not_found; invalid_request; too_large, if the attributes exceed `attributes_bytes`;
                conflict, if it is a gateway with devices and would not be one any more.
            Unavailable: the log could not be written.
        """
        if isinstance(change.device_type, str) and change.device_type not in self.types:
            raise invalid("type", f"must be one of {', '.join(sorted(self.types))}", change.device_type)
        if change.attributes is not msgspec.UNSET:
            self.check_attributes(change.attributes)
        if change.answer_key is not msgspec.UNSET:
            check_answer_key(change.answer_key)
        more = [change.gateway] if isinstance(change.gateway, str) else []
        device = await self.find(caller, name, *more)
        kind, names = self._changed(device, change)
        if kind is not None and (rivals := self.addresses.rivals(kind, names)):
            device = await self.find(caller, name, *more, *rivals)
            kind, names = self._changed(device, change)
        topics_changed = False
        if kind is not None and self.addresses.speaks(device, kind):
            topics_changed = (names, kind.name) != (names_of(device), device.device_type)
        old = device.gateway
        new = self.gateways.after(device, change, caller.sees)
        if kind is not None and topics_changed:
            self.addresses.check(kind, names, device.id)
        rest = msgspec.structs.replace(change, gateway=msgspec.UNSET)
        for each in (rest, Changed(gateway=msgspec.UNSET if new == old else new)):
            if each != Changed():
                device = self.record(each, device.id, device, device.project, caller.actor)
        if new != old:
            self.gateways.moved(device)
        await self.writer.barrier()
        if topics_changed or new != old:
            await self.gateways.tell(self.writer.storage, device.hardware_id, self.entitled)
            await self.gateways.regroup(self.writer.storage, old, new)
        return device

    def _changed(self, device: DeviceState, change: Changed) -> tuple[DeviceType | None, Names]:
        """The type and the names of the device after a change."""
        unset = msgspec.UNSET
        kind = device.device_type if change.device_type is unset else change.device_type
        name = device.name if change.name is unset else change.name
        gateway = device.gateway if change.gateway is unset else self.gateways.named(change.gateway)
        return self.types.get(kind), Names(device.hardware_id, name, gateway)

    async def delete(self, caller: Caller, name: str, *, force: bool) -> DeviceState:
        """Deletes a device for ever; with `force` also while it has open commands.

        Commands that were never handed over are cancelled. The others become timed_out, because the
        device may have executed them.

        Raises:
            Refusal: not_found; without `force`, conflict while the lane is not empty.
            Unavailable: the log could not be written.
        """
        device = await self.find(caller, name)
        self.gateways.check_free(device, "deleting it")
        lane = self.live.lanes.get(device.id)
        open_ones = list(lane.members.values()) if lane is not None else []
        if open_ones and not force:
            raise Refusal(
                "conflict",
                f"device {device.hardware_id} has {len(open_ones)} open commands; `force` ends them",
                {"open_commands": len(open_ones)},
            )
        # `deleted` comes first: then the closing of one command does not hand over the next one.
        device = self.record(Deleted(), device.id, device, device.project, caller.actor)
        self.secrets.forget(device.id)
        self.writer.then(lambda: self._gone(device.id))
        request = Request(input=Input.DEVICE_DELETED, by=caller.actor, now=self.writer.now())
        for member in reversed(open_ones):
            self.commands.apply(member.state, decide(member.state, request), caller.actor)
        await self.writer.barrier()
        await self.gateways.tell(self.writer.storage, device.hardware_id, self.entitled)
        await self.gateways.regroup(self.writer.storage, device.gateway)
        return device

    async def rotate_token(self, caller: Caller, name: str) -> Issued:
        """Gives the device a new token and secret. The old ones stop working at once.

        Raises:
            Refusal: not_found.
            Unavailable: the log could not be written.
        """
        device = await self.find(caller, name)
        token = self._new_token(device.id)
        event = TokenRotated(token_digest=token_digest(token, self.writer.entropy))
        device = self.record(event, device.id, device, device.project, caller.actor)
        secret = self._new_secret(device)
        await self.writer.barrier()
        await self._tell(token, device)
        return Issued(device, token, secret)

    async def _tell(self, token: str, made: DeviceState) -> None:
        """Tells the MQTT server of a new token, unless the device is deleted or has a newer one now."""

        def tell(device: DeviceState) -> None:
            self.entitled(device)
            if device.deleted_at is None and device.token_digest == made.token_digest:
                self.issued(device, token)

        await self.gateways.tell(self.writer.storage, made.hardware_id, tell)

    def _new_token(self, device_id: str) -> str:
        """`dtok_<secret>.<device id>`: the id lets a request with only a token name its device."""
        return f"{new_secret(OF_DEVICE, self.writer.entropy)}.{device_id}"

    def _new_secret(self, device: DeviceState) -> str | None:
        """A new device secret, if the type signs grants with one, or answers and the device has no public
        key; else the old one is deleted, and None returned.

        It is staged together with the token, so that both become valid in one transaction.
        """
        kind = self.types.get(device.device_type)
        answers = kind is not None and kind.answers_signed != "none" and device.answer_key is None
        if answers or (kind is not None and kind.grants == "HS256"):
            return self.secrets.renew(device.id)
        self.secrets.forget(device.id)
        return None

    async def find(self, caller: Caller, name: str, *more: str) -> DeviceState:
        """A device of the caller's project by id or hardware id. The caller may stage until its next `await`.
        `more`: other devices that are brought into memory.

        Raises:
            Refusal: not_found; also for a device that the caller may not see and for a deleted one.
        """
        await self.commands.ready([name, *more], project=caller.project)
        return self.commands.device(caller, name)

    async def authenticate(self, name: str, token: str) -> DeviceState | None:
        """The device of this name, if the token is its current token; else None.

        A refusal costs the same for every name: one look-up in the storage and one digest.
        """
        names = [name] if is_name(name) else []
        was_here = self.live.device(name) is not None
        await self.live.bring(self.writer.storage, names)
        device = self.live.device(name)
        alive = device is not None and device.deleted_at is None
        if is_token(token, device.token_digest if alive and device is not None else NOBODY) and alive:
            return device
        if was_here:
            await self.live.bring(self.writer.storage, names, project="")  # no device is of the project ""
        return None

    async def caller(self, token: str, name: str) -> Caller | None:
        """The device that sent this token, as a caller; None if the token is not valid.

        `name`: the device named by the request, used for tokens that contain no device id.
        """
        _, _, own = token.partition(".")
        device = await self.authenticate(own or name, token)
        if device is None:
            return None
        return Caller(actor=f"device:{device.id}", project=device.project, device_id=device.id)

    # --- presence ---

    async def load(self) -> None:
        by_name = self.addresses.by_name

        async def work(sql: Sql) -> tuple[list[str], list[DeviceState], list[DeviceState]]:
            self._system_version = await log.last_version(sql, SYSTEM)
            used = await devices_view.types_in_use(sql)
            children = await devices_view.with_gateway(sql) if any(map(is_gateway, used)) else []
            return used, await devices_view.of_types(sql, by_name), children

        is_gateway = self.gateways.is_gateway
        used, devices, children = await self.writer.storage.read(work)
        self.addresses.load(used, devices)
        self.gateways.load(children)

    async def started(
        self, release: str, mqtt: Literal["embedded", "external"], settings: dict[str, Any]
    ) -> None:
        """Records that a new process serves this log, and resets presence.

        With the embedded server all devices are offline now. With an external one it is unknown.
        """
        self.record_system(Started(release=release, mqtt=mqtt, settings=settings))
        for device in await self.writer.storage.read(devices_view.believed_online):
            self.live.put_device(device)
            if mqtt == "embedded":
                self.heard(device, Presence.OFFLINE, device.session)
            else:
                self.live.presence[device.id] = Presence.UNKNOWN
        await self.writer.barrier()

    def record_system(self, event: Started | ClockStepped) -> None:
        self._system_version += 1
        self.writer.stage(SYSTEM, self._system_version, event, project="", device_id=None, actor="broker")

    def nobody_known_online(self) -> None:
        """A new MQTT session began: online devices become unknown, as they may have left in the gap."""
        for device_id, presence in list(self.live.presence.items()):
            if presence is Presence.ONLINE:
                self.presence(device_id, Presence.UNKNOWN)

    def heard(self, device: DeviceState, presence: Presence, session: str | None) -> None:
        """Takes in the presence of a device, whose `newest` state is given. There is an event if it came
        online or went offline, within its rate; delivery reacts at once."""
        known = self.live.presence.get(device.id)
        if presence in (Presence.ONLINE, Presence.OFFLINE):
            event = (Online if presence is Presence.ONLINE else Offline)(session=session)
            if changes_presence(device, event):
                self.told.tell(device.id, News(presence=event))
        renewed = presence is Presence.ONLINE is known and session != device.session
        if renewed:
            # A new session while online: the device was away unnoticed, so open attempts are lost.
            self.presence(device.id, Presence.OFFLINE)
            self.presence(device.id, Presence.ONLINE)
        elif presence is not known:
            self.presence(device.id, presence)
        if renewed or presence is not known:
            self.gateways.follow(device, known, presence, renewed=renewed)

    def _gone(self, device_id: str) -> None:
        self.live.presence.pop(device_id, None)
