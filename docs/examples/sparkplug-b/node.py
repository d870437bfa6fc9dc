"""One edge node, as its Sparkplug messages show it: what it has announced, and the bytes of commands to it.

Source: Sparkplug 3.0, sections 6.4 (payload) and 5 (birth and death).
"""

from dataclasses import dataclass, field
from typing import Any

from sparkplug_pb2 import Payload

REBIRTH = "Node Control/Rebirth"
SESSION = "bdSeq"
BITS = {1: 8, 2: 16, 3: 32, 4: 64}  # signed whole numbers, as two's complement in an unsigned field
UNSIGNED = (5, 6, 7, 8)
FLOAT, DOUBLE, BOOLEAN, STRING = 9, 10, 11, 12
LONG = (4, 8)


@dataclass
class Node:
    """`kinds`: the data type of each metric. `names`: the metrics by alias. `last`: their last known values.
    `session`: number of its birth."""

    kinds: dict[str, int] = field(default_factory=lambda: {REBIRTH: BOOLEAN})
    names: dict[int, str] = field(default_factory=dict)
    last: dict[str, Any] = field(default_factory=dict)
    session: Any = None

    def born(self, payload: bytes) -> dict[str, Any]:
        """Takes in an NBIRTH; returns the values that it reports."""
        message = Payload.FromString(payload)
        self.kinds = {REBIRTH: BOOLEAN} | {each.name: each.datatype for each in message.metrics}
        self.names = {each.alias: each.name for each in message.metrics if each.HasField("alias")}
        values = self.values(message)
        self.session = values.get(SESSION)
        return values

    def died(self, payload: bytes) -> bool:
        """Whether an NDEATH ends the present session: the last will of an older one may come late."""
        found = [each for each in Payload.FromString(payload).metrics if each.name == SESSION]
        return not found or value_of(found[0], found[0].datatype) == self.session

    def said(self, payload: bytes) -> dict[str, Any]:
        """The values that an NDATA reports."""
        return self.values(Payload.FromString(payload))

    def values(self, message: Any) -> dict[str, Any]:
        found = {}
        for each in message.metrics:
            name = each.name or self.names.get(each.alias, "")
            if name in self.kinds and not each.is_null:
                found[name] = value_of(each, self.kinds[name])
        self.last |= found
        return found

    def command(self, metric: str, value: Any, at_ms: int) -> bytes:
        """The NCMD that writes a metric.

        Raises:
            ValueError: the node has no such metric, or the value does not fit it.
        """
        if metric not in self.kinds:
            raise ValueError(f"the node has not announced a metric {metric}")
        payload = Payload(timestamp=at_ms)
        written = payload.metrics.add(name=metric, timestamp=at_ms, datatype=self.kinds[metric])
        put(written, self.kinds[metric], value)
        return bytes(payload.SerializeToString())


def put(metric: Any, kind: int, value: Any) -> None:
    """Puts a value into the field that its data type has."""
    if kind in BITS or kind in UNSIGNED:
        bits = BITS.get(kind) or 8 * 2 ** (kind - UNSIGNED[0])
        low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1)) if kind in BITS else (0, 2**bits)
        if isinstance(value, bool) or value != int(value) or not low <= value < high:
            raise ValueError(f"{value} is no whole number of {bits} bits")
        setattr(metric, "long_value" if kind in LONG else "int_value", int(value) % 2**bits)
        return
    fields = {FLOAT: "float_value", DOUBLE: "double_value", BOOLEAN: "boolean_value", STRING: "string_value"}
    if kind not in fields:
        raise ValueError(f"data type {kind} is not supported")
    wanted: Any = {BOOLEAN: bool, STRING: str}.get(kind, (int, float))
    if not isinstance(value, wanted) or (kind in (FLOAT, DOUBLE) and isinstance(value, bool)):
        raise ValueError(f"{value!r} does not fit data type {kind}")
    setattr(metric, fields[kind], value)


def value_of(metric: Any, kind: int) -> Any:
    value = getattr(metric, metric.WhichOneof("value") or "int_value")
    if kind in BITS:
        value %= 2 ** BITS[kind]
        return value - 2 ** BITS[kind] if value >= 2 ** (BITS[kind] - 1) else value
    return value


def same(wanted: Any, reported: Any, kind: int) -> bool:
    """Whether a report is what was written. A Float has only 32 bits."""
    if kind == FLOAT and isinstance(reported, float):
        return abs(wanted - reported) <= 1e-6 * max(1.0, abs(wanted))
    if isinstance(wanted, bool) or isinstance(reported, bool):
        return wanted is reported
    return bool(wanted == reported)
