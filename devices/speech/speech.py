"""How one command of a device type is spoken: the part of its definition that is not Ordain's own form.

It is a plain value in the log. `faults` checks it when a type is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from devices.speech import rules as rules_
from devices.speech.rules import Rule
from devices.speech.templates import declared, places, template_fault, text_places
from devices.speech.topics import PREFIX, VARYING, clash, pattern_fault

LARGEST_NUMBER = 2**31 - 1
MAX_TOPICS = 16
Fault = tuple[str, Any, str]


class Query(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """A message that asks the device for its state, sent if an attempt is not answered within `after_sec`.

    It changes nothing at the device. It has a `text`, or a `template`.
    """

    topic: str
    text: str | None = None
    template: Any = None
    after_sec: Annotated[float, Meta(ge=0.05, le=3_600)] = 2


class Speech(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Topics are patterns; see `topics.py`. In `command_topic` and `answer_topics` the command is filled in.

    `kinds`: the declared types of the parameters in the text. `rules`: empty if the answers have Ordain's own
    form. `online` and `offline`: conditions on the presence topic, as in `Rule.when`. `silence_sec`: after so
    long without a message it is unknown whether the device is online.
    """

    command_topic: str
    answer_topics: tuple[str, ...] = ()
    state_topics: tuple[str, ...] = ()
    presence_topic: str | None = None
    online: str | None = None
    offline: str | None = None
    silence_sec: float | None = None
    reply_topic: str | None = None
    wire_name: str | None = None
    template: Any = None
    kinds: dict[str, str] = {}
    rules: tuple[Rule, ...] = ()
    done_when: str | None = None
    query: Query | None = None
    record_state: Literal["changes", "none"] = "changes"
    number_max: int = LARGEST_NUMBER

    @property
    def numbered(self) -> bool:
        return "$number" in places(self.template)

    @property
    def listens(self) -> tuple[str, ...]:
        """The patterns of the topics that the device receives."""
        return (self.command_topic, *([self.query.topic] if self.query is not None else []))

    @property
    def says(self) -> tuple[str, ...]:
        """The patterns of the topics that the broker reads."""
        presence = [self.presence_topic] if self.presence_topic is not None else []
        return tuple(dict.fromkeys((*self.answer_topics, *self.state_topics, *presence)))


def faults(where: str, speech: Speech, text: str | None, params: dict[str, Any] | None) -> Iterator[Fault]:
    """What is wrong with one command's speech. `where`: `commands.<name>.`. `params`: its schema."""
    yield from _topic_faults(speech)
    yield from rules_.rule_faults("answers", speech.rules, speech.answer_topics)
    if speech.template is not None and (fault := template_fault(speech.template)):
        yield where + "template", speech.template, fault
    if speech.done_when is not None:
        if not speech.state_topics:
            yield where + "done_when", speech.done_when, "needs state_topics: it reads the state"
        if fault := rules_.condition_fault(speech.done_when):
            yield where + "done_when", speech.done_when, fault
    if speech.query is not None:
        yield from _query_faults(speech)
    if params is None:
        return
    used = {place.removeprefix("$params."): "template" for place in places(speech.template)}
    used |= dict.fromkeys(text_places(text or ""), "text")
    used |= dict.fromkeys(rules_.params_of([speech.done_when]), "done_when")
    for path, key in used.items():
        if path and not path.startswith("$") and not declared(params, path):
            yield where + key, f"$params.{path}", f"is not declared in {where}params"


def _topic_faults(speech: Speech) -> Iterator[Fault]:
    lists = {"answer_topics": speech.answer_topics, "state_topics": speech.state_topics}
    single = {"command_topic": speech.command_topic, "presence_topic": speech.presence_topic}
    named = [(key, each) for key, topics in lists.items() for each in topics]
    named += [(key, each) for key, each in single.items() if each is not None]
    for key, pattern in named:
        if fault := pattern_fault(pattern, command=False):
            yield key, pattern, fault
    for key, topics in lists.items():
        if len(topics) > MAX_TOPICS:
            yield key, len(topics), f"at most {MAX_TOPICS} topics"
    for key, pattern in named:
        if key != "command_topic" and any(clash(pattern, each) for each in speech.listens):
            yield key, pattern, "is a topic that the device receives: the broker would read its own commands"
        if key in lists and speech.presence_topic is not None and clash(pattern, speech.presence_topic):
            yield key, pattern, "must not be the presence topic too"
    if speech.reply_topic is not None:
        filled = speech.reply_topic.split("/")
        if any("{" in level and level not in (*VARYING, PREFIX) for level in filled):
            right = f"may have {PREFIX}, {', '.join(VARYING)}, as whole levels"
            yield "reply_topic", speech.reply_topic, right
    for key in ("online", "offline"):
        condition = getattr(speech, key)
        if (condition is None) is not (speech.presence_topic is None):
            yield key, condition, "presence_topic, online and offline belong together"
        elif condition is not None and (fault := rules_.condition_fault(condition)):
            yield key, condition, fault


def _query_faults(speech: Speech) -> Iterator[Fault]:
    query = speech.query
    assert query is not None
    if fault := pattern_fault(query.topic, command=False):
        yield "query.topic", query.topic, fault
    if (query.text is None) is (query.template is None):
        yield "query.text", query.text, "a query has either a text or a template"
    if query.template is not None and (fault := template_fault(query.template)):
        yield "query.template", query.template, fault
    for place in places(query.template):
        if place not in ("$id", "$reply_topic", "$type"):
            yield "query.template", place, "a query belongs to no attempt: it has no such value"
    if not (speech.state_topics or speech.answer_topics):
        yield "query.topic", query.topic, "needs state_topics: nobody would read what it asks for"
