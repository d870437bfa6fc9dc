"""Adds to an explanation what the device said that did not decide the command: answers that contradict the
record, that could not be used, or parts of answers that were left out.

Pure. The messages are the kept unmatched ones; see `Intake.unmatched`.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from broker.domain.explain import Explanation, Facts
from broker.domain.lifecycle import FINAL
from devices.clock import rfc3339


class Said(msgspec.Struct, frozen=True, kw_only=True):
    """A message of the command's device that matched no command. `at`: ms. `reason`: as it was kept."""

    at: int
    reason: str
    topic: str = ""


CONTRADICTING = {
    "contradiction": "the device has also reported a different outcome",
    "promise_broken": "the device has reported on it although it was never handed over",
    "never_handed_over": "an answer to it came before it was handed over",
    "unsigned": "an answer to it came without a signature and was not used",
    "bad_signature": "an answer to it came with a signature that is not the device's and was not used",
    "no_key": "a signed answer to it was not used, because no key of the device is known",
}
UNUSABLE = {
    "malformed": "could not be read",
    "no_rule": "fitted no rule of its device type",
    "unknown": "named a command that does not exist",
    "wrong_device": "named a command of another device",
    "ambiguous": "named no command and could belong to several",
    "nothing_in_flight": "named no command and fitted none that was in flight",
}
UNFIT = {
    "unfit_at": ("at", "its time `at` is not RFC 3339"),
    "unfit_progress": ("progress", "its `progress` is not a percentage from 0 to 100"),
    "unfit_session": ("session", "its `session` is not a text of at most 128 bytes"),
}


def with_answers(explanation: Explanation, said: Sequence[Said]) -> Explanation:
    """`said`: the messages that named the command, and the unusable ones that came since it was handed over
    or, if it was not, since the device's presence last changed."""
    sentences, reasons = [explanation.summary], list(explanation.reasons)
    for reason in dict.fromkeys(message.reason for message in said):
        found = [message for message in said if message.reason == reason]
        last = max(found, key=lambda message: message.at)
        at = rfc3339(last.at)
        facts: Facts = {"count": len(found), "at": at}
        if reason in CONTRADICTING:
            sentences.append(f"But {CONTRADICTING[reason]} (last at {at}).")
            reasons.append({"code": reason} | facts)
        elif reason in UNFIT:
            part, why = UNFIT[reason]
            sentences.append(f"A part of a message was left out: {why} (last at {at}).")
            reasons.append({"code": "unfit_part", "part": part} | facts)
        elif reason in UNUSABLE and explanation.state not in FINAL:
            sentences.append(
                f"The device sent a message that was of no use: it {UNUSABLE[reason]} "
                f"(last at {at}, topic {last.topic})."
            )
            reasons.append({"code": "unusable_answer", "reason": reason, "topic": last.topic} | facts)
    return msgspec.structs.replace(explanation, summary=" ".join(sentences), reasons=reasons)
