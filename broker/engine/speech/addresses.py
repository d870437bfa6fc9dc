"""Which topics a device has, and which device a topic belongs to.

In memory only: it is a function of the device types and of the registered devices. No two devices may have a
topic in common: `check` refuses that before a device is registered or changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache, partial
from itertools import product
from typing import NamedTuple

from broker.domain.errors import invalid
from broker.domain.fleet import DeviceState
from broker.engine.live import Live, Recent
from devices.names import answer_topic, device_topic, parse_topic
from devices.speech.speech import Speech
from devices.speech.topics import (
    GATEWAY,
    HARDWARE_ID,
    NAME,
    Owner,
    Router,
    contains,
    covers,
    filter_of,
    level_fault,
    meeting,
    topic_of,
    with_prefix,
)
from devices.types import Definition, DeviceType

STATUS = "status"
PARSED, PARSED_CHARS = 8_192, 256  # topics that are kept parsed, and how long each may be
ANSWER, STATE, PRESENCE = "answer", "state", "presence"


class Place(NamedTuple):
    """Where a message came in. `roles`: what a message there may be. `pattern`: of the topic, "" if it is in
    Ordain's own layout and form."""

    hardware_id: str
    roles: tuple[str, ...]
    pattern: str = ""


class Names(NamedTuple):
    """What the topics of a device are made of. `gateway`: the hardware id of its gateway."""

    hardware_id: str
    name: str | None
    gateway: str | None


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
        self._parsed = lru_cache(PARSED)(partial(parse_topic, prefix))
        self._router = Router(with_prefix(each, prefix) for kind in types.values() for each in kind.says)
        every = [each for kind in types.values() for each in _patterns(kind, prefix)]
        self._every = Router(every)
        self._patterns = dict.fromkeys(every)
        self._others = dict.fromkeys(each for kind in types.values() for each in _others(kind, prefix))
        self._kept = [*every, f"{prefix}/evt/{HARDWARE_ID}"]  # the `other_topics` of no device cover these
        self._named: dict[Owner, str] = {}  # the name in topics -> device id, of types that use {name}
        self._names: dict[str, set[Owner]] = {}  # device id -> its names there
        self._reaches: Recent[str, tuple[tuple[Names, str], Reach]] = Recent()
        self.used: Callable[[list[str]], None] = lambda filters: None
        self.filters: dict[str, None] = {}

    # --- devices ---

    def put(self, device: DeviceState, *, loaded: bool = False) -> None:
        """Takes in a device as it is now.

        A device may have retained its presence and state before it was registered here. Then a subscription
        to exactly its topics brings them; the common one has brought them already, when nobody knew the
        device.
        """
        for old in self._names.pop(device.id, ()):
            if self._named.get(old) == device.id:
                del self._named[old]
        kind = self.types.get(device.device_type)
        if device.deleted_at is not None or kind is None:
            return
        if found := _owners(kind, names_of(device)):
            self._names[device.id] = found
            self._named |= dict.fromkeys(found, device.id)
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
        return [name for name, kind in self.types.items() if _owners(kind, Names("", "", None))]

    def alike(self, device: DeviceState) -> dict[str, DeviceType]:
        """The types that a command to this device may have instead of its own: those with the same rule for
        signed answers, so that nobody can choose a type that accepts unsigned ones. None, if the rule is not
        known because the file of its own type is missing."""
        own = self.types.get(device.device_type)
        if own is None:
            return {}
        return {name: kind for name, kind in self.types.items() if kind.answers_signed == own.answers_signed}

    def kind(self, device: DeviceState, other: str | None) -> DeviceType:
        """The type that a command to this device has. `other`: the one that the caller wants instead of its
        own.

        Raises:
            Refusal: invalid_request.
        """
        own = device.device_type
        wanted = own if other is None else other
        if own not in self.types:
            right = f"the device's own type {own} is not known to the broker: its file is missing"
            raise invalid("device_type", right, wanted)
        allowed = self.alike(device)
        if (found := allowed.get(wanted)) is None:
            raise invalid("device_type", f"must be one of {', '.join(sorted(allowed))}", wanted)
        return found

    def load(self, used: Iterable[str], devices: Iterable[DeviceState]) -> None:
        """Forgets everything, and takes in the types in use and the devices of types with names in topics."""
        self._named.clear()
        self._names.clear()
        for device in devices:
            self.put(device, loaded=True)
        for name in used:
            if (kind := self.types.get(name)) is not None and kind.speeches:
                self._use(kind.says)

    def rivals(self, kind: DeviceType, names: Names) -> dict[str, str]:
        """The devices, if they exist, that may have a topic in common with a device of these names: each with
        the field that decides it."""
        found: dict[str, str] = {}
        if not kind.speeches:
            return found
        own = _patterns(kind, self.prefix)
        pairs = [(each, self._others) for each in own]
        pairs += [(each, self._patterns) for each in _others(kind, self.prefix)]
        for pattern, others in pairs:
            topic = self._topic(pattern, names)
            field = "name" if NAME in pattern and names.name is not None else "hardware_id"
            owners = (owner for other, owner in self._every.matches(topic) if other not in own)
            met = [self._device_of(owner) for owner in owners]
            for other in others:
                met += self._named_by(meeting(other, topic), names.hardware_id)
            found = dict.fromkeys(filter(None, met), field) | found
        return found

    def check(self, kind: DeviceType, names: Names, device_id: str) -> None:
        """Checks that a device can have this type and these names. Its `rivals` are in memory, as far as they
        exist.

        Raises:
            Refusal: invalid_request, which names the field.
        """
        value = names.name or names.hardware_id
        field = "hardware_id" if names.name is None else "name"
        as_level = any(NAME in pattern for pattern in _patterns(kind, self.prefix))
        if as_level and (fault := level_fault(value)):
            raise invalid(field, f"is a level of this type's topics: {fault}", value)
        for each in kind.other_topics:
            wide = self._topic(each, names)
            if (kept := next((one for one in self._kept if covers(wide, one)), None)) is not None:
                field = "hardware_id" if NAME not in each else field
                right = f"it might then publish on topics of other devices: {wide} covers {kept}"
                raise invalid(field, right, value if field == "name" else names.hardware_id)
        if any(self._named.get(each, device_id) != device_id for each in _owners(kind, names)):
            raise invalid(field, f"another device has {value} in its topics already", value)
        for rival, field in self.rivals(kind, names).items():
            device = self._live.device(rival)
            if device is None or device.id == device_id or device.deleted_at is not None:
                continue
            if (fault := self._shared(kind, names, device)) is not None:
                raise invalid(field, fault, value if field == "name" else names.hardware_id)

    def _shared(self, kind: DeviceType, names: Names, device: DeviceState) -> str | None:
        """Which topic a device with these names would have in common with this device, as a sentence."""
        reach = self.reach(device)
        own = {self._topic(each, names) for each in _patterns(kind, self.prefix)}
        theirs = {*reach.hears, *reach.says}
        if both := own & theirs:
            return f"its topic {min(both)} is one of another device's: {device.hardware_id}"
        if (names.gateway or names.hardware_id) == (device.gateway or device.hardware_id):
            return None  # one connection, which may use the topics of both
        for wide, topic in product((self._topic(each, names) for each in kind.other_topics), theirs):
            if contains(wide, topic):
                return f"it might then publish on topics of {device.hardware_id}: {wide} covers {topic}"
        for wide, topic in product(reach.others, own):
            if contains(wide, topic):
                return f"{device.hardware_id} might then publish on its topics: {wide} covers {topic}"
        return None

    # --- topics ---

    def owners(self, topic: str) -> list[str]:
        """The devices (ids or hardware ids) that a topic may belong to. They may not exist."""
        if (own := self._own(topic)) is not None:
            return [own[0]]
        found = map(self._device_of, self._router.owners(topic))
        return [name for name in found if name is not None]

    def _own(self, topic: str) -> tuple[str, str] | None:
        """(hardware_id, suffix) of a topic in Ordain's own layout. Each message asks several times."""
        return self._parsed(topic) if len(topic) <= PARSED_CHARS else parse_topic(self.prefix, topic)

    def _device_of(self, owner: Owner) -> str | None:
        return self._named.get(owner) if owner.by == NAME else owner.value

    def _named_by(self, levels: dict[str, str] | None, own: str) -> Iterator[str | None]:
        """The devices, if they exist, that these levels of a topic name. `own`: the hardware id of the device
        that asks; it speaks for all devices behind itself."""
        if levels is None or own in (levels.get(HARDWARE_ID), levels.get(GATEWAY)):
            return
        if HARDWARE_ID in levels:
            yield levels[HARDWARE_ID]
        elif NAME in levels:
            yield self._named.get(Owner(NAME, levels[NAME], levels.get(GATEWAY)))
        elif GATEWAY in levels:
            yield from (each for owner, each in self._named.items() if owner.gateway == levels[GATEWAY])

    def place(self, topic: str) -> Place | None:
        """Whose topic this is. The owners are in memory already, as far as they exist; None: nobody's."""
        for name in self.owners(topic):
            device = self._live.device(name)
            if device is None or device.deleted_at is not None or not self.speaks(device):
                continue
            if (found := self.reach(device).says.get(topic)) is not None:
                return found
        own = self._own(topic)
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
        key = (names_of(device), device.device_type)
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

    def _topic(self, pattern: str, of: DeviceState | Names) -> str:
        return topic_of(pattern, self.prefix, of.hardware_id, of.name or of.hardware_id, of.gateway)

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
        pattern = speech.reply_topic or next(iter(speech.answer_topics), None)
        device = self._live.device(hardware_id) or Names(hardware_id, None, None)
        return None if pattern is None else self._topic(pattern, device)

    def status_topic(self, hardware_id: str) -> str:
        """Where the device says whether it is online."""
        device = self._live.device(hardware_id)
        if device is None:
            return device_topic(self.prefix, hardware_id, STATUS)
        return self.reach(device).will


def names_of(device: DeviceState) -> Names:
    return Names(device.hardware_id, device.name, device.gateway)


def _owners(kind: DeviceType, names: Names) -> set[Owner]:
    """What tells a device with these names in topics where only the name, or name and gateway, says whose
    they are."""
    value, gateway = names.name or names.hardware_id, names.gateway or names.hardware_id
    by_name = (each for each in (*kind.says, *kind.listens) if NAME in each and HARDWARE_ID not in each)
    return {Owner(NAME, value, gateway if GATEWAY in each else None) for each in by_name}


def _patterns(kind: DeviceType, prefix: str) -> list[str]:
    return [with_prefix(each, prefix) for each in (*kind.says, *kind.listens)]


def _others(kind: DeviceType, prefix: str) -> list[str]:
    return [with_prefix(each, prefix) for each in kind.other_topics]
