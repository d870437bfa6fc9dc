"""Log lines show no secret, and no name can forge a line or change the terminal."""

from __future__ import annotations

import pytest

from broker.cli.logs import safe


@pytest.mark.parametrize(
    ("secret", "shown"),
    [
        ("sk_live_0123456789abcdefXYZ", "sk_live_…"),
        ("dtok_0123456789abcdef.door", "dtok_….door"),
        ("whsec_AbCdEf0123456789+/==", "whsec_…"),
        ("eyJhbGciOiJFZERTQSJ9.eyJpc3MiOiJvIn0.c2ln", "eyJ…"),
    ],
)
@pytest.mark.parametrize("name", ["why", "exception"])
def test_what_looks_like_a_secret_is_masked(secret: str, shown: str, name: str) -> None:
    line = safe(None, "", {"event": f"said {secret}", name: f"a {secret}, b", "many": [secret], "count": 3})
    assert line["event"] == f"said {shown}"
    assert line[name] == f"a {shown}, b"
    assert line["many"] == f"['{shown}']"
    assert line["count"] == 3


def test_control_characters_are_escaped() -> None:
    line = safe(
        None, "", {"peer": "a\nlevel=error \x1b[2J \u202e \ud800 é", "many": ["a"], "exception": "x\n  y"}
    )
    assert line == {
        "peer": r"a\nlevel=error \x1b[2J \u202e \ud800 é",
        "many": ["a"],
        "exception": "x\n  y",
    }
