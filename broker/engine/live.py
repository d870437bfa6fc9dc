"""The state that the broker keeps in memory: open commands in their lanes, and caches.

All of it can be read again from the log; no fact is only here. Decisions read this state and stage
their events without an `await` in between, so that no other request can change it meanwhile.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Generic, NamedTuple, TypeVar

import msgspec

from broker.domain import attempts, lanes
from broker.domain.fleet import DeviceState
from broker.domain.lanes import Lane, Member, Presence
from broker.domain.lifecycle import CommandState, State
from broker.log import erasing
from broker.log.erasing import Purge
from broker.seams import Entropy, Sql, Storage
from devices.types import Definition
from projections import commands as commands_view
from projections import devices as devices_view
from projections import lanes as lanes_view

K = TypeVar("K")
V = TypeVar("V")
Ids = Iterable[str]
Key = tuple[str, str, str]  # project, idempotency key, scope

KEPT = 20_000
AT_ONCE = 1_000
KEPT_PURGES = 100


class Recent(Generic[K, V]):
    """A bounded map that drops what was not used for longest.

    It has two halves, so that a look-up need not note its time: what is found in the older half moves to the
    newer one, and when that is full, the older one is dropped.
    """

    def __init__(self, bound: int = KEPT) -> None:
        self._most = bound // 2
        self._newer: dict[K, V] = {}
        self._older: dict[K, V] = {}

    def get(self, key: K) -> V | None:
        found = self._newer.get(key)
        if found is None and (found := self._older.get(key)) is not None:
            self.put(key, found)
        return found

    def put(self, key: K, value: V) -> None:
        self._newer[key] = value
        if len(self._newer) >= self._most:
            self._newer, self._older = {}, self._newer

    def __contains__(self, key: K) -> bool:
        return key in self._newer or key in self._older

    def values(self) -> list[V]:
        return [*(self._older | self._newer).values()]

    def forget(self, key: K) -> None:
        self._newer.pop(key, None)
        self._older.pop(key, None)

    def clear(self) -> None:
        self._newer.clear()
        self._older.clear()


class _Read(NamedTuple):
    """What a start reads from the log. `late`: commands that timed out recently. `ended`: commands that
    were answered recently, without their content. `forgotten`: device id and time (ms) of commands that
    timed out and were erased."""

    open: list[CommandState]
    late: list[CommandState]
    ended: list[CommandState]
    forgotten: list[tuple[str, int]]
    definitions: dict[str, Definition]
    purges: list[Purge]


class Live:
    """`members`: open commands, and commands that timed out recently. `closed`: a cache of other commands."""

    def __init__(self) -> None:
        self.lanes: dict[str, Lane] = {}
        self.members: dict[str, Member] = {}
        self.definitions: dict[str, Definition] = {}
        self.closed: Recent[str, CommandState] = Recent()
        self.devices: Recent[str, DeviceState] = Recent()
        self.names: Recent[str, str] = Recent(2 * KEPT)
        self.keys: Recent[Key, tuple[bytes, str]] = Recent()
        self.numbers: Recent[tuple[str, int], str] = Recent()  # device id, number of an attempt -> command id
        self.presence: dict[str, Presence] = {}
        # A read that began before an erasure may still return the erased commands; these two filter them.
        self._erased: Recent[str, None] = Recent()
        self._purged: list[tuple[int, int]] = []
        self.epoch = 0  # how many times `load` has replaced everything

    # --- looking up ---

    def command(self, command_id: str) -> CommandState | None:
        """The state of a command, if it is in memory. None does not mean that the log has no such command."""
        member = self.members.get(command_id)
        return member.state if member is not None else self.closed.get(command_id)

    def device(self, name: str) -> DeviceState | None:
        """A device by id or hardware id, if it is in memory. Deleted devices are included."""
        device_id = self.names.get(name)
        return None if device_id is None else self.devices.get(device_id)

    def lane(self, device_id: str) -> Lane:
        lane = self.lanes.get(device_id)
        if lane is None:
            lane = self.lanes[device_id] = Lane(device_id)
        return lane

    def numbered(self, device_id: str, number: int) -> str | None:
        """The id of the command of which one attempt had this number. An open command is always found; of
        the closed ones only those whose numbers are in memory."""
        found = self.numbers.get((device_id, number))
        if found is None and (lane := self.lanes.get(device_id)) is not None:
            states = (member.state for member in (*lane.members.values(), *lane.late.values()))
            found = next((state.id for state in states if number in state.numbers), None)
        return found

    def put_device(self, device: DeviceState) -> None:
        self.devices.put(device.id, device)
        self.names.put(device.id, device.id)
        self.names.put(device.hardware_id, device.id)

    # --- changes; call these only after the event was staged ---

    def put_command(self, state: CommandState, definition: Definition) -> Member:
        """Stores a command's new state, and puts it into its lane or takes it out."""
        lane = self.lane(state.device_id)
        member = self.members.get(state.id)
        if member is None:
            member = Member(state, definition)
            self.members[state.id] = lane.members[state.id] = member
            self.closed.forget(state.id)
        for number in state.numbers:
            self.numbers.put((state.device_id, number), state.id)
        before, member.state = member.state, state
        if state.closed:
            lanes.closed(lane, member, state.updated_at)
            if state.state is not State.TIMED_OUT:
                del self.members[state.id]
                self.closed.put(state.id, state)
        elif before.closed:
            lanes.reopened(lane, member)
        return member

    def forget_late(self, lane: Lane, now: int) -> None:
        """Drops timed-out commands from the lane once their `late_answer_sec` is over, and an empty lane."""
        for member in [m for m in lane.late.values() if now >= lanes.late_until(m)]:
            del lane.late[member.state.id]
            del self.members[member.state.id]
            self.closed.put(member.state.id, member.state)
        if not lane.members and not lane.late and now >= lane.shut_until:
            self.lanes.pop(lane.device_id, None)

    # --- erasing ---

    def forget(self, state: CommandState) -> None:
        """A closed command was erased: removes it, and keeps a running read from bringing it back."""
        self._erased.put(state.id, None)
        self._drop(state)

    def forget_purged(self, cutoff: int, at: int) -> None:
        """Removes all commands that a purge erases: created before `cutoff` and closed before `at` (ms)."""
        self._purged = [*self._purged[-KEPT_PURGES:], (cutoff, at)]
        held = [*(member.state for member in self.members.values()), *self.closed.values()]
        for state in filter(self._is_erased, held):
            self._drop(state)

    def remember(self, state: CommandState) -> None:
        """Undoes `forget`: the commit of the erasure failed."""
        self._erased.forget(state.id)

    def remember_purged(self, cutoff: int, at: int) -> None:
        """Undoes `forget_purged`: the commit of the purge failed."""
        self._purged = [known for known in self._purged if known != (cutoff, at)]

    def _drop(self, state: CommandState) -> None:
        self.closed.forget(state.id)
        if self.members.pop(state.id, None) is not None:
            self.lanes[state.device_id].late.pop(state.id, None)

    def _is_erased(self, state: CommandState) -> bool:
        return state.id in self._erased or (
            state.closed
            and any(state.created_at < cutoff and state.updated_at < at for cutoff, at in self._purged)
        )

    # --- from the log ---

    async def load(self, storage: Storage, entropy: Entropy, now: int) -> None:
        """Reads everything from the log again, as after a restart.

        Keeps what no event holds: the presence of devices, which `Intake` puts back if it was learnt in a
        commit that failed, and of each command what `Flight.keep` names.
        """

        async def work(sql: Sql) -> _Read:
            definitions = {
                digest: _definition(body) for digest, body in (await devices_view.definitions(sql)).items()
            }
            without_ids = [each for each in definitions.values() if not each.carries_ids]
            return _Read(
                (await lanes_view.open_commands(sql)),
                (await commands_view.timed_out_since(sql, now - _longest_late(definitions.values()))),
                (await commands_view.answered_since(sql, now - _longest_late(without_ids))),
                (await commands_view.forgotten_since(sql, now - _longest_late(without_ids))),
                definitions,
                (await erasing.purges(sql)),
            )

        read = await storage.read(work)
        found: dict[str, Member] = {}
        by_device: dict[str, Lane] = {}
        for count, state in enumerate(read.open, 1):
            if count % AT_ONCE == 0:
                await asyncio.sleep(0)  # a node must show signs of life while it reads
            member = Member(state, read.definitions[state.definition])
            if state.state is not State.PENDING:
                member.begun = attempts.recovered(state, member.definition, now, entropy.uniform)
            lane = by_device.setdefault(state.device_id, Lane(state.device_id))
            found[state.id] = lane.members[state.id] = member
            if not member.definition.carries_ids:
                # A command that closed just before the stop may be answered a second time now.
                lane.shut_until = now + lanes.IDLESS_PAUSE_MS
        # From here on: no await. A receipt that came meanwhile is noted in the commands of before.
        for cache in (self.closed, self.devices, self.names, self.keys, self.numbers):
            cache.clear()
        before = {key: each for key, each in self.members.items() if each.begun is not None}
        self.lanes.clear()
        self.members.clear()
        promised = [(purge.cutoff, purge.at) for purge in read.purges]
        self._purged = [*self._purged, *(each for each in promised if each not in self._purged)]
        self.epoch += 1
        self.definitions = read.definitions
        self.lanes.update(by_device)
        self.members.update(found)
        for member in found.values():
            for number in member.state.numbers:
                self.numbers.put((member.state.device_id, number), member.state.id)
        for state in read.late:
            self.put_command(state, self.definitions[state.definition])
        for command_id, old in before.items():
            if (again := self.members.get(command_id)) is not None:
                again.flight.keep(old.flight, more=again.state.attempts - old.state.attempts)
        for state in read.ended:
            definition = self.definitions[state.definition]
            if not definition.carries_ids:
                lanes.closed(self.lane(state.device_id), Member(state, definition), state.updated_at)
        without_ids = [each for each in read.definitions.values() if not each.carries_ids]
        for device_id, at in read.forgotten:
            # The device may still answer an erased command. Such an answer without id must not be matched
            # to another command.
            lane = self.lane(device_id)
            lane.shut_until = max(lane.shut_until, at + _longest_late(without_ids))

    async def bring(
        self,
        storage: Storage,
        names: Iterable[str],
        command_ids: Iterable[str] = (),
        project: str | None = None,
    ) -> None:
        """Reads devices (by id or hardware id) and commands into memory, unless they are there already.

        `project`: what belongs to another project is read although it is there. So the time that it takes
        does not tell whether it exists.
        """
        missing_names = {name for name in names if _foreign(self.device(name), project)}
        missing_ids = {
            command_id for command_id in command_ids if _foreign(self.command(command_id), project)
        }
        if not missing_names and not missing_ids:
            return

        async def work(sql: Sql) -> tuple[dict[str, DeviceState], dict[str, CommandState]]:
            return (await devices_view.by_name(sql, missing_names)), (
                await commands_view.get_many(sql, missing_ids)
            )

        devices, commands = await storage.read(work)
        for device in devices.values():
            # A state that is in memory is newer than the one read; only its names may have been dropped.
            self.put_device(self.devices.get(device.id) or device)
        for state in commands.values():
            if self.command(state.id) is None and not self._is_erased(state):
                self.closed.put(state.id, state)

    async def bring_keys(self, storage: Storage, keys: Iterable[Key]) -> None:
        """Reads the entries of these idempotency keys into memory, unless they are there already."""
        missing = [key for key in keys if self.keys.get(key) is None]
        if not missing:
            return

        async def work(sql: Sql) -> dict[Key, tuple[bytes, str]]:
            find = "SELECT digest, command_id FROM idempotency WHERE project = ? AND key = ? AND scope = ?"
            rows = [(key, await sql.one(find, key)) for key in missing]
            return {key: (bytes(row[0]), row[1]) for key, row in rows if row is not None}

        for key, first in (await storage.read(work)).items():
            if self.keys.get(key) is None:
                self.keys.put(key, first)


def _foreign(found: DeviceState | CommandState | None, project: str | None) -> bool:
    return found is None or project not in (None, found.project)


def _definition(body: bytes) -> Definition:
    return msgspec.json.decode(body, type=Definition)


def _longest_late(definitions: Iterable[Definition]) -> int:
    """The longest time in which a timed-out command may still be answered, ms."""
    return lanes.ms(max((definition.late_answer_sec for definition in definitions), default=0))
