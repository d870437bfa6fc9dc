"""The definition of one command: all that is needed to deliver it and to understand its answers.

A plain value in the log, by its digest.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from devices.schema import misfit
from devices.speech.speech import Speech

PayloadFormat = Literal["bare", "json", "msgpack"]
AnswerStatus = Literal["acknowledged", "executed", "failed", "progress"]
Transport = Literal["mqtt", "heartbeat", "relay"]
CompletesOn = Literal["executed", "published"]
GrantAlgorithm = Literal["EdDSA", "HS256"]
Signing = Literal["none", "optional", "required"]
PresenceRule = Literal["required", "none", "optional"]


class Definition(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One command of one device type, with all defaults filled in. Times in seconds.

    `command` is `*` for all commands that an open type does not list.

    `text` is the payload of a `bare` command. `answers` maps a bare answer to its status. `carries_ids`: the
    device receives the command's id or a number, and can return it in its answer. `presence`: `optional`
    holds a command only while the device is known to be offline. `speech`: how the command is spoken, where
    that is not Ordain's own form. `answers_signed`: whether an unsigned answer counts (`optional`) or not
    (`required`); `none`: no answer is signed.
    """

    device_type: str
    command: str
    payload: PayloadFormat = "json"
    text: str | None = None
    command_suffix: str = "rls"
    answer_suffix: str = "ack"
    answers: dict[str, AnswerStatus] = {}
    carries_ids: bool = True
    carries_grant: bool = True
    completes_on: Literal["executed", "published"] = "executed"
    repeatable: bool = True
    presence: PresenceRule = "required"
    transports: tuple[Transport, ...] = ("mqtt",)
    max_in_flight: int = 1
    max_attempts: int = 5
    ack_timeout_sec: float = 10
    result_timeout_sec: float = 60
    max_run_sec: float = 86_400
    backoff_base_sec: float = 5
    backoff_factor: float = 2
    backoff_cap_sec: float = 300
    late_answer_sec: float = 20
    heartbeat_lease_sec: float = 60
    relay_lease_sec: float = 60
    max_payload_bytes: int = 65_536
    # Added later: older definitions in existing logs lack these fields, so each needs a default.
    grant_algorithm: GrantAlgorithm = "EdDSA"
    result_schema: dict[str, Any] | None = None
    speech: Speech | None = None
    answers_signed: Signing = "none"

    def result_fault(self, result: dict[str, Any] | None) -> str | None:
        """Why a recorded result does not match the command's result schema; None if it matches."""
        return misfit(self.result_schema, result)
