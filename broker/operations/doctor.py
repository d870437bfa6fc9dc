"""`ordain doctor`: checks everything a broker depends on, and says how to correct each problem.

It changes nothing, except for the canary, which registers three devices and sends two of them a command. A
*fault* loses commands, stops them, or shows them to others; a *warning* may become a fault.
"""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
import stat
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, Literal, NamedTuple

import httpx2

from broker.log import sqlite as log
from broker.log.driven import read_now
from broker.opening import snapshot
from broker.operations.asking import POLL_SEC, Failed, call
from broker.operations.passwords import canaries
from broker.seams import Readable, UnknownFormat
from broker.settings import Settings
from broker.world import DATABASE, SystemClock, open_for_reading
from devices.canary import Canary, Server, Untried, server_of, strangers
from devices.clock import rfc3339
from projections import follower

FULL_BYTES, TIGHT_BYTES = 100 << 20, 1 << 30
CLOCK_FAULT_MS = 5_000
OPEN = ("pending", "published", "acknowledged")
OLD_KEY_MS = 366 * 86_400_000


class Finding(NamedTuple):
    """The result of one check. `do` says how to correct the problem; it is empty if there is none."""

    level: Literal["ok", "warning", "fault"]
    check: str
    says: str
    do: str = ""


def postgresql(settings: Settings) -> Iterator[Finding]:
    """Checks a log in PostgreSQL: its form, chain and projections, and how the server keeps what it confirms.

    Raises:
        Broken: the server cannot be reached, or there is no log.
        BadSetting: the setting `log` is wrong.
    """
    try:
        sql = snapshot(settings)
    except UnknownFormat as unknown:
        yield Finding("fault", "format", str(unknown), "see docs/how-to/upgrade.md")
        return
    with closing(sql):
        yield Finding("ok", "format", f"{log.FORMAT}, which this release writes")
        yield from _server(sql)
        yield from _contents(sql)


def _server(sql: Readable) -> Iterator[Finding]:
    """How the server keeps what it confirms."""
    names = ("fsync", "full_page_writes", "data_checksums", "synchronous_standby_names")
    found = {name: sql.execute(f"SHOW {name}").fetchone()[0] for name in names}
    do = "see docs/how-to/scale-out.md"
    for name in ("fsync", "full_page_writes"):
        if found[name] != "on":
            yield Finding("fault", "database", f"{name} = {found[name]}: a power cut may lose events", do)
    if found["data_checksums"] != "on":
        yield Finding("warning", "database", "data_checksums = off: a bad disk is noticed late", do)
    if not found["synchronous_standby_names"]:
        says = "there is no synchronous standby: if the disk is lost, so are the last events"
        yield Finding("warning", "database", says, do)


def files(directory: Path) -> Iterator[Finding]:
    """Checks the data directory, the database's pages, the hash chain and the disk, also while a broker runs.

    Raises:
        Broken: there is no log, or it cannot be read.
    """
    path = directory / DATABASE
    try:
        open_for_reading(directory).close()
    except UnknownFormat as unknown:
        yield Finding("fault", "format", str(unknown), "see docs/how-to/upgrade.md")
        return
    yield Finding("ok", "format", f"{log.FORMAT}, which this release writes")
    with closing(open_for_reading(directory)) as sql:
        open_to = [each for each in (directory, path) if stat.S_IMODE(each.stat().st_mode) & 0o077]
        if open_to:
            names = " ".join(map(str, open_to))
            yield Finding(
                "warning", "file", f"users other than the owner can read {names}", f"chmod go= {names}"
            )
        yield from _database(sql, path)
    free = shutil.disk_usage(directory).free
    says = f"{free >> 20} MiB are free"
    if free < FULL_BYTES:
        yield Finding("fault", "disk", says, "free space: with a full disk the broker refuses every change")
    elif free < max(TIGHT_BYTES, path.stat().st_size // 4):
        yield Finding("warning", "disk", says, "free space before the disk is full")
    else:
        yield Finding("ok", "disk", says)


def _database(sql: sqlite3.Connection, path: Path) -> Iterator[Finding]:
    fault = sql.execute("PRAGMA quick_check(1)").fetchone()[0]
    if fault != "ok":
        yield Finding("fault", "file", f"{path}: {fault}", "restore a backup into a new directory")
        return
    yield Finding("ok", "file", f"{path}, {path.stat().st_size >> 20} MiB, every page is whole")
    sql.execute("BEGIN")
    yield from _contents(sql)


def _contents(sql: Readable) -> Iterator[Finding]:
    verified = read_now(sql, log.verify)
    if verified.fault is not None:
        do = "the log was changed from outside; keep a copy, and restore an older backup"
        yield Finding("fault", "chain", verified.fault, do)
    else:
        yield Finding("ok", "chain", f"{verified.rows} events, the hash chain is valid")
        if (differs := read_now(sql, follower.fault, lambda _: None)) is not None:
            do = "keep a copy, stop the broker, and: ordain projections rebuild"
            yield Finding("fault", "projections", differs, do)
        else:
            yield Finding("ok", "projections", "they match the log")
    behind = read_now(sql, log.head).recorded_at - SystemClock().wall_ms()
    if behind > CLOCK_FAULT_MS:
        last = rfc3339(read_now(sql, log.head).recorded_at)
        do = "set the clock (NTP); until then no command is sent to a device"
        yield Finding("fault", "clock", f"it is {behind} ms behind the last event ({last})", do)
    else:
        yield Finding("ok", "clock", "it is not behind the last event")


async def broker(client: httpx2.AsyncClient, serving: bool) -> list[Finding]:
    """Checks the broker's readiness, its devices, its keys. If no broker serves, only what the log shows."""
    found = []
    if not serving:
        found.append(
            Finding("warning", "broker", "no broker serves this log; no command moves", "ordain serve")
        )
    else:
        ready = await client.get("/readyz")
        reasons = ready.json()["error"]["details"]["reasons"] if ready.is_error else []
        found += [
            Finding("fault", "broker", reason, "see its log lines; it recovers when this is corrected")
            for reason in reasons
        ]
        if not reasons:
            found.append(Finding("ok", "broker", "it serves and is ready"))
    system = await call(client, "GET", "/v1/system")
    broken = await call(client, "GET", "/v1/unmatched?reason=promise_broken&limit=1")
    if broken["data"]:
        says = "a device answered a command that expired or was cancelled before it was sent"
        do = "see GET /v1/unmatched?reason=promise_broken: a forged command, or the grant leaked"
        found.append(Finding("fault", "promises", says, do))
    return found + _keys(
        (await call(client, "GET", "/local/keys"))["data"],
        (await call(client, "GET", "/local/grants"))["data"],
        system["clock"]["now"],
    )


def _keys(keys: list[dict[str, Any]], grants: list[dict[str, Any]], now: str) -> list[Finding]:
    valid = [key for key in keys if key["revoked_at"] is None]
    signing = [key for key in grants if key["signing"]]
    found = []
    if not valid:
        do = "ordain keys create --project P --scope devices:read --scope devices:write"
        found.append(Finding("warning", "keys", "no API key is valid: every request is refused", do))
    if not signing:
        found.append(Finding("fault", "keys", "there is no key to sign grants", "ordain grants rotate"))
    elif signing[0]["created_at"] < rfc3339(SystemClock().wall_ms() - OLD_KEY_MS):
        says = f"the key that signs grants is from {signing[0]['created_at'][:10]}"
        found.append(Finding("warning", "keys", says, "ordain grants rotate"))
    if not found:
        admins = sum("admin" in key["scopes"] for key in valid)
        found.append(Finding("ok", "keys", f"{len(valid)} API keys, {admins} of them for all projects"))
    return found


async def mqtt(
    client: httpx2.AsyncClient, serving: bool, settings: Settings, *, canary: bool
) -> list[Finding]:
    """Checks the MQTT server's access rules: does it accept clients without a password? With the canary: can
    a device do anything that it must not do?"""
    if not serving:
        return [Finding("warning", "mqtt", "not checked: no broker serves", "ordain serve")]
    system = await call(client, "GET", "/v1/system")
    url, prefix = system["mqtt"]["url"], system["settings"]["prefix"]
    found = _users(url, system["mqtt"]["rules"])
    do = "see mosquitto.conf and docs/mosquitto.acl: own topics for each device, no client without a password"
    try:
        server = server_of(url, settings.mqtt_ca)
        work = _canary(client, server, prefix, settings) if canary else strangers(server)
        breaches = await work
    except (Untried, Failed, OSError) as error:
        says = f"{url}: its access rules could not be checked: {str(error) or type(error).__name__}"
        hint = "is it running? An external server needs the canary's devices: ordain mqtt passwd-file"
        return [*found, Finding("warning" if canary else "fault", "mqtt", says, hint)]
    if breaches:
        return found + [Finding("fault", "mqtt", f"{url}: {breach}", do) for breach in breaches]
    says = "no device can use another's topics" if canary else "no client connects without a password"
    more = "" if canary else "; --canary also checks its rules as a device"
    return [*found, Finding("ok", "mqtt", f"{url}: {says}{more}")]


def _users(url: str, rules: dict[str, Any] | None) -> list[Finding]:
    """What the broker itself found out about an external server: at its start and every hour."""
    if rules is None:
        return []
    found = []
    if rules["fault"] is not None:
        do = "see mqtt_users in the settings"
        found.append(Finding("warning", "mqtt", f"{url}: its users are not in step: {rules['fault']}", do))
    if rules["missing"]:
        says, do = f"{url}: it does not know {rules['missing']} devices", "ordain devices token, for each"
        found.append(Finding("warning", "mqtt", says, do))
    found += [
        Finding("warning", "mqtt", f"{url}: at {rules['checked_at']}: {breach}", "ordain doctor --canary")
        for breach in rules["breaches"] or ()
    ]
    return found


async def _canary(client: httpx2.AsyncClient, server: Server, prefix: str, settings: Settings) -> list[str]:
    """Runs the canary with its devices."""
    thief, victim, bought = await canaries(client, settings)

    async def send(hardware_id: str, name: str) -> str:
        command = {"type": name, "ttl_sec": 60}
        made = await call(client, "POST", f"/v1/devices/{hardware_id}/commands", command)
        return str(made["id"])

    async def outcome(command_id: str) -> str:
        while (state := (await call(client, "GET", f"/v1/commands/{command_id}"))["state"]) in OPEN:  # noqa: ASYNC110
            await asyncio.sleep(POLL_SEC)
        return str(state)

    return await Canary(server, prefix, thief, victim, bought, send, outcome).breaches()
