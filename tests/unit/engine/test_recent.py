"""The bounded map of what was used recently."""

from __future__ import annotations

from broker.engine.live import Recent


def test_it_never_holds_more_than_its_bound() -> None:
    recent: Recent[int, int] = Recent(10)

    for key in range(1_000):
        recent.put(key, key)
        assert len(recent.values()) <= 10


def test_what_is_used_stays_and_what_is_not_goes() -> None:
    recent: Recent[str, int] = Recent(10)
    recent.put("used", 1)
    recent.put("unused", 2)

    for key in range(100):
        recent.put(str(key), key)
        assert recent.get("used") == 1

    assert "unused" not in recent
    assert recent.get("unused") is None


def test_the_newest_value_is_shown_also_if_an_old_one_was_not_dropped_yet() -> None:
    recent: Recent[str, int] = Recent(4)
    recent.put("a", 1)
    recent.put("b", 2)  # both are in the older half now
    recent.put("a", 3)

    assert recent.get("a") == 3
    assert sorted(recent.values()) == [2, 3]


def test_what_is_forgotten_is_gone_from_both_halves() -> None:
    recent: Recent[str, int] = Recent(4)
    recent.put("a", 1)
    recent.put("b", 2)
    recent.put("a", 3)

    recent.forget("a")

    assert "a" not in recent
    assert recent.get("a") is None
    assert recent.values() == [2]
