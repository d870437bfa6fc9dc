"""The delivery queue of one webhook: in order per device, in parallel across devices. Also its signatures.

Pure. Memory holds only positions, at most WINDOW of them. The cursor never moves past an undelivered event.
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

# Undelivered events of one endpoint in memory, those of failing devices included.
WINDOW = 1_000
BASE_MS, CAP_MS = 5_000, 2 * 3_600_000
GIVE_UP_MS = 3 * 86_400_000
HOLD_MS = 3_600_000  # longest Retry-After that is honoured: a longer pause would look like a lost delivery


class Pending(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One undelivered event. `failed_since`: time of its first failure, ms."""

    position: int
    attempts: int = 0
    failed_since: int | None = None
    device_id: str = ""


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """The delivery progress of an endpoint. All wanted events before `cursor` are delivered. Between `cursor`
    and `reached`, both included, all wanted events except `open` are delivered."""

    cursor: int
    reached: int
    open: tuple[Pending, ...] = ()


class Window:
    """The undelivered events of one endpoint, in memory. It resumes at `progress` and takes entries in order
    of position."""

    def __init__(self, progress: Progress) -> None:
        self.reached = progress.cursor - 1
        self.hold_until = 0
        self._before = {pending.position: msgspec.structs.replace(pending) for pending in progress.open}
        self._before_until = progress.reached
        self._open: dict[int, Pending] = {}
        self._queues: dict[str, deque[Pending]] = {}
        # Heap of (due at, position, device id): the first event of each device without a request under way.
        self._due: list[tuple[int, int, str]] = []

    @property
    def open(self) -> int:
        """How many events wait for their delivery."""
        return len(self._open) + len(self._before)

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
        return Progress(
            cursor=self.cursor,
            reached=reached,
            open=tuple(msgspec.structs.replace(pending, device_id="") for pending in self._left()),
        )

    def _left(self) -> list[Pending]:
        """What is not delivered. `_before`: open before the restart and not yet read again; later ones."""
        return [*self._open.values(), *self._before.values()]

    def failing(self) -> Pending | None:
        """The event that has failed for the longest time."""
        failed = [pending for pending in self._left() if pending.failed_since is not None]
        return min(failed, key=lambda pending: pending.failed_since or 0, default=None)

    def looked(self, entries: Iterable[tuple[int, str]], reached: int, now: int) -> None:
        """Adds the wanted events up to `reached`, each as (position, device id)."""
        for position, device_id in entries:
            pending = self._before.pop(position, None)
            if pending is None:
                if position <= self._before_until:
                    continue  # it was delivered before the restart, ahead of the cursor
                pending = Pending(position=position)
            pending.device_id = device_id
            self._open[position] = pending
            queue = self._queues.setdefault(device_id, deque())
            queue.append(pending)
            if len(queue) == 1:
                heapq.heappush(self._due, (now, position, device_id))
        self.reached = max(self.reached, reached)
        if self._before:  # drop the events that the filter no longer matches
            self._before = {at: pending for at, pending in self._before.items() if at > self.reached}

    def next_at(self) -> int | None:
        """When the next event is due, ms; None if no event waits for a request."""
        return max(self._due[0][0], self.hold_until) if self._due else None

    def take(self, now: int) -> Pending | None:
        """The event that has been due for the longest time; None if none is due.

        Its device gets no other event until `delivered` or `failed` is called for this one.
        """
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
        """Schedules the retry. Returns False after GIVE_UP_MS of failures: the endpoint must pause."""
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
    """Forgets past failures: everything is due now, with a fresh three-day retry budget."""
    return msgspec.structs.replace(
        progress, open=tuple(Pending(position=pending.position) for pending in progress.open)
    )


def backoff_ms(attempts: int, draw: Callable[[float, float], float]) -> int:
    """Exponential back-off with full jitter, at least 1 s."""
    return max(1_000, int(draw(0, min(CAP_MS, BASE_MS * 2 ** min(attempts - 1, 20)))))


def hold_ms(retry_after: str | None, wall_ms: int) -> int:
    """The wait that a `Retry-After` header (seconds or a date) asks for, ms, at most HOLD_MS; 0 if it cannot
    be parsed."""
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
    """The `webhook-signature` header of Standard Webhooks 1.0: one signature per secret, so a receiver can
    verify with the old or the new one."""
    signed = b"%s.%d.%s" % (id.encode(), timestamp_sec, body)
    made = (hmac.digest(secret_key(secret), signed, hashlib.sha256) for secret in secrets)
    return " ".join("v1," + base64.b64encode(each).decode() for each in made)
