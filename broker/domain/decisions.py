"""The decision table of commands, and `decide`, which reads it.

Pure and total: there is exactly one cell for every input and state. The docstring of `lifecycle.py`
explains the cells. Cells that depend on facts are functions in this module; they use only the state and
the request.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum

import msgspec

from broker.domain.events import (
    Acknowledged,
    Cancelled,
    CommandEvent,
    Error,
    Executed,
    Expired,
    Failed,
    Progressed,
    Published,
    TimedOut,
)
from broker.domain.lifecycle import (
    ANSWERS,
    MAX_PROGRESS_RECORDED,
    PROGRESS_INTERVAL_MS,
    CommandState,
    Input,
    Request,
    State,
)


class Verdict(StrEnum):
    RECORD = "record"
    NOTHING = "nothing"
    ALREADY = "already"
    CONFLICT = "conflict"
    MISSING = "missing"
    RENEW = "renew"
    ERASE = "erase"
    UNMATCHED = "unmatched"
    ATTEMPT = "attempt"


class Cell(msgspec.Struct, frozen=True):
    """A verdict with its details.

    `word`: the event's name, the reason of `unmatched`, or the change of the attempt. `reason`: the reason
    in the event.
    """

    verdict: Verdict
    word: str = ""
    reason: str = ""


class Decision(msgspec.Struct, frozen=True):
    verdict: Verdict
    word: str = ""
    event: CommandEvent | None = None


Rule = Callable[[CommandState, Request], Cell]

# Recorded in logs and compared with repeated answers, so this message must not change.
UNEXPLAINED = Error(code="device_error", message="the device said only that it failed")

NOTHING = Cell(Verdict.NOTHING)
ALREADY = Cell(Verdict.ALREADY)
CONFLICT = Cell(Verdict.CONFLICT)
MISSING = Cell(Verdict.MISSING)
RENEW = Cell(Verdict.RENEW)
ERASE = Cell(Verdict.ERASE)


def record(event: str, reason: str = "") -> Cell:
    return Cell(Verdict.RECORD, event, reason)


def unmatched(reason: str) -> Cell:
    return Cell(Verdict.UNMATCHED, reason)


def attempt(what: str) -> Cell:
    """A change of the attempt: `close` (counts), `unheard` or `dropped` (closed, does not count: nobody was
    subscribed, or the device went offline), `back_off`, `due`, `held` or `again` (the same attempt is
    returned once more)."""
    return Cell(Verdict.ATTEMPT, what)


# --- rules: cells that depend on facts -----------------------------------------------------------


def _hand_over_again(_: CommandState, request: Request) -> Cell:
    if request.attempt_open or not request.repeatable:
        return NOTHING
    return record("published")


def _fetch_again(state: CommandState, request: Request) -> Cell:
    if request.attempt_open and state.transport != request.transport:
        return NOTHING  # another transport has the open attempt
    if not request.repeatable:
        return NOTHING  # it was handed over once, and the device may have received it
    return attempt("again") if request.lease_open else record("published")


def _refused(_: CommandState, request: Request) -> Cell:
    return record("failed", "refused") if request.every_attempt_refused else attempt("close")


def _accepted(_: CommandState, request: Request) -> Cell:
    return record("executed") if request.one_way else NOTHING


def _attempt_timer(_: CommandState, request: Request) -> Cell:
    if not request.repeatable:
        return record("timed_out", "no_answer")
    if request.exhausted:
        return record("timed_out", "no_answer")
    if request.held:
        return attempt("held")
    return record("timed_out", "no_answer") if request.last_attempt else attempt("back_off")


def _no_subscriber(_: CommandState, request: Request) -> Cell:
    if not request.repeatable:
        return NOTHING  # it keeps its only attempt, so that the attempt timer ends it
    if request.always_sent:
        return record("timed_out", "no_answer") if request.last_attempt else attempt("back_off")
    return attempt("unheard")


def _went_offline(_: CommandState, request: Request) -> Cell:
    if not request.repeatable:
        return NOTHING  # as above
    return record("timed_out", "no_answer") if request.exhausted else attempt("dropped")


def _restarted(_: CommandState, request: Request) -> Cell:
    # An attempt that may not be repeated stays open, so that the attempt timer ends it.
    return attempt("due") if request.repeatable and not request.exhausted else NOTHING


def _came_online(_: CommandState, request: Request) -> Cell:
    return attempt("due") if request.repeatable else NOTHING


def _acknowledged_late(state: CommandState, _: Request) -> Cell:
    # Nothing is sent after the first acknowledgement, so a second one is a delayed copy of it.
    return record("acknowledged") if state.acknowledged_at is None else NOTHING


def _progress_again(state: CommandState, request: Request) -> Cell:
    if _repeated(state, request):
        return NOTHING
    changed = (request.percent, request.note) != (state.percent, state.note)
    soon = state.progress_count > 0 and request.now - state.updated_at < PROGRESS_INTERVAL_MS
    return NOTHING if not changed or soon else _progress_late(state, request)


def _repeated(state: CommandState, request: Request) -> bool:
    """Somebody sends an older signed report again."""
    return None not in (request.seq, state.seq) and request.seq <= state.seq  # type: ignore[operator]


def _progress_late(state: CommandState, request: Request) -> Cell:
    if _repeated(state, request):
        return NOTHING
    copy = state.progress_count > 0 and (request.percent, request.note) == (state.percent, state.note)
    return NOTHING if copy or state.progress_count >= MAX_PROGRESS_RECORDED else record("progressed")


def _same_result(state: CommandState, request: Request) -> Cell:
    return ALREADY if same_json(bytes(state.result), bytes(request.result)) else unmatched("contradiction")


def _same_error(state: CommandState, request: Request) -> Cell:
    return ALREADY if state.error == (request.error or UNEXPLAINED) else unmatched("contradiction")


def same_json(left: bytes, right: bytes) -> bool:
    """Are the decoded values equal? Order of members and notation of numbers do not matter."""
    return left == right or msgspec.json.decode(left) == msgspec.json.decode(right)


def _without_id(_: CommandState, request: Request) -> Cell:
    if request.candidates == 0:
        return unmatched("nothing_in_flight")
    return unmatched("ambiguous") if request.candidates > 1 else attempt("again")


# --- the table -----------------------------------------------------------------------------------


def row(
    none: Cell | Rule,
    pending: Cell | Rule,
    published: Cell | Rule,
    acknowledged: Cell | Rule,
    timed_out: Cell | Rule,
    executed: Cell | Rule,
    failed: Cell | Rule,
    expired: Cell | Rule,
    cancelled: Cell | Rule,
) -> dict[State, Cell | Rule]:
    cells = (none, pending, published, acknowledged, timed_out, executed, failed, expired, cancelled)
    return dict(zip(State, cells, strict=True))


def every(cell: Cell) -> dict[State, Cell | Rule]:
    return dict.fromkeys(State, cell)


_ = NOTHING
UNKNOWN = unmatched("unknown")
NEVER = unmatched("never_handed_over")  # a forged answer, or the device got the grant another way
BROKEN = unmatched("promise_broken")  # an answer to a command that was closed as never handed over
AGAINST = unmatched("contradiction")
GAVE_UP = record("timed_out", "operator")
GONE = record("timed_out", "device_deleted")

# fmt: off
TABLE: dict[Input, dict[State, Cell | Rule]] = {
    # in state             none     pending              published            acknowledged         timed_out              executed      failed       expired   cancelled
    # requests
    Input.CREATE:          row(record("created"), ALREADY, ALREADY,           ALREADY,             ALREADY,               ALREADY,      ALREADY,     ALREADY,  ALREADY),
    Input.SUPERSEDE:       row(_,       record("cancelled"), _,               _,                   _,                     _,            _,           _,        _),
    Input.CANCEL:          row(MISSING, record("cancelled"), CONFLICT,        CONFLICT,            CONFLICT,              CONFLICT,     CONFLICT,    CONFLICT, ALREADY),
    Input.ABANDON:         row(MISSING, CONFLICT,        GAVE_UP,             GAVE_UP,             ALREADY,               CONFLICT,     CONFLICT,    CONFLICT, CONFLICT),
    Input.RETRY:           row(MISSING, CONFLICT,        CONFLICT,            CONFLICT,            RENEW,                 CONFLICT,     RENEW,       RENEW,    RENEW),
    Input.DELETE:          row(MISSING, record("cancelled"), CONFLICT,        CONFLICT,            ERASE,                 ERASE,        ERASE,       ERASE,    ERASE),
    Input.DEVICE_DELETED:  row(_,       record("cancelled"), GONE,            GONE,                _,                     _,            _,           _,        _),
    Input.KEY_REVOKED:     every(_),
    # the broker's own decisions
    Input.HAND_OVER:       row(_,       record("published"), _hand_over_again, _,                  _,                     _,            _,           _,        _),
    Input.FETCH:           row(_,       record("published"), _fetch_again,    _,                   _,                     _,            _,           _,        _),
    Input.UNSENDABLE:      row(_,       record("failed", "unsendable"), record("timed_out", "unsendable"), _, _,          _,            _,           _,        _),
    Input.REFUSED:         row(_,       _,               _refused,            _,                   _,                     _,            _,           _,        _),
    Input.NO_SUBSCRIBER:   row(_,       _,               _no_subscriber,      _,                   _,                     _,            _,           _,        _),
    Input.ACCEPTED:        row(_,       _,               _accepted,           _,                   _,                     _,            _,           _,        _),
    Input.WRITE_UNKNOWN:   every(_),
    Input.ATTEMPT_TIMER:   row(_,       _,               _attempt_timer,      _,                   _,                     _,            _,           _,        _),
    Input.EXPIRY:          row(_,       record("expired"), record("timed_out", "ttl"), _,          _,                     _,            _,           _,        _),
    Input.RESULT_TIMER:    row(_,       _,               _,                   record("timed_out", "no_result"), _,        _,            _,           _,        _),
    Input.WENT_OFFLINE:    row(_,       _,               _went_offline,       _,                   _,                     _,            _,           _,        _),
    Input.CAME_ONLINE:     row(_,       _,               _came_online,        _,                   _,                     _,            _,           _,        _),
    Input.RESTARTED:       row(_,       _,               _restarted,          _,                   _,                     _,            _,           _,        _),
    # answers from the command's own device
    Input.ANSWER_ACKNOWLEDGED: row(UNKNOWN, NEVER,       record("acknowledged"), _,                _acknowledged_late,    _,           _,           BROKEN,   BROKEN),
    Input.ANSWER_PROGRESS: row(UNKNOWN, NEVER,           record("progressed"), _progress_again,    _progress_late,        _,            _,           BROKEN,   BROKEN),
    Input.ANSWER_EXECUTED: row(UNKNOWN, NEVER,           record("executed"),  record("executed"),  record("executed"),    _same_result, AGAINST,     BROKEN,   BROKEN),
    Input.ANSWER_FAILED:   row(UNKNOWN, NEVER,           record("failed"),    record("failed"),    record("failed"),      AGAINST,      _same_error, BROKEN,   BROKEN),
    # what a state topic shows after the command's bytes were written
    Input.OBSERVED:        row(_,       _,               record("executed"),  record("executed"),  record("executed"),    _,            _,           _,        _),
    # answers that do not name a command of this device
    Input.WRONG_DEVICE:    every(unmatched("wrong_device")),
    Input.WITHOUT_ID:      row(unmatched("nothing_in_flight"), unmatched("nothing_in_flight"), _without_id, _without_id, _without_id,
                               unmatched("nothing_in_flight"), unmatched("nothing_in_flight"), unmatched("nothing_in_flight"), unmatched("nothing_in_flight")),
    Input.MALFORMED:       every(unmatched("malformed")),
}
# fmt: on


def decide(state: CommandState | None, request: Request) -> Decision:
    """Decides one request in one state; `state` None: there is no such command yet.

    A refusal is a verdict, never an exception.
    """
    if state is not None and (word := _distrusted(request)):
        return Decision(Verdict.UNMATCHED, word)
    found = TABLE[request.input][State.NONE if state is None else state.state]
    if isinstance(found, Cell):
        cell = found
    else:
        assert state is not None, "the column `none` contains no functions"
        cell = found(state, request)
    if request.over_http:
        cell = _as_report(state, request, cell)
    if cell.verdict is Verdict.RECORD:
        return Decision(cell.verdict, cell.word, _event(state, request, cell))
    return Decision(cell.verdict, cell.word)


def _distrusted(request: Request) -> str:
    """Why an answer is not the device's word, where answers are signed; else empty."""
    if request.signing == "none" or request.input not in OF_DEVICE or request.signature == "valid":
        return ""
    return "" if (request.signing, request.signature) == ("optional", "unsigned") else request.signature


# What the device itself says about a command.
OF_DEVICE = frozenset((*ANSWERS.values(), Input.OBSERVED))
HANDED_OVER = (State.PUBLISHED, State.ACKNOWLEDGED, State.TIMED_OUT)


def _as_report(state: CommandState | None, request: Request, cell: Cell) -> Cell:
    """Changes a cell for an HTTP report: its sender waits for an answer; `unmatched` becomes a conflict."""
    if state is None:
        return MISSING
    if state.state in HANDED_OVER and not (state.pulled or request.may_report):
        return CONFLICT
    if cell.verdict is Verdict.NOTHING:
        return ALREADY
    if cell == BROKEN:
        return Cell(Verdict.CONFLICT, "promise_broken")  # refused, and also kept for the operator
    return CONFLICT if cell.verdict is Verdict.UNMATCHED else cell


def _event(state: CommandState | None, request: Request, cell: Cell) -> CommandEvent:
    late = state is not None and state.state is State.TIMED_OUT
    signed = None if request.signing == "none" else request.signature == "valid"
    match cell.word:
        case "created":
            assert request.created is not None, "a create request carries its event"
            return request.created
        case "published":
            number = 1 if state is None else state.attempts + 1
            counts = request.counts and request.transport == "mqtt"
            return Published(
                attempt=number, transport=request.transport, counts=counts, number=request.number
            )
        case "acknowledged":
            return Acknowledged(late=late, at=request.at, evidence=request.evidence, signed=signed)
        case "progressed":
            return Progressed(
                percent=request.percent,
                note=request.note,
                late=late,
                at=request.at,
                evidence=request.evidence,
                signed=signed,
                seq=request.seq,
            )
        case "executed":
            evidence = "mqtt_puback" if request.input is Input.ACCEPTED else request.evidence
            return Executed(result=request.result, late=late, at=request.at, evidence=evidence, signed=signed)
        case "failed":
            return _failed(request, cell, late, signed)
        case "timed_out":
            by = None if cell.reason in ("no_answer", "no_result", "ttl", "unsendable") else request.by
            source = "timer" if by is None else "operator"
            return TimedOut(reason=cell.reason, by=by, note=request.reason, evidence=source)  # type: ignore[arg-type]
        case "expired":
            return Expired()
        case _:
            reason = "device_deleted" if request.input is Input.DEVICE_DELETED else request.reason
            source = "broker" if request.by == "broker" else "operator"
            return Cancelled(
                by=request.by,
                reason=reason,
                superseded_by=request.superseded_by,
                evidence=source,  # type: ignore[arg-type]
            )


def _failed(request: Request, cell: Cell, late: bool, signed: bool | None) -> Failed:
    if cell.reason == "refused":
        error = Error(code="refused", message=request.reason or "the MQTT server refused the publish")
        return Failed(error=error, by="mqtt_server", evidence="mqtt_refused")
    if cell.reason == "unsendable":
        error = Error(code="unsendable", message=request.reason or "the device type cannot encode it")
        return Failed(error=error, by="broker", evidence="broker")
    return Failed(
        error=request.error or UNEXPLAINED,
        by="device",
        late=late,
        at=request.at,
        evidence=request.evidence,
        signed=signed,
    )
