"""What was seen from outside in one run: by HTTP clients, on the wire, by devices, on the disk, in the log.

Plain records in the order in which they happened (`seq`), with the true time in milliseconds (`t`). This
module judges nothing and reads none of the broker's state; the checkers do the judging. No record can be part
of a cycle, so the search for garbage leaves them out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import msgspec

What = Literal["publish", "queued", "accepted", "delivery", "puback", "reached"]
Row = dict[str, Any]  # an event as the log stores it, `data` decoded; `data` is None for an erased event


class Call(msgspec.Struct, kw_only=True, gc=False):
    """One HTTP request. While `status` is None the outcome is unknown: the request may have been carried out
    or not.

    `ids`: the commands that the request names (cancel, read) or that the answer names (create, retry,
    fan-out).
    """

    kind: str
    invoked: int
    t: int
    key: str | None = None
    body: str = ""
    ids: tuple[str, ...] = ()
    status: int | None = None
    returned: int | None = None
    answered_at: int | None = None
    answer: Any = None
    secret: Secret | None = None  # what it carried

    @property
    def who(self) -> str:
        return "" if self.secret is None else self.secret.who


class Commit(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """From this `seq` on, every event up to position `head` is durable."""

    seq: int
    t: int
    head: int


class Wire(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One MQTT message, seen at one end of its way. The fields hold what its payload says.

    `what` is one of:
    - `publish`: the broker begins to write the message. With a `transport` other than `mqtt`: the broker
    answers a fetch with it.
    - `accepted`: the MQTT server's PUBACK for it, without an error code, reaches the broker.
    - `delivery`: the message reaches the broker.
    - `puback`: the broker sends its PUBACK.
    - `reached`: the message reaches a device.
    """

    what: What
    seq: int
    t: int
    topic: str
    hardware_id: str
    command_id: str | None
    attempt: int | None = None
    status: str | None = None
    retain: bool = False
    transport: str = "mqtt"


class Link(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """The broker's connection to the MQTT server came up or went down, as seen by the broker."""

    seq: int
    t: int
    up: bool


class Execution(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """The device executed the command. Its answer may have been lost."""

    seq: int
    t: int
    hardware_id: str
    command_id: str


class Answer(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """The device sent an answer (by MQTT or HTTP), forged answers included. Copies made on the way do not
    count."""

    seq: int
    t: int
    hardware_id: str
    command_id: str | None
    status: str


class Hook(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A webhook receiver saw a request. `taken`: the receiver answers 2xx; the answer itself may be lost."""

    seq: int
    t: int
    url: str
    id: str
    position: int
    type: str
    taken: bool


class Streamed(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A reader of the event stream received an event."""

    seq: int
    t: int
    name: str
    position: int
    type: str


class Write(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One transaction of the broker on its disk, when it ended. `began`: when it was asked for, ms."""

    seq: int
    t: int
    began: int
    ok: bool


class Backup(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A copy of the log that was taken while the broker ran."""

    seq: int
    rows: list[Row]


class Life(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What happened to the broker's process or its disk.

    `full` and `room`: the disk has no free byte, and has some again. `stopping`: it was asked to end.
    `ended`: it has ended in order. `paused` and `resumed`: it did not run between.
    """

    seq: int
    t: int
    what: Literal["up", "down", "stopping", "ended", "paused", "resumed", "full", "room"]


class Granted(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A command with a grant reached its device. `fault`: why the grant does not allow it, or None."""

    seq: int
    t: int
    hardware_id: str
    command_id: str
    exp: int
    fault: str | None


class Secret(msgspec.Struct, kw_only=True, gc=False):
    """Something that nobody else may learn. `ended`: the answer that ended it was seen at this time, ms."""

    who: str
    value: str
    actor: str | None = None
    ended: int | None = None


class Reading(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A reader of the event stream takes what comes from now on (`on`), or does not any more."""

    seq: int
    t: int
    name: str
    on: bool


class Note(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What the simulation did to the broker, for people who read the history. Checkers may not use it."""

    seq: int
    t: int
    what: str


BY_MQTT = "MQTT events"


class _Event(msgspec.Struct):
    id: str
    type: str


class _Named(msgspec.Struct):
    id: str | None = None
    attempt: int | None = None
    status: str | None = None


_decode = msgspec.json.Decoder(_Named).decode
_NOTHING = _Named()


class History:
    """The recorder. `now_ms` gives the true time in ms; `note` adds each observation to the run's trace."""

    def __init__(self, now_ms: Callable[[], int], note: Callable[[str], object] = lambda what: None) -> None:
        self.calls: list[Call] = []
        self.commits: list[Commit] = []
        self.wire: list[Wire] = []
        self.links: list[Link] = []
        self.executions: list[Execution] = []
        self.answers: list[Answer] = []
        self.dumps: list[list[Row]] = []
        self.notes: list[Note] = []
        self.hooks: list[Hook] = []
        self.streams: list[Streamed] = []
        self.writes: list[Write] = []
        self.backups: list[Backup] = []
        self.lives: list[Life] = []
        self.granted: list[Granted] = []
        self.secrets: list[Secret] = []
        self.reading: list[Reading] = []
        self.lines: list[str] = []  # what the broker logged
        # Name of a bound: the most that was seen, and the most that is allowed.
        self.bounds: dict[str, tuple[int, int]] = {}
        self.most: tuple[int, int] = (1_000, 100)  # open commands of a device, in all and of one name
        # Readers that follow the event stream from its beginning: name to the one event type wanted, None for
        # all.
        self.readers: dict[str, str | None] = {}
        # Position up to which all endpoints confirmed their deliveries and all readers had time to read; None
        # if the run did not get that far.
        self.hooked_until: int | None = None
        self.mqtt_events = False  # the broker publishes its events by MQTT as well
        # Start and end of the phase without faults, by the broker's clock in ms; None if the run did not
        # reach it.
        self.healed_at: int | None = None
        self.ended_at: int | None = None
        self._recorded: dict[int, bytes] = {}
        self.now_ms = now_ms
        self._note = note
        self._seq = 0

    @property
    def log(self) -> list[Row]:
        """The last dump, which is the final log."""
        return self.dumps[-1] if self.dumps else []

    def _next(self) -> int:
        self._seq += 1
        return self._seq

    def invoked(
        self,
        kind: str,
        *,
        key: str | None = None,
        body: str = "",
        ids: tuple[str, ...] = (),
        secret: str = "",
    ) -> Call:
        known = next((each for each in self.secrets if secret and each.value == secret), None)
        call = Call(
            kind=kind, invoked=self._next(), t=self.now_ms(), key=key, body=body, ids=ids, secret=known
        )
        self.calls.append(call)
        self._note(f"call {kind} {ids}")
        return call

    def returned(self, call: Call, status: int, *, ids: tuple[str, ...] = (), answer: Any = None) -> None:
        call.status, call.returned, call.answer = status, self._next(), answer
        call.answered_at = self.now_ms()
        call.ids = ids or call.ids
        self._note(f"returned {call.kind} {status} {call.ids}")

    def recorded(self, position: int, data: bytes) -> None:
        """Keeps the data that a row had when it became durable."""
        self._recorded[position] = data

    def as_recorded(self, row: Row) -> Row:
        """The row with its data from before its erasure, if that data was seen."""
        if row["data"] is not None or row["position"] not in self._recorded:
            return row
        return row | {"data": msgspec.json.decode(self._recorded[row["position"]])}

    def committed(self, head: int) -> None:
        if not self.commits or self.commits[-1].head != head:
            self.commits.append(Commit(seq=self._next(), t=self.now_ms(), head=head))

    def on_wire(
        self,
        what: What,
        topic: str,
        payload: bytes,
        correlation: bytes | None = None,
        retain: bool = False,
        attempt: int | None = None,
    ) -> None:
        """Records one MQTT message. `attempt` is used when the payload does not name one."""
        try:
            named = _decode(payload)
        except msgspec.MsgspecError:
            named = _NOTHING
        command_id = named.id or (correlation.decode("ascii", "replace") if correlation else None)
        self.wire.append(
            Wire(
                what=what,
                seq=self._next(),
                t=self.now_ms(),
                topic=topic,
                hardware_id=topic.split("/")[-2] if "/" in topic else "",
                command_id=command_id,
                attempt=named.attempt or attempt,
                status=named.status,
                retain=retain,
            )
        )
        self._note(f"{what} {topic} {command_id} {named.attempt} {named.status}")

    def handed(self, transport: str, hardware_id: str, command_id: str, attempt: int) -> None:
        """Records that the broker answered a fetch with this command."""
        self.wire.append(
            Wire(
                what="publish",
                seq=self._next(),
                t=self.now_ms(),
                topic=transport,
                hardware_id=hardware_id,
                command_id=command_id,
                attempt=attempt,
                transport=transport,
            )
        )
        self._note(f"{transport} {hardware_id} {command_id} {attempt}")

    def wrote(self, began: int, *, ok: bool) -> None:
        self.writes.append(Write(seq=self._next(), t=self.now_ms(), began=began, ok=ok))

    def lived(
        self, what: Literal["up", "down", "stopping", "ended", "paused", "resumed", "full", "room"]
    ) -> None:
        self.lives.append(Life(seq=self._next(), t=self.now_ms(), what=what))
        self._note(what)

    def stops(self) -> Iterator[tuple[int, Life]]:
        """When the process began to stand still, ms, and what ended that: SIGCONT, or its own end."""
        since = None
        for each in self.lives:
            if each.what in ("full", "room"):
                continue  # of the disk, also while the process stands
            if since is not None:
                yield since, each
            since = each.t if each.what == "paused" else None

    def grant(self, hardware_id: str, command_id: str, exp: int, fault: str | None) -> None:
        self.granted.append(
            Granted(
                seq=self._next(),
                t=self.now_ms(),
                hardware_id=hardware_id,
                command_id=command_id,
                exp=exp,
                fault=fault,
            )
        )

    def secret(self, who: str, value: str, actor: str | None = None) -> None:
        """A secret that belongs to `who` from now on. What it had before has ended."""
        self.end_secret(who)
        self.secrets.append(Secret(who=who, value=value, actor=actor))

    def end_secret(self, who: str) -> None:
        for each in self.secrets:
            if each.who == who and each.ended is None:
                each.ended = self.now_ms()

    def reads(self, name: str, *, on: bool) -> None:
        self.reading.append(Reading(seq=self._next(), t=self.now_ms(), name=name, on=on))

    def bound(self, name: str, seen: int, most: int) -> None:
        if seen > self.bounds.get(name, (-1, 0))[0]:
            self.bounds[name] = seen, most

    def linked(self, up: bool) -> None:
        self.links.append(Link(seq=self._next(), t=self.now_ms(), up=up))

    def executed(self, hardware_id: str, command_id: str) -> None:
        self.executions.append(
            Execution(seq=self._next(), t=self.now_ms(), hardware_id=hardware_id, command_id=command_id)
        )
        self._note(f"executed {hardware_id} {command_id}")

    def answered(self, hardware_id: str, command_id: str | None, status: str) -> None:
        self.answers.append(
            Answer(
                seq=self._next(),
                t=self.now_ms(),
                hardware_id=hardware_id,
                command_id=command_id,
                status=status,
            )
        )

    def hooked(self, url: str, id: str, position: int, type: str, *, taken: bool) -> None:
        self.hooks.append(
            Hook(
                seq=self._next(),
                t=self.now_ms(),
                url=url,
                id=id,
                position=position,
                type=type,
                taken=taken,
            )
        )
        self._note(f"hook {url} {id} {type} {taken}")

    def streamed(self, name: str, position: int, type: str) -> None:
        seen = Streamed(seq=self._next(), t=self.now_ms(), name=name, position=position, type=type)
        self.streams.append(seen)
        self._note(f"stream {name} {position} {type}")

    def told(self, payload: bytes) -> None:
        """An event reached the MQTT server."""
        event = msgspec.json.decode(payload, type=_Event)
        self.streamed(BY_MQTT, int(event.id), event.type)

    def said(self, what: str) -> None:
        self.notes.append(Note(seq=self._next(), t=self.now_ms(), what=what))
        self._note(what)

    def backed_up(self, rows: list[Row]) -> None:
        self.backups.append(Backup(seq=self._next(), rows=rows))

    def dumped(self, rows: list[Row]) -> None:
        self.dumps.append(rows)
