"""Repair requests: retry a command that did not succeed, cancel many commands at once.

They use `commands.py` and follow its rule: no `await` between reading the state and staging the event.
"""

from __future__ import annotations

import hashlib

import msgspec

from broker.domain.decisions import decide
from broker.domain.errors import Refusal
from broker.domain.lifecycle import CommandState, Input, Request, State
from broker.engine.commands import Accepted, Caller, Commands, Order

BATCH = 500  # commands cancelled without a pause; other tasks run between two batches


class Which(msgspec.Struct, frozen=True, kw_only=True):
    """The filter of a bulk request; None means any."""

    device: str | None = None
    type: str | None = None
    created_by: str | None = None


class Repairs:
    def __init__(self, commands: Commands) -> None:
        self._commands = commands

    async def retry(self, caller: Caller, command_id: str, key: str | None = None) -> Accepted:
        """Creates a copy of a command that failed, timed out, expired or was cancelled.

        It goes to the end of the lane and has the TTL of the old one, counted from now. If the old one
        timed out, the device may execute the command twice.

        Raises:
            Refusal: not_found, conflict, device_deleted, and all refusals of `create`.
            Unavailable: the log could not be written.
        """
        commands = self._commands
        await commands.ready(command_ids=[command_id], project=caller.project)
        old = commands.seen(caller, command_id)
        await commands.ready([old.device_id])
        device = commands.live.device(old.device_id)
        if device is None or device.deleted_at is not None:
            raise Refusal("device_deleted", f"the device of {old.id} was deleted")
        types, allowed = commands.addresses.types, commands.addresses.alike(device)
        order = Order(
            device=old.device_id,
            type=old.type,
            params=msgspec.json.decode(old.params),
            ttl_sec=None if old.ttl_ms is None else max(1, old.ttl_ms // 1_000),
            # Where the device's type now has another rule for signed answers, that type is used.
            device_type=None if old.device_type in types.keys() - allowed.keys() else old.device_type,
            idempotency_key=key,
            fingerprint=hashlib.sha256(f"retry {old.id}".encode()).digest(),
        )
        return await commands.create(caller, order, retry_of=old.id)

    async def cancel_many(self, caller: Caller, which: Which, reason: str | None = None) -> list[str]:
        """Cancels all pending commands that match the filter; returns their ids in order of creation.

        Raises:
            Refusal: not_found (device).
            Unavailable: the log could not be written; some commands may have been cancelled.
        """
        commands = self._commands
        await commands.ready([] if which.device is None else [which.device], project=caller.project)
        device_id = None if which.device is None else commands.device(caller, which.device).id
        # Newest first: then no command moves to the front of its lane and is handed over meanwhile.
        # Commands of one millisecond are in the order of their creation already; a sort keeps it.
        found = sorted(
            (
                member.state
                for member in commands.live.members.values()
                if member.state.state is State.PENDING and _fits(caller, which, device_id, member.state)
            ),
            key=lambda state: state.created_at,
        )[::-1]
        cancelled = []
        for start in range(0, len(found), BATCH):
            await commands.ready()
            for state in found[start : start + BATCH]:
                member = commands.live.members.get(state.id)
                if member is None or member.state.state is not State.PENDING:
                    continue  # it expired or was handed over since the search
                request = Request(
                    input=Input.CANCEL, now=commands.writer.now(), by=caller.actor, reason=reason
                )
                commands.apply(member.state, decide(member.state, request), caller.actor)
                cancelled.append(state.id)
            await commands.writer.barrier()
        await commands.writer.barrier()
        return cancelled[::-1]


def _fits(caller: Caller, which: Which, device_id: str | None, state: CommandState) -> bool:
    return (
        caller.sees(state)
        and device_id in (None, state.device_id)
        and which.type in (None, state.type)
        and which.created_by in (None, state.actor)
    )
