"""Explanations of why a command is not done, for every state and every possible reason."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest

from broker.domain.ended import TIMED_OUT
from broker.domain.events import (
    Acknowledged,
    Cancelled,
    Created,
    Error,
    Event,
    Executed,
    Expired,
    Failed,
    Progressed,
    Published,
    TimedOut,
)
from broker.domain.explain import Explanation, Situation, Speaker, explain
from broker.domain.lanes import Flight, Lane, Member, Presence
from broker.domain.lifecycle import State
from devices.clock import parse_rfc3339, rfc3339
from tests.integration.core_support import (
    COMMAND,
    DEVICE,
    PUBLISHED,
    WAYS,
    Bench,
    T,
    created,
    definition,
    folded,
    on_virtual_time,
    simulated,
    until,
)
from tests.simulation.loop import SimLoop

EARLIER = "cmd_01h455vb4pex5vsknk084sn02a"
LATER = "cmd_01h455vb4pex5vsknk084sn02z"
REQUIRED: dict[str, Any] = {"presence": "required"}
ONE_WAY: dict[str, Any] = {"completes_on": "published"}


def at(ms: int) -> str:
    return rfc3339(T + ms)


def member(
    *events: Event | tuple[Event, int],
    id: str = COMMAND,
    flight: Flight | None = None,
    first: Created | None = None,
    **fields: Any,
) -> Member:
    return Member(folded(*events, first=first, id=id), definition(**fields), flight or Flight())


def why(
    subject: Member,
    *before: Member,
    after: tuple[Member, ...] = (),
    now: int = 0,
    shut_until: int = 0,
    forgotten: bool = False,
    **around: Any,
) -> Explanation:
    """The explanation of one command among others of its lane, at T + `now` ms."""
    members = {m.state.id: m for m in (*before, subject, *after)}
    lane = Lane(DEVICE, members, shut_until=T + shut_until)
    fields: dict[str, Any] = {
        "presence": Presence.ONLINE,
        "offline_since": None,
        "link_up": True,
        "halted": None,
        "slots_free": True,
    }
    return explain(
        Situation(
            state=subject.state,
            now=T + now,
            member=None if forgotten else subject,
            lane=lane,
            **fields | around,
        )
    )


def codes(explanation: Explanation) -> list[str]:
    return [reason["code"] for reason in explanation.reasons]


# --- not handed over yet


TOPIC = "iotee/dev/lamp-1/rls"
BY_ITSELF: dict[str, Any] = {"online": "connection", "topic": TOPIC}
CONNECTS = f"(it is online while it is connected and subscribed to {TOPIC})"
WAITS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (
        {"presence": Presence.OFFLINE, "offline_since": T - 60_000},
        {"code": "offline", "since": at(-60_000), **BY_ITSELF},
        f"the device has been offline since {at(-60_000)} {CONNECTS}",
    ),
    (
        {"presence": Presence.NEVER, "offline_since": T - 60_000},
        {"code": "offline", "since": at(-60_000), **BY_ITSELF},
        f"the device has been offline since {at(-60_000)} {CONNECTS}",
    ),
    (
        {"presence": Presence.OFFLINE},
        {"code": "offline", "since": None, **BY_ITSELF},
        f"the device is offline {CONNECTS}",
    ),
    (
        {"presence": Presence.NEVER},
        {"code": "never_heard", **BY_ITSELF},
        f"the device has not been heard since it was registered, or since the broker was started {CONNECTS}",
    ),
    ({"link_up": False}, {"code": "link_down"}, "the MQTT server cannot be reached"),
]


@pytest.mark.parametrize(("around", "reason", "text"), WAITS)
def test_a_command_that_waits_for_a_device_or_server_expires_if_nothing_changes(
    around: dict[str, Any], reason: dict[str, Any], text: str
) -> None:
    limited = why(member(first=created(ttl_ms=300_000), **REQUIRED), **around)
    endless = why(member(**REQUIRED), **around)

    assert limited.summary == f"Not handed over yet: {text}. It expires at {at(300_000)}."
    assert limited.reasons == endless.reasons == [reason]
    assert limited.next == {"action": "expire", "at": at(300_000)}
    assert endless.summary == f"Not handed over yet: {text}."
    assert endless.next == {"action": "hand_over"}
    assert (limited.command_id, limited.state) == (COMMAND, "pending")


def test_a_held_command_names_the_topic_on_which_its_device_must_say_online() -> None:
    found = why(member(**REQUIRED), presence=Presence.NEVER, status_topic="iotee/dev/lamp-1/status")

    assert found.reasons == [{"code": "never_heard", "online": "status", "topic": "iotee/dev/lamp-1/status"}]
    assert "(it must publish `online` on iotee/dev/lamp-1/status)" in found.summary


@pytest.mark.parametrize(
    ("gateway", "around", "text", "facts"),
    [
        (Presence.OFFLINE, {}, "; its gateway gw-1 is offline", {}),
        (Presence.NEVER, {}, "; its gateway gw-1 has not been heard either", {}),
        (
            Presence.ONLINE,
            {},
            f" (it is online while its gateway gw-1 is subscribed to {TOPIC})",
            {"online": "connection", "topic": TOPIC},
        ),
        (
            Presence.UNKNOWN,
            {"status_topic": "x/y"},
            " (its gateway gw-1 must publish a message of it)",
            {"online": "status"},
        ),
    ],
)
def test_a_command_that_waits_for_a_device_behind_a_gateway_names_the_gateway(
    gateway: Presence, around: dict[str, Any], text: str, facts: dict[str, Any]
) -> None:
    fields = {"presence": Presence.OFFLINE, "gateway": Speaker("gw-1", gateway), **around}
    reason = {"code": "offline", "since": None, "gateway": "gw-1", "gateway_presence": gateway.value, **facts}
    held = why(member(**REQUIRED), **fields)
    between = why(member(*sent(), flight=Flight(due_at=T + 1_500), **REQUIRED), **fields)

    assert held.summary == f"Not handed over yet: the device is offline{text}."
    assert held.reasons == between.reasons[1:] == [reason]
    assert f"the device is offline{text}, and the next attempt follows when it is back" in between.summary


def test_a_command_whose_topic_its_device_does_not_read_names_the_topic() -> None:
    found = why(member(**REQUIRED), listens=False)

    assert found.reasons == [{"code": "no_subscriber", "topic": TOPIC}]
    assert why(member(presence="none"), listens=False).reasons == []


def test_attempts_that_met_no_subscriber_are_shown() -> None:
    flight = Flight(unheard=1, unheard_at=T + 500, due_at=T + 1_500)
    found = why(member(*sent(), flight=flight, **REQUIRED), now=600)

    assert found.reasons[-1] == {"code": "no_subscriber", "at": at(500), "topic": TOPIC}
    assert f"At {at(500)} the MQTT server had no subscriber for {TOPIC}." in found.summary
    assert found.next == {"action": "hand_over", "at": at(1_500)}


def test_a_device_that_drops_its_connection_is_shown_before_and_after_the_end() -> None:
    kind = {"max_attempts": 3, **REQUIRED}
    dropping = why(member(*sent(2), flight=Flight(dropped=2, voided=2), **kind), presence=Presence.OFFLINE)
    used_up = member(*sent(6), TimedOut(reason="no_answer"), **kind)
    forgotten = why(used_up, forgotten=True, definition=definition(**kind))
    tried = why(member(*sent(3), TimedOut(reason="no_answer"), **kind), definition=definition(**kind))

    assert dropping.reasons[-1] == {"code": "drops_connection", "count": 2}
    assert forgotten.reasons[-1] == {"code": "drops_connection", "count": 3}
    assert "drops_connection" not in codes(tried)


def test_an_exhausted_command_is_given_up_even_if_its_device_is_offline() -> None:
    flying = Flight(open=True, written_at=T)
    found = why(member(*sent(6), flight=flying, max_attempts=3, **REQUIRED), presence=Presence.OFFLINE)

    assert found.next == {"action": "give_up", "at": at(10_000)}


def test_a_type_without_presence_does_not_wait_for_its_device() -> None:
    assert codes(why(member(presence="none"), presence=Presence.NEVER)) == []


def test_the_command_that_fills_the_window_is_named() -> None:
    found = why(member(), member(PUBLISHED, id=EARLIER))

    text = f"{EARLIER} (open) is with the device, which takes one command at a time"
    assert found.summary == f"Not handed over yet: {text}."
    assert found.reasons == [{"code": "window_full", "command_ids": [EARLIER], "window": 1}]
    assert found.next == {"action": "hand_over"}


def test_the_commands_in_a_larger_window_are_counted() -> None:
    flying = [member(PUBLISHED, id=f"{EARLIER}{n}") for n in range(2)]

    found = why(member(max_in_flight=2), *flying)

    assert "2 commands are with the device, which takes 2 at a time" in found.summary
    assert codes(why(member(max_in_flight=3), *flying)) == []


def test_older_waiting_commands_are_counted_and_the_first_is_named() -> None:
    one = why(member(), member(id=EARLIER))
    two = why(member(), member(id=EARLIER), member(id=EARLIER + "b"))

    assert one.summary == f"Not handed over yet: the older command {EARLIER} (open) goes first."
    assert one.reasons == [{"code": "behind", "command_id": EARLIER, "count": 1}]
    assert f"2 older commands go first, beginning with {EARLIER} (open)" in two.summary
    assert two.reasons[0]["count"] == 2


def test_younger_and_non_blocking_commands_are_no_reason() -> None:
    dying = member(id=EARLIER, first=created(ttl_ms=10_000))
    reopened = member(PUBLISHED, TimedOut(reason="no_answer"), Acknowledged(late=True), id=EARLIER + "b")

    found = why(member(), dying, reopened, after=(member(PUBLISHED, id=LATER),), now=9_500)

    assert found.summary == "Not handed over yet: it is being handed over now."
    assert (found.reasons, found.next) == ([], {"action": "hand_over", "at": at(9_500)})


def test_a_shut_lane_gives_the_time_when_it_opens() -> None:
    found = why(member(carries_ids=False), shut_until=20_000)

    text = f"until {at(20_000)} an answer without id could belong to the previous command"
    assert found.summary == f"Not handed over yet: {text}."
    assert found.reasons == [{"code": "lane_shut", "until": at(20_000)}]
    assert found.next == {"action": "hand_over", "at": at(20_000)}
    assert codes(why(member(), shut_until=20_000, now=20_000)) == []


def test_a_command_that_expires_before_its_lane_opens_shows_the_expiry() -> None:
    found = why(member(first=created(ttl_ms=20_500)), shut_until=20_000)

    assert found.next == {"action": "expire", "at": at(20_500)}


def test_no_free_slot_is_a_reason_only_while_the_server_is_reachable() -> None:
    busy = why(member(first=created(ttl_ms=300_000)), slots_free=False)

    assert codes(busy) == ["no_slot"]
    assert "all send slots are in use until the MQTT server confirms earlier messages" in busy.summary
    assert busy.next == {"action": "hand_over"}
    assert codes(why(member(), slots_free=False, link_up=False)) == ["link_down"]


def test_in_its_last_second_a_command_can_only_expire() -> None:
    found = why(member(first=created(ttl_ms=300_000)), now=299_000)

    assert codes(found) == ["no_time"]
    assert found.summary.startswith("Not handed over yet: it expires too soon to be handed over.")
    assert found.next == {"action": "expire", "at": at(300_000)}


def test_a_pull_only_command_waits_for_neither_link_nor_presence() -> None:
    subject = member(first=created(ttl_ms=300_000), transports=("relay",), **REQUIRED)

    found = why(subject, link_up=False, presence=Presence.OFFLINE, slots_free=False)

    assert codes(found) == ["pull_only"]
    assert "its device or a relay must fetch it" in found.summary
    assert found.next == {"action": "expire", "at": at(300_000)}


def test_while_hand_overs_are_halted_no_expiry_is_shown() -> None:
    reason = "clock: it is 9000 ms before the last event of the log"

    found = why(member(first=created(ttl_ms=300_000)), halted=reason)

    assert found.summary.startswith(f"Not handed over yet: nothing is handed over now ({reason}).")
    assert found.reasons == [{"code": "halted", "why": reason}]
    assert found.next == {"action": "hand_over"}


def test_all_reasons_are_given() -> None:
    found = why(
        member(**REQUIRED), member(PUBLISHED, id=EARLIER), presence=Presence.OFFLINE, link_up=False
    )  # fmt: skip

    assert codes(found) == ["window_full", "offline", "link_down"]
    assert found.summary.count(";") == 2


# --- handed over, no answer


def in_the_air(**flight: Any) -> Flight:
    return Flight(**{"open": True, "written_at": T} | flight)


def sent(times: int = 1, *, counts: int | None = None) -> list[Event]:
    counting = times if counts is None else counts
    return [Published(attempt=n, counts=n <= counting) for n in range(1, times + 1)]


def test_an_open_attempt_gives_the_deadline_of_its_answer() -> None:
    found = why(member(*sent(), flight=in_the_air()))

    assert found.summary == (
        f"Handed over once (attempt 1 of 5), last at {at(0)}; no answer from the device yet; "
        f"if none comes by {at(10_000)}, it is sent again after a pause."
    )
    assert found.reasons == [
        {"code": "no_answer", "attempts": 1, "counted": 1, "max_attempts": 5, "last_at": at(0)},
        {"code": "attempt_open", "until": at(10_000)},
    ]
    assert found.next == {"action": "back_off", "at": at(10_000)}


def test_attempts_that_do_not_count_are_shown_separately() -> None:
    found = why(member(*sent(3, counts=2), flight=in_the_air(voided=1)))

    assert "Handed over 3 times (1 of 5 counted attempts)" in found.summary
    assert (found.reasons[0]["attempts"], found.reasons[0]["counted"]) == (3, 1)


@pytest.mark.parametrize(
    ("fields", "events", "code", "text"),
    [
        ({}, sent(5), "last_attempt", "this is the last attempt, and it is given up at"),
        ({"repeatable": False}, sent(), "not_repeatable", "it may be sent only once, and is given up at"),
    ],
)
def test_the_last_attempt_ends_in_giving_up(
    fields: dict[str, Any], events: list[Event], code: str, text: str
) -> None:
    found = why(member(*events, flight=in_the_air(), **fields))

    assert codes(found) == ["no_answer", code]
    assert f"{text} {at(10_000)}." in found.summary
    assert found.next == {"action": "give_up", "at": at(10_000)}


def test_a_non_repeatable_command_has_attempt_1_of_1() -> None:
    assert "(attempt 1 of 1)" in why(member(*sent(), flight=in_the_air(), repeatable=False)).summary


def test_an_attempt_ends_with_the_expiry_of_its_command() -> None:
    found = why(member(*sent(), first=created(ttl_ms=6_000), flight=in_the_air()))

    assert codes(found) == ["no_answer"]
    assert f"it expires at {at(6_000)} and is given up then." in found.summary
    assert found.next == {"action": "give_up", "at": at(6_000)}


def test_a_lease_is_the_answer_deadline_of_a_fetched_command() -> None:
    leased = in_the_air(lease_until=T + 60_000, holder="key:key_2")
    fetched = [Published(attempt=1, transport="relay", counts=False)]

    def asked(*transports: str, presence: Presence = Presence.NEVER, **fields: Any) -> Explanation:
        return why(member(*fetched, flight=leased, transports=transports, **fields), presence=presence)

    found = asked("relay")
    held = {"code": "leased", "transport": "relay", "by": "key:key_2", "until": at(60_000)}
    assert found.reasons[1:] == [held]
    assert f"a relay (key:key_2) has it under a lease until {at(60_000)}; if no answer" in found.summary
    assert found.next == {"action": "hold", "at": at(60_000)}
    assert asked("relay", "mqtt").next == {"action": "hold", "at": at(60_000)}
    online = asked("relay", "mqtt", presence=Presence.ONLINE)
    assert online.next == {"action": "hand_over", "at": at(60_000)}
    assert asked("relay", repeatable=False).next == {"action": "give_up", "at": at(60_000)}
    dying = asked("relay", first=created(ttl_ms=6_000))
    assert (dying.reasons[1:], dying.next) == ([held], {"action": "give_up", "at": at(6_000)})


def test_a_pull_only_command_does_not_wait_for_the_mqtt_server() -> None:
    leased = in_the_air(lease_until=T + 60_000)
    fetched = Published(attempt=1, transport="heartbeat", counts=False)

    only = why(member(fetched, flight=leased, transports=("heartbeat",)), link_up=False)
    also = why(member(fetched, flight=leased, transports=("heartbeat", "mqtt")), link_up=False)

    assert (codes(only), codes(also)) == (["no_answer", "leased"], ["no_answer", "leased", "link_down"])
    assert "the device, by its heartbeat, has it under a lease" in only.summary


def test_a_held_command_may_be_fetched_if_its_type_allows_it() -> None:
    held = why(member(transports=("mqtt", "relay")), presence=Presence.NEVER)

    assert codes(held) == ["never_heard", "fetchable"]
    assert "its device or a relay may fetch it meanwhile" in held.summary


def test_an_attempt_being_written_is_shown_as_such() -> None:
    found = why(member(*sent(), flight=in_the_air(written_at=None)))

    assert "its bytes are being written." in found.summary
    assert found.next == {"action": "hand_over", "at": at(0)}


def test_a_pause_gives_the_time_of_the_next_attempt() -> None:
    found = why(member(*sent(), flight=Flight(due_at=T + 4_000)))

    assert codes(found) == ["no_answer", "backing_off"]
    assert found.summary.endswith(f"; the next attempt follows at {at(4_000)}.")
    assert found.next == {"action": "hand_over", "at": at(4_000)}
    due = why(member(*sent(), flight=Flight(due_at=T + 4_000)), now=4_000)
    assert due.summary.endswith("; the next attempt is due now.")
    assert due.next == {"action": "hand_over", "at": at(4_000)}


def test_the_next_attempt_follows_when_the_device_is_back() -> None:
    gone: dict[str, Any] = {"presence": Presence.OFFLINE, "offline_since": T + 1_000}

    endless = why(member(*sent(), **REQUIRED), **gone)
    limited = why(member(*sent(), first=created(ttl_ms=300_000), **REQUIRED), **gone)

    away = f"the device has been offline since {at(1_000)} {CONNECTS}, "
    away += "and the next attempt follows when it is back"
    assert endless.summary.endswith(f"; {away}.")
    assert limited.summary.endswith(f"; {away}, and at {at(300_000)} it is given up.")
    offline = {"code": "offline", "since": at(1_000), **BY_ITSELF}
    assert endless.reasons[1:] == limited.reasons[1:] == [offline]
    assert endless.next == {"action": "hand_over"}
    assert limited.next == {"action": "give_up", "at": at(300_000)}


def test_an_open_attempt_of_an_absent_device_ends_in_hold() -> None:
    found = why(member(*sent(5), flight=in_the_air(), **REQUIRED), presence=Presence.OFFLINE)

    assert codes(found) == ["no_answer", "offline"]
    assert found.summary.endswith(f"from {at(10_000)} on it is held until the device is back.")
    assert found.next == {"action": "hold", "at": at(10_000)}


def test_a_pause_longer_than_the_commands_life_ends_in_giving_up() -> None:
    found = why(member(*sent(), first=created(ttl_ms=15_000), flight=Flight(due_at=T + 14_500)))

    assert codes(found) == ["no_answer", "no_time"]
    assert f"it expires too soon for another attempt, and at {at(15_000)} it is given up." in found.summary
    assert found.next == {"action": "give_up", "at": at(15_000)}


def test_a_next_attempt_may_wait_for_a_slot_or_for_a_fetch() -> None:
    busy = why(member(*sent()), slots_free=False)
    fetched = why(member(*sent(), transports=("relay",)))

    assert codes(busy) == ["no_answer", "no_slot"]
    assert busy.next == {"action": "hand_over"}
    assert codes(fetched) == ["no_answer", "pull_only"]
    assert "it waits to be fetched again." in fetched.summary


@pytest.mark.parametrize(
    "subject",
    [
        member(*sent(), flight=in_the_air()),
        member(*sent(), flight=Flight(due_at=T + 4_000)),
        member(*sent(), first=created(ttl_ms=6_000), flight=in_the_air()),
        member(*sent(), Acknowledged()),
    ],
)
def test_without_the_mqtt_server_no_handed_over_command_times_out(subject: Member) -> None:
    with_link, without = why(subject), why(subject, link_up=False)
    halted = why(subject, halted="clock: mend it")

    assert with_link.next is not None
    assert without.next == halted.next == {"action": with_link.next["action"]}
    assert [*codes(with_link), "link_down"] == codes(without)
    assert [*codes(with_link), "halted"] == codes(halted)
    assert without.summary == (
        f"{with_link.summary} The MQTT server cannot be reached; until it can, nothing is sent or given up."
    )
    assert halted.summary.endswith("Nothing is sent or given up now (clock: mend it).")


def test_a_one_way_command_waits_only_for_the_mqtt_server() -> None:
    assert (
        "no answer from the MQTT server yet" in why(member(*sent(), flight=in_the_air(), **ONE_WAY)).summary
    )


# --- acknowledged


def test_a_running_command_shows_its_progress_and_its_deadline() -> None:
    heard = (Acknowledged(), 2_000)
    plain = why(member(PUBLISHED, heard))
    far = why(member(PUBLISHED, heard, (Progressed(percent=40, note="heating"), 5_000)))

    assert plain.summary == (
        f"The device has had it since {at(2_000)}. Without another report it is given up at {at(62_000)}."
    )
    assert plain.reasons == [{"code": "running", "since": at(2_000)}]
    assert plain.next == {"action": "give_up", "at": at(62_000)}
    assert far.summary.startswith(f"The device has had it since {at(2_000)}; 40 percent is done (heating).")
    assert far.reasons[0] | {"percent": 40, "note": "heating"} == far.reasons[0]
    assert far.next == {"action": "give_up", "at": at(65_000)}


def test_a_command_reopened_by_a_late_answer_says_so() -> None:
    found = why(member(PUBLISHED, TimedOut(reason="no_answer"), (Acknowledged(late=True), 30_000)))

    assert found.state == "acknowledged"
    assert found.summary.startswith(f"It had timed out; then the device reported at {at(30_000)} that it")
    assert found.reasons[0]["late"] is True


# --- closed


def ended(*events: Event, **kwargs: Any) -> Explanation:
    """The explanation of a closed command that is no longer in memory, at T + 1 s."""
    *before, last = events
    return why(member(*before, (last, 1_000), **kwargs), forgotten=True)


DONE = Executed(result=msgspec.Raw(b"1"))
JAMMED = Error(code="jammed", message="it is jammed.")
GAVE_UP = TimedOut(reason="no_answer")
NEVER = "it was never handed over"
AT = at(1_000)
ENDS: list[tuple[tuple[Event, ...], str, dict[str, Any]]] = [
    ((PUBLISHED, DONE), f"The device reported at {AT} that it executed the command.", {"code": "executed"}),
    (
        (PUBLISHED, GAVE_UP, Executed(result=msgspec.Raw(b"1"), late=True)),
        f"The device reported at {AT} that it executed the command, after it had timed out.",
        {"code": "executed", "late": True},
    ),
    (
        (PUBLISHED, Executed(evidence="mqtt_puback")),
        f"The MQTT server accepted it at {AT}; devices of this type send no answers.",
        {"code": "executed", "one_way": True},
    ),
    (
        (PUBLISHED, Failed(error=JAMMED)),
        f"It failed: it is jammed. The device reported this at {AT}.",
        {"code": "failed", "by": "device", "error": "jammed"},
    ),
    (
        (PUBLISHED, GAVE_UP, Failed(error=JAMMED, late=True)),
        f"It failed: it is jammed. The device reported this at {AT}, after it had timed out.",
        {"code": "failed", "by": "device", "error": "jammed", "late": True},
    ),
    (
        (PUBLISHED, Failed(error=Error(code="refused", message="not authorised"), by="mqtt_server")),
        f"It failed: not authorised. The MQTT server refused it at {AT}.",
        {"code": "failed", "by": "mqtt_server", "error": "refused"},
    ),
    (
        (Failed(error=Error(code="unsendable", message="too large"), by="broker"),),
        f"It failed: too large. Ordain detected this at {AT}. It was never handed over.",
        {"code": "failed", "by": "broker", "error": "unsendable"},
    ),
    ((Expired(),), f"It expired at {AT}; {NEVER}.", {"code": "expired"}),
    (
        (Cancelled(by="key:key_1"),),
        f"It was cancelled at {AT} by key:key_1; {NEVER}.",
        {"code": "cancelled", "by": "key:key_1", "reason": None},
    ),
    (
        (Cancelled(by="key:key_1", reason="a mistake"),),
        f"It was cancelled at {AT} by key:key_1 (a mistake); {NEVER}.",
        {"code": "cancelled", "by": "key:key_1", "reason": "a mistake"},
    ),
    (
        (Cancelled(by="key:key_1", reason="device_deleted"),),
        f"It was cancelled at {AT} by key:key_1 (its device was deleted); {NEVER}.",
        {"code": "cancelled", "by": "key:key_1", "reason": "device_deleted"},
    ),
    (
        (Cancelled(by="broker", superseded_by=LATER),),
        f"It was cancelled at {AT} by broker (replaced by {LATER}); {NEVER}.",
        {"code": "cancelled", "by": "broker", "reason": None, "superseded_by": LATER},
    ),
]


@pytest.mark.parametrize(("events", "summary", "reason"), ENDS)
def test_a_closed_command_shows_its_end_and_no_next_step(
    events: tuple[Event, ...], summary: str, reason: dict[str, Any]
) -> None:
    found = ended(*events)

    assert found.summary == summary
    assert found.reasons == [reason | {"at": AT}]
    assert found.next is None


@pytest.mark.parametrize("reason", list(TIMED_OUT))
def test_a_timeout_says_that_the_outcome_is_unknown(reason: Any) -> None:
    found = ended(PUBLISHED, Published(attempt=2), TimedOut(reason=reason))

    assert found.summary.startswith(
        f"It timed out at {AT} ({TIMED_OUT[reason]}) after it was handed over 2 times."
    )
    assert "It is not known whether the device executed it" in found.summary
    # Answers of a deleted device are ignored, so no late answer is announced.
    assert ("late answer" in found.summary) == (reason != "device_deleted")
    expected = {"code": "timed_out", "at": AT, "reason": reason, "attempts": 2, "by": None}
    assert found.reasons == [expected]
    assert found.next is None


def test_a_command_closed_while_its_state_was_read_gives_just_closed() -> None:
    found = why(member(), forgotten=True)

    assert (codes(found), found.next) == (["just_closed"], None)


@pytest.mark.parametrize("state", [state for state in State if state is not State.NONE])
def test_every_state_is_explained(state: State) -> None:
    found = why(member(*WAYS[state]))

    assert found.state == state.value
    assert found.summary.endswith(".")


# --- the announced next step: the real core, on virtual time

LONG_SEC = 100  # of virtual time

Way = Callable[[Bench], Awaitable[str]]


async def _expires_offline(bench: Bench) -> str:
    await bench.device(online=False)
    return (await bench.order(ttl_sec=5)).id


async def _runs_out_of_answer_time(bench: Bench) -> str:
    await bench.device()
    command = await bench.order()
    await bench.becomes(command.id, "published")
    return command.id


async def _pauses(bench: Bench) -> str:
    command_id = await _runs_out_of_answer_time(bench)
    member = bench.live.members[command_id]
    await until(lambda: not member.flight.open, LONG_SEC)
    return command_id


async def _lives_too_short_for_an_answer(bench: Bench) -> str:
    await bench.device()
    command = await bench.order(ttl_sec=5)
    await bench.becomes(command.id, "published")
    return command.id


async def _may_be_sent_once(bench: Bench) -> str:
    await bench.device(type="iotee_device", online=False)
    command = await bench.order(type="reboot")
    await bench.becomes(command.id, "published")
    return command.id


async def _never_ends_its_run(bench: Bench) -> str:
    command_id = await _runs_out_of_answer_time(bench)
    bench.answers(command_id, "acknowledged")
    await bench.becomes(command_id, "acknowledged")
    return command_id


async def _waits_for_a_doubled_answer(bench: Bench) -> str:
    await bench.device(type="iotee_device", online=False)
    first = await bench.order(type="lock")
    second = await bench.order(type="unlock")
    await bench.becomes(first.id, "published")
    bench.wire.receipt()
    bench.says(b"ok")
    await bench.becomes(first.id, "executed")
    return second.id


FORETOLD: list[tuple[Way, str, str]] = [
    (_expires_offline, "expire", "expired"),
    (_runs_out_of_answer_time, "back_off", "published"),
    (_pauses, "hand_over", "published"),
    (_lives_too_short_for_an_answer, "give_up", "timed_out"),
    (_may_be_sent_once, "give_up", "timed_out"),
    (_never_ends_its_run, "give_up", "timed_out"),
    (_waits_for_a_doubled_answer, "hand_over", "published"),
]


@pytest.mark.parametrize(("way", "action", "state"), FORETOLD)
def test_the_announced_next_step_happens_at_its_time(way: Way, action: str, state: str) -> None:
    async def world(loop: SimLoop) -> None:
        async with on_virtual_time(loop) as (bench, _):
            command_id = await way(bench)
            member = bench.live.members[command_id]
            before, was_open = member.state, member.flight.open

            said = (await bench.core.dispatch.explain(before)).next

            assert said is not None
            assert said["action"] == action
            now = (before.version, was_open)
            await until(lambda: (member.state.version, member.flight.open) != now, LONG_SEC)
            assert member.state.state == state
            assert 0 <= bench.writer.now() - parse_rfc3339(said["at"]) <= 100
            if action == "hand_over":
                assert member.state.attempts == before.attempts + 1

    simulated(world)
