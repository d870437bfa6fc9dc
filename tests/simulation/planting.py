"""What all planted bugs have: a name, what is replaced, and the invariants that must be reported."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import msgspec


class Planted(msgspec.Struct, frozen=True, kw_only=True):
    """`patches`: (owner, name, replacement). `caught_by`: at least one of these invariants must be
    reported."""

    name: str
    caught_by: frozenset[str]
    patches: tuple[tuple[Any, str, Any], ...] = ()

    def names(self, found: list[str]) -> bool:
        """Whether one of the reported sentences is about these invariants."""
        return any(sentence.partition(":")[0] in self.caught_by for sentence in found)

    @contextmanager
    def planted(self) -> Iterator[None]:
        with ExitStack() as stack:
            for owner, name, replacement in self.patches:
                stack.enter_context(patch.object(owner, name, replacement))
            yield
