"""`ordain replay`: sends past events again, to a terminal, a webhook, MQTT, or a new data directory."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from broker.cli.base import Config, Data, Json, Text, print_json, settings_of
from broker.control import operator
from broker.domain.cloudevents import Entry, Wanted, cloud_event
from broker.log import sqlite as log
from broker.log.driven import read_now
from broker.log.erasing import bound
from broker.opening import snapshot
from broker.operations.asking import REFUSED, UNREACHABLE, USAGE, Failed, call
from broker.operations.replay import Played, Send, copy_log, entries, play
from broker.seams import Readable
from broker.settings import Settings
from broker.subscriptions.outbound import HttpOutbound
from broker.subscriptions.webhook_worker import delivery
from broker.world import SystemClock, new_file
from devices.clock import parse_rfc3339, rfc3339
from projections import devices as devices_view

SPEED = re.compile(r"(\d+(?:\.\d+)?)x?")
SECRET = re.compile(r"whsec_[A-Za-z0-9+/]{16,}={0,2}")
POINT = "a position of the log, or an RFC 3339 time"


def replay(
    *,
    into: str,
    first: Annotated[str, Parameter(name="--from")] = "1",
    last: Annotated[Text, Parameter(name="--to")] = None,
    device: Text = None,
    project: Text = None,
    speed: Text = None,
    secret: Text = None,
    dry_run: Annotated[bool, Parameter(negative="")] = False,
    data: Data = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Send recorded events again, with their original ids. No command is sent again.

    Parameters
    ----------
    into
        stdout; the URL of a webhook; mqtt, for the event topics (a broker must serve); or a new directory,
        which gets a copy of the log up to --to, with its projections.
    first
        The first event: a position of the log, or an RFC 3339 time; else the beginning.
    last
        The last event, inclusive: a position or a time; else the current end.
    device
        Only events of this device: id or hardware id.
    project
        Only events of this project.
    speed
        1x keeps the original pace, 10x is ten times as fast, 0.1x is slow motion; else without pauses.
    secret
        whsec_…: signs the requests to a webhook; else ORDAIN_WEBHOOK_SECRET, else they are not signed.
    dry_run
        Print what would be sent, and send nothing.
    """
    settings = settings_of(config, data=data)
    with closing(snapshot(settings)) as sql:
        span = _span(sql, first, last)
        wanted = Wanted(project=project, device=None if device is None else _device(sql, device))
        pace, secret = _speed(speed), _secret(secret)
        if not into.startswith(("http://", "https://")) and into not in ("stdout", "mqtt"):
            if "/" not in into:
                right = "must be stdout, mqtt, a URL, or a directory such as ./copy"
                raise Failed(USAGE, f"--into = {into}: {right}")
            if span[0] > 0 or wanted != Wanted() or pace is not None:
                raise Failed(
                    USAGE,
                    f"--into {into}: a directory gets the whole log from its beginning: use only --to",
                )
            played = _into_directory(sql, Path(into), span[1], dry_run=dry_run)
        else:
            played = asyncio.run(_play(sql, settings, into, span, wanted, pace, secret, dry_run))
    if as_json and into != "stdout":
        print_json(played._asdict())
    else:
        said = f"{'would send' if dry_run else 'sent'} {played.events} events of {played.devices} devices"
        if played.events:
            said += f", from {rfc3339(played.first_at)} to {rfc3339(played.last_at)}"
        print(f"{into}: {said}", file=sys.stderr if into == "stdout" else sys.stdout)


def _span(sql: Readable, first: str, last: str | None) -> tuple[int, int]:
    """The range to replay: events after the first position, up to the second one."""
    head = read_now(sql, log.head).position
    after = _point(sql, "--from", first, head, before=True)
    until = head if last is None else _point(sql, "--to", last, head, before=False)
    if after > until:
        raise Failed(USAGE, f"--from = {first} is after --to = {last}")
    return after, until


def _point(sql: Readable, flag: str, text: str, head: int, *, before: bool) -> int:
    """The position of the last event before a point (`before`), or at the point or before it."""
    whose, colon, number = text.rpartition(":")
    if colon and whose.startswith("log_"):
        if whose != read_now(sql, log.meta, "log_id"):
            raise Failed(
                USAGE, f"{flag} = {text}: belongs to another log than {read_now(sql, log.meta, 'log_id')}"
            )
        text = number
    if text.isascii() and text.isdecimal():
        if int(text) > head:
            raise Failed(USAGE, f"{flag} = {text}: the log ends at position {head}")
        return max(0, int(text) - before)
    try:
        at = parse_rfc3339(text)
    except ValueError:
        raise Failed(USAGE, f"{flag} = {text}: must be {POINT}") from None
    return read_now(sql, bound, at if before else at + 1) - 1


def _device(sql: Readable, name: str) -> str:
    found = read_now(sql, devices_view.by_name, [name]).get(name)
    if found is None:
        raise Failed(USAGE, f"--device = {name}: there is no such device in this log")
    return found.id


def _speed(text: str | None) -> float | None:
    if text is None:
        return None
    found = SPEED.fullmatch(text)
    if found is None or not float(found[1]):
        raise Failed(USAGE, f"--speed = {text}: must be such as 1x, 10x or 0.1x")
    return float(found[1])


def _secret(text: str | None) -> str | None:
    text = text or os.environ.get("ORDAIN_WEBHOOK_SECRET") or None
    if text is not None and not SECRET.fullmatch(text):
        raise Failed(USAGE, "--secret: must be whsec_ followed by base64, as shown when it was created")
    return text


def _into_directory(sql: Readable, directory: Path, until: int, *, dry_run: bool) -> Played:
    """Makes a new data directory that no broker serves. It gets its final name when it is complete."""
    if directory.exists():
        raise Failed(USAGE, f"--into {directory}: it already exists; name a new directory")
    if not dry_run:
        part = directory.with_name(f"{directory.name}.part")
        try:
            part.mkdir(mode=0o700, parents=True)
            with closing(new_file(part)) as target:
                target.execute("BEGIN")
                copy_log(sql, target, until)
                target.execute("COMMIT")
            part.rename(directory)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return asyncio.run(play(entries(sql, Wanted(), 0, until), _nothing, None))


async def _play(
    sql: Readable,
    settings: Settings,
    into: str,
    span: tuple[int, int],
    wanted: Wanted,
    speed: float | None,
    secret: str | None,
    dry_run: bool,
) -> Played:
    found = entries(sql, wanted, *span)
    if dry_run:
        return await play(found, _nothing, None)
    log_id = read_now(sql, log.meta, "log_id")
    async with _target(settings, into, log_id, secret) as send:
        return await play(found, send, speed)


async def _nothing(_: Entry) -> None:
    return


@asynccontextmanager
async def _target(settings: Settings, into: str, log_id: str, secret: str | None) -> AsyncIterator[Send]:
    if into == "stdout":

        async def show(entry: Entry) -> None:
            print_json(cloud_event(log_id, entry))

        yield show
    elif into == "mqtt":
        async with operator(settings) as (client, serving):
            if not serving:
                raise Failed(
                    UNREACHABLE, "--into mqtt: no broker serves this log, and only its MQTT link can publish"
                )

            async def publish(entry: Entry) -> None:
                await call(client, "POST", "/local/events/publish", {"position": entry.position})

            yield publish
    else:
        outbound = HttpOutbound(settings.webhook_allow, limits=settings.limits)
        secrets = [] if secret is None else [secret]
        try:

            async def post(entry: Entry) -> None:
                headers, body = delivery(log_id, entry, secrets, SystemClock().wall_ms() // 1_000)
                answer = await outbound.post(into, headers, body, settings.webhook_timeout_sec)
                if answer.status is None or not 200 <= answer.status < 300:
                    why = answer.error or f"it answered {answer.status}"
                    at = entry.position
                    raise Failed(REFUSED, f"{into}: position {at}: {why}; go on with --from {at}")

            yield post
        finally:
            await outbound.aclose()
