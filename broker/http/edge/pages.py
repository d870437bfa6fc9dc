"""Pages of lists: opaque, signed cursors. A cursor is valid only for the list and filters that gave it.

A cursor contains a position of the log, so pages do not shift while new items arrive. It also contains a
signature over the list and its filters. A cursor gives its holder no extra rights.
"""

from __future__ import annotations

import base64
import hmac
from collections.abc import Sequence
from typing import Annotated, Any, TypeVar

import msgspec
from litestar.params import QueryParameter

from broker.domain.errors import invalid

T = TypeVar("T")

Limit = Annotated[int, QueryParameter(ge=1, le=100, description="The largest number of items in a page.")]
Cursor = Annotated[
    str | None,
    QueryParameter(
        description="The `next_cursor` of the previous page, unchanged. A cursor is good only for the list "
        "and the filters that gave it; any other is refused (400).",
        schema_extra={"pattern": "^[A-Za-z0-9_-]{32}$"},
    ),
]


class Pager:
    """Makes and checks the cursors of one list. `scope` identifies the list: route, filters, project."""

    def __init__(self, key: bytes, *scope: Any) -> None:
        self._key = key
        self._scope = msgspec.json.encode(scope)

    def seal(self, place: int) -> str:
        body = place.to_bytes(8, "big")
        seal = hmac.digest(self._key, body + self._scope, "sha256")[:16]
        return base64.urlsafe_b64encode(body + seal).decode()

    def after(self, cursor: str | None) -> int | None:
        """The place that a cursor contains; None without a cursor.

        Raises:
            Refusal: invalid_request, if this list did not give this cursor.
        """
        if cursor is None:
            return None
        try:
            place = int.from_bytes(base64.urlsafe_b64decode(cursor.encode("ascii"))[:8], "big")
        except ValueError:
            place = 0
        if not hmac.compare_digest(self.seal(place).encode(), cursor.encode("utf-8", "replace")):
            raise invalid("cursor", "was not given by this list with these filters", cursor)
        return place


def cut(found: Sequence[T], limit: int) -> tuple[Sequence[T], bool]:
    """The first `limit` items, and whether there are more. The caller reads one item more than the limit."""
    return found[:limit], len(found) > limit
