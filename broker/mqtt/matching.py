"""Which of many topics a filter fits: a gateway receives the topics of hundreds of devices."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache


class _Node:
    __slots__ = ("children", "topic")

    def __init__(self) -> None:
        self.children: dict[str, _Node] = {}
        self.topic: str | None = None


class Topics:
    """Topics as a tree of their levels. Source of the rules: MQTT 5.0, section 4.7. None begins with $."""

    def __init__(self, topics: Iterable[str]) -> None:
        self._root = _Node()
        self._deepest = 0
        for topic in topics:
            node, levels = self._root, topic.split("/")
            for level in levels:
                node = node.children.setdefault(level, _Node())
            node.topic = topic
            self._deepest = max(self._deepest, len(levels))

    def fitting(self, topic_filter: str) -> Iterator[str]:
        """The topics that a filter covers."""
        nodes = [self._root]
        for level in topic_filter.split("/", self._deepest + 1):  # a filter may have thousands of levels
            if level == "#":
                yield from _all(nodes)
                return
            if level == "+":
                nodes = [child for node in nodes for child in node.children.values()]
            else:
                nodes = [node.children[level] for node in nodes if level in node.children]
            if not nodes:
                return
        yield from (node.topic for node in nodes if node.topic is not None)


def _all(nodes: list[_Node]) -> Iterator[str]:
    while nodes:
        yield from (node.topic for node in nodes if node.topic is not None)
        nodes = [child for node in nodes for child in node.children.values()]


@lru_cache(256)
def tree(topics: frozenset[str]) -> Topics:
    """The tree of a peer's topics; they rarely change."""
    return Topics(topics)
