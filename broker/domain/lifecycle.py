"""The life of a command: its states, every transition, and the two functions that use them.

`decide(state, request)`, in `decisions.py`, says what follows from a request. `evolve(state, pending)`
folds an event into the state and never refuses it. Both are pure: time, ids and randomness are
arguments. No other module knows which event may follow which state. README's diagram is drawn from
`TRANSITIONS` below.

A command is *closed* in five states. Four of them are final. The fifth, `timed_out`, means that the
outcome is unknown: the command holds no place in the lane and is never sent again, but a late answer
of the device still corrects it.

The tables keep two promises. First, `expired` and `cancelled` mean that no byte of the command left
the broker. Therefore `published` is recorded before the bytes are written, and both can follow only
`pending`. Second, a PUBACK is no evidence about a device: only the device's own answer closes a command
as `executed` or `failed`. The exception are one-way types, whose devices send no answers.

How to read the table in `decisions.py`: a row is an input, a column is the present state, and a cell
says what follows. A cell is one of

    record(event)      the event is recorded; `TRANSITIONS` gives the next state
    NOTHING            nothing changes, and nothing is recorded
    ALREADY            the state is already as requested: answer as if it were done now
    CONFLICT           refused, because the state does not allow it
    MISSING            there is no such command
    RENEW              a new command is created from this one
    ERASE              the command's data may be erased
    unmatched(reason)  the answer matches no command: kept for the operator, never in the log
    attempt(what)      nothing is recorded; the open attempt changes (see `Flight` in lanes.py)
    a function         the cell depends on facts in the request
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import Any, Literal

import msgspec

from broker.domain.events import (
    Acknowledged,
    Cancelled,
    Created,
    Error,
    Event,
    Evidence,
    Executed,
    Expired,
    Failed,
    Pending,
    Progressed,
    Published,
    TimedOut,
    Transport,
)
from devices.types import Signing


class State(StrEnum):
    NONE = "none"  # no event yet
    PENDING = "pending"
    PUBLISHED = "published"
    ACKNOWLEDGED = "acknowledged"
    TIMED_OUT = "timed_out"
    EXECUTED = "executed"
    FAILED = "failed"
    EXPIRED = "expired"
    CANCELLED = "cancelled"


FINAL = frozenset({State.EXECUTED, State.FAILED, State.EXPIRED, State.CANCELLED})
CLOSED = FINAL | {State.TIMED_OUT}

TRANSITIONS: dict[State, dict[str, State]] = {
    State.NONE: {"created": State.PENDING},
    State.PENDING: {
        "published": State.PUBLISHED,
        "failed": State.FAILED,  # recorded by the broker only: the command can never be sent
        "expired": State.EXPIRED,
        "cancelled": State.CANCELLED,
    },
    State.PUBLISHED: {
        "published": State.PUBLISHED,
        "acknowledged": State.ACKNOWLEDGED,
        "progressed": State.ACKNOWLEDGED,
        "executed": State.EXECUTED,
        "failed": State.FAILED,
        "timed_out": State.TIMED_OUT,
    },
    State.ACKNOWLEDGED: {
        "progressed": State.ACKNOWLEDGED,
        "executed": State.EXECUTED,
        "failed": State.FAILED,
        "timed_out": State.TIMED_OUT,
    },
    State.TIMED_OUT: {
        "acknowledged": State.ACKNOWLEDGED,
        "progressed": State.ACKNOWLEDGED,
        "executed": State.EXECUTED,
        "failed": State.FAILED,
    },
    State.EXECUTED: {},
    State.FAILED: {},
    State.EXPIRED: {},
    State.CANCELLED: {},
}

MAX_PROGRESS_RECORDED = 1_000
MAX_NUMBERS = 16
NO_RESULT = msgspec.Raw(b"null")
PROGRESS_INTERVAL_MS = 1_000


class CommandState(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """The fold of a command's events. Times in ms.

    `counted`: number of attempts that count towards max_attempts; `counting`: the last one does. `reopened`:
    a late answer reopened it after `timed_out`; it then takes no window slot. `pulled`: a heartbeat or relay
    has fetched it. `numbers`: those of the last attempts, if the device's type uses `$number`.
    """

    id: str
    project: str
    device_id: str
    hardware_id: str
    type: str
    device_type: str
    definition: str
    topic: str
    params: msgspec.Raw
    state: State
    version: int
    actor: str
    created_at: int
    updated_at: int
    expires_at: int | None = None
    ttl_ms: int | None = None
    retry_of: str | None = None
    collapse_key: str | None = None
    attempts: int = 0
    counted: int = 0
    counting: bool = True
    transport: Transport | None = None
    pulled: bool = False
    published_at: int | None = None
    handed_over_at: int | None = None
    delivered_at: int | None = None
    acknowledged_at: int | None = None
    reported_at: int | None = None
    executed_at: int | None = None
    closed_at: int | None = None
    percent: int | float | None = None
    note: str | None = None
    progress_count: int = 0
    result: msgspec.Raw = NO_RESULT  # JSON
    error: Error | None = None
    reason: str | None = None
    by: str | None = None
    superseded_by: str | None = None
    late: bool = False
    reopened: bool = False
    numbers: tuple[int, ...] = ()
    signed: bool | None = None  # whether the last recorded answer was; None: answers are not signed
    seq: int | None = None  # of the last recorded signed progress

    @property
    def closed(self) -> bool:
        return self.state in CLOSED


def evolve(state: CommandState | None, pending: Pending) -> CommandState:
    """The state after one more event.

    Never refuses an event because of the state, so that old logs stay readable when rules change.

    Raises:
        ValueError: the first event is not `created`, or the event is not a command event.
    """
    event, at = pending.event, pending.decided_at
    if type(event) is Created:
        return _created(pending, event)
    changes_of = CHANGES.get(type(event))
    if state is None or changes_of is None:
        raise ValueError(f"{pending.type} cannot be version {pending.version} of stream {pending.stream}")
    found = TRANSITIONS[state.state].get(pending.type, state.state)
    changes = changes_of(state, event, at)
    if found in CLOSED:
        changes["closed_at"] = at
    elif state.state is State.TIMED_OUT:
        changes |= {"reopened": True, "closed_at": None}
    return msgspec.structs.replace(state, state=found, version=pending.version, updated_at=at, **changes)


def _created(pending: Pending, event: Created) -> CommandState:
    return CommandState(
        id=pending.stream,
        project=pending.project,
        device_id=pending.device_id or "",
        hardware_id=event.hardware_id,
        type=event.type,
        device_type=event.device_type,
        definition=event.definition,
        topic=event.topic,
        params=event.params,
        state=State.PENDING,
        version=pending.version,
        actor=pending.actor,
        created_at=pending.decided_at,
        updated_at=pending.decided_at,
        expires_at=event.expires_at,
        ttl_ms=event.ttl_ms,
        retry_of=event.retry_of,
        collapse_key=event.collapse_key,
    )


Changes = dict[str, object]


def _published(state: CommandState, event: Published, at: int) -> Changes:
    return {
        "attempts": event.attempt,
        "counted": state.counted + event.counts,
        "counting": event.counts,
        "transport": event.transport,
        "pulled": state.pulled or event.transport != "mqtt",
        "published_at": at if state.published_at is None else state.published_at,
        "handed_over_at": at,
        "numbers": _numbers(state, event),
    }


def _numbers(state: CommandState, event: Published) -> tuple[int, ...]:
    return state.numbers if event.number is None else (*state.numbers[1 - MAX_NUMBERS :], event.number)


def _reported(state: CommandState, event: Acknowledged | Progressed, at: int) -> Changes:
    return {
        "delivered_at": at if state.delivered_at is None else state.delivered_at,
        "acknowledged_at": at if state.acknowledged_at is None else state.acknowledged_at,
        "reported_at": at,
        "late": state.late or event.late,
        "signed": event.signed,
    }


def _progressed(state: CommandState, event: Progressed, at: int) -> Changes:
    count = state.progress_count + 1
    progress = {"percent": event.percent, "note": event.note, "progress_count": count, "seq": event.seq}
    return _reported(state, event, at) | progress


def _executed(state: CommandState, event: Executed, at: int) -> Changes:
    heard = at if state.delivered_at is None and event.evidence != "mqtt_puback" else state.delivered_at
    late = state.late or event.late
    return {
        "result": event.result,
        "executed_at": at,
        "late": late,
        "signed": event.signed,
        "delivered_at": heard,
    }


def _failed(state: CommandState, event: Failed, at: int) -> Changes:
    heard = at if state.delivered_at is None and event.by == "device" else state.delivered_at
    late = state.late or event.late
    return {"error": event.error, "by": event.by, "late": late, "signed": event.signed, "delivered_at": heard}


def _timed_out(state: CommandState, event: TimedOut, at: int) -> Changes:
    return {"reason": event.reason, "by": event.by}


def _expired(state: CommandState, event: Expired, at: int) -> Changes:
    return {}


def _cancelled(state: CommandState, event: Cancelled, at: int) -> Changes:
    return {"by": event.by, "reason": event.reason, "superseded_by": event.superseded_by}


# What each event after `created` changes. A `match` would ask class after class whether the event is one of
# it; with the table `evolve` takes a fifth less time.
CHANGES: dict[type[Event], Callable[[CommandState, Any, int], Changes]] = {
    Published: _published,
    Acknowledged: _reported,
    Progressed: _progressed,
    Executed: _executed,
    Failed: _failed,
    TimedOut: _timed_out,
    Expired: _expired,
    Cancelled: _cancelled,
}


# --- requests --------------------------------------------------------------------------------------


class Input(StrEnum):
    """Everything that can happen to a command: the rows of the table in `decisions.py`."""

    CREATE = "create"
    SUPERSEDE = "create of a successor with the same collapse_key"
    CANCEL = "cancel"
    ABANDON = "abandon"
    RETRY = "retry"
    DELETE = "delete"
    DEVICE_DELETED = "device deleted"
    KEY_REVOKED = "key that created it revoked"
    HAND_OVER = "hand over by MQTT"
    FETCH = "heartbeat or relay fetch"
    UNSENDABLE = "device type cannot speak it"
    REFUSED = "MQTT server refuses the publish"
    NO_SUBSCRIBER = "MQTT server has no matching subscriber"
    ACCEPTED = "MQTT server accepts the publish"
    WRITE_UNKNOWN = "outcome of the write unknown"
    ATTEMPT_TIMER = "attempt timer"
    EXPIRY = "expires_at reached"
    RESULT_TIMER = "result timer"
    WENT_OFFLINE = "device goes offline"
    CAME_ONLINE = "device comes online"
    RESTARTED = "restart of the broker"
    ANSWER_ACKNOWLEDGED = "answer acknowledged"
    ANSWER_PROGRESS = "answer progress"
    ANSWER_EXECUTED = "answer executed"
    ANSWER_FAILED = "answer failed"
    OBSERVED = "live state shows that it is done"
    WRONG_DEVICE = "answer from another device or project"
    WITHOUT_ID = "answer without id"
    MALFORMED = "answer that does not parse"


ANSWERS = {
    "acknowledged": Input.ANSWER_ACKNOWLEDGED,
    "progress": Input.ANSWER_PROGRESS,
    "executed": Input.ANSWER_EXECUTED,
    "failed": Input.ANSWER_FAILED,
}


# `no_key`: the broker has none to check the signature with.
Signature = Literal["valid", "unsigned", "bad_signature", "no_key"]


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """One input for one command, with the facts that the rules of its row need.

    `now` in ms. `exhausted`: the open attempt is the last one that the log allows (`attempts.is_exhausted`).
    `always_sent`: the type has no presence. `candidates`: how many commands an answer without id can belong
    to. `over_http`: the answer is an HTTP report. `may_report`: the reporter is the device itself, which may
    also report for a command that went by MQTT only. `signing`: whether answers to this command are signed.
    `signature`: of this answer; `seq`: its number, if it is signed progress.
    """

    input: Input
    now: int = 0
    by: str = "broker"
    reason: str | None = None
    created: Created | None = None
    superseded_by: str | None = None
    transport: Transport = "mqtt"
    counts: bool = True
    number: int | None = None
    attempt_open: bool = False
    lease_open: bool = False
    last_attempt: bool = False
    exhausted: bool = False
    always_sent: bool = False
    every_attempt_refused: bool = False
    repeatable: bool = True
    held: bool = False
    one_way: bool = False
    evidence: Evidence = "device_ack"
    at: str | None = None
    result: msgspec.Raw = msgspec.Raw(b"null")
    error: Error | None = None
    percent: int | float | None = None
    note: str | None = None
    over_http: bool = False
    may_report: bool = False
    candidates: int = 1
    signing: Signing = "none"
    signature: Signature = "unsigned"
    seq: int | None = None
