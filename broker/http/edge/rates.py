"""The header fields `RateLimit-Policy` and `RateLimit`: what is left of the limits that hold for a request.

Source: draft-ietf-httpapi-ratelimit-headers-10. `q` is the quota of a window of `w` seconds, `r` what is left
of it, `t` the seconds until it is full again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from broker.engine.commands import Caller
from broker.engine.quotas import MINUTE_MS
from broker.http.edge.services import Services

Headers = list[tuple[bytes, bytes]]


def rate_headers(services: Services, scope: Mapping[str, Any]) -> Headers:
    """The fields of an answer; none if no limit holds. `scope`: of the request, after its key was checked."""
    caller = scope.get("user")
    if not isinstance(caller, Caller):
        return []
    commands = services.commands
    buckets = commands.quotas.of_request(caller.actor, caller.requests_per_minute)
    if "devices:write" in caller.scopes:
        # An unknown device has no limit of its own. A foreign one must not show that it has one.
        device = commands.live.device(str(scope.get("path_params", {}).get("device", "")))
        if device is not None and not caller.sees(device):
            device = None
        project = caller.project if device is None else device.project
        buckets += commands.quotas.of_command(caller.actor, caller.commands_per_minute, project, device)
    if not buckets:
        return []
    now = commands.writer.now()
    policies, rest = [], []
    for bucket in buckets:
        left, full_in_sec = commands.quotas.left(bucket, now)
        policies.append(f'"{bucket.policy}";q={bucket.rate};w={MINUTE_MS // 1_000}')
        rest.append(f'"{bucket.policy}";r={left};t={full_in_sec}')
    return [
        (b"ratelimit-policy", ", ".join(policies).encode()),
        (b"ratelimit", ", ".join(rest).encode()),
    ]
