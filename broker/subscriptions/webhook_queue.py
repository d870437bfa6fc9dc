"""What is due to one webhook: in order per device, in parallel across devices; and how it is signed.

Pure. Memory holds positions only, at most a window of them; the cursor never passes one that is undelivered.
"""

from __future__ import annotations

import base64
import hashlib
import heapq
import hmac
from collections import deque
from collections.abc import Callable, Iterable
from email.utils import parsedate_to_datetime

import msgspec

# Undelivered events of one endpoint that are looked ahead at; with its devices' failing ones among them.
WINDOW = 1_000
BASE_MS, CAP_MS = 5_000, 2 * 3_600_000
GIVE_UP_MS = 3 * 86_400_000
HOLD_MS = 3_600_000  # a receiver may ask for an hour; more would look like a delivery that was lost


class Pending(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One undelivered event. `failed_since`: its first failure, ms."""

    position: int
    attempts: int = 0
    failed_since: int | None = None
    device_id: str = ""


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """How far an endpoint is. Everything wanted before `cursor` is delivered; of what was looked at
    from there, up to `reached`, only `open` is not."""

    cursor: int
    reached: int
    open: tuple[Pending, ...] = ()


class Window:
    """Begins where `progress` ended; takes entries in order of position."""

    def __init__(self, progress: Progress) -> None:
        self.reached = progress.cursor - 1
        self.hold_until = 0
        self._before = {pending.position: msgspec.structs.replace(pending) for pending in progress.open}
        self._before_until = progress.reached
        self._open: dict[int, Pending] = {}
        self._queues: dict[str, deque[Pending]] = {}
        self._due: list[tuple[int, int, str]] = []  # the first of each device that is not under way

    @property
    def full(self) -> bool:
        return len(self._open) >= WINDOW

    @property
    def cursor(self) -> int:
        for waiting in (self._open, self._before):
            for position in waiting:
                return position
        return max(self.reached, self._before_until) + 1

    def progress(self) -> Progress:
        reached = max(self.reached, self._before_until)
        # What was open before a restart and has not been looked at again lies after all that is open now.
        left = [*self._open.values(), *self._before.values()]
        return Progress(
            cursor=self.cursor,
            reached=reached,
            open=tuple(msgspec.structs.replace(pending, device_id="") for pending in left),
        )

    def failing(self) -> Pending | None:
        """The one that has failed for longest."""
        failed = [pending for pending in self._open.values() if pending.failed_since is not None]
        return min(failed, key=lambda pending: pending.failed_since or 0, default=None)

    def looked(self, entries: Iterable[tuple[int, str]], reached: int, now: int) -> None:
        """Takes in what is wanted (position, device id) of everything up to `reached`."""
        for position, device_id in entries:
            pending = self._before.pop(position, None)
            if pending is None:
                if position <= self._before_until:
                    continue  # it was delivered ahead of the cursor
                pending = Pending(position=position)
            pending.device_id = device_id
            self._open[position] = pending
            queue = self._queues.setdefault(device_id, deque())
            queue.append(pending)
            if len(queue) == 1:
                heapq.heappush(self._due, (now, position, device_id))
        self.reached = max(self.reached, reached)
        if self._before:  # what is wanted no longer
            self._before = {at: pending for at, pending in self._before.items() if at > self.reached}

    def next_at(self) -> int | None:
        """When something is due, ms; None: nothing waits that is not under way."""
        return max(self._due[0][0], self.hold_until) if self._due else None

    def take(self, now: int) -> Pending | None:
        """What is due for longest; its device gets nothing else until it is `delivered` or `failed`."""
        at = self.next_at()
        if at is None or at > now:
            return None
        return self._queues[heapq.heappop(self._due)[2]][0]

    def delivered(self, pending: Pending, now: int) -> None:
        del self._open[pending.position]
        queue = self._queues[pending.device_id]
        queue.popleft()
        if queue:
            heapq.heappush(self._due, (now, queue[0].position, pending.device_id))
        else:
            del self._queues[pending.device_id]

    def failed(self, pending: Pending, now: int, draw: Callable[[float, float], float]) -> bool:
        """Sets when it is due again; False if it has failed for so long that the endpoint must pause."""
        pending.attempts += 1
        if pending.failed_since is None:
            pending.failed_since = now
        end = pending.failed_since + GIVE_UP_MS
        due = min(now + backoff_ms(pending.attempts, draw), end)
        heapq.heappush(self._due, (due, pending.position, pending.device_id))
        return now < end

    def is_open(self, position: int) -> bool:
        return position > self.reached or position in self._open or position in self._before


def fresh(progress: Progress) -> Progress:
    """As if nothing had failed yet: all of it is due, and has its three days before it."""
    return msgspec.structs.replace(
        progress, open=tuple(Pending(position=pending.position) for pending in progress.open)
    )


def backoff_ms(attempts: int, draw: Callable[[float, float], float]) -> int:
    """Exponential with full jitter, at least a second."""
    return max(1_000, int(draw(0, min(CAP_MS, BASE_MS * 2 ** min(attempts - 1, 20)))))


def hold_ms(retry_after: str | None, wall_ms: int) -> int:
    """How long a `Retry-After` asks to wait: seconds or a date. What cannot be read asks for nothing."""
    text = (retry_after or "").strip()
    if text.isascii() and text.isdecimal():
        asked = int(text[:9]) * 1_000
    else:
        try:
            asked = int(parsedate_to_datetime(text).timestamp() * 1_000) - wall_ms
        except (ValueError, OverflowError):
            asked = 0
    return min(max(asked, 0), HOLD_MS)


def secret_key(secret: str) -> bytes:
    """The key in a `whsec_` secret."""
    return base64.b64decode(secret.removeprefix("whsec_"))


def signature(secrets: Iterable[str], id: str, timestamp_sec: int, body: bytes) -> str:
    """`webhook-signature` of Standard Webhooks 1.0: one for each secret, so that either verifies."""
    signed = b"%s.%d.%s" % (id.encode(), timestamp_sec, body)
    made = (hmac.digest(secret_key(secret), signed, hashlib.sha256) for secret in secrets)
    return " ".join("v1," + base64.b64encode(each).decode() for each in made)
