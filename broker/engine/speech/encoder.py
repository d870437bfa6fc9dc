"""Makes the MQTT message of one attempt, as the command's definition describes it."""

from __future__ import annotations

from broker.domain import lanes
from broker.domain.lanes import Member
from broker.engine.commands import Commands
from broker.engine.grants import Grants
from broker.seams import Outgoing
from devices.clock import rfc3339
from devices.wire import encode_command


class Encoder:
    def __init__(self, commands: Commands, grants: Grants) -> None:
        self._commands = commands
        self._grants = grants

    def number(self, member: Member) -> int | None:
        """A number for the next attempt that no recent attempt of this device has had; None: it has none."""
        speech = member.definition.speech
        if speech is None or not speech.numbered:
            return None
        while True:
            number = 1 + int(self._commands.writer.entropy.uniform(0, speech.number_max))
            if (
                number <= speech.number_max
                and (member.state.device_id, number) not in self._commands.live.numbers
            ):
                return number

    def encode(self, member: Member, now: int, number: int | None) -> Outgoing:
        """The MQTT message of the next attempt.

        Raises:
            Unsendable: the device type cannot encode the command, or the message is too large.
        """
        state, definition = member.state, member.definition
        grant = self._grants.mint(state, now) if definition.carries_grant else None
        attempt = state.attempts + 1
        reply_topic = self._commands.addresses.reply_topic(state.hardware_id, definition)
        payload = encode_command(
            definition,
            command_id=state.id,
            command=state.type,
            params=state.params,
            attempt=attempt,
            expires_at=None if state.expires_at is None else rfc3339(state.expires_at),
            grant=grant,
            number=number,
            reply_topic=reply_topic,
        )
        life = lanes.ms(definition.ack_timeout_sec)
        if state.expires_at is not None:
            life = min(life, state.expires_at - now)
        properties = [("attempt", str(attempt))]
        if grant is not None:
            properties.append(("grant", grant))
        return Outgoing(
            topic=state.topic,
            payload=payload,
            correlation=state.id.encode(),
            response_topic=reply_topic,
            expiry_sec=max(1, life // 1_000),
            user_properties=tuple(properties),
        )
