"""Judges a soak: the devices' books against the log, and against what HTTP answered for.

It gives sentences for what is wrong, none if all is right. It must never take the broker's word for what a
device did.
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
    """What is wrong. To be called when all is closed; adds what it counted to the figures."""
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
        faults.append(f"{len(created)} commands were created, and their states are {states}")
    if counts.get("executed") != len(created):
        faults.append(f"{len(created)} commands were created, and the log holds {counts}")
    return faults + await _verify(world, figures)


def _answered(accepted: Collection[str], created: set[str]) -> list[str]:
    lost, stray = set(accepted) - created, created - set(accepted)
    return [
        *([f"{len(lost)} commands were answered for and are not in the log: {_few(lost)}"] if lost else []),
        *([f"{len(stray)} commands were made that nobody was told of: {_few(stray)}"] if stray else []),
    ]


def _order(books: Books, created: list[tuple[str, str]]) -> list[str]:
    """Each device ran what was created for it, each once, in that order."""
    wanted: dict[str, list[str]] = {}
    for command, device in created:
        wanted.setdefault(device, []).append(command)
    faults = []
    for device in sorted(wanted.keys() | books.runs.keys()):
        want, ran = wanted.get(device, []), books.runs.get(device, [])
        doubled, missing = len(ran) - len(set(ran)), set(want) - set(ran)
        if doubled or missing:
            faults.append(f"{device} ran {doubled} commands again and {len(missing)} never: {_few(missing)}")
        elif want != ran:
            place = next(at for at, (a, b) in enumerate(zip(want, ran, strict=False)) if a != b)
            faults.append(f"{device} ran {ran[place]} as number {place}, and {want[place]} was its turn")
    return faults


def _timed_out(books: Books, ends: list[tuple[str, str, int]]) -> list[str]:
    """No command ends as timed out when the MQTT server had taken the device's last answer before."""
    early = [
        (command, at - books.taken_ms[command])
        for command, event, at in ends
        if event == "timed_out" and books.taken_ms.get(command, at) < at
    ]
    if not early:
        return []
    worst = max(late for _, late in early)
    return [
        f"{len(early)} commands timed out up to {worst} ms after the MQTT server had taken their answer: "
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
