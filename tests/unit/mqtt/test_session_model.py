"""A session against a model: in any order of client and owner actions the protocol's rules hold."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from broker.mqtt import packets as p
from broker.mqtt.codec import encode
from tests.unit.mqtt.speaker import Speaker, said
from tests.unit.mqtt.test_session import limits

WINDOW, HEARD, QUEUE = 3, 4, 2


class Sessions(RuleBasedStateMachine):
    """The model: unacknowledged messages of the client, messages in flight, and the counts of both."""

    @initialize(version=st.sampled_from([4, 5]))
    def begin(self, version: int) -> None:
        self.connect(version)

    def connect(self, version: int) -> None:
        self.speaker = Speaker(
            version=version,
            limits=limits(
                receive_maximum=HEARD, unacknowledged=HEARD, queued=QUEUE, in_flight=WINDOW + (version == 5)
            ),
        )
        properties = {"receive_maximum": WINDOW} if version == 5 else {}
        self.speaker.connected(properties=properties)
        self.waiting: list[int] = []  # packet ids without PUBACK, in order of arrival
        self.allowed: set[int] = set()  # of these, the ids that the owner has acknowledged
        self.sent: dict[int, int] = {}  # packet id in flight -> tag
        self.queued: list[int] = []
        self.next_tag = 0
        self.next_id = 0

    def alive(self) -> bool:
        return hasattr(self, "speaker") and self.speaker.session.state == "open"

    @precondition(lambda self: self.alive() and len(self.waiting) < HEARD)
    @rule(cut=st.integers(0, 10))
    def client_says(self, cut: int) -> None:
        self.next_id = self.next_id % 9 + 1
        if self.next_id in self.waiting:
            return
        data = encode(said(b"%d" % self.next_id, self.next_id), self.speaker.version)
        before = len(self.speaker.told(p.Publish))
        self.speaker.raw(data[:cut])
        assert len(self.speaker.told(p.Publish)) == before
        self.speaker.raw(data[cut:])
        assert len(self.speaker.told(p.Publish)) == before + 1
        self.waiting.append(self.next_id)

    @precondition(lambda self: self.alive() and self.waiting)
    @rule(data=st.data())
    def client_says_again(self, data: st.DataObject) -> None:
        if len(self.waiting) == HEARD and self.speaker.version == 4:
            return  # the session is paused and does not read
        again = data.draw(st.sampled_from(self.waiting))
        before = len(self.speaker.told(p.Publish))
        self.speaker.say(said(b"%d" % again, again, dup=True))
        assert len(self.speaker.told(p.Publish)) == before

    @precondition(lambda self: self.alive() and self.waiting)
    @rule(data=st.data())
    def owner_acknowledges(self, data: st.DataObject) -> None:
        one = data.draw(st.sampled_from(self.waiting))
        self.allowed.add(one)
        before = len(self.speaker.sent(p.Ack))
        self.speaker.acknowledge(one)
        expected = []
        while self.waiting and self.waiting[0] in self.allowed:
            expected.append(self.waiting.pop(0))
            self.allowed.discard(expected[-1])
        assert [ack.packet_id for ack in self.speaker.sent(p.Ack)[before:]] == expected

    @precondition(lambda self: self.alive())
    @rule()
    def owner_publishes(self) -> None:
        self.next_tag += 1
        outcome = self.speaker.publish(b"%d" % self.next_tag, tag=self.next_tag)
        if len(self.sent) < WINDOW:
            assert outcome == "sent"
            self._flies(self.next_tag)
        elif len(self.queued) < QUEUE:
            assert outcome == "queued"
            self.queued.append(self.next_tag)
        else:
            assert outcome == "full"

    def _flies(self, tag: int) -> None:
        message = next(m for m in reversed(self.speaker.sent(p.Publish)) if m.payload == b"%d" % tag)
        assert message.packet_id not in self.sent
        self.sent[message.packet_id] = tag

    @precondition(lambda self: self.alive() and self.sent and len(self.waiting) < HEARD)
    @rule(data=st.data())
    def client_acknowledges(self, data: st.DataObject) -> None:
        one = data.draw(st.sampled_from(sorted(self.sent)))
        self.speaker.say(p.Ack(p.PUBACK, one))
        tag = self.sent.pop(one)
        assert self.speaker.taken[-1] == (tag, 0)
        if self.queued:
            self._flies(self.queued.pop(0))

    @precondition(lambda self: self.alive())
    @rule()
    def client_is_lost(self) -> None:
        before = len(self.speaker.taken)
        self.speaker.session.lost()
        self.speaker.look()
        unknown = [*self.sent.values(), *self.queued]
        assert self.speaker.taken[before:] == [(tag, None) for tag in unknown]
        assert self.speaker.closed is not None
        self.connect(self.speaker.version)

    @invariant()
    def the_windows_are_kept(self) -> None:
        if self.alive():
            assert len(self.speaker.session._heard) == len(self.waiting)
            assert self.speaker.session.in_flight == len(self.sent) + len(self.queued)


TestSessions = Sessions.TestCase
TestSessions.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
