"""The worker of one webhook: reads the events its endpoint wants, sends them, and decides when to stop.

It sends only durable events and skips none: an event stays due until the receiver answers 2xx. A failing
endpoint has one request under way at a time, so it does not slow other endpoints down.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, Literal

import msgspec

from broker import __version__
from broker.domain.cloudevents import CloudEvent, Entry, Wanted, cloud_event
from broker.domain.fleet import DeviceSet
from broker.engine.commands import Caller
from broker.engine.ids import new_id
from broker.engine.writer import Writer
from broker.seams import Answer, Outbound, of_project
from broker.subscriptions.feed import Feed, Subscription
from broker.subscriptions.webhook_queue import GIVE_UP_MS, Pending, Progress, Window, hold_ms, signature
from devices.clock import rfc3339
from projections import outgoing

State = Literal["active", "paused", "gone"]

PARALLEL = 16  # requests of one endpoint at a time, each for a different device
SHARED = 128  # requests of all endpoints together, not counting the first of each endpoint
GONE = 410
ASKED_TO_WAIT = (429, 503)
TEST = "ordain.webhook.test.v1"


class NoWayOut:
    """The `Outbound` of a broker without outgoing HTTP: it refuses every URL."""

    async def fault(self, url: str) -> str | None:
        return "cannot be reached from here"

    async def post(self, url: str, headers: Any, body: bytes, timeout_sec: float) -> Answer:
        return Answer(error="nothing can be sent from here")


class Secret(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`until`: this secret was replaced, and still signs beside the new one until this time, ms."""

    value: str
    until: int | None = None


class Endpoint(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The configuration and state of one webhook. `events`: event types without prefix; empty: all. Times in
    ms.

    `devices`: the devices that the key which made it was limited to.

    `state`: `paused` until it is resumed, `gone` after a 410; `reason` says why.
    """

    id: str
    project: str
    url: str
    created_at: int
    created_by: str
    secrets: tuple[Secret, ...]
    name: str | None = None
    events: tuple[str, ...] = ()
    device_id: str | None = None
    command: str | None = None
    devices: DeviceSet | None = None
    state: State = "active"
    reason: str | None = None

    def seen_by(self, caller: Caller) -> bool:
        """A key with a device set sees only the webhooks that were made with the same set."""
        return caller.project in (None, self.project) and caller.devices in (None, self.devices)

    def signing(self, now: int) -> tuple[Secret, ...]:
        """The newest secret first."""
        return tuple(secret for secret in self.secrets if secret.until is None or secret.until > now)


class Attempt(msgspec.Struct, frozen=True, kw_only=True):
    """One request that was sent. `attempt` is its number for this event; None for a manual resend."""

    position: int
    type: str
    device_id: str
    command_id: str | None
    attempt: int | None
    at: int
    duration_ms: int
    status: int | None
    error: str | None

    @property
    def delivered(self) -> bool:
        return self.status is not None and 200 <= self.status < 300

    @property
    def outcome(self) -> str:
        """The receiver's answer or the error, in a few words."""
        return f"answered {self.status}" if self.status is not None else self.error or "no answer"


def delivery(
    log_id: str, entry: Entry, secrets: Sequence[str], timestamp_sec: int
) -> tuple[dict[str, str], bytes]:
    """Headers and body of a delivery, in the format of Standard Webhooks; not signed without a secret."""
    id, body = f"{log_id}_{entry.position}", msgspec.json.encode(cloud_event(log_id, entry))
    return signed(id, body, secrets, timestamp_sec), body


def signed(id: str, body: bytes, secrets: Sequence[str], timestamp_sec: int) -> dict[str, str]:
    """The headers of a request to a webhook."""
    headers = {
        "content-type": "application/cloudevents+json",
        "user-agent": f"Ordain/{__version__}",
        "webhook-id": id,
        "webhook-timestamp": str(timestamp_sec),
    }
    if secrets:
        headers["webhook-signature"] = signature(secrets, id, timestamp_sec, body)
    return headers


class Sender:
    """Sends the requests of all endpoints. `tell` is called after each."""

    def __init__(self, writer: Writer, outbound: Outbound, timeout_sec: float) -> None:
        self.writer = writer
        self.outbound = outbound
        self.log_id = ""
        self.tell: Callable[[Attempt], None] = lambda _: None
        self.shared = 0
        self._timeout_sec = timeout_sec

    async def entry(self, endpoint: Endpoint, position: int) -> Entry | None:
        """Reads the event from the log just before it is sent, because erased data must not be sent."""
        wanted = Wanted(project=endpoint.project, within=endpoint.devices)
        found, _ = await self.writer.storage.read(
            lambda sql: outgoing.page(sql, wanted, position - 1, position, 1)
        )
        return found[0] if found else None

    async def send(self, endpoint: Endpoint, entry: Entry, attempt: int | None) -> tuple[Attempt, Answer]:
        writer = self.writer
        secrets = [secret.value for secret in endpoint.signing(writer.now())]
        # Wall-clock time, because receivers compare it with their own clock and refuse a large difference.
        headers, body = delivery(self.log_id, entry, secrets, writer.clock.wall_ms() // 1_000)
        at = writer.now()
        of_project.set(endpoint.project)
        answer = await self.outbound.post(endpoint.url, headers, body, self._timeout_sec)
        made = Attempt(
            position=entry.position,
            type=entry.type,
            device_id=entry.device_id,
            command_id=entry.command_id,
            attempt=attempt,
            at=at,
            duration_ms=writer.now() - at,
            status=answer.status,
            error=answer.error,
        )
        self.tell(made)
        return made, answer

    async def test(self, endpoint: Endpoint, actor: str) -> Attempt:
        """Sends an event that did not happen, signed as all others are. It is not in the log."""
        writer = self.writer
        at, id = writer.now(), new_id("test", writer.now(), writer.entropy)
        event = CloudEvent(
            id=id,
            source=f"/ordain/{self.log_id}",
            type=TEST,
            subject=endpoint.id,
            time=rfc3339(at),
            project=endpoint.project,
            actor=actor,
            schema=1,
            version=1,
            data={"webhook_id": endpoint.id},
        )
        secrets, body = [secret.value for secret in endpoint.signing(at)], msgspec.json.encode(event)
        headers = signed(id, body, secrets, writer.clock.wall_ms() // 1_000)
        of_project.set(endpoint.project)
        answer = await self.outbound.post(endpoint.url, headers, body, self._timeout_sec)
        return Attempt(
            position=0,
            type="test",
            device_id="",
            command_id=None,
            attempt=None,
            at=at,
            duration_ms=writer.now() - at,
            status=answer.status,
            error=answer.error,
        )


class Worker:
    """Call `run` once; read `window.progress()` at any time. `note` is called with each attempt."""

    def __init__(
        self,
        sender: Sender,
        feed: Feed,
        endpoint: Endpoint,
        progress: Progress,
        note: Callable[[Attempt], None],
    ) -> None:
        self.window = Window(progress)
        self._sender, self._feed, self._endpoint, self._note = sender, feed, endpoint, note
        self._writer = sender.writer
        self._live: Subscription | None = None
        self._slots = PARALLEL
        self._under_way = 0
        self._wake = asyncio.Event()
        self._room = asyncio.Event()
        self._verdict: tuple[State, str] | None = None

    async def run(self) -> tuple[State, str]:
        """Delivers until the endpoint must stop. Returns its new state and the reason."""
        async with asyncio.TaskGroup() as group:
            reader = group.create_task(self._read())
            while self._verdict is None:
                while self._may_start() and (pending := self.window.take(self._writer.now())):
                    extra = self._under_way > 0
                    self._under_way += 1
                    self._sender.shared += extra
                    group.create_task(self._deliver(pending, extra=extra))
                await self._sleep()
            reader.cancel()
        return self._verdict

    def rest(self) -> None:
        """Moves the window to the head if no wanted event is pending, so that a restart need not read those
        events again."""
        if self._live is not None and self._live.lag == 0:
            self.window.looked((), self._feed.head, self._writer.now())

    def _may_start(self) -> bool:
        return self._under_way == 0 or (self._under_way < self._slots and self._sender.shared < SHARED)

    async def _sleep(self) -> None:
        at = self.window.next_at() if self._may_start() else None
        try:
            async with asyncio.timeout(None if at is None else (at - self._writer.now()) / 1_000):
                await self._wake.wait()
        except TimeoutError:
            pass
        self._wake.clear()

    # --- reading ---

    async def _read(self) -> None:
        """Reads history first, then new events. At most the window and one page are in memory."""
        endpoint = self._endpoint
        wanted = Wanted(
            project=endpoint.project,
            within=endpoint.devices,
            device=endpoint.device_id,
            command=endpoint.command,
            event=endpoint.events[0] if len(endpoint.events) == 1 else None,
        )
        with self._feed.subscribed(wanted, self.window.reached) as subscription:
            while True:
                await self._has_room()
                self._live = subscription
                entries = await subscription.next()
                self._live = None  # `rest` must not skip entries that were read but are not yet in the window
                # After a failed commit, rows can be readable but not synced; the next commit syncs them.
                await self._writer.opened()
                self._take_in(entries or [], subscription.reached)

    def _take_in(self, entries: list[Entry], reached: int) -> None:
        events = self._endpoint.events
        chosen = [(each.position, each.device_id) for each in entries if not events or each.type in events]
        self.window.looked(chosen, reached, self._writer.now())
        self._wake.set()

    async def _has_room(self) -> None:
        while self.window.full:
            self._room.clear()
            await self._room.wait()

    # --- sending ---

    async def _deliver(self, pending: Pending, *, extra: bool) -> None:
        try:
            # The feed forgets everything when something is erased; then only the log tells what is left.
            entry = self._feed.recent.get(pending.position)
            if entry is None:
                entry = await self._sender.entry(self._endpoint, pending.position)
            assert entry is not None, "positions of the log are never removed"
            made, answer = await self._sender.send(self._endpoint, entry, pending.attempts + 1)
            self._judge(pending, made, answer)
        finally:
            self._under_way -= 1
            self._sender.shared -= extra
            self._wake.set()

    def _judge(self, pending: Pending, made: Attempt, answer: Answer) -> None:
        now, window = self._writer.now(), self.window
        if made.delivered:
            window.delivered(pending, now)
            self._slots = min(PARALLEL, self._slots * 2)
            self._room.set()
        else:
            self._slots = 1
            going_on = window.failed(pending, now, self._writer.entropy.uniform)
            if made.status in ASKED_TO_WAIT:
                window.hold_until = now + hold_ms(answer.retry_after, self._writer.clock.wall_ms())
            what = f"the event at position {made.position}"
            if self._verdict is not None:
                pass  # another request already decided; this one was still under way
            elif made.status == GONE:
                self._verdict = "gone", f"the receiver answered {what} with 410 Gone at {rfc3339(now)}"
            elif not going_on:
                days = GIVE_UP_MS // 86_400_000
                self._verdict = "paused", f"{what} could not be delivered for {days} days: {made.outcome}"
        self._note(made)
