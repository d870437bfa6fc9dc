"""Requests of those who repair: retry what ended badly, cancel many at once.

They stand on `commands.py` and follow its rules: nothing between looking and staging may await.
"""

from __future__ import annotations

import hashlib

import msgspec

from broker.commands import Accepted, Caller, Commands, Order, conflict
from broker.decisions import Verdict, decide
from broker.errors import Refusal
from broker.lifecycle import Input, Request, State


class Which(msgspec.Struct, frozen=True, kw_only=True):
    """Which commands a bulk request is about; None means any."""

    device: str | None = None
    type: str | None = None
    created_by: str | None = None


class Repairs:
    def __init__(self, commands: Commands) -> None:
        self._commands = commands

    async def retry(self, caller: Caller, command_id: str, key: str | None = None) -> Accepted:
        """A new command like one that failed, timed out, expired or was cancelled, at the end of the lane.

        It lives as long as the old one was to live, from now. Retrying one that timed out may make the
        device do it twice.

        Raises:
            Refusal: not_found, conflict, device_deleted; and whatever `create` raises.
            Unavailable: the log could not be written.
        """
        await self._commands.ready(command_ids=[command_id])
        old = self._commands.seen(caller, command_id)
        decision = decide(old, Request(input=Input.RETRY, now=self._commands.writer.now(), by=caller.actor))
        if decision.verdict is not Verdict.RENEW:
            await self._commands.writer.barrier()
            raise conflict(old, Input.RETRY)
        await self._commands.ready([old.device_id])
        device = self._commands.live.device(old.device_id)
        if device is None or device.deleted_at is not None:
            raise Refusal("device_deleted", f"the device of {old.id} was deleted")
        order = Order(
            device=old.device_id,
            type=old.type,
            params=msgspec.json.decode(old.params),
            ttl_sec=None if old.ttl_ms is None else max(1, old.ttl_ms // 1_000),
            device_type=old.device_type,
            idempotency_key=key,
            fingerprint=hashlib.sha256(f"retry {old.id}".encode()).digest(),
        )
        return await self._commands.create(caller, order, retry_of=old.id)

    async def cancel_many(self, caller: Caller, which: Which, reason: str | None = None) -> list[str]:
        """Cancels every command that was never handed over and fits; gives their ids, in order of creation.

        Raises:
            Refusal: not_found (device).
            Unavailable: the log could not be written; some may have been cancelled.
        """
        await self._commands.ready([] if which.device is None else [which.device])
        device_id = None if which.device is None else self._commands.device(caller, which.device).id
        cancelled = []
        for member in sorted(self._commands.live.members.values(), key=lambda member: -member.state.position):
            # From the end of each lane, so that nothing moves up and is handed over meanwhile.
            state = member.state
            fits = (
                caller.sees(state.project)
                and device_id in (None, state.device_id)
                and which.type in (None, state.type)
                and which.created_by in (None, state.actor)
            )
            if fits and state.state is State.PENDING:
                request = Request(
                    input=Input.CANCEL, now=self._commands.writer.now(), by=caller.actor, reason=reason
                )
                self._commands.apply(state, decide(state, request), caller.actor)
                cancelled.append(state.id)
        await self._commands.writer.barrier()
        return cancelled[::-1]
