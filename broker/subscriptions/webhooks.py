"""Webhooks: registers endpoints, checks who may change them, runs their workers, and saves their progress.

Endpoints are stored beside the log, not in it. The state in memory is current; changed rows are written once
a second and before each HTTP answer. A secret is shown once, when it is made; it must never appear in a log
line or in a later answer.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import structlog

from broker.domain.errors import Refusal, Unavailable, invalid, not_found
from broker.engine.commands import Caller
from broker.engine.ids import new_id
from broker.engine.writer import Writer
from broker.seams import Drop, Entropy, Outbound, Put, Sql, of_project
from broker.subscriptions.feed import Feed
from broker.subscriptions.webhook_queue import Progress, fresh
from broker.subscriptions.webhook_state import Webhook
from broker.subscriptions.webhook_worker import Attempt, Endpoint, Secret, Sender, Worker

logger = structlog.get_logger()

SAVE_SEC = 1.0
AGAIN_SEC = 5.0
SECRETS = 3
SECRET_BYTES = 32


class Webhooks:
    def __init__(
        self, writer: Writer, feed: Feed, outbound: Outbound, *, timeout_sec: float, per_project: int
    ) -> None:
        self.writer = writer
        self.sender = Sender(writer, outbound, timeout_sec)
        self._feed = feed
        self._per_project = per_project
        self._kept: dict[str, Webhook] = {}
        self._dirty: dict[str, None] = {}
        self._changed = asyncio.Event()  # there may be something to save
        # A worker without work moves to the new head of the log.
        writer.listeners.append(lambda events, placed: self._changed.set() if events else None)
        self._group: asyncio.TaskGroup | None = None

    # --- running and keeping ---

    async def load(self, log_id: str) -> None:
        async def work(sql: Sql) -> list[Any]:
            return await sql.all("SELECT id, endpoint, progress FROM webhooks ORDER BY id")

        self.sender.log_id = log_id
        for id, endpoint, progress in await self.writer.storage.read(work):
            known = Webhook(
                msgspec.json.decode(endpoint, type=Endpoint), msgspec.json.decode(progress, type=Progress)
            )
            known.saved = known.at_rest
            self._kept[id] = known

    async def run(self) -> None:
        """Runs the workers of all active webhooks, and saves progress once a second, without end."""
        async with asyncio.TaskGroup() as group:
            self._group = group
            try:
                self._start(self._kept)
                while True:
                    await asyncio.sleep(SAVE_SEC)
                    self._changed.clear()
                    if self.save() and all(known.at_ease for known in self._kept.values()):
                        await self._changed.wait()
            finally:
                self._group = None

    def _mark(self, *ids: str) -> None:
        """The rows of these webhooks must be written."""
        self._dirty.update(dict.fromkeys(ids))
        self._changed.set()

    def save(self) -> bool:
        """Stages the rows of all changed webhooks; returns False if the log cannot be written now."""
        if not self.writer.open:
            return False
        for id, known in self._kept.items():
            if known.worker is not None:
                known.worker.rest()
                if known.progress != known.saved:
                    self._dirty[id] = None
        if not self._dirty:
            return True
        ids, self._dirty = tuple(self._dirty), {}
        for id in ids:
            if (kept := self._kept.get(id)) is None:
                self.writer.also(Drop("webhooks", (id,)))
            else:
                kept.saved = kept.progress
                row = (id, msgspec.json.encode(kept.endpoint), msgspec.json.encode(kept.saved))
                self.writer.also(Put("webhooks", row))
        self.writer.then(lambda: self._start(ids), lambda: self._mark(*ids))
        return True

    def _start(self, ids: Iterable[str]) -> None:
        """Starts a worker for each active webhook without one. Call it only when their rows are durable."""
        for id in ids:
            known = self._kept.get(id)
            if known is None or self._group is None or known.task is not None or known.changing.locked():
                continue
            if known.endpoint.state == "active":
                known.task = self._group.create_task(self._serve(known))

    async def _serve(self, known: Webhook) -> None:
        id, verdict = known.endpoint.id, None
        try:
            while verdict is None:
                worker = Worker(self.sender, self._feed, known.endpoint, known.at_rest, known.note)
                known.worker = worker
                try:
                    verdict = await worker.run()
                except Exception as error:
                    logger.error("webhook.failed", webhook=id, error=repr(error), exc_info=error)
                finally:
                    known.at_rest, known.worker = worker.window.progress(), None
                if verdict is None:
                    await asyncio.sleep(AGAIN_SEC)
        finally:
            known.task = None
            self._mark(id)
        state, reason = verdict
        known.endpoint = msgspec.structs.replace(known.endpoint, state=state, reason=reason)
        logger.warning("webhook.stopped", webhook=id, state=state, reason=reason)

    # --- requests ---

    def all(self, caller: Caller) -> list[Webhook]:
        """The webhooks that the caller may see, newest first."""
        found = (known for known in self._kept.values() if known.endpoint.seen_by(caller))
        return sorted(found, key=lambda known: known.endpoint.id, reverse=True)

    def seen(self, caller: Caller, id: str) -> Webhook:
        """The webhook with this id, if the caller may see it.

        Raises:
            Refusal: not_found.
        """
        known = self._kept.get(id)
        if known is None or not known.endpoint.seen_by(caller):
            raise not_found("webhook", id)
        return known

    async def create(self, caller: Caller, project: str, url: str, **fields: Any) -> tuple[Webhook, str]:
        """Makes an endpoint that gets events from now on. Returns it and its secret, `whsec_…`.

        Raises:
            Refusal: invalid_request (url), conflict: the project already has the allowed number of webhooks.
            Unavailable: the log cannot be written.
        """
        await self._check(url, project)
        await self.writer.room()
        if sum(known.endpoint.project == project for known in self._kept.values()) >= self._per_project:
            raise Refusal(
                "conflict", f"project {project} already has {self._per_project} webhooks, the most allowed"
            )
        now, secret = self.writer.now(), new_secret(self.writer.entropy)
        endpoint = Endpoint(
            id=new_id("whk", now, self.writer.entropy),
            project=project,
            url=url,
            created_at=now,
            created_by=caller.actor,
            devices=caller.devices,
            secrets=(Secret(value=secret),),
            **fields,
        )
        start = self._feed.head + 1
        known = self._kept[endpoint.id] = Webhook(endpoint, Progress(cursor=start, reached=start - 1))
        await self._durable(caller, "created", endpoint)
        return known, secret

    async def change(self, caller: Caller, id: str, **fields: Any) -> Webhook:
        """Changes the url, the name or the event filter; the change applies from the cursor on.

        Raises:
            Refusal: not_found, invalid_request (url).
            Unavailable: the log cannot be written.
        """
        if "url" in fields:
            await self._check(fields["url"], self.seen(caller, id).endpoint.project)
        async with self._worker_stopped(caller, id, "changed", fields=sorted(fields)) as known:
            known.endpoint = msgspec.structs.replace(known.endpoint, **fields)
            if "events" in fields:  # the new filter may match events that the old one skipped
                known.at_rest = msgspec.structs.replace(known.at_rest, reached=known.at_rest.cursor - 1)
        return known

    async def pause(self, caller: Caller, id: str) -> Webhook:
        """Stops deliveries until `resume`. Events are kept and sent then.

        Raises:
            Refusal: not_found.
            Unavailable: the log cannot be written.
        """
        async with self._worker_stopped(caller, id, "paused") as known:
            if known.endpoint.state == "active":
                reason = f"{caller.actor} paused it"
                known.endpoint = msgspec.structs.replace(known.endpoint, state="paused", reason=reason)
        return known

    async def resume(self, caller: Caller, id: str) -> Webhook:
        """Continues where it stopped. Failed events are due now, with a fresh three-day retry budget.

        Raises:
            Refusal: not_found, conflict: the receiver answered 410 Gone.
            Unavailable: the log cannot be written.
        """
        async with self._worker_stopped(caller, id, "resumed") as known:
            endpoint = known.endpoint
            if endpoint.state == "gone":
                raise Refusal("conflict", f"webhook {id} has ended: {endpoint.reason}; make another one")
            known.endpoint = msgspec.structs.replace(endpoint, state="active", reason=None)
            known.at_rest = fresh(known.at_rest)
        return known

    async def redrive(self, caller: Caller, id: str, position: int) -> Webhook:
        """Sends all wanted events from a position on again, with the same ids.

        Raises:
            Refusal: not_found, invalid_request: the position would skip undelivered events.
            Unavailable: the log cannot be written.
        """
        async with self._worker_stopped(caller, id, "redriven", position=position) as known:
            if not 1 <= position <= known.cursor:
                raise invalid(
                    "from",
                    f"must be a position from 1 to the cursor, {known.cursor}: a redrive skips no event",
                    position,
                )
            known.at_rest = Progress(cursor=position, reached=position - 1)
        return known

    async def rotate(self, caller: Caller, id: str, overlap_sec: int) -> tuple[Webhook, str]:
        """Makes a new secret. The old secrets also sign for `overlap_sec` more.

        Raises:
            Refusal: not_found.
            Unavailable: the log cannot be written.
        """
        secret = new_secret(self.writer.entropy)
        async with self._worker_stopped(caller, id, "rotated") as known:
            now = self.writer.now()
            until = now + overlap_sec * 1_000
            old = tuple(
                Secret(value=each.value, until=min(each.until or until, until))
                for each in known.endpoint.signing(now)
                if overlap_sec
            )
            secrets = (Secret(value=secret), *old)[:SECRETS]
            known.endpoint = msgspec.structs.replace(known.endpoint, secrets=secrets)
        return known, secret

    async def delete(self, caller: Caller, id: str) -> Webhook:
        """Stops deliveries and removes the webhook with all its state.

        Raises:
            Refusal: not_found.
            Unavailable: the log cannot be written.
        """
        async with self._worker_stopped(caller, id, "deleted") as known:
            del self._kept[id]
        return known

    async def resend(self, caller: Caller, id: str, position: int) -> Attempt:
        """Sends one event of the project again, now, without retries. An earlier delivery does not matter.

        Raises:
            Refusal: not_found, conflict: its regular delivery is still pending; rate_limit_exceeded.
        """
        known = self.seen(caller, id)
        if known.is_open(position) and position <= self._feed.head:
            raise Refusal("conflict", f"the event at position {position} is still waiting for its delivery")
        if known.resending:
            raise Refusal("rate_limit_exceeded", f"webhook {id} is still resending another event")
        known.resending = True
        try:
            entry = await self.sender.entry(known.endpoint, position) if position > 0 else None
            if entry is None:
                raise not_found("event at position", str(position))
            attempt, _ = await self.sender.send(known.endpoint, entry, None)
            known.note(attempt)
        finally:
            known.resending = False
        return attempt

    async def test(self, caller: Caller, id: str) -> Attempt:
        """Sends a test event now, whatever the webhook's state and filters. Nothing else changes.

        Raises:
            Refusal: not_found; rate_limit_exceeded, while another resend or test is under way.
        """
        known = self.seen(caller, id)
        if known.resending:
            raise Refusal("rate_limit_exceeded", f"webhook {id} is still sending another event")
        known.resending = True
        try:
            return await self.sender.test(known.endpoint, caller.actor)
        finally:
            known.resending = False

    @asynccontextmanager
    async def _worker_stopped(
        self, caller: Caller, id: str, action: str, **details: object
    ) -> AsyncIterator[Webhook]:
        """Stops the webhook's worker during a change; the change is durable before it starts again."""
        known = self.seen(caller, id)
        async with known.changing:
            await self.writer.room()
            if known.task is not None:
                known.task.cancel()
                await asyncio.wait({known.task})
                known.task = None  # a task cancelled before its first step does not clear this itself
            self.seen(caller, id)  # another request may have deleted it
            try:
                yield known
                await self._durable(caller, action, known.endpoint, **details)
            finally:
                self._mark(id)  # the next save starts the worker again, also after an error
        self._start([id])

    async def _durable(self, caller: Caller, action: str, endpoint: Endpoint, **details: object) -> None:
        """Saves a change and records who made it. Its URL may hold a secret, so it is not recorded."""
        self._dirty[endpoint.id] = None
        if not self.save():
            raise Unavailable("the log cannot be written now")
        self.writer.operated(caller.actor, f"webhook.{action}", endpoint.id, endpoint.project, **details)
        await self.writer.barrier()

    async def _check(self, url: str, project: str) -> None:
        of_project.set(project)
        fault = await self.sender.outbound.fault(url)
        if fault is not None:
            # A password in a refused URL is not repeated: answers get logged.
            raise invalid("url", fault, None if "@" in url else url)

    # --- metrics ---

    def lag(self) -> float:
        """Positions between the end of the log and the cursor that is furthest behind."""
        cursors = [known.cursor for known in self._kept.values() if known.endpoint.state == "active"]
        return float(max(0, self._feed.head + 1 - min(cursors, default=self._feed.head + 1)))

    def stopped(self) -> float:
        return float(sum(known.endpoint.state != "active" for known in self._kept.values()))


def new_secret(entropy: Entropy) -> str:
    return "whsec_" + base64.b64encode(entropy.token(SECRET_BYTES)).decode()
