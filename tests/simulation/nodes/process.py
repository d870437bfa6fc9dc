"""One run of a broker as one of several nodes: the real nodes, core and HTTP app on simulated seams.

Written again here is only what `broker/serving/sharing.py` puts together with sockets.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary

import msgspec
from litestar.types import ASGIApp

from broker.control import services
from broker.core import Core
from broker.engine.ids import new_id
from broker.http.app import create_app
from broker.log.postgresql.log import PostgresLog
from broker.log_url import Address
from broker.nodes.cluster import Cluster
from broker.nodes.entrance import Apps, Entrance
from broker.nodes.forwarding import Peers
from broker.nodes.turns import Owned, take_turns
from broker.seams import Broken, LinkEvents, Message, Outgoing, Receipt, Unknown
from broker.seams import Node as NodeRow
from broker.serving.owning import WhileHolding
from broker.settings import Settings
from tests.simulation.fleet import ISSUER, PREFIX, TYPES
from tests.simulation.link import SimLink
from tests.simulation.loop import Node, SimEntropy
from tests.simulation.network import SimMqttServer
from tests.simulation.nodes.checkers import Look, Passed
from tests.simulation.nodes.connection import connect
from tests.simulation.nodes.net import MQTT, Net
from tests.simulation.nodes.peers import SimTransport

if TYPE_CHECKING:
    from tests.simulation.nodes.world import Machine, NodesWorld

SUBSCRIPTIONS = (f"{PREFIX}/dev/+/ack", f"{PREFIX}/dev/+/status")
SECRET = "s" * 40
WHERE = Address("postgresql://sim/log", "postgresql://sim/log")
OF_NODE_ITSELF = ("/readyz", "/healthz", "/metrics")
CLIENT_ID = "ordain"
NOTICED_SEC = (8.0, 16.0)  # a dead connection to the MQTT server, by keepalive


LATEST: WeakKeyDictionary[SimMqttServer, NodeLink] = WeakKeyDictionary()


class SimLog(PostgresLog):
    """The real client of a log that has its tables already."""

    async def prepare(self, log_id: str, cursor_key: str) -> None:
        """Does nothing."""


class NodeLink(SimLink):
    """The link with what `MqttLink` does for one of several nodes: nothing is sent or connected while `holds`
    is false, and `cut` ends the connection at once. `acts` is told of each byte that follows from owning."""

    def __init__(
        self,
        net: Net,
        machine: str,
        server: SimMqttServer,
        events: LinkEvents,
        holds: Callable[[], bool],
        acts: Callable[[str], object],
    ) -> None:
        self._net, self._machine, self._holds, self._acts = net, machine, holds, acts
        super().__init__(server, events, SUBSCRIPTIONS, client_id=self._name())

    def _name(self) -> str:
        return CLIENT_ID

    def _linked(self, up: bool) -> None:
        """Only the last link that connected is the broker's: an older one may end later, and unseen."""
        if LATEST.get(self.server, self) is self:
            super()._linked(up)

    def _may_send(self) -> bool:
        if self._holds():
            return True
        self.cut()
        return False

    def cut(self) -> None:
        if self._connection is not None:
            self._connection.to_server.lose_what_is_under_way()
            self._connection.close("the lease of this node has ended")

    def publish(self, outgoing: Outgoing, done: Callable[[Receipt], None]) -> bool:
        if not self._may_send() or not super().publish(outgoing, done):
            return False
        self._acts("published")
        return True

    def puback(self, message: Message, reason: int = 0, text: str = "") -> None:
        if self._may_send():
            if message.token[0] is self._connection:
                self._acts("acknowledged")
            super().puback(message, reason, text)

    def message(self, message: Message) -> None:
        if LATEST.get(self.server) is self:
            super().message(message)
        else:  # what a stopped process finds when it goes on; no checker waits for its PUBACK
            self._events.message(message)

    def _dial(self) -> None:
        if self._wanted and self._connection is None:
            if self._may_send() and self._net.reaches(self._machine, MQTT):
                super()._dial()
                self._dialled()
            else:
                self.inbox.later(0.2, self._dial)

    def _dialled(self) -> None:
        if self._connection is not None and LATEST.get(self.server) is not self:
            LATEST[self.server] = self
            self._linked(False)

    def cut_off(self) -> None:
        """The network to the MQTT server is cut."""
        if self._connection is not None:
            self._connection.go_half_open(self.server.random.uniform(*NOTICED_SEC))


class Watched(Cluster):
    """Each of its beats is noted."""

    def __init__(self, process: Process, log: PostgresLog, node: NodeRow) -> None:
        clock = process.machine.clock
        super().__init__(log, node, clock.monotonic_ms, clock.wall_ms)
        self._acts, self._true_ms = process.world.acts, process.world.clock.true_ms

    async def _beat(self) -> None:
        began, before = self._true_ms(), self.members.confirmed
        await super()._beat()
        confirmed = self.members.confirmed != before
        self._acts.looks.append(
            Look(t=self._true_ms(), incarnation=self.node.incarnation, began=began, confirmed=confirmed)
        )

    def passes(self, owner: NodeRow) -> None:
        """A request goes to the one that this node takes for the owner."""
        passed = Passed(t=self._true_ms(), incarnation=self.node.incarnation, owner=owner.incarnation)
        self._acts.passed.append(passed)


class WatchedPeers(Peers):
    """Each request that is passed on is noted."""

    async def send(self, owner: NodeRow, *args: Any, **more: Any) -> Any:
        cluster = cast(Watched, self._cluster)
        cluster.passes(owner)
        return await super().send(owner, *args, **more)


class Process:
    """`node`: its handles. `incarnation`: its name among all runs. `core`: while it owns the log."""

    def __init__(self, world: NodesWorld, machine: Machine, last: str | None) -> None:
        self.world, self.machine = world, machine
        self.node = Node(machine.name)
        self.entropy = SimEntropy(world.loop, f"{machine.name}/{machine.runs}")
        self.incarnation = new_id("node", world.clock.true_ms(), self.entropy)
        self.listening = False
        self.core: Core | None = None
        self.link: NodeLink | None = None
        self.stop = asyncio.Event()
        self._last = last
        self._entrance: Entrance | None = None
        self.task = world.loop.spawn(self.node, self._live())

    @property
    def owns(self) -> bool:
        return self.core is not None and self._entrance is not None and self._entrance.apps is not None

    @property
    def ready(self) -> bool:
        """Whether it owns the log, may act, and can hand over."""
        core = self.core
        return self.owns and core is not None and not core.not_ready() and core.holds()

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        """Its HTTP address. Each answer of the owner is an act."""
        entrance = self._entrance
        assert entrance is not None

        async def noted(message: Any) -> None:
            of_owner = entrance.apps is not None and scope["path"] not in OF_NODE_ITSELF
            if message["type"] == "http.response.start" and message["status"] < 300 and of_owner:
                self._acts("answered")
            await send(message)

        await entrance.app(local=False)(scope, receive, noted)

    def _acts(self, what: str) -> None:
        self.world.acted(self.incarnation, what)

    async def _live(self) -> None:
        world, name = self.world, self.machine.name
        connects = partial(connect, world.database, name, self.incarnation)
        log = SimLog(WHERE, self.incarnation, connect=connects)
        me = NodeRow(self.incarnation, name, f"{name}:80")
        if self._last is not None:
            await log.leave(msgspec.structs.replace(me, incarnation=self._last))
        cluster = Watched(self, log, me)
        peers = WatchedPeers(cluster, SECRET, SimTransport(world.loop, world.net, name, world.listening))
        entrance = self._entrance = Entrance(cluster, peers, SECRET)
        try:
            own = partial(self._own, log, entrance)
            await take_turns(entrance, self._serving(), own, self.stop)
            peers.close()
            with suppress(Unknown, Broken):
                await log.leave(cluster.node)
        finally:
            await log.close()

    @asynccontextmanager
    async def _serving(self) -> AsyncIterator[None]:
        self.listening = True
        yield
        self.listening = False
        await self.world.door.quiet(self.node)

    @asynccontextmanager
    async def _own(self, log: PostgresLog, entrance: Entrance) -> AsyncIterator[Owned]:
        world, cluster = self.world, entrance.cluster
        settings = Settings(prefix=PREFIX, issuer=ISSUER)
        outbound = WhileHolding(world.receivers, cluster.holds)
        core = Core(cast(Any, log), self.machine.clock, self.entropy, TYPES, settings, outbound)
        core.holds = cluster.holds
        core.erasures.batch, core.erasures.pause_sec = 4, 1.0
        await core.open(embedded=False)
        async with core.running("external") as group:
            link = self.link = NodeLink(
                world.net, self.machine.name, world.server, core.intake, cluster.holds, self._acts
            )
            cluster.lapsed = link.cut
            core.attach(link)
            group.create_task(link.run())
            parts = services(core, nodes=cluster.facts)

            def hang_up() -> None:
                parts.streams.close()
                parts.waits.close()

            self.core = core
            public: ASGIApp = create_app(parts)
            yield Owned(Apps(public, public, parts.ready), hang_up)
            link.close()
        self.core = None
