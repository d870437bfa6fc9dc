"""Which topics a device has, and which device a topic belongs to.

In memory only: it is a function of the device types and of the registered devices. No two devices may have a
topic in common: `taken` says so before a device is registered or changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from broker.domain.fleet import DeviceState
from broker.engine.live import Live, Recent
from devices.names import answer_topic, device_topic, parse_topic
from devices.speech.speech import Speech
from devices.speech.topics import (
    HARDWARE_ID,
    NAME,
    Router,
    filter_of,
    level_fault,
    topic_of,
    with_prefix,
)
from devices.types import Definition, DeviceType

STATUS = "status"
ANSWER, STATE, PRESENCE = "answer", "state", "presence"


class Place(NamedTuple):
    """Where a message came in. `roles`: what a message there may be. `pattern`: of the topic, "" if it is in
    Ordain's own layout and form."""

    hardware_id: str
    roles: tuple[str, ...]
    pattern: str = ""


class Reach(NamedTuple):
    """All topics of one device. `hears`: what it receives. `says`: what it publishes and the broker reads,
    with the role. `others`: filters of what it publishes and nobody reads. `will`: where its last will may
    be."""

    hears: frozenset[str]
    says: dict[str, Place]
    others: tuple[str, ...]
    will: str


class Addresses:
    """`used(filters)` is called when more topics are in use: the link must subscribe to them. `filters`: all
    that are in use, beside those of Ordain's own layout."""

    def __init__(self, types: dict[str, DeviceType], prefix: str, live: Live) -> None:
        self.types = types
        self.prefix = prefix
        self._live = live
        self._router = Router(with_prefix(each, prefix) for kind in types.values() for each in kind.says)
        self._every = Router(each for kind in types.values() for each in _patterns(kind, prefix))
        self._named: dict[str, str] = {}  # the name in topics -> device id, of types that use {name}
        self._names: dict[str, str] = {}  # device id -> its name there
        self._reaches: Recent[str, tuple[tuple[str | None, str], Reach]] = Recent()
        self.used: Callable[[list[str]], None] = lambda filters: None
        self.filters: dict[str, None] = {}

    # --- devices ---

    def put(self, device: DeviceState, *, loaded: bool = False) -> None:
        """Takes in a device as it is now.

        A device may have retained its presence and state before it was registered here. Then a subscription
        to exactly its topics brings them; the common one has brought them already, when nobody knew the
        device.
        """
        old = self._names.pop(device.id, None)
        if old is not None and self._named.get(old) == device.id:
            del self._named[old]
        kind = self.types.get(device.device_type)
        if device.deleted_at is not None or kind is None:
            return
        if _by_name(kind):
            self._names[device.id] = device.name or device.hardware_id
            self._named[self._names[device.id]] = device.id
        self._use(kind.says if kind.speeches else ())
        if kind.speeches and not loaded:
            said = self.reach(device).says.items()
            self.used([topic for topic, place in said if place.roles != (ANSWER,)])

    def keep(self, speech: Speech) -> None:
        """Takes in how an open command is spoken: its type may have changed since, or be gone."""
        for pattern in speech.says:
            self._router.add(with_prefix(pattern, self.prefix))
        self._use(speech.says)

    def _use(self, patterns: Iterable[str]) -> None:
        found = [filter_of(each, self.prefix) for each in patterns]
        new = [each for each in found if each not in self.filters]
        if new:
            self.filters |= dict.fromkeys(new)
            self.used(new)

    @property
    def by_name(self) -> list[str]:
        """The types whose topics have the device's name."""
        return [name for name, kind in self.types.items() if _by_name(kind)]

    def alike(self, device: DeviceState) -> dict[str, DeviceType]:
        """The types that a command to this device may have instead of its own: those with the same rule for
        signed answers, so that nobody can choose a type that accepts unsigned ones."""
        own = self.types.get(device.device_type)
        rule = "none" if own is None else own.answers_signed
        return {name: kind for name, kind in self.types.items() if kind.answers_signed == rule}

    def load(self, used: Iterable[str], devices: Iterable[DeviceState]) -> None:
        """Forgets everything, and takes in the types in use and the devices of types with names in topics."""
        self._named.clear()
        self._names.clear()
        for device in devices:
            self.put(device, loaded=True)
        for name in used:
            if (kind := self.types.get(name)) is not None and kind.speeches:
                self._use(kind.says)

    def rivals(self, kind: DeviceType, hardware_id: str, name: str | None) -> dict[str, tuple[str, str]]:
        """The devices of other types, if they exist, that may have a topic of a device with these names: each
        with the field that decides it, and the topic."""
        found: dict[str, tuple[str, str]] = {}
        if not kind.speeches:
            return found
        own = _patterns(kind, self.prefix)
        for pattern in own:
            topic = topic_of(pattern, self.prefix, hardware_id, name or hardware_id)
            field = "name" if NAME in pattern and name is not None else "hardware_id"
            for other, owner in self._every.matches(topic):
                value = owner.value if owner.by != NAME else self._named.get(owner.value)
                if other not in own and value is not None:
                    found.setdefault(value, (field, topic))
        return found

    def taken(
        self, kind: DeviceType, hardware_id: str, name: str | None, device_id: str
    ) -> tuple[str, str] | None:
        """Why a device cannot have this type and these names: (field, what would be right). Its `rivals` are
        in memory, as far as they exist."""
        field = "hardware_id" if name is None else "name"
        as_level = any(NAME in pattern for pattern in _patterns(kind, self.prefix))
        if as_level and (fault := level_fault(name or hardware_id)):
            return field, f"is a level of this type's topics: {fault}"
        if _by_name(kind) and self._named.get(name or hardware_id, device_id) != device_id:
            return field, f"another device has {name or hardware_id} in its topics already"
        for rival, (field, topic) in self.rivals(kind, hardware_id, name).items():
            device = self._live.device(rival)
            if device is None or device.id == device_id or device.deleted_at is not None:
                continue
            reach = self.reach(device)
            if topic in reach.hears or topic in reach.says:
                return field, f"its topic {topic} is one of another device's: {device.hardware_id}"
        return None

    # --- topics ---

    def owners(self, topic: str) -> list[str]:
        """The devices (ids or hardware ids) that a topic may belong to. They may not exist."""
        if (own := parse_topic(self.prefix, topic)) is not None:
            return [own[0]]
        return [
            name
            for owner in self._router.owners(topic)
            if (name := owner.value if owner.by != NAME else self._named.get(owner.value)) is not None
        ]

    def place(self, topic: str) -> Place | None:
        """Whose topic this is. The owners are in memory already, as far as they exist; None: nobody's."""
        for name in self.owners(topic):
            device = self._live.device(name)
            if device is None or device.deleted_at is not None or not self.speaks(device):
                continue
            if (found := self.reach(device).says.get(topic)) is not None:
                return found
        own = parse_topic(self.prefix, topic)
        return None if own is None else Place(own[0], (PRESENCE,) if own[1] == STATUS else (ANSWER,))

    def shared(self, topic: str) -> bool:
        """Whether this is a topic as bought devices have them: it need not be one of ours."""
        return not topic.startswith(f"{self.prefix}/") and bool(self._router.owners(topic))

    def speaks(self, device: DeviceState, kind: DeviceType | None = None) -> bool:
        """Whether the device has topics or a form of its own, by its type or by another one."""
        own = self.types.get(device.device_type)
        return own is None or bool(own.speeches) or (kind is not None and bool(kind.speeches))

    def reach(self, device: DeviceState) -> Reach:
        """The topics of a device: those of its type, and those of open commands of another type."""
        lane = self._live.lanes.get(device.id)
        speeches = [] if lane is None else [member.definition.speech for member in lane.members.values()]
        foreign = [each for each in speeches if each is not None and each.command_topic]
        key = (device.name, device.device_type)
        known = self._reaches.get(device.id)
        if known is not None and known[0] == key and self._covers(known[1], foreign, device):
            return known[1]
        reach = self._reach(device, foreign)
        self._reaches.put(device.id, (key, reach))
        return reach

    def _covers(self, reach: Reach, speeches: Iterable[Speech], device: DeviceState) -> bool:
        return all(self._topic(speech.command_topic, device) in reach.hears for speech in speeches)

    def _reach(self, device: DeviceState, more: list[Speech]) -> Reach:
        kind = self.types.get(device.device_type)
        speeches = [*(kind.speeches if kind is not None else ()), *more]
        own = device_topic(self.prefix, device.hardware_id, STATUS)
        roles: dict[str, dict[str, None]] = {}
        for speech in speeches:
            named = [(each, ANSWER) for each in speech.answer_topics]
            named += [(each, STATE) for each in speech.state_topics]
            named += [(speech.presence_topic, PRESENCE)] if speech.presence_topic is not None else []
            for pattern, role in named:
                roles.setdefault(pattern, {})[role] = None
        says = {
            self._topic(pattern, device): Place(device.hardware_id, tuple(found), pattern)
            for pattern, found in roles.items()
        }
        hears = {self._topic(each, device) for speech in speeches for each in speech.listens}
        will = own
        if kind is not None:
            hears |= {self._topic(each, device) for each in kind.listens}
            will = self._topic(kind.presence_pattern, device)
        others = () if kind is None else tuple(self._topic(each, device) for each in kind.other_topics)
        return Reach(frozenset(hears), says, others, will)

    def _topic(self, pattern: str, device: DeviceState) -> str:
        return topic_of(pattern, self.prefix, device.hardware_id, device.name or device.hardware_id)

    def command_topic(self, device: DeviceState, definition: Definition) -> str:
        if definition.speech is None:
            return device_topic(self.prefix, device.hardware_id, definition.command_suffix)
        return self._topic(definition.speech.command_topic, device)

    def query_topic(self, device: DeviceState, speech: Speech) -> str:
        assert speech.query is not None
        return self._topic(speech.query.topic, device)

    def reply_topic(self, hardware_id: str, definition: Definition) -> str | None:
        """Where the device is asked to answer: the Response Topic of MQTT 5, and `$reply_topic`."""
        speech = definition.speech
        if speech is None:
            return answer_topic(self.prefix, hardware_id, definition)
        device = self._live.device(hardware_id)
        name = hardware_id if device is None or device.name is None else device.name
        pattern = speech.reply_topic or next(iter(speech.answer_topics), None)
        return None if pattern is None else topic_of(pattern, self.prefix, hardware_id, name)

    def status_topic(self, hardware_id: str) -> str:
        """Where the device says whether it is online."""
        device = self._live.device(hardware_id)
        if device is None:
            return device_topic(self.prefix, hardware_id, STATUS)
        return self.reach(device).will


def _by_name(kind: DeviceType) -> bool:
    """Whether only the name says whose a topic of this type is."""
    return any(NAME in each and HARDWARE_ID not in each for each in (*kind.says, *kind.listens))


def _patterns(kind: DeviceType, prefix: str) -> list[str]:
    return [with_prefix(each, prefix) for each in (*kind.says, *kind.listens)]
