"""The invariants of delivery without MQTT: leases, and reports over HTTP.

Pure functions of a recorded history, like those in `life`. Nothing may be imported from the broker.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from tests.simulation.facts import ANSWER_EVENT, NEVER, Facts, data


def r9(facts: Facts) -> Iterator[str]:
    """A report that was answered 200 is durable before the answer, as an event of the device or as the
    reported end."""
    for call in facts.history.calls:
        if call.kind != "report" or call.status != 200:
            continue
        _, _, rest = call.body.partition("/commands/")
        command_id, _, what = rest.partition(" ")[0].partition("/")
        said = call.answer["state"] if what == "result" else None
        told = [
            row
            for row in facts.commands.get(command_id, ())
            if row["type"] in ANSWER_EVENT.values() and (said is None or row["type"] == said)
        ]
        if min(map(facts.durable, told), default=NEVER) > (call.returned or 0):
            yield f"a report on {command_id} was answered 200 before it was durable"


def d11(facts: Facts) -> Iterator[str]:
    """While a lease runs, no other attempt is made on any transport."""
    for command_id, rows in facts.commands.items():
        definition = facts.definition(command_id)
        for before, after in pairwise(row for row in rows if row["type"] == "published"):
            transport = data(before).get("transport", "mqtt")
            lease_ms = round(1_000 * definition.get(f"{transport}_lease_sec", 0))
            early = before["recorded_at"] + lease_ms - after["recorded_at"]
            if early > 0:
                yield f"{command_id}: attempt {data(after)['attempt']} came {early} ms before the lease's end"


def a6(facts: Facts) -> Iterator[str]:
    """Only the device itself may report on a command that was never fetched by heartbeat or relay."""
    for command_id, rows in facts.commands.items():
        pulled = False
        for row in rows:
            pulled |= row["type"] == "published" and data(row).get("transport", "mqtt") != "mqtt"
            if data(row).get("evidence") == "relay_report" and not pulled:
                yield f"{command_id}: {row['type']} was reported by a relay that never fetched the command"
