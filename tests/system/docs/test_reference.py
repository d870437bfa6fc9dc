"""Compares the reference pages with the code: generated parts are current, and no setting is missing."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest

from broker.settings import ENVIRONMENT, ProjectLimits, Settings
from devices.wire import decode_answer, decode_command
from scripts.draw import DRAWN, drawn
from tests.system.docs.pages import blocks_of
from tests.system.support import ROOT

README = ROOT / "README.md"
README_LINES = 160
MQTT = ROOT / "docs" / "reference" / "mqtt.md"
# A command as README says how large it is, in bytes.
ABOUT = 20


@pytest.mark.parametrize("page", DRAWN, ids=lambda page: page.name)
def test_pictures_and_tables_match_the_code(page: Path) -> None:
    assert drawn(page) == page.read_text(), "python -m scripts.draw"


def test_the_readme_is_short_and_names_only_files_that_exist() -> None:
    text = README.read_text()
    named = set(re.findall(r"`((?:broker|projections|devices|scripts|tests|docs)/[\w/.]*)`", text))
    named |= set(re.findall(r"\]\(([\w/.-]+)\)", text))
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []
    assert len(text.splitlines()) <= README_LINES


def test_the_readme_has_the_real_size_of_a_command() -> None:
    sizes = [
        int(size)
        for size in re.findall(r"\| (\d+) \|$", (ROOT / "docs/reference/grants.md").read_text(), re.M)
    ]
    said = re.search(r"takes about (\d+) bytes.*?takes about (\d+)", README.read_text(), re.DOTALL)
    assert said is not None
    written = [int(size) for size in said.groups()]
    assert [abs(size - known) <= ABOUT for size, known in zip(written, sizes[:2], strict=True)] == [
        True,
        True,
    ]


@pytest.mark.parametrize("page", [README, MQTT], ids=lambda page: page.name)
def test_the_code_accepts_the_messages_shown_to_device_makers(page: Path) -> None:
    shown = [
        block.text.replace("…", "1")
        for block in blocks_of(page.read_text())
        if block.language == "json" and not block.title
    ]
    command, answers = shown
    assert decode_command(command.encode()).type == "unlock"
    statuses = [decode_answer(line.encode(), None, {}).status for line in answers.splitlines()]
    assert statuses == ["acknowledged", "progress", "executed", "failed"]


def test_the_page_of_settings_names_every_setting_and_its_default() -> None:
    page = (ROOT / "docs" / "reference" / "settings.md").read_text()
    shown: dict[str, object] = {}
    for key, default in msgspec.to_builtins(Settings()).items():
        inside = default if isinstance(default, dict) else None
        shown |= {key: default} if inside is None else {f"{key}.{name}": inside[name] for name in inside}
    for key in ProjectLimits.__struct_fields__:
        assert f"| `projects.<name>.{key}` | as `limits.{key}` |" in page
    for key, default in shown.items():
        row = next((line for line in page.splitlines() if line.startswith(f"| `{key}` |")), "")
        written = str(default).lower() if isinstance(default, bool) else str(default)  # written as in TOML
        assert row, f"docs/reference/settings.md has no row for {key}"
        assert written.removesuffix(".0") in row
        assert ENVIRONMENT.get(key, "") in row
