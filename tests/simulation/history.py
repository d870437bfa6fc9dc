"""What was seen from outside in one run: by HTTP clients, on the wire, by devices, on the disk, in the log.

Plain records in the order in which they happened (`seq`), with the true time in milliseconds (`t`).
It judges nothing and reads nothing of the broker's; `checkers` do the judging.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import msgspec

What = Literal["publish", "accepted", "delivery", "puback", "reached"]
Row = dict[str, Any]  # an event as the log has it, `data` decoded; None where it was erased


class Call(msgspec.Struct, kw_only=True):
    """One HTTP request. While `status` is None its outcome is unknown: it may or may not have happened.

    `ids`: the commands that it names (cancel, read) or that the answer names (create, retry, fan-out).
    """

    kind: str
    invoked: int
    t: int
    key: str | None = None
    body: str = ""
    ids: tuple[str, ...] = ()
    status: int | None = None
    returned: int | None = None
    answer: Any = None


class Commit(msgspec.Struct, frozen=True, kw_only=True):
    """From here on everything up to position `head` is durable."""

    seq: int
    t: int
    head: int


class Wire(msgspec.Struct, frozen=True, kw_only=True):
    """One MQTT message at one end of its way, as far as the payload tells.

    `publish`: the broker began to write it; by another `transport`: a fetch was answered with it. `accepted`:
    the MQTT server's PUBACK of it, without a fault, reached the broker. `delivery`: it reached the broker.
    `puback`: the broker gave its own. `reached`: it reached a device.
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


class Link(msgspec.Struct, frozen=True, kw_only=True):
    """The broker's connection to the MQTT server came or went, as the broker heard of it."""

    seq: int
    t: int
    up: bool


class Execution(msgspec.Struct, frozen=True, kw_only=True):
    """The device did it, whatever became of its answer."""

    seq: int
    t: int
    hardware_id: str
    command_id: str


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """The device sent an answer once (by MQTT or HTTP), however many copies arrived. Forged ones too."""

    seq: int
    t: int
    hardware_id: str
    command_id: str | None
    status: str


class Hook(msgspec.Struct, frozen=True, kw_only=True):
    """A webhook's receiver saw a request. `taken`: it answers 2xx, if the answer arrives."""

    seq: int
    t: int
    url: str
    id: str
    position: int
    type: str
    taken: bool


class Streamed(msgspec.Struct, frozen=True, kw_only=True):
    """An event came to a reader of the event stream."""

    seq: int
    t: int
    name: str
    position: int
    type: str


class Note(msgspec.Struct, frozen=True, kw_only=True):
    """What the world did to the broker, for whoever reads the history. No checker may look at it."""

    seq: int
    t: int
    what: str


class _Named(msgspec.Struct):
    id: str | None = None
    attempt: int | None = None
    status: str | None = None


_decode = msgspec.json.Decoder(_Named).decode
_NOTHING = _Named()


class History:
    """The recorder. `now_ms` is the true time; `note` mixes what was seen into the trace of the run."""

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
        # Who reads the event stream from its beginning: by name the one event it wants, or None for any.
        self.readers: dict[str, str | None] = {}
        # Up to this position every endpoint said that it had delivered what was wanted, and every reader had
        # the time to read it; None if it never came to that.
        self.hooked_until: int | None = None
        # From when to when, by the broker's clock, everything was well; None if it never was.
        self.healed_at: int | None = None
        self.ended_at: int | None = None
        self._recorded: dict[int, bytes] = {}
        self._now_ms = now_ms
        self._note = note
        self._seq = 0

    @property
    def log(self) -> list[Row]:
        """The last dump is the final log."""
        return self.dumps[-1] if self.dumps else []

    def _next(self) -> int:
        self._seq += 1
        return self._seq

    def invoked(
        self, kind: str, *, key: str | None = None, body: str = "", ids: tuple[str, ...] = ()
    ) -> Call:
        call = Call(kind=kind, invoked=self._next(), t=self._now_ms(), key=key, body=body, ids=ids)
        self.calls.append(call)
        self._note(f"call {kind} {ids}")
        return call

    def returned(self, call: Call, status: int, *, ids: tuple[str, ...] = (), answer: Any = None) -> None:
        call.status, call.returned, call.answer = status, self._next(), answer
        call.ids = ids or call.ids
        self._note(f"returned {call.kind} {status} {call.ids}")

    def recorded(self, position: int, data: bytes) -> None:
        """What a row said when it became durable."""
        self._recorded[position] = data

    def as_recorded(self, row: Row) -> Row:
        """A row with the data it had before that was erased, if it was seen."""
        if row["data"] is not None or row["position"] not in self._recorded:
            return row
        return row | {"data": msgspec.json.decode(self._recorded[row["position"]])}

    def committed(self, head: int) -> None:
        if not self.commits or self.commits[-1].head != head:
            self.commits.append(Commit(seq=self._next(), t=self._now_ms(), head=head))

    def on_wire(
        self,
        what: What,
        topic: str,
        payload: bytes,
        correlation: bytes | None = None,
        retain: bool = False,
        attempt: int | None = None,
    ) -> None:
        """`attempt`: where the payload does not say it."""
        try:
            named = _decode(payload)
        except msgspec.MsgspecError:
            named = _NOTHING
        command_id = named.id or (correlation.decode("ascii", "replace") if correlation else None)
        self.wire.append(
            Wire(
                what=what,
                seq=self._next(),
                t=self._now_ms(),
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
        """A fetch was answered with this command."""
        self.wire.append(
            Wire(
                what="publish",
                seq=self._next(),
                t=self._now_ms(),
                topic=transport,
                hardware_id=hardware_id,
                command_id=command_id,
                attempt=attempt,
                transport=transport,
            )
        )
        self._note(f"{transport} {hardware_id} {command_id} {attempt}")

    def linked(self, up: bool) -> None:
        self.links.append(Link(seq=self._next(), t=self._now_ms(), up=up))

    def executed(self, hardware_id: str, command_id: str) -> None:
        self.executions.append(
            Execution(seq=self._next(), t=self._now_ms(), hardware_id=hardware_id, command_id=command_id)
        )
        self._note(f"executed {hardware_id} {command_id}")

    def answered(self, hardware_id: str, command_id: str | None, status: str) -> None:
        self.answers.append(
            Answer(
                seq=self._next(),
                t=self._now_ms(),
                hardware_id=hardware_id,
                command_id=command_id,
                status=status,
            )
        )

    def hooked(self, url: str, id: str, position: int, type: str, *, taken: bool) -> None:
        self.hooks.append(
            Hook(
                seq=self._next(),
                t=self._now_ms(),
                url=url,
                id=id,
                position=position,
                type=type,
                taken=taken,
            )
        )
        self._note(f"hook {url} {id} {type} {taken}")

    def streamed(self, name: str, position: int, type: str) -> None:
        seen = Streamed(seq=self._next(), t=self._now_ms(), name=name, position=position, type=type)
        self.streams.append(seen)
        self._note(f"stream {name} {position} {type}")

    def said(self, what: str) -> None:
        self.notes.append(Note(seq=self._next(), t=self._now_ms(), what=what))
        self._note(what)

    def dumped(self, rows: list[Row]) -> None:
        self.dumps.append(rows)
