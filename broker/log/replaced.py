"""Finds device events that newer ones replaced, so that their data can be erased.

Walks the log once, page by page. A presence event is replaced by the next presence event of its device, a
change of only the attributes by the next event that sets them, a reported state by the next one. An `online`
on which a hand-over relied is kept, and so is every event of another kind.
"""

from __future__ import annotations

import msgspec

from broker.log.erasing import ATTRIBUTES, PRESENCE, REPORTED
from broker.seams import Sql

PAGE = 5_000  # positions in one read
ONLY_ATTRIBUTES = ({"attributes"}, {"attributes", "via"})

_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


class Walk:
    """`after`: the log is read up to this position. The dictionaries have, by device, the position of the
    newest event of the kind; 0: it must be kept."""

    def __init__(self) -> None:
        self.after = 0
        self._presence: dict[str, int] = {}
        self._attributes: dict[str, int] = {}
        self._reported: dict[str, int] = {}

    async def step(self, sql: Sql, end: int) -> list[int]:
        """Reads one page, up to the position before `end`; returns the positions it found replaced."""
        until = min(self.after + PAGE, end - 1)
        rows = await sql.all(
            "SELECT position, type, device_id, CASE WHEN type = 'published' THEN NULL "
            "WHEN type = 'reported' THEN substr(data, 1, 1) ELSE data END "
            "FROM events WHERE position > ? AND position <= ? "
            "AND type IN ('online', 'offline', 'changed', 'reported', 'published') ORDER BY position",
            (self.after, until),
        )
        found = [old for row in rows if (old := self._replaced(*row))]
        self.after = until
        return sorted(found)

    def _replaced(self, position: int, type_name: str, device_id: str, data: bytes | None) -> int:
        """The position of the event that this one replaces, if it may be erased; else 0."""
        if type_name == "published":
            # The presence of that time is why the command was sent. It stays, whatever it was.
            self._presence[device_id] = 0
            return 0
        if type_name == REPORTED:
            old = self._reported.get(device_id, 0)
            self._reported[device_id] = 0 if data is None else position
            return old
        fields = set() if data is None else set(_fields(data))
        if type_name in PRESENCE:
            old = self._presence.get(device_id, 0)
            self._presence[device_id] = position if fields else 0
            return old
        if type_name != ATTRIBUTES or "attributes" not in fields:
            return 0
        old = self._attributes.get(device_id, 0)
        self._attributes[device_id] = position if fields in ONLY_ATTRIBUTES else 0
        return old
