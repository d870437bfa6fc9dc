"""When a node may claim the log, and when an owner may act: from beats as one node sees them."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from broker.nodes.asked import Asked
from broker.nodes.membership import LEASE_MS, MARGIN_MS, OUTAGE_MS, TURN_MS, Membership
from broker.seams import Node, View

A, B, C = "node_a", "node_b", "node_c"


def beats(*, a: int | None = None, b: int | None = None, c: int | None = None) -> list[Node]:
    counts = {A: a, B: b, C: c}
    return [Node(name, name, beat=count) for name, count in counts.items() if count is not None]


def watched(me: str, seconds: int, *, owner: str | None = A, stopped: str = A) -> Membership:
    """What `me` knows after some seconds in which `stopped` has not beaten."""
    members = Membership(me)
    for second in range(seconds + 1):
        counts = {name[-1]: 1 if name == stopped else second for name in (A, B, C)}
        members.took(View(1, owner, beats(**counts)), second * 1_000, second * 1_000)
    return members


def test_nobody_claims_the_log_while_its_owner_beats() -> None:
    members = watched(B, 30, stopped=C)
    assert not members.may_claim(30_000)
    assert members.lives(A, 30_000)
    assert not members.lives(C, 30_000)


def test_the_node_that_has_lived_longest_claims_a_lease_after_the_owner_s_last_beat() -> None:
    assert not watched(B, LEASE_MS // 1_000 - 1).may_claim(LEASE_MS - 1)
    assert watched(B, LEASE_MS // 1_000).may_claim(LEASE_MS)
    assert not watched(C, LEASE_MS // 1_000).may_claim(LEASE_MS)


def test_the_next_node_claims_if_the_first_one_does_not() -> None:
    assert not watched(C, (LEASE_MS + TURN_MS) // 1_000).may_claim(LEASE_MS + TURN_MS)
    assert watched(C, 7).may_claim(7_000)


def test_a_log_whose_owner_has_left_is_claimed_at_once() -> None:
    members = Membership(B)
    members.took(View(1, A, beats(b=1)), 0, 0)
    assert members.may_claim(0)
    members.took(View(0, None, beats(b=2)), 1, 1)
    assert members.may_claim(1)
    left = [Node(A, "a", beat=9, draining=True), *beats(b=3)]
    members.took(View(1, A, left), 2, 2)
    assert members.may_claim(2)


def test_after_an_outage_of_the_database_nobody_claims_for_a_lease() -> None:
    members = watched(B, 4)
    back = 4_000 + OUTAGE_MS + 1
    members.took(View(1, A, beats(a=1, b=9)), back, back)
    assert not members.may_claim(back)
    for at in range(back, back + LEASE_MS, 1_000):
        members.took(View(1, A, beats(a=1, b=at)), at, at)
        assert not members.may_claim(at)
    assert not members.may_claim(back + LEASE_MS)  # on the word of a beat that is a second old
    members.took(View(1, A, beats(a=1, b=99)), back + LEASE_MS, back + LEASE_MS)
    assert members.may_claim(back + LEASE_MS)
    assert not members.may_claim(back + LEASE_MS + OUTAGE_MS + 1)


def test_an_owner_stops_acting_before_the_others_believe_it_dead() -> None:
    members = Membership(A)
    assert not members.holds(1, 0)
    members.took(View(1, A, beats(a=1)), 100, 900)
    assert members.holds(1, 100 + LEASE_MS - MARGIN_MS - 1)
    assert not members.holds(1, 100 + LEASE_MS - MARGIN_MS)
    assert not members.holds(2, 200)
    members.took(View(2, B, beats(a=2, b=1)), 1_000, 1_000)
    assert not members.holds(1, 1_000)


@example([("b", 0, 0), ("b", 2_500, 0), ("b", 0, 2_500), ("a", 0, 0)])  # its lease had ended meanwhile
@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 3_000), st.integers(0, 2_900)), max_size=40))
def test_no_node_may_claim_while_the_owner_may_act(steps: list[tuple[str, int, int]]) -> None:
    """Each step: some time passes, then one of two nodes beats, and its answer takes a while."""
    owner, other = Membership(A), Membership(B)
    counts, now = {"a": 1, "b": 1}, 0
    owner.took(View(1, A, beats(**counts)), 0, 0)
    for who, pause, takes in steps:
        began = now + pause
        counts[who] += 1  # recorded at any time between the beginning and the answer
        view = View(1, A, beats(**counts))
        now = began + takes
        (owner if who == "a" else other).took(view, began, now)
        assert not (other.may_claim(now) and owner.holds(1, now))


def repeatable(method: str, path: str, *headers: tuple[bytes, bytes]) -> bool:
    scope = {"method": method, "path": path, "headers": headers}
    return Asked(scope, None, None).repeatable  # type: ignore[arg-type] # it only looks


def test_only_what_does_no_harm_twice_is_sent_to_a_second_owner() -> None:
    key = (b"idempotency-key", b"one")
    assert repeatable("GET", "/v1/commands/cmd_1")
    assert repeatable("POST", "/v1/devices/door-7/commands", key)
    assert repeatable("POST", "/v1/devices/door-7/commands/cmd_1/result")
    assert repeatable("DELETE", "/v1/devices/door-7/commands/cmd_1")
    assert repeatable("POST", "/v1/commands/cmd_1/abandon")
    for method, path in (
        ("POST", "/v1/devices/door-7/commands"),
        ("POST", "/v1/devices"),
        ("POST", "/v1/devices/door-7/token"),
        ("POST", "/v1/keys"),
        ("DELETE", "/commands/cmd_1"),
        ("GET", "/devices/door-7/commands/pending"),
        ("POST", "/v1/devices/door-7/commands/claim"),
    ):
        assert not repeatable(method, path), path
