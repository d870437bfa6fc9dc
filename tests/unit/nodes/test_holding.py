"""A node whose lease has ended sends nothing to webhooks."""

from __future__ import annotations

from collections.abc import Mapping

from broker.seams import Answer
from broker.serving.owning import WhileHolding


class Receiver:
    """Outgoing HTTP that only notes what was sent."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []

    async def fault(self, url: str) -> str | None:
        return None

    async def post(self, url: str, headers: Mapping[str, str], body: bytes, timeout_sec: float) -> Answer:
        self.sent.append(body)
        return Answer(status=200)


async def test_nothing_is_posted_after_the_end_of_the_lease() -> None:
    holding, receiver = [True], Receiver()
    outbound = WhileHolding(receiver, lambda: holding[0])
    assert (await outbound.post("https://a.example", {}, b"one", 1)).status == 200
    holding[0] = False
    assert (await outbound.post("https://a.example", {}, b"two", 1)).status is None
    assert receiver.sent == [b"one"]
