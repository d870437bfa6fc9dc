"""The parts of the simulator: the faults it draws, its MQTT, one device, and the ledger that finds wrong
outcomes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.cli.simulate import share
from broker.operations.asking import Failed
from devices.fleet.device import COMMAND, Device
from devices.fleet.faults import Fate, Faults, fate
from devices.fleet.mqtt import (
    CONNACK,
    CONNECT,
    PUBACK,
    PUBLISH,
    SUBACK,
    SUBSCRIBE,
    Connection,
    Refused,
    packet,
    take,
    text,
)
from devices.fleet.summary import Ledger, Sent, Summary, View, misfit, percentile, summarise

NAME = "sim-0001"
MESSAGE = PUBLISH | 2
CALM = Faults()


# --- faults ----------------------------------------------------------------------------------------


def test_the_same_seed_draws_the_same_faults() -> None:
    faults = Faults(offline=0.5, fail=0.5, duplicate=0.5, lose=0.5, slow=0.5, seed=7)

    once = [fate(faults, NAME, str(number)) for number in range(100)]

    assert [fate(faults, NAME, str(number)) for number in range(100)] == once
    assert [fate(faults, "sim-0002", str(number)) for number in range(100)] != once
    other = msgspec.structs.replace(faults, seed=8)
    assert [fate(other, NAME, str(number)) for number in range(100)] != once


def test_each_fault_occurs_about_as_often_as_its_share() -> None:
    faults = Faults(offline=0.1, fail=0.02, duplicate=0.3, lose=0.01, slow=0.05)

    fates = [fate(faults, f"sim-{number % 100:04}", str(number)) for number in range(20_000)]

    def found(what: Callable[[Fate], bool]) -> float:
        return sum(map(what, fates)) / len(fates)

    assert found(lambda each: each.away_sec > 0) == pytest.approx(0.1, rel=0.2)
    assert found(lambda each: each.failed) == pytest.approx(0.02, rel=0.2)
    assert found(lambda each: each.doubled) == pytest.approx(0.3, rel=0.2)
    assert found(lambda each: each.lost) == pytest.approx(0.01, rel=0.2)
    assert found(lambda each: each.slow_sec > 0) == pytest.approx(0.05, rel=0.2)
    assert all(1 <= each.slow_sec <= 5 for each in fates if each.slow_sec)
    assert all(1 <= each.away_sec <= 8 for each in fates if each.away_sec)


def test_a_share_of_zero_never_occurs_and_a_share_of_one_always() -> None:
    whole = Faults(offline=1, fail=1, duplicate=1, lose=1, slow=1)

    for number in range(1_000):
        assert not fate(CALM, NAME, str(number)).silent
        met = fate(whole, NAME, str(number))
        assert all([met.failed, met.doubled, met.lost, met.slow_sec, met.away_sec])


@pytest.mark.parametrize(("written", "value"), [("10%", 0.1), ("0.1", 0.1), ("0%", 0), ("100%", 1), ("1", 1)])
def test_a_share_is_written_as_percent_or_as_a_fraction(written: str, value: float) -> None:
    assert share("--fail", written) == pytest.approx(value)


@pytest.mark.parametrize("written", ["", "%", "ten", "-1%", "101%", "1.5", "nan", "nan%", "inf"])
def test_an_invalid_share_is_refused_and_the_error_names_the_option(written: str) -> None:
    with pytest.raises(Failed, match="--fail"):
        share("--fail", written)


# --- bytes -----------------------------------------------------------------------------------------


@given(st.lists(st.binary(max_size=300), max_size=8), st.integers(1, 7))
def test_packets_are_read_from_the_buffer_however_they_were_split(bodies: list[bytes], size: int) -> None:
    stream = b"".join(packet(MESSAGE, body) for body in bodies)
    buffer, found = bytearray(), []

    for place in range(0, len(stream), size):
        buffer += stream[place : place + size]
        while (one := take(buffer)) is not None:
            found.append(one)

    assert found == [(MESSAGE, body) for body in bodies]
    assert not buffer


@pytest.mark.parametrize("wrong", [b"\x30\xff\xff\xff\xff\x01", b"\x30\xff\xff\xff\x7f"])
def test_an_excessive_length_is_refused(wrong: bytes) -> None:
    with pytest.raises(ValueError, match="packet"):
        take(bytearray(wrong))


# --- one device ------------------------------------------------------------------------------------


class Wire(asyncio.Transport):
    """The other end of a device's connection, in the place of the MQTT server."""

    def __init__(self, connection: Connection) -> None:
        super().__init__()
        self.connection, self.gone = connection, False
        self._sent = bytearray()
        connection.connection_made(self)

    def write(self, data: Any) -> None:
        self._sent += data

    def abort(self) -> None:
        self.gone = True

    close = abort

    def packets(self) -> list[tuple[int, bytes]]:
        """The packets sent by the device since the last call."""
        found = []
        while (one := take(self._sent)) is not None:
            found.append(one)
        return found

    def answers(self) -> list[tuple[str, str]]:
        """The answers among these packets, as (id, status)."""
        bodies = [body for kind, body in self.packets() if kind & 0xF0 == PUBLISH]
        said = [(topic(body), msgspec.json.decode(body[2 + len(topic(body)) + 2 :])) for body in bodies]
        return [(answer["id"], answer["status"]) for where, answer in said if where.endswith("/ack")]

    def command(self, command_id: str, number: int = 0) -> None:
        payload = msgspec.json.encode({"id": command_id, "type": COMMAND, "params": {"number": number}})
        self.connection.data_received(packet(MESSAGE, text(b"iotee/dev/sim-0001/rls") + b"\0\x09" + payload))


def topic(body: bytes) -> str:
    return body[2 : 2 + int.from_bytes(body[:2])].decode()


def device(faults: Faults = CALM) -> tuple[Device, Ledger]:
    ledger = Ledger(faults)
    return Device(NAME, "dtok_x", run="run", prefix="iotee", ledger=ledger, now_ms=lambda: 1_000), ledger


def online(one: Device) -> Wire:
    wire = Wire(one.connect())
    wire.connection.data_received(packet(CONNACK, b"\0\0") + packet(SUBACK, b"\0\1\1"))
    return wire


def connected(one: Device, *, late: bool) -> Wire:
    """A new connection of the device, of the wanted order. Its other order comes at the next connection."""
    while (connection := one.connect()).subscribes_late is not late:
        pass
    return Wire(connection)


@pytest.mark.parametrize("late", [False, True])
async def test_a_device_connects_with_name_and_token_subscribes_and_reports_online(late: bool) -> None:
    one, _ = device()
    wire = connected(one, late=late)
    sent = wire.packets()
    async with asyncio.timeout(60):
        wire.connection.data_received(packet(CONNACK, b"\0\0"))
        while len(sent) < (3 if late else 2):
            sent += wire.packets()
            await asyncio.sleep(0)
    wire.connection.data_received(packet(SUBACK, b"\0\1\1"))
    sent += wire.packets()

    await wire.connection.ready
    (connect, body), *rest = sent
    (_, status), (subscribe, topics) = rest if late else reversed(rest)
    assert connect == CONNECT
    assert body.count(text(NAME.encode())) == 2
    assert body.endswith(text(b"dtok_x"))
    assert subscribe == SUBSCRIBE
    assert topics == b"\0\1" + text(b"iotee/dev/sim-0001/rls") + b"\1"
    assert topic(status) == "iotee/dev/sim-0001/status"
    assert b'"online"' in status


async def test_a_refused_connection_reports_the_code() -> None:
    one, _ = device()
    wire = Wire(one.connect())
    wire.connection.data_received(packet(CONNACK, b"\0\5"))

    with pytest.raises(Refused, match="5"):
        await wire.connection.ready
    assert wire.gone


async def test_a_repeated_command_is_answered_again_and_not_executed() -> None:
    one, ledger = device()
    wire = online(one)
    wire.packets()

    wire.command("cmd_a")
    sent = wire.packets()
    wire.command("cmd_a")

    assert [kind & 0xF0 for kind, _ in sent] == [PUBLISH, PUBLISH, PUBACK]
    assert wire.answers() == [("cmd_a", "executed")]
    assert ledger.runs_by_command() == {"cmd_a": 1}


async def test_a_drawn_failure_is_reported_as_failed() -> None:
    wire = online(device(Faults(fail=1))[0])

    wire.command("cmd_a")

    assert wire.answers() == [("cmd_a", "acknowledged"), ("cmd_a", "failed")]


async def test_doubled_answers_are_sent_twice_for_one_execution() -> None:
    one, ledger = device(Faults(duplicate=1))
    wire = online(one)

    wire.command("cmd_a")

    assert wire.answers() == [("cmd_a", "acknowledged")] * 2 + [("cmd_a", "executed")] * 2
    assert ledger.runs == 1


async def test_a_lost_answer_is_sent_when_the_command_is_repeated() -> None:
    one, ledger = device(Faults(lose=1))
    wire = online(one)

    wire.command("cmd_a")
    assert wire.answers() == []
    wire.command("cmd_a")

    assert wire.answers() == [("cmd_a", "executed")]
    assert ledger.runs == 1


async def test_a_slow_command_is_acknowledged_first_and_blocks_the_device() -> None:
    one, ledger = device(Faults(slow=1, slow_sec=(0.01, 0.01)))
    wire = online(one)

    wire.command("cmd_a", 1)
    wire.command("cmd_b", 2)
    assert wire.answers() == [("cmd_a", "acknowledged"), ("cmd_b", "acknowledged")]
    async with asyncio.timeout(120):
        ended: list[tuple[str, str]] = []
        while len(ended) < 2:
            await asyncio.sleep(0)
            ended += wire.answers()

    assert ended == [("cmd_a", "executed"), ("cmd_b", "executed")]
    assert ledger.runs == 2


@pytest.mark.parametrize("unread", [True, False])
async def test_a_device_that_goes_away_executes_once_and_answers_when_it_is_back(
    unread: bool,
) -> None:
    faults = Faults(offline=1)
    number = next(n for n in range(100) if fate(faults, NAME, str(n)).unread is unread)
    one, ledger = device(faults)
    wire = online(one)

    wire.command("cmd_a", number)
    wire.connection.connection_lost(None)
    assert wire.gone
    assert wire.answers() == []
    assert one.away_sec >= 1
    assert ledger.runs == (0 if unread else 1)
    wire = online(one)
    wire.command("cmd_a", number)

    assert not wire.gone
    assert wire.answers()[-1] == ("cmd_a", "executed")
    assert ledger.runs == 1


async def test_unacknowledged_answers_are_sent_again_on_the_next_connection() -> None:
    one, _ = device()
    wire = online(one)
    wire.command("cmd_a")
    # Status, acknowledged and executed have packet ids 2, 3 and 4.
    wire.connection.data_received(packet(PUBACK, b"\0\3"))
    wire.connection.connection_lost(None)

    assert online(one).answers() == [("cmd_a", "executed")]


async def test_an_unanswered_ping_ends_the_connection() -> None:
    wire = online(device()[0])

    wire.connection.ping()
    assert not wire.gone
    wire.connection.ping()

    assert wire.gone


@pytest.mark.parametrize(
    "wrong", [b"\x30\x00", b"\x30\x01\xff", b"\x20\x00", b"\x90\x02\0\0", b"\x30\xff\xff\xff\xff"]
)
async def test_bytes_that_are_not_mqtt_only_end_the_connection(wrong: bytes) -> None:
    wire = online(device()[0])
    wire.packets()

    wire.connection.data_received(wrong)

    assert wire.gone or not wire.packets()


# --- the ledger ------------------------------------------------------------------------------------


def books(
    state: str | None, *, runs: int = 1, faults: Faults = CALM, there: bool = True, interrupted: bool = False
) -> Summary:
    """A summary of one sent command: the broker shows `state` (None: unknown), and the device executed it
    `runs` times."""
    ledger = Ledger(faults)
    ledger.delivered(NAME, "cmd_a", 1)
    for _ in range(runs):
        ledger.ran(NAME, "cmd_a")
    view = View(
        id="cmd_a",
        state=state or "",
        created_at="2026-11-20T09:30:00.000Z",
        executed_at="2026-11-20T09:30:00.025Z" if state == "executed" else None,
    )
    return summarise(
        faults=faults,
        devices=1,
        ledger=ledger,
        sent={"cmd_a": Sent(NAME, 1)},
        views={} if state is None else {"cmd_a": view},
        online=frozenset({NAME} if there else ()),
        refused=0,
        sending_sec=1.0,
        interrupted=interrupted,
    )


def test_a_command_executed_once_is_good() -> None:
    summary = books("executed")

    assert summary.good
    assert (summary.sent, summary.executed, summary.latency_p50_ms, summary.latency_p99_ms) == (1, 1, 25, 25)


def test_a_command_executed_twice_is_doubled() -> None:
    summary = books("executed", runs=2)

    assert (summary.doubled, summary.good) == (1, False)
    assert summary.examples == ("cmd_a ran 2 times",)


def test_a_command_executed_by_two_devices_is_doubled() -> None:
    ledger = Ledger(CALM)
    for name in ("sim-0001", "sim-0002"):
        ledger.delivered(name, "cmd_a", 1)
        ledger.ran(name, "cmd_a")

    assert ledger.runs_by_command() == {"cmd_a": 2}


def test_an_accepted_command_unknown_to_the_broker_is_lost() -> None:
    assert books(None).lost == 1
    assert books(None, interrupted=True).lost == 1


def test_an_open_command_is_lost_only_if_its_device_was_there() -> None:
    assert books("published", runs=0).lost == 1
    away = books("published", runs=0, there=False)
    assert (away.lost, away.open) == (0, 1)
    interrupted = books("published", runs=0, interrupted=True)
    assert (interrupted.lost, interrupted.open, interrupted.good) == (0, 1, True)


FAILS, LOSES, LEAVES = Fate(failed=True), Fate(lost=True), Fate(away_sec=2)
FITS = [
    ("executed", Fate(), 1), ("executed", LOSES, 1), ("failed", FAILS, 1), ("timed_out", LOSES, 1),
    ("timed_out", LEAVES, 0), ("expired", Fate(), 0), ("cancelled", Fate(), 0), ("pending", Fate(), 0),
    ("published", Fate(), 1), ("acknowledged", Fate(), 1),
]  # fmt: skip
CANNOT_BE = [
    ("executed", Fate(), 0), ("executed", FAILS, 1), ("failed", Fate(), 1), ("failed", FAILS, 0),
    ("timed_out", Fate(), 1), ("expired", Fate(), 1), ("cancelled", Fate(), 1), ("pending", Fate(), 1),
]  # fmt: skip


@pytest.mark.parametrize(("state", "drawn", "runs"), FITS)
def test_a_possible_outcome_is_no_misfit(state: str, drawn: Fate, runs: int) -> None:
    assert misfit(state, drawn, runs) is None


@pytest.mark.parametrize(("state", "drawn", "runs"), CANNOT_BE)
def test_an_impossible_outcome_is_a_misfit(state: str, drawn: Fate, runs: int) -> None:
    assert misfit(state, drawn, runs) is not None


def test_a_misfit_names_command_and_device_and_is_not_good() -> None:
    summary = books("failed")

    assert (summary.misfits, summary.good) == (1, False)
    assert summary.examples == ("cmd_a on sim-0001: failed, but the device did not report a failure",)


def test_the_percentile_is_an_observed_value() -> None:
    assert percentile([], 50) is None
    assert percentile([4], 99) == 4
    assert percentile(list(range(1, 101)), 50) == 50
    assert percentile(list(range(1, 101)), 99) == 99
