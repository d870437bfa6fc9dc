"""What `make fuzz` learned, replayed: kept inputs, and changes of them that a seed decides."""

from __future__ import annotations

import random
import tomllib
from typing import Any

import pytest

from scripts.fuzz import NAMES
from tests.fuzz.corpus import read
from tests.fuzz.seeds import SEEDS, WORDS
from tests.fuzz.targets import TARGETS

# These work with files, at some milliseconds an input.
SLOW = ("settings", "types", "imports")


def changed(draw: random.Random, data: bytes, words: list[bytes]) -> bytes:
    """The input with a few bytes changed, cut out, repeated, or replaced by a word of its grammar."""
    made = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        at, length = draw.randint(0, len(made)), draw.randint(0, 8)
        piece = draw.choice(
            [draw.randbytes(length), b"", draw.choice(words), bytes(made[at : at + length]) * 3]
        )
        made[at : at + draw.randint(0, length)] = piece
    return bytes(made)


def test_every_target_has_seeds_words_and_kept_inputs() -> None:
    assert set(NAMES) == set(TARGETS) == set(SEEDS) == set(WORDS)
    assert [name for name in NAMES if not read(name)] == []


def inputs(name: str) -> list[bytes]:
    draw, kept, many = random.Random(name), [*SEEDS[name](), *read(name)], 400
    chosen = kept
    if name in SLOW:
        chosen, many = [*SEEDS[name](), *draw.sample(read(name), min(20, len(read(name))))], 20
    return [*chosen, *(changed(draw, draw.choice(kept), WORDS[name]) for _ in range(many))]


@pytest.mark.parametrize("name", NAMES)
def test_no_kept_input_and_no_change_of_one_breaks_a_rule(name: str) -> None:
    for data in inputs(name):
        try:
            TARGETS[name](data)
        except Exception as error:
            pytest.fail(f"{type(error).__name__} for {data!r}: {error}")


# A target -> what is broken, and how.
BUGS: list[tuple[str, str, Any]] = [
    ("packets", "broker.mqtt.codec._text", lambda value: b"\0\0"),
    ("packets", "broker.mqtt.session.Session._end", lambda *given, **more: None),
    ("answers", "devices.wire.parse_rfc3339", lambda text: {}[text]),
    ("topics", "tests.fuzz.targets.fits", lambda wanted, topic: wanted.endswith("#") or wanted == topic),
    ("grants", "devices.grant.GrantVerifier._check_purpose", lambda *given: None),
    ("cursors", "broker.http.edge.pages.Pager.after", lambda pager, cursor: 0),
    ("settings", "broker.settings._useless", lambda value: value["x"]),
    ("types", "devices.types.toml.parse", tomllib.loads),
    ("imports", "broker.operations.transfer.unfit", lambda row: None),
]


@pytest.mark.parametrize(("name", "place", "broken"), BUGS, ids=[place for _, place, _ in BUGS])
def test_a_planted_bug_is_found(name: str, place: str, broken: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(place, broken)

    def breaks(data: bytes) -> bool:
        try:
            TARGETS[name](data)
        except Exception:
            return True
        return False

    assert any(map(breaks, inputs(name)))
