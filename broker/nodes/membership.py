"""What one node knows of the others from their beats: who lives, who owns the log, whether it may claim it.

Only this node's own clock is used: one that never steps, and that goes on while the machine sleeps. A node is
dead when its beat has stood still for a lease, and this node's own beats succeeded all the time.
"""

from __future__ import annotations

from broker.seams import Node, View

LEASE_MS = 5_000
# An owner stops acting so much earlier than the others believe it dead.
MARGIN_MS = 1_000
# After so long without a beat of our own, what we saw of the others before says nothing any more.
OUTAGE_MS = 2_500
# Nodes claim one after another, the one that has lived longest first, so that they rarely collide.
TURN_MS = 1_500


class Membership:
    """`incarnation`: this run of this process. `view`: what the last confirmed beat read. Times in ms."""

    def __init__(self, incarnation: str, lease_ms: int = LEASE_MS) -> None:
        self.incarnation = incarnation
        self.lease_ms = lease_ms
        self.view = View(0, None, [])
        self.confirmed: int | None = None  # when the last confirmed beat began
        self._looked = 0  # when it was answered
        self._resumes = 0  # before that nobody acts: see `took`
        self._seen: dict[str, tuple[int, int]] = {}  # its last new beat, and when it was seen
        self._vacant_since: int | None = None

    def took(self, view: View, began: int, now: int) -> None:
        """A beat of this node was confirmed."""
        if self.confirmed is None or now - self.confirmed > OUTAGE_MS:
            self._seen.clear()
            self._vacant_since = None
        if self.confirmed is not None and now - self.confirmed >= self.lease_ms - MARGIN_MS:
            # An owner whose lease had ended goes on only when nobody claims any more because of what it saw
            # before this beat.
            self._resumes = now + OUTAGE_MS
        self._seen = {
            node.incarnation: self._seen[node.incarnation]
            if self._seen.get(node.incarnation, (-1, 0))[0] == node.beat
            else (node.beat, now)
            for node in view.nodes
        }
        self.view, self.confirmed, self._looked = view, began, now
        owner = self.owner
        if owner is not None and not owner.draining:
            self._vacant_since = None
        elif self._vacant_since is None:
            self._vacant_since = now

    @property
    def owner(self) -> Node | None:
        """The node that claimed the current term; None: nobody did, or it has left in order."""
        return next((node for node in self.view.nodes if node.incarnation == self.view.owner), None)

    def silent_ms(self, incarnation: str, now: int) -> int:
        """How long the beat of a node has stood still, as seen from here."""
        return now - self._seen.get(incarnation, (0, now))[1]

    def lives(self, incarnation: str, now: int) -> bool:
        return incarnation in self._seen and self.silent_ms(incarnation, now) < self.lease_ms

    def holds(self, term: int, now: int) -> bool:
        """Whether this node may act as the owner in `term`: decide, answer, and send."""
        return (
            self.confirmed is not None
            and (self.view.owner, self.view.term) == (self.incarnation, term)
            and self._resumes <= now < self.confirmed + self.lease_ms - MARGIN_MS
        )

    def may_claim(self, now: int) -> bool:
        """Whether it is this node's turn to claim the log. Its last confirmed beat says so, and is young."""
        if self.confirmed is None or now - self.confirmed > OUTAGE_MS:
            return False
        owner, now = self.owner, self._looked
        if owner is not None and owner.incarnation == self.incarnation:
            return True  # a claim of ours whose outcome we did not learn
        return self._free_ms(owner, now) >= self._before(now) * TURN_MS

    def _free_ms(self, owner: Node | None, now: int) -> int:
        """For how long the log has been free to claim; less than 0: it is not."""
        if owner is None or owner.draining:
            return 0 if self._vacant_since is None else now - self._vacant_since
        return self.silent_ms(owner.incarnation, now) - self.lease_ms

    def _before(self, now: int) -> int:
        """How many nodes have the right to claim it before this one."""
        return sum(
            node.incarnation < self.incarnation
            and node.incarnation != self.view.owner
            and not node.draining
            and self.lives(node.incarnation, now)
            for node in self.view.nodes
        )
