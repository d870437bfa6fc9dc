"""QoS 0 messages that wait: each project and each device gets its turn, and none fills the room."""

from __future__ import annotations

from broker.engine.waiting import Waiting
from broker.seams import Message
from broker.settings import Limits

LIMITS = Limits(qos0_per_device=5, qos0_per_project=8, qos0_in_all=12, qos0_bytes=1_048_576)


def message(text: str) -> Message:
    return Message(topic="t", payload=text.encode(), qos=0)


def taken(waiting: Waiting, most: int) -> list[str]:
    return [message.payload.decode() for message in waiting.take(most)]


def test_projects_take_turns_and_in_them_devices_take_turns() -> None:
    waiting = Waiting(LIMITS)
    for n in range(4):
        assert waiting.put("loud", "a", message(f"a{n}"))
    assert waiting.put("loud", "b", message("b0"))
    assert waiting.put("quiet", "c", message("c0"))
    assert taken(waiting, 3) == ["a0", "c0", "b0"]
    assert taken(waiting, 10) == ["a1", "a2", "a3"]
    assert len(waiting) == 0
    assert taken(waiting, 10) == []


def test_a_full_device_or_project_leaves_room_for_others() -> None:
    waiting = Waiting(LIMITS)
    assert [waiting.put("loud", "a", message("x")) for _ in range(6)] == [True] * 5 + [False]
    assert [waiting.put("loud", "b", message("x")) for _ in range(4)] == [True] * 3 + [False]
    assert [waiting.put("quiet", "c", message("x")) for _ in range(5)] == [True] * 4 + [False]
    waiting.take(1)
    assert waiting.put("quiet", "d", message("x"))


def test_bytes_are_bounded_too() -> None:
    waiting = Waiting(LIMITS)
    large = message("x" * 200_000)
    assert [waiting.put("loud", "a", large) for _ in range(2)] == [True, False]
    assert all(waiting.put(project, "a", large) for project in ("b", "c", "d", "e"))
    assert not waiting.put("f", "a", large)
    waiting.take(12)
    assert waiting.put("loud", "a", large)
