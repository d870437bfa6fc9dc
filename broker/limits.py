"""The limits among the settings: what one client, and all together, can make the broker hold or do."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import UNSET, Meta, UnsetType

Queue = Annotated[int, Meta(ge=1)]
Count = Annotated[int, Meta(ge=1)]
Seconds = Annotated[float, Meta(gt=0)]
Bytes = Annotated[int, Meta(ge=2)]
PerMinute = Annotated[int, Meta(ge=0, le=1_000_000_000)]
Retention = Annotated[int, Meta(ge=1, le=3_153_600_000)]


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Limits on requests, stored data and messages in flight; `…_bytes` in bytes, `…_sec` in seconds.

    `…_per_minute…` 0: no limit. A project's table may set the commands, a key its own limits.
    """

    queue_per_name: Queue = 100
    queue_per_device: Queue = 1_000
    params_bytes: Bytes = 65_536
    params_values: Annotated[int, Meta(ge=100)] = 4_000
    attributes_bytes: Bytes = 4_096
    commands_per_minute: PerMinute = 0
    commands_per_minute_per_key: PerMinute = 0
    commands_per_minute_per_device: PerMinute = 0
    requests_per_minute_per_key: PerMinute = 0
    requests_per_minute_per_device: PerMinute = 0
    history_retention_sec: Retention = 2_592_000
    body_bytes: Annotated[int, Meta(ge=1_024)] = 262_144
    body_values: Annotated[int, Meta(ge=1_024)] = 8_000
    default_ttl_sec: Annotated[int, Meta(ge=1, le=31_536_000)] = 300
    idempotency_sec: Annotated[int, Meta(ge=86_400)] = 604_800
    send_slots: Annotated[int, Meta(ge=1, le=100)] = 100
    qos0_per_device: Count = 100
    qos0_per_project: Count = 2_000
    qos0_in_all: Count = 10_000
    qos0_bytes: Annotated[int, Meta(ge=1_048_576)] = 16_777_216
    strangers: Count = 5_000
    strangers_per_address: Count = 2_500
    unmatched_per_device: Annotated[int, Meta(ge=1)] = 100
    unmatched_in_all: Annotated[int, Meta(ge=1)] = 10_000
    lookups: Count = 256
    lookups_per_project: Count = 8
    webhooks_per_project: Annotated[int, Meta(ge=0, le=1_000)] = 20
    streams_per_project: Annotated[int, Meta(ge=1)] = 2_000
    waits_per_project: Annotated[int, Meta(ge=0)] = 2_000
    device_events_per_sec: Annotated[int, Meta(ge=1, le=1_000)] = 1
    device_events_burst: Count = 30
    devices_per_gateway: Annotated[int, Meta(ge=1, le=1_000)] = 250


class MqttLimits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one client of our own MQTT server, and all together, may make it hold or do; sizes in bytes.

    `strangers` are connections that are not let in yet. Of each client: `unacknowledged` messages from it
    that wait for our PUBACK (MQTT 5 clients are told `receive_maximum`), `in_flight` to it without its PUBACK
    and `queued` behind those. Its rates may be exceeded for `burst_sec`.
    """

    connections: Count = 50_000
    connections_per_address: Count = 50_000
    strangers: Count = 5_000
    strangers_per_address: Count = 2_500
    admitted_at_once: Count = 64
    admit_within_sec: Seconds = 3.0
    connect_bytes: Annotated[int, Meta(ge=256)] = 16_384
    connect_sec: Seconds = 10.0
    packet_bytes: Annotated[int, Meta(ge=1_024, le=268_435_455)] = 262_144
    filters: Count = 100
    receive_maximum: Annotated[int, Meta(ge=1, le=65_535)] = 20
    unacknowledged: Count = 100
    unacknowledged_bytes: Annotated[int, Meta(ge=65_536)] = 67_108_864
    in_flight: Annotated[int, Meta(ge=1, le=65_000)] = 100
    queued: Count = 100
    packets_at_once: Count = 200
    packets_per_sec: Seconds = 500.0
    bytes_per_sec: Seconds = 1_048_576.0
    burst_sec: Seconds = 4.0
    keepalive_sec: Annotated[int, Meta(ge=1, le=65_535)] = 300
    unanswered_sec: Seconds = 30.0
    stalled_sec: Seconds = 30.0
    close_within_sec: Seconds = 1.0
    tick_sec: Seconds = 0.5


class ProjectLimits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The limits of one project; an unset field has the value of the common limits."""

    queue_per_name: Queue | UnsetType = UNSET
    queue_per_device: Queue | UnsetType = UNSET
    params_bytes: Bytes | UnsetType = UNSET
    commands_per_minute: PerMinute | UnsetType = UNSET
    commands_per_minute_per_key: PerMinute | UnsetType = UNSET
    commands_per_minute_per_device: PerMinute | UnsetType = UNSET
    history_retention_sec: Retention | UnsetType = UNSET


def limits_of(limits: Limits, project: ProjectLimits) -> Limits:
    return msgspec.structs.replace(limits, **msgspec.to_builtins(project))
