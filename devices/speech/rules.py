"""Rules that read a device's messages: which message is an answer, to which command, and what it says.

Pure. The first rule that fits decides. A rule never raises: what it cannot read does not fit.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import msgspec

from devices.speech.expressions import BadExpression, Unanswerable, compiled, evaluate, is_true

Status = Literal["acknowledged", "executed", "failed", "progress"]
MAX_RULES = 32
MAX_NOTE = 512
# Operators of JMESPath. A condition without any of them may be a plain text that is no JMESPath, such as `1`.
_OPERATORS = re.compile(r"[\[\](){}|&'\"`=<>!,$*@]")


class Decoded(NamedTuple):
    """A message. `value`: as JSON or msgpack; a text that is no JSON is a string. `text`: the text,
    trimmed."""

    value: Any
    text: str | None = None


class Rule(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """`when`: JMESPath that must be true of the message, or a text that the message must equal; absent:
    always.

    `topic`: only on this one of the answer topics. All others are JMESPath: `id` (the command's id) and
    `number` (the attempt's `$number`) name the command; a rule that has one of them fits only if the message
    has it. `progress` is a percentage, or an object with `percent` and `note`.
    """

    status: Status
    when: str | None = None
    topic: str | None = None
    id: str | None = None
    number: str | None = None
    result: str | None = None
    error: str | None = None
    progress: str | None = None


class Reading(NamedTuple):
    """What the rule number `rule` (from 0) read."""

    rule: int
    status: Status
    id: str | None = None
    number: int | None = None
    result: Any = None
    error: Any = None
    percent: int | float | None = None
    note: str | None = None


def holds(condition: str, message: Decoded, params: Any = None) -> bool:
    """Whether a condition is true of a message: equal to its text, or true as JMESPath."""
    if message.text is not None and condition == message.text:
        return True
    try:
        return is_true(evaluate(compiled(condition), message.value, params))
    except (BadExpression, Unanswerable):
        return False


def read(rules: Sequence[Rule], topic: str, message: Decoded, params: Any = None) -> Reading | str:
    """What the first rule that fits reads; else a sentence that says why each of them does not fit.

    `topic`: the pattern of the topic that the message came on.
    """
    reasons = []
    for index, rule in enumerate(rules):
        found = _read(index, rule, topic, message, params)
        if isinstance(found, Reading):
            return found
        reasons.append(f"rule {index + 1}: {found}")
    return "; ".join(reasons) or "there are no rules"


def _read(index: int, rule: Rule, topic: str, message: Decoded, params: Any) -> Reading | str:
    if rule.topic is not None and rule.topic != topic:
        return f"it is for topic {rule.topic}"
    if rule.when is not None and not holds(rule.when, message, params):
        return f"`when` is not true: {rule.when}"
    named = _value(rule.id, message, params)
    if rule.id is not None and not isinstance(named, str):
        return f"`id` is no text in this message: {rule.id}"
    number = _number(_value(rule.number, message, params))
    if rule.number is not None and number is None:
        return f"`number` is no whole number in this message: {rule.number}"
    percent, note = _progress(_value(rule.progress, message, params))
    if rule.status == "progress" and percent is None:
        return f"`progress` is no percentage from 0 to 100 in this message: {rule.progress}"
    return Reading(
        index,
        rule.status,
        id=named,
        number=number,
        result=_value(rule.result, message, params) if rule.status == "executed" else None,
        error=_value(rule.error, message, params) if rule.status == "failed" else None,
        percent=percent if rule.status == "progress" else None,
        note=note if rule.status == "progress" else None,
    )


def _value(expression: str | None, message: Decoded, params: Any) -> Any:
    if expression is None:
        return None
    try:
        return evaluate(compiled(expression), message.value, params)
    except (BadExpression, Unanswerable):
        return None


def _number(value: Any) -> int | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int) else None


def _progress(value: Any) -> tuple[int | float | None, str | None]:
    note = value.get("note") if isinstance(value, dict) else None
    percent = value.get("percent") if isinstance(value, dict) else value
    if isinstance(percent, bool) or not isinstance(percent, int | float) or not 0 <= percent <= 100:
        return None, None
    return percent, note[:MAX_NOTE] if isinstance(note, str) else None


def condition_fault(condition: str) -> str | None:
    """What would be right about a condition; None if it is JMESPath or a plain text."""
    try:
        compiled(condition)
    except BadExpression as error:
        return str(error) if not condition.strip() or _OPERATORS.search(condition) else None
    return None


def expression_fault(expression: str) -> str | None:
    try:
        compiled(expression)
    except BadExpression as error:
        return str(error)
    return None


def params_of(expressions: Iterable[str | None]) -> list[str]:
    """The parameters that these expressions use."""
    found: list[str] = []
    for expression in expressions:
        try:
            found += compiled(expression).params if expression is not None else ()
        except BadExpression:
            continue
    return found


def rule_faults(where: str, rules: Sequence[Rule], topics: Sequence[str]) -> Iterator[tuple[str, Any, str]]:
    """What is wrong with rules: (key, value, what would be right)."""
    if len(rules) > MAX_RULES:
        yield where, len(rules), f"at most {MAX_RULES} rules"
    for index, rule in enumerate(rules):
        at = f"{where}[{index}]."
        if rule.when is not None and (fault := condition_fault(rule.when)):
            yield at + "when", rule.when, fault
        for key in ("id", "number", "result", "error", "progress"):
            expression = getattr(rule, key)
            if expression is not None and (fault := expression_fault(expression)):
                yield at + key, expression, fault
        if rule.topic is not None and rule.topic not in topics:
            yield at + "topic", rule.topic, f"must be one of the answer topics: {', '.join(topics)}"
        if rule.status == "progress" and rule.progress is None:
            yield at + "progress", None, 'a rule with status = "progress" needs it: a percentage'
        if rule.id is not None and rule.number is not None:
            yield at + "number", rule.number, "a rule names the command by `id` or by `number`, not by both"
