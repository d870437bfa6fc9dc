"""The request to `decide` that an answer of a device leads to, with the verdict on its signature."""

from __future__ import annotations

from typing import Any

import msgspec

from broker.domain.events import Error
from broker.domain.fleet import DeviceState
from broker.domain.lifecycle import ANSWERS, Request, Signature
from broker.engine.grants import Secrets
from devices.speech.numbers import hard_numbers
from devices.speech.signing import is_signed_by, looks_signed, public_key
from devices.types import Definition
from devices.wire import Answer

# To check a signature takes as long as to read an unsigned answer of this many bytes.
SIGNED_BYTES = 4_096
HARD_BYTES = 128  # so does one hard number; in a signed answer it may have eight bytes


def weight(payload: bytes) -> int:
    """How many bytes of an unsigned answer take as long to read as this message."""
    if looks_signed(payload.lstrip()):
        return max(SIGNED_BYTES, HARD_BYTES // 8 * len(payload))
    return len(payload) + HARD_BYTES * hard_numbers(payload)


def request_of(
    answer: Answer, definition: Definition, device: DeviceState, secrets: Secrets, **facts: Any
) -> Request:
    """`facts`: the fields of the request that do not come from the answer."""
    progress, signing = answer.progress, definition.answers_signed
    return Request(
        input=ANSWERS[answer.status],
        at=answer.at,
        result=msgspec.Raw(msgspec.json.encode(answer.result)),
        error=None if answer.error is None else msgspec.convert(answer.error, Error),
        percent=None if progress is None else progress.percent,
        note=None if progress is None else progress.note,
        signing=signing,
        signature="unsigned" if signing == "none" else _signature(answer, device, secrets),
        seq=answer.seq,
        **facts,
    )


def _signature(answer: Answer, device: DeviceState, secrets: Secrets) -> Signature:
    """A device with a public key signs with that one only, never with its secret."""
    if answer.token is None:
        return "unsigned"
    try:
        key = secrets.get(device.id) if device.answer_key is None else public_key(device.answer_key)
    except ValueError:  # an imported log may hold a key that no request would have been allowed
        key = None
    if key is None:
        return "no_key"
    return "valid" if is_signed_by(answer.token, device.hardware_id, key) else "bad_signature"
