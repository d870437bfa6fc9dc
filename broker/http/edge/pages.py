"""Pages of lists: opaque cursors that only the list that gave them takes back.

A cursor holds a position of the log, so a page stays where it is while others arrive, and a
signature over the list and its filters; it gives nobody a right they do not have anyway.
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

Limit = Annotated[int, QueryParameter(ge=1, le=100, description="How many at most.")]
Cursor = Annotated[
    str | None, QueryParameter(description="`next_cursor` of the page before, as it was given.")
]


class Pager:
    """Cursors of one list; `scope` is everything that says which list it is: route, filters, project."""

    def __init__(self, key: bytes, *scope: Any) -> None:
        self._key = key
        self._scope = msgspec.json.encode(scope)

    def seal(self, place: int) -> str:
        body = place.to_bytes(8, "big")
        seal = hmac.digest(self._key, body + self._scope, "sha256")[:16]
        return base64.urlsafe_b64encode(body + seal).decode()

    def after(self, cursor: str | None) -> int | None:
        """The place a cursor stands for.

        Raises:
            Refusal: invalid_request, if this list never gave it.
        """
        if cursor is None:
            return None
        try:
            place = int.from_bytes(base64.urlsafe_b64decode(cursor.encode("ascii"))[:8], "big")
        except ValueError:
            place = 0
        if not hmac.compare_digest(self.seal(place).encode(), cursor.encode("utf-8", "replace")):
            raise invalid("cursor", "is not one that this list, with these filters, gave")
        return place


def cut(found: Sequence[T], limit: int) -> tuple[Sequence[T], bool]:
    """The page, and whether there is more; one more than the limit was asked for."""
    return found[:limit], len(found) > limit
