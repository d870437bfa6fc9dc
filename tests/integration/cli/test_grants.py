"""`ordain grants`, and the command line's error for a wrong device type file; no broker is serving."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from broker.cli.main import run


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Path:
    """A data directory with a log that holds one grant key."""
    monkeypatch.setenv("ORDAIN_DATA", str(tmp_path / "data"))
    assert run(["keys", "create", "--project", "acme", "--scope", "devices:read"]) == 0
    capsys.readouterr()
    return tmp_path / "data"


def said(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    assert run(["grants", *arguments]) == code
    captured = capsys.readouterr()
    return captured.out if code == 0 else captured.err


def test_a_key_is_rotated_and_the_old_one_retired(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = json.loads(said(capsys, "list", "--json"))[0]["kid"]
    second = said(capsys, "rotate").strip()
    refused = said(capsys, "retire", second, code=1)
    said(capsys, "retire", first)
    table = [line.split()[:2] for line in said(capsys, "list").splitlines()]

    assert "is the key that signs" in refused
    assert table == [["kid", "state"], [first, "retired"], [second, "signing"]]


def test_a_wrong_type_file_is_named_and_is_a_usage_error(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "lamp.toml").write_text('name = "lamp"\npresence = "maybe"\n[commands.dim]\n')
    monkeypatch.setenv("ORDAIN_TYPES", str(tmp_path))

    for arguments in (["grants", "list"], ["serve", "--http", "127.0.0.1:0", "--mqtt-listen", "127.0.0.1:0"]):
        assert run(arguments) == 2
        assert "lamp.toml: presence = 'maybe': " in capsys.readouterr().err
