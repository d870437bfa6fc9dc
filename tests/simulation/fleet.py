"""The simulated devices: the real device core and its memory, driven by hand, on the simulated network.

Each device is a process of its own that can be killed and started again; its memory is kept. This module also
sends forged answers. It reads none of the broker's state.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
from collections.abc import Callable
from typing import Any, Protocol

import msgspec

from broker.seams import Message, Receipt
from devices.core import Core, Effect, Run, Send
from devices.grant import Claims, GrantRefused, GrantVerifier, keys_from_jwks
from devices.memory import RamMemory
from devices.names import device_topic, status_topic
from devices.relay import message_of
from devices.types import DeviceType, load_type, shipped_types
from devices.wire import CommandMessage
from tests.simulation.history import Call, History
from tests.simulation.link import SimDevicePort
from tests.simulation.loop import Node, SimClock, SimLoop
from tests.simulation.network import SimMqttServer
from tests.simulation.pipes import PipeNet, PipePort
from tests.simulation.tide import Tide

PREFIX, ISSUER = "iotee", "ordain"
# A type without answers: its commands are done when the MQTT server has taken them.
SIREN = """
name = "siren"
payload = "bare"
presence = "required"
completes_on = "published"
[commands.on]
text = "on"
repeatable = true
[commands.off]
text = "off"
"""
# A type that never connects to MQTT.
TAG = """
name = "tag"
presence = "required"
payload = "json"
transports = ["heartbeat", "relay"]
heartbeat_lease_sec = 30
[commands.beep]
[commands.pop]
repeatable = false
"""
TYPES = shipped_types() | {"siren": load_type(SIREN), "tag": load_type(TAG)}
# The commands that clients send to each type, with valid parameters.
COMMANDS: dict[str, dict[str, dict[str, Any]]] = {
    "generic": {"ping": {}, "set": {"level": 3}, "run": {"steps": [1, 2]}},
    "recorder": {"start_recording": {"max_duration_sec": 60}, "stop_recording": {}},
    "iotee_device": {"lock": {}, "unlock": {}, "reboot": {}},
    "siren": {"on": {}, "off": {}},
    "tag": {"beep": {}, "pop": {}},
}
MALFORMED = (
    b"",
    b"{",
    b"\xff\xfe",
    b'{"status":"done"}',
    b"[1]",
    b"x" * 70_000,
    b'{"id":3,"status":"executed"}',
)


HEARTBEAT_SEC, QUIET_HEARTBEAT_SEC = 30, 600
DAY_SEC = 86_400


class Asks(Protocol):
    """The interface of `clients.Door`. A protocol, because `clients` imports this module."""

    async def call(
        self,
        kind: str,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        *,
        key: str | None = None,
        ids: tuple[str, ...] = (),
        patience: float = 15,
        secret: str | None = None,
    ) -> Call: ...


class _Said(msgspec.Struct):
    id: str | None = None
    type: str = ""
    params: Any = None
    grant: str | None = None
    status: str = ""
    result: Any = None
    error: Any = None


class Device:
    """One simulated device."""

    def __init__(
        self,
        loop: SimLoop,
        server: SimMqttServer,
        history: History,
        tide: Tide,
        hardware_id: str,
        kind: str,
    ) -> None:
        self.hardware_id, self.kind = hardware_id, kind
        self.whims = True  # may get stuck, take long, or fail
        self.jwks: dict[str, Any] | None = None
        self.port: SimDevicePort
        self.node: Node | None = None
        self.token = ""
        # callback of the phone that is connected over the air
        self.ble: Callable[[bytes], object] | None = None
        self._by_air: set[str] = set()  # ids of commands that a phone brought
        self._unconfirmed: list[Send] = []  # answers that no phone has confirmed yet
        self.door: Asks
        self.on_end: Callable[[str, str], object] = lambda hardware_id, command_id: None
        self._loop, self._server, self._history, self._tide = loop, server, history, tide
        self._clock = SimClock(loop)
        self._random = loop.rng(f"device/{hardware_id}")
        self._type: DeviceType = TYPES[kind]
        self._memory = RamMemory()
        self._session = 0
        self._names_session = self._random.random() < 0.5
        self._clean = self._random.random() < 0.5
        self._checks_grants = self._random.random() < 0.3
        self._subscribes_late = self._random.random() < 0.3  # says `online` first
        # drops its connection on every command, until the faults end
        self.drops = self._random.random() < 0.06
        self._unsent: dict[int, Send] = {}
        self._sent = itertools.count()
        self._core: Core
        self._judged: GrantVerifier | None = None
        self._judged_at = 0.0
        if self.bare:
            server.in_time.add(device_topic(PREFIX, hardware_id, self._type.answer_suffix))

    @property
    def transports(self) -> tuple[str, ...]:
        return self._type.transports

    @property
    def bare(self) -> bool:
        return self._type.payload == "bare"

    def start(self) -> None:
        if self.node is None:
            self.node = Node(self.hardware_id)
            self.node.context.run(self._boot)

    def die(self) -> None:
        """Kills the process. The device core's memory is kept, unsent answers are lost."""
        if self.node is not None:
            node, self.node = self.node, None
            self._loop.kill(node)
            self._unsent.clear()
            self._unconfirmed.clear()
            self.ble = None

    def connect(self) -> None:
        """Connects to the MQTT server. Only needed at boot and after `port.disconnect`: otherwise the port
        reconnects by itself."""
        if "mqtt" not in self.transports:
            return
        topic = status_topic(PREFIX, self.hardware_id)

        def status(word: str) -> bytes:
            return _status(word, f"s{self._session}" if self._names_session else None)

        def dials() -> None:
            self._session += 1  # each connection is a session of its own, and has its own will
            self.port.will = topic, status("offline")

        def up() -> None:
            self.port.publish(topic, status("online"), retain=True)
            for number in list(self._unsent):
                self._transmit(number)

        self.port.dials = dials
        self.port.connect(self._received, on_up=up, will=(topic, status("offline")), clean=self._clean)

    def say_goodbye(self) -> None:
        self.port.publish(status_topic(PREFIX, self.hardware_id), b"offline", retain=True)
        self.port.disconnect()

    def forge(self, command_id: str | None, status: str) -> None:
        """Sends an unexpected answer: for a command of this device, of another device, or one that does not
        exist."""
        answer = {"id": command_id, "status": status, "result": {"forged": True}, "progress": {"percent": 7}}
        payload = msgspec.json.encode(answer)
        if self._say_raw(payload):
            self._history.answered(self.hardware_id, command_id, status)

    def babble(self, *, short: bool = False) -> None:
        said = self._random.choice(MALFORMED)
        self._say_raw(said[:8] if short else said)

    def _say_raw(self, payload: bytes) -> bool:
        if self.node is None:
            return False
        topic = device_topic(PREFIX, self.hardware_id, self._type.answer_suffix)
        return self.port.publish(topic, payload)

    # --- inside its process ---

    def _boot(self) -> None:
        verifier = None
        if self.jwks is not None and self._checks_grants:
            keys = keys_from_jwks(self.jwks)
            verifier = GrantVerifier(keys, ISSUER, self.hardware_id, lambda: self._now() / 1_000)
        if self.jwks is not None and not self.bare and self._judged is None:
            keys = keys_from_jwks(self.jwks)
            self._judged = GrantVerifier(keys, ISSUER, self.hardware_id, lambda: self._judged_at)
        handlers = dict.fromkeys(COMMANDS[self.kind], False)
        self._core = Core(
            self.hardware_id, self._type, self._memory, handlers, prefix=PREFIX, verifier=verifier
        )
        topics = tuple(self._core.command_topics)
        if isinstance(self._server, PipeNet):
            self.port = port = PipePort(self._server, self.hardware_id, topics)
            port.password, port.refused = lambda: self.token, self._refused
        else:
            self.port = SimDevicePort(self._server, self.hardware_id, topics)
        self.port.subscribes_at_once = not self._subscribes_late
        self.connect()
        self._do(self._core.recover(self._now()))
        if "heartbeat" in self.transports:
            self._loop.create_task(self._beat())

    def _refused(self) -> None:
        """Its token is not valid any more: an operator issues a new one."""

        async def renew() -> None:
            issued = await self.door.call("rotate", "POST", f"/v1/devices/{self.hardware_id}/token")
            if issued.status == 201:
                self.token = issued.answer["device_token"]

        self._loop.create_task(renew())

    def nearby(self, payload: bytes) -> None:
        """Receives a command over the air, from a phone."""
        if self.node is not None:
            self._by_air.add(msgspec.json.decode(payload, type=_Said).id or "")
            self.node.context.copy().run(self._fetched, payload)

    def confirmed(self, payload: bytes) -> None:
        self._unconfirmed = [send for send in self._unconfirmed if send.payload != payload]

    def alone(self) -> None:
        """The phone went away: unconfirmed answers go over the device's own transport."""
        self.ble = None
        left, self._unconfirmed = self._unconfirmed, []
        if self.node is not None:
            for send in left:
                self.node.context.copy().run(self._by_itself, send)

    def _fetched(self, payload: bytes) -> None:
        self._judge(payload)
        self._do(self._core.receive(self._now(), self._core.command_topics[0], payload))

    async def _beat(self) -> None:
        while True:
            await self._tide.sleep(self._random.expovariate(1), HEARTBEAT_SEC, QUIET_HEARTBEAT_SEC)
            said = {"battery_percent": self._random.choice((3, 3, 3, 3, 3, 2))}  # mostly as before
            call = await self._ask("heartbeat", "heartbeat", said)
            if call.status == 200:
                for command in call.answer["commands"]:
                    self._fetched(message_of(command))

    async def _ask(self, kind: str, path: str, body: dict[str, Any] | None = None) -> Call:
        """Sends a request with the device's own token. After a 401 an operator issues a new token."""
        patience = self._random.uniform(0, 0.02) if self.whims and self._random.random() < 0.05 else 15
        path = f"/v1/devices/me/{path}"
        call = await self.door.call(kind, "POST", path, body, secret=self.token, patience=patience)
        if call.status == 401:
            issued = await self.door.call("rotate", "POST", f"/v1/devices/{self.hardware_id}/token")
            if issued.status == 201:
                self.token = issued.answer["device_token"]
        return call

    async def _report(self, payload: bytes) -> None:
        said = msgspec.json.decode(payload, type=_Said)
        path, body = f"commands/{said.id}/ack", None
        if said.status in ("executed", "failed"):
            path, body = f"commands/{said.id}/result", {"status": said.status}
            body |= {key: value for key in ("result", "error") if (value := getattr(said, key)) is not None}
        for _ in range(5):
            call = await self._ask("report", path, body)
            if call.status not in (None, 401, 503):
                return
            await asyncio.sleep(self._random.uniform(0.5, 5))

    def _now(self) -> int:
        return self._clock.true_ms()

    def _judge(self, payload: bytes) -> None:
        """Tells the history whether the grant of a command allows it, whatever this device makes of that."""
        if self._judged is None:
            return
        said = msgspec.json.decode(payload, type=_Said)
        try:
            claims = msgspec.json.decode(_unbase64((said.grant or ".").split(".")[1]), type=Claims)
            self._judged_at = claims.nbf - 1.0  # one for the last second of a command ends in it
            params = said.params or {}
            self._judged.verify(said.grant, command_id=said.id or "", command=said.type, params=params)
            fault = "it is valid for more than a day" if claims.exp - claims.nbf > DAY_SEC else None
            exp = claims.exp
        except (GrantRefused, msgspec.MsgspecError, ValueError) as error:
            fault, exp = str(error), 0
        self._history.grant(self.hardware_id, said.id or "", 1_000 * exp, fault)

    def _received(self, message: Message) -> None:
        if self.drops:
            self.port.drop()
            return
        self._judge(message.payload)
        self._do(self._core.receive(self._now(), message.topic, message.payload))

    def _do(self, effects: list[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Send):
                self._say(effect)
            else:
                self._begin(effect)

    def _begin(self, run: Run) -> None:
        if run.command.id:
            self._history.executed(self.hardware_id, run.command.id)
        self._loop.create_task(self._execute(run.command))

    async def _execute(self, command: CommandMessage) -> None:
        draw = self._random.random() if self.whims else 0.5
        if draw < 0.02:
            return  # stuck: the handler never ends, and later commands wait until the device reboots
        await asyncio.sleep(self._random.uniform(0.01, 3) if draw < 0.9 else self._random.uniform(3, 90))
        if self._random.random() < 0.2:
            self._do(self._core.progress(self._now(), command, 50, None))
            await asyncio.sleep(self._random.uniform(0.1, 5))
        failed = self.whims and self._random.random() < 0.1
        error = {"code": "broken", "message": "it did not work"} if failed else None
        self._do(self._core.finish(self._now(), command, {"n": 1}, error))
        self.on_end(self.hardware_id, command.id)

    def _say(self, send: Send) -> None:
        if not self.bare:
            said = msgspec.json.decode(send.payload, type=_Said)
            self._history.answered(self.hardware_id, said.id, said.status)
            if self.ble is not None and said.id in self._by_air:
                self._unconfirmed.append(send)
                self.ble(send.payload)
                return
        self._by_itself(send)

    def _by_itself(self, send: Send) -> None:
        if "mqtt" not in self.transports:
            self._loop.create_task(self._report(send.payload))
            return
        number = next(self._sent)
        self._unsent[number] = send
        self._transmit(number)

    def _transmit(self, number: int) -> None:
        def done(receipt: Receipt) -> None:
            if receipt.reason is not None:
                self._unsent.pop(number, None)

        send = self._unsent[number]
        if self.port.publish(send.topic, send.payload, done=done) and self.bare:
            # An answer without id that is sent again looks like a new answer, so each transmission is
            # recorded.
            status = self._type.words[send.payload.decode()]
            self._history.answered(self.hardware_id, None, status)


def _unbase64(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def _status(word: str, session: str | None) -> bytes:
    return word.encode() if session is None else msgspec.json.encode({"status": word, "session": session})
