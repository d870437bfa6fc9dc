"""QoS 0 messages that wait: each project and each device gets its turn, and none fills the room."""

from __future__ import annotations

from broker.domain.waiting import Room, Waiting, first

ROOM = Room(per_device=5, per_project=8, in_all=12, size=1_000)


def test_projects_take_turns_and_in_them_devices_take_turns() -> None:
    waiting: Waiting[str] = Waiting(ROOM)
    for n in range(4):
        assert waiting.put("loud", "a", f"a{n}", 1)
    assert waiting.put("loud", "b", "b0", 1)
    assert waiting.put("quiet", "c", "c0", 1)
    assert waiting.take(3) == ["a0", "c0", "b0"]
    assert waiting.take(10) == ["a1", "a2", "a3"]
    assert len(waiting) == 0
    assert waiting.take(10) == []


def test_a_full_device_or_project_leaves_room_for_others() -> None:
    waiting: Waiting[str] = Waiting(ROOM)
    assert [waiting.put("loud", "a", "x", 1) for _ in range(6)] == [True] * 5 + [False]
    assert [waiting.put("loud", "b", "x", 1) for _ in range(4)] == [True] * 3 + [False]
    assert [waiting.put("quiet", "c", "x", 1) for _ in range(5)] == [True] * 4 + [False]
    waiting.take(1)
    assert waiting.put("quiet", "d", "x", 1)


def test_bytes_are_bounded_too() -> None:
    waiting: Waiting[str] = Waiting(ROOM)
    assert [waiting.put("loud", "a", "x", 200) for _ in range(2)] == [True, False]
    assert all(waiting.put(project, "a", "x", 200) for project in ("b", "c", "d", "e"))
    assert not waiting.put("f", "a", "x", 200)
    waiting.take(12)
    assert waiting.put("loud", "a", "x", 200)


def test_the_first_messages_are_bounded_by_count_and_size_and_are_at_least_one() -> None:
    queue = ["aa", "b", "cccc", "d"]
    assert first(queue, 3, 100, len) == ["aa", "b", "cccc"]
    assert first(queue, 9, 6, len) == ["aa", "b"]
    assert first(queue, 9, 1, len) == ["aa"]
    assert first([], 9, 1, len) == []
