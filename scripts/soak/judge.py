"""Judges a soak: compares the devices' books with the log, and with the commands that HTTP accepted.

It returns the faults as sentences. It must never use the broker's data to decide what a device did.
"""

from __future__ import annotations

import asyncio
import re
import subprocess
import time
from collections.abc import Collection, Iterable

from scripts.bench import processes
from scripts.soak.fleet import Books
from scripts.soak.world import World

CREATED = """SELECT e.stream, d.hardware_id FROM events e JOIN devices d ON d.id = e.device_id
    WHERE e.type = 'created' ORDER BY e.position"""
ENDS = "SELECT stream, type, recorded_at FROM events WHERE type IN ('executed', 'timed_out')"
COUNTS = "SELECT type, count(*) FROM events GROUP BY type ORDER BY type"
STATES = "SELECT state, count(*) FROM commands GROUP BY state ORDER BY state"
EXAMPLES = 3

Figures = dict[str, float | str]


async def judge(world: World, accepted: Collection[str], figures: Figures) -> list[str]:
    """Returns the faults and adds its counts to the figures. Call it when all commands are closed."""
    books = await world.books()
    created = [(str(command), str(device)) for command, device in world.ask(CREATED)]
    counts = {str(event): int(count or 0) for event, count in world.ask(COUNTS)}
    states = {str(state): int(count or 0) for state, count in world.ask(STATES)}
    figures["deliveries to devices"] = books.deliveries
    figures |= {f"log: {event}": count for event, count in counts.items()}
    faults = [
        *_answered(accepted, {command for command, _ in created}),
        *_order(books, created),
        *_timed_out(books, [(str(s), str(t), int(at or 0)) for s, t, at in world.ask(ENDS)]),
    ]
    if states != {"executed": len(created)}:
        faults.append(f"{len(created)} commands were created, but their states are {states}")
    if counts.get("executed") != len(created):
        faults.append(f"{len(created)} commands were created, but the log has {counts}")
    return faults + await _verify(world, figures)


def _answered(accepted: Collection[str], created: set[str]) -> list[str]:
    lost, stray = set(accepted) - created, created - set(accepted)
    return [
        *([f"{len(lost)} commands were accepted but are not in the log: {_few(lost)}"] if lost else []),
        *(
            [f"{len(stray)} commands are in the log but HTTP never accepted them: {_few(stray)}"]
            if stray
            else []
        ),
    ]


def _order(books: Books, created: list[tuple[str, str]]) -> list[str]:
    """Checks that each device executed its commands, each once, in the order of creation."""
    wanted: dict[str, list[str]] = {}
    for command, device in created:
        wanted.setdefault(device, []).append(command)
    faults = []
    for device in sorted(wanted.keys() | books.runs.keys()):
        want, ran = wanted.get(device, []), books.runs.get(device, [])
        doubled, missing = len(ran) - len(set(ran)), set(want) - set(ran)
        if doubled or missing:
            faults.append(f"{device} ran {doubled} commands twice and {len(missing)} never: {_few(missing)}")
        elif want != ran:
            place = next(at for at, (a, b) in enumerate(zip(want, ran, strict=False)) if a != b)
            faults.append(f"{device} ran {ran[place]} as number {place}, but {want[place]} was next")
    return faults


def _timed_out(books: Books, ends: list[tuple[str, str, int]]) -> list[str]:
    """Checks that no command timed out after the MQTT server had acknowledged the device's final answer."""
    early = [
        (command, at - books.taken_ms[command])
        for command, event, at in ends
        if event == "timed_out" and books.taken_ms.get(command, at) < at
    ]
    if not early:
        return []
    worst = max(late for _, late in early)
    return [
        f"{len(early)} commands timed out up to {worst} ms after the MQTT server had their answer: "
        + _few(command for command, _ in early)
    ]


async def _verify(world: World, figures: Figures) -> list[str]:
    since = time.monotonic()
    try:
        said = await asyncio.to_thread(processes.ordain, "log", "verify", "--data", str(world.data))
    except subprocess.CalledProcessError as error:
        return [f"log verify: {error.stderr or error.stdout}"]
    figures["log verify"] = re.sub(r"\s+", " ", said)
    figures["log verify, s"] = time.monotonic() - since
    return []


def _few(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)[:EXAMPLES])
