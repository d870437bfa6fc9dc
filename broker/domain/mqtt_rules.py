"""What is known of the users and rules of the MQTT server. Pure."""

from __future__ import annotations

from typing import Literal

import msgspec


class MqttRules(msgspec.Struct, kw_only=True):
    """What is known of the MQTT server's users and rules.

    `users`: how the server learns of devices. `missing`: devices that it does not know. `fault`: why it is
    not in step. `breaches`: sentences about what it allows and must not; None: not tried yet. `as_device`:
    they were tried with the canary's devices. `checked_at`: Unix time in ms.
    """

    users: Literal["listener", "child", "dynsec", "password_file", "none"]
    missing: int = 0
    fault: str | None = None
    breaches: list[str] | None = None
    as_device: bool = False
    checked_at: int | None = None

    @property
    def tried(self) -> bool:
        """Ordain's own rules need no trial."""
        return self.users in ("listener", "child") or (self.breaches is not None and self.as_device)
