"""Puts the broker together: log, live state, requests, dispatch and intake.

It uses only the seams, so that production and simulation run the same code. It must never import
`broker.world`, HTTP or an MQTT library.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from itertools import count
from typing import Any, Literal

from broker import __version__
from broker.domain.errors import Unavailable
from broker.domain.events import ClockStepped
from broker.engine.commands import Commands
from broker.engine.deadlines import Deadlines
from broker.engine.dispatch import Dispatch
from broker.engine.erasures import Erasures
from broker.engine.fanout import Fanout
from broker.engine.grants import Grants
from broker.engine.ids import new_id
from broker.engine.intake import Intake
from broker.engine.keys import Keys
from broker.engine.live import Live
from broker.engine.pull import Pull
from broker.engine.quotas import Quotas
from broker.engine.registry import Registry
from broker.engine.repairs import Repairs
from broker.engine.verification import Verification
from broker.engine.writer import CLOCK_STEP_MS, Writer
from broker.log import sqlite as log
from broker.seams import Clock, Drop, Entropy, Link, Message, Outbound, Outgoing, Put, Receipt, Sql, Storage
from broker.settings import Settings, differing
from broker.subscriptions.feed import Feed
from broker.subscriptions.home_assistant import HomeAssistant
from broker.subscriptions.mqtt import MqttEvents
from broker.subscriptions.webhook_worker import NoWayOut
from broker.subscriptions.webhooks import Webhooks
from devices.types import DeviceType

TICK_SEC = 1.0
KEY_USES_TICKS = 60
HOUSEKEEPING_SEC = 3_600.0
KEYS_AT_ONCE, KEYS_PAUSE_SEC = 500, 0.05


class NoLink:
    """The link when there is no MQTT server: requests are accepted, and nothing is handed over."""

    up = False
    direct = False

    def listens(self, topic: str) -> bool:
        return False

    def publish(self, outgoing: Outgoing, done: Callable[[Receipt], None]) -> bool:
        return False

    def puback(self, message: Message, reason: int = 0, text: str = "") -> None:
        return


class Core:
    """One broker on one log. Call `open`, then `attach` a link, then use `running`."""

    def __init__(
        self,
        storage: Storage,
        clock: Clock,
        entropy: Entropy,
        types: dict[str, DeviceType],
        settings: Settings,
        outbound: Outbound | None = None,
        pepper: bytes | None = None,
    ) -> None:
        self.also_not_ready: Callable[[], list[str]] = list
        # Whether this process may hand over: with several nodes, only while its lease lasts.
        self.holds: Callable[[], bool] = lambda: True
        self.storage = storage
        self.settings = settings
        self.writer = Writer(storage, clock, entropy)
        self.live = Live()
        self.feed = Feed(self.writer, self.live)
        quotas = Quotas(settings.limits, settings.projects)
        self.commands = Commands(self.writer, self.live, types, settings.prefix, quotas)
        self.fanout = Fanout(self.commands)
        self.repairs = Repairs(self.commands)
        self.erasures = Erasures(self.commands)
        self.registry = Registry(self.commands)
        self.keys = Keys(self.writer, pepper)
        self.verification = Verification(self.writer)
        self.grants = Grants(self.writer, self.live, self.registry.secrets, settings.issuer)
        self.webhooks = Webhooks(
            self.writer,
            self.feed,
            outbound or NoWayOut(),
            timeout_sec=settings.webhook_timeout_sec,
            per_project=settings.limits.webhooks_per_project,
        )
        self.mqtt_events = MqttEvents(self.writer, self.feed, settings.prefix)
        self.link: Link = NoLink()
        self.home_assistant = HomeAssistant(
            self.writer, self.feed, types, settings.prefix, settings.home_assistant
        )
        self.mqtt_events.link = self.home_assistant.link = self.link
        self.log_id = ""
        self.cursor_key = b""
        self.dispatch: Dispatch
        self.intake: Intake
        self.pull: Pull
        self.tick_sec = TICK_SEC
        self._stepped_ms = 0

    @property
    def deadlines(self) -> Deadlines:
        return self.dispatch.deadlines

    async def open(self, *, embedded: bool) -> None:
        """Creates or reads the log and loads the live state. Nothing is handed over before `attach`.

        `embedded`: presence comes from the embedded MQTT server only.
        """
        writer, entropy = self.writer, self.writer.entropy
        log_id = new_id("log", writer.now(), entropy)
        cursor_key = entropy.token(32).hex()
        await self.storage.prepare(log_id, cursor_key)

        async def work(sql: Sql) -> tuple[str, str]:
            return await log.meta(sql, "log_id"), await log.meta(sql, "cursor_key")

        self.log_id, key = await self.storage.read(work)
        self.cursor_key = bytes.fromhex(key)
        await self.grants.load()
        await self.feed.open()
        self.dispatch = Dispatch(self.commands, self.grants, self.link)
        self.intake = Intake(self.commands, self.registry, self.dispatch, self.link, embedded=embedded)
        self.dispatch.settle, self.registry.told.settled = self.registry.told.settle, self.dispatch.pump
        self.pull = Pull(self.registry, self.grants, self.dispatch, self.intake)
        writer.reload = self._reload
        writer.resumed = self._resumed
        await writer.start()
        await self.keys.load()
        await self.webhooks.load(self.log_id)
        await self.mqtt_events.load(self.log_id)
        self._watch_clock()

    async def _reload(self) -> None:
        await self.live.load(self.storage, self.writer.entropy, self.writer.now())
        for member in self.live.members.values():
            if (speech := member.definition.speech) is not None:
                self.commands.addresses.keep(speech)
        await self.registry.load()
        await self.erasures.load()
        self.dispatch.recovered()

    def _resumed(self) -> None:
        self.feed.reread()
        self.intake.resumed()

    def attach(self, link: Link) -> None:
        self.link = self.dispatch.link = self.intake.link = self.mqtt_events.link = link
        self.home_assistant.link = link

    def tasks(self) -> list[Coroutine[Any, Any, None]]:
        """The tasks that run as long as the broker; each ends only by an error or by cancellation."""
        return [
            self.writer.run(),
            self.deadlines.run(),
            self.intake.run(),
            self.registry.told.run(),
            self.erasures.run(),
            self.verification.run(),
            self._tick(),
            self._forget_keys(),
        ]

    @asynccontextmanager
    async def running(self, mqtt: Literal["embedded", "external"] | None) -> AsyncIterator[asyncio.TaskGroup]:
        """Runs the tasks. At the end everything staged is made durable before they are cancelled.

        `mqtt` None: no MQTT server, so webhooks and MQTT events do not run either.

        Raises (in an exception group): Broken, if the storage failed.
        """
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(task) for task in self.tasks()]
            try:
                if mqtt is not None:
                    await self._note_restore()
                    await self.registry.started(__version__, mqtt, differing(self.settings))
                    # Start these only after that commit. The last events of a killed process were read
                    # from the file but may not be synced: after a power cut subscribers would have
                    # events that the log has lost.
                    tasks.append(group.create_task(self.webhooks.run()))
                    if self.settings.mqtt_events:
                        tasks.append(group.create_task(self.mqtt_events.run()))
                    if self.settings.home_assistant:
                        tasks.append(group.create_task(self.home_assistant.run()))
                yield group
                self.webhooks.save()
                self.mqtt_events.save()
                if self.writer.open:
                    self.keys.save_uses()
                    self.registry.told.settle_all()
                await self.writer.drain()
            finally:
                for task in tasks:
                    task.cancel()

    async def _note_restore(self) -> None:
        """Records that this log was restored from a backup, at its first start after that."""

        async def work(sql: Sql) -> dict[str, str]:
            keys = "('restored_from', 'restore_noted')"
            return dict(await sql.all(f"SELECT key, value FROM meta WHERE key IN {keys}"))

        known = await self.storage.read(work)
        if (old := known.get("restored_from")) is None or known.get("restore_noted") == self.log_id:
            return
        self.writer.operated("operator:local", "restored", self.log_id, restored_from=old)
        self.writer.also(Put("meta", ("restore_noted", self.log_id)))

    def not_ready(self) -> list[str]:
        """The reasons why the broker is not ready, as sentences; empty if it is ready."""
        reasons = []
        if not self.writer.open:
            reasons.append("log: it cannot be written")
        if not self.link.up:
            reasons.append("mqtt: not connected to the MQTT server")
        if self.dispatch.halted:
            reasons.append(self.dispatch.halted)
        if abs(self._stepped_ms) > CLOCK_STEP_MS:
            reasons.append(f"clock: the wall clock was stepped by {self._stepped_ms} ms since the start")
        return [*reasons, *self.also_not_ready()]

    async def _tick(self) -> None:
        """What is looked at once a second, in one task: an idle broker wakes up as rarely as possible."""
        for number in count(1):
            await asyncio.sleep(self.tick_sec)
            if self.writer.open:
                self._watch_clock()
                self.keys.tick()
                await self.registry.gateways.tell_rest(self.storage)
                if number % KEY_USES_TICKS == 0:
                    self.keys.save_uses()

    def _watch_clock(self) -> None:
        """Records a step of the wall clock. Halts hand-over while the clock is before the last event."""
        writer, dispatch = self.writer, self.dispatch
        if writer.behind_log_ms() > CLOCK_STEP_MS and not writer.reanchor():
            dispatch.halted = f"clock: it is {writer.behind_log_ms()} ms before the last event of the log"
        elif dispatch.halted:
            dispatch.halted = None
            self.intake.backlog_begins()  # the broker's clock may have jumped over the end of the wait for it
            dispatch.clock_set()
        step = writer.wall_step_ms()
        if abs(step - self._stepped_ms) > CLOCK_STEP_MS and writer.open:
            self._stepped_ms = step
            self.registry.record_system(ClockStepped(by_ms=step))

    async def _forget_keys(self) -> None:
        """Deletes idempotency keys older than `idempotency_sec` whose command is closed, every hour."""
        while True:
            await asyncio.sleep(HOUSEKEEPING_SEC)
            with suppress(Unavailable):  # the next try is in an hour
                while await self._forget_some_keys() == KEYS_AT_ONCE:  # noqa: ASYNC110
                    await asyncio.sleep(KEYS_PAUSE_SEC)

    async def _forget_some_keys(self) -> int:
        """Deletes at most `KEYS_AT_ONCE` keys in one short transaction; returns how many."""
        before = self.writer.now() - self.settings.limits.idempotency_sec * 1_000

        async def work(sql: Sql) -> list[tuple[str, str, str]]:
            return await sql.all(
                "SELECT project, key, scope FROM idempotency WHERE created_at < ? AND NOT EXISTS (SELECT 1 "
                "FROM events e JOIN commands c ON c.position = e.position AND c.closed_at IS NULL "
                "WHERE e.stream = command_id AND e.version = 1) LIMIT ?",
                (before, KEYS_AT_ONCE),
            )

        gone = await self.storage.read(work)
        self.writer.also(*(Drop("idempotency", key) for key in gone))
        await self.writer.barrier()
        return len(gone)
