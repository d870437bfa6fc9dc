"""Writes a release's golden log: one real run of the core on a fixed clock, with every kind of event in it.

Run once, when a release is made: `python -m tests.golden.write RELEASE`. A file that exists is never
written again, because it says what that release left on people's disks.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import msgspec

from broker.domain.events import (
    ERASURES,
    OWNER,
    TYPES,
    Cancelled,
    Changed,
    ClockStepped,
    Deleted,
    Erased,
    Error,
    Failed,
    Owned,
    Published,
    Reported,
    device_stream,
)
from broker.log import sqlite as log
from broker.log.chain import Row
from broker.log.driven import read_now
from broker.log.lines import as_line
from broker.seams import Receipt, Sqlite
from projections import commands as commands_view
from projections.commands import Filter
from tests.integration.core_support import ME, Bench, on_virtual_time, simulated, until
from tests.reading import plain
from tests.simulation.loop import SimLoop

HERE = Path(__file__).parent


async def lives(bench: Bench) -> None:
    """One command for each end, and each way there that leaves other fields behind."""
    device = await bench.device()
    lock = await bench.device("lock-1", "iotee_device")
    await bench.device("lamp-2", online=False)

    async def flying(hardware_id: str = "lamp-1", type: str = "open", **fields: Any) -> str:
        count = len(bench.wire.sent)
        state = await bench.order(hardware_id, type, **fields)
        await until(lambda: len(bench.wire.sent) > count, within_sec=3_600)
        return state.id

    done = await flying(params={"level": 1.5, "name": "Grüße"}, ttl_sec=600, idempotency_key="first")
    bench.answers(done, "acknowledged", at="2026-11-20T09:30:00Z")
    await bench.becomes(done, "acknowledged")
    bench.answers(done, "progress", progress={"percent": 42.5, "note": "half way"})
    await until(lambda: bench.live.members[done].state.progress_count == 1)
    bench.answers(done, "executed", result={"b": 1, "a": [2.50, None]})
    await bench.becomes(done, "executed")
    failed = await flying()
    bench.answers(failed, "failed", error={"code": "jammed", "message": "stuck", "details": {"z": 1, "a": 2}})
    await bench.becomes(failed, "failed")
    silent = await flying()  # five attempts without an answer
    await bench.becomes(silent, "timed_out", within_sec=36_000)
    late = await flying(ttl_sec=5)
    await bench.becomes(late, "timed_out")
    bench.answers(late, "acknowledged")
    await bench.becomes(late, "acknowledged")
    bench.answers(late, "executed", result="done at last")
    await bench.becomes(late, "executed")
    quiet = await flying()
    bench.answers(quiet, "acknowledged")
    await bench.becomes(quiet, "timed_out", within_sec=3_600)
    given_up = await flying()
    await bench.core.commands.abandon(ME, given_up, "the lamp is broken")

    refused = await flying("lock-1", "lock")
    bench.wire.due[-1][1](Receipt(written=True, reason=0x87))
    await bench.becomes(refused, "failed")
    inferred = await flying("lock-1", "unlock")
    bench.wire.due[-1][1](Receipt(written=True, reason=0))
    bench.says(b"ok", "lock-1")
    await bench.becomes(inferred, "executed")

    expired = await bench.order("lamp-2", ttl_sec=2)
    await bench.becomes(expired.id, "expired")
    cancelled = await bench.order("lamp-2")
    await bench.core.commands.cancel(ME, cancelled.id, "wrong lamp")
    await bench.order("lamp-2")  # stays pending
    left = await flying()
    bench.answers(left, "progress", progress={"percent": 1})
    await bench.becomes(left, "acknowledged")
    await flying("lock-1", "reboot", ttl_sec=None)  # stays published
    bench.core.intake.device_offline("lamp-1")
    await until(lambda: bench.live.presence[device.id] == "offline")
    await bench.core.registry.rotate_token(ME, lock.id)


async def the_rest(bench: Bench) -> None:
    """What this release reads but does not yet write by itself, as it would be recorded."""
    await bench.core.registry.change(ME, "lamp-2", Changed(name="Hall", attributes={"floor": 2}))
    registry, commands, writer = bench.core.registry, bench.core.commands, bench.writer
    registry.record_system(ClockStepped(by_ms=-3_600_000))
    writer.operated(ME.actor, "key.revoked", "key_x", "acme")
    owned = Owned(incarnation="node_x", node="one", address="10.0.0.1:8081")
    writer.stage(OWNER, 1, owned, project="", device_id=None, actor="broker")
    device = await registry.find(ME, "lamp-1")
    said = Reported(state={"state": "ON", "level": 2.5})
    device = registry.record(said, device.id, device, device.project, f"device:{device.id}")
    registry.record(Deleted(), device.id, device, device.project, ME.actor)
    pending = next(m.state for m in bench.live.members.values() if m.state.state == "pending")

    def record(state: Any, event: Any) -> Any:
        definition = bench.live.definitions[state.definition]
        return commands.record(
            event,
            command_id=state.id,
            before=state,
            definition=definition,
            project=state.project,
            device_id=state.device_id,
            actor="broker",
        )

    superseded = (await bench.order("lamp-2")).id
    record(
        bench.live.members[superseded].state,
        Cancelled(by="broker", superseded_by=pending.id, evidence="broker"),
    )
    unsendable = (await bench.order("lamp-2")).id
    record(
        bench.live.members[unsendable].state,
        Failed(error=Error(code="unsendable", message="too large"), by="broker", evidence="broker"),
    )
    relayed = (await bench.order("lamp-2")).id
    record(bench.live.members[relayed].state, Published(attempt=1, transport="relay", counts=False))
    writer.stage(
        ERASURES, 1, Erased(ids=["cmd_none"], count=0), project="acme", device_id=None, actor=ME.actor
    )
    await writer.barrier()


def main(release: str) -> None:
    async def world(loop: SimLoop) -> tuple[list[Row], dict[str, Any]]:
        async with on_virtual_time(loop) as (bench, _):
            await lives(bench)
            await the_rest(bench)

            def work(sql: Sqlite) -> tuple[list[Row], dict[str, Any]]:
                return list(read_now(sql, log.all_rows)), folded(sql)

            return await bench.writer.storage.read(plain(work))

    rows, states = simulated(world)
    assert {row.type for row in rows} == set(TYPES), set(TYPES) - {row.type for row in rows}
    for name, content in (
        (f"{release}.jsonl", b"".join(as_line(row) + b"\n" for row in rows)),
        (f"{release}.states.json", msgspec.json.format(msgspec.json.encode(states), indent=1) + b"\n"),
    ):
        with (HERE / name).open("xb") as file:
            file.write(content)


def folded(sql: Sqlite) -> dict[str, Any]:
    """Everything the log folds to: the state of every command and device, by id, in plain JSON."""
    found: dict[str, Any] = {}
    states = sorted(read_now(sql, commands_view.newest, Filter(), -1), key=lambda state: state.id)
    found["commands"] = {
        state.id: msgspec.json.decode(msgspec.json.encode(state)) | placed(sql, state.id) for state in states
    }
    rows = sql.execute("SELECT id, body FROM devices ORDER BY id").fetchall()
    found["devices"] = {
        row[0]: msgspec.json.decode(row[1]) | placed(sql, device_stream(row[0])) for row in rows
    }
    open_commands = "SELECT device_id, position FROM commands WHERE closed_at IS NULL ORDER BY 1, 2"
    found["open"] = [list(row) for row in sql.execute(open_commands).fetchall()]
    return found


def placed(sql: Sqlite, stream: str) -> dict[str, int]:
    """The positions of the first and the last event of a stream."""
    first, last = sql.execute(
        "SELECT min(position), max(position) FROM events WHERE stream = ?", (stream,)
    ).fetchone()
    return {"position": first, "last_position": last}


if __name__ == "__main__":
    main(sys.argv[1])
