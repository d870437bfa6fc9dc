"""Asks devices for their state, if an attempt is not answered in time and the device's type has a query.

A query changes nothing at the device, so it has no event of its own. It is sent once per attempt, after the
attempt's bytes, which follow from a durable event.
"""

from __future__ import annotations

from broker.domain.lanes import Member, ms
from broker.domain.lifecycle import State
from broker.engine.commands import Commands
from broker.engine.deadlines import Deadlines
from broker.seams import Link, Outgoing
from devices.speech.messages import query_payload

TIMER = "query/"


class Queries:
    """`link` is the link in use; `Core.attach` replaces it."""

    def __init__(self, commands: Commands, deadlines: Deadlines) -> None:
        self._commands = commands
        self._deadlines = deadlines

    def written(self, member: Member, now: int) -> None:
        """The bytes of an attempt were written: asks later, if nothing comes."""
        speech = member.definition.speech
        if speech is not None and speech.query is not None:
            self._deadlines.set(TIMER + member.state.id, now + ms(speech.query.after_sec))

    def ask(self, key: str, link: Link) -> None:
        """The timer of a query fired."""
        member = self._commands.live.members.get(key.removeprefix(TIMER))
        if member is None or member.state.state is not State.PUBLISHED or not member.flight.open:
            return
        speech, addresses = member.definition.speech, self._commands.addresses
        device = self._commands.live.device(member.state.device_id)
        if speech is None or speech.query is None or device is None:
            return
        reply_topic = addresses.reply_topic(device.hardware_id, member.definition)
        payload = query_payload(
            speech.query, member.state.id, speech.wire_name or member.state.type, reply_topic
        )
        outgoing = Outgoing(
            topic=addresses.query_topic(device, speech), payload=payload, response_topic=reply_topic
        )
        link.publish(outgoing, lambda receipt: None)
