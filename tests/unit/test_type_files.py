"""The device types a broker knows: the shipped ones and the files of its operator, checked at start."""

from __future__ import annotations

from pathlib import Path

import pytest

from broker.settings import BadSetting, load
from broker.type_files import load_types
from devices.types import BadType, shipped_types

DOCUMENTED = Path(__file__).parents[2] / "docs" / "types"
LAMP = 'name = "lamp"\n[commands.dim]\n'


def test_without_a_directory_the_shipped_types_are_known() -> None:
    assert load_types("") == shipped_types()


def test_files_of_a_directory_are_added(tmp_path: Path) -> None:
    (tmp_path / "any-name.toml").write_text(LAMP)
    (tmp_path / "notes.txt").write_text("not a type")

    assert load_types(str(tmp_path)).keys() == {*shipped_types(), "lamp"}


def test_a_wrong_file_stops_the_start_and_is_named(tmp_path: Path) -> None:
    (tmp_path / "lamp.toml").write_text("max_in_flight = 0\n" + LAMP)

    with pytest.raises(BadType, match=r"lamp\.toml: max_in_flight = 0: .*1"):
        load_types(str(tmp_path))


def test_a_duplicate_type_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text(LAMP)
    (tmp_path / "b.toml").write_text(LAMP)

    with pytest.raises(BadType, match=r"b\.toml: name = 'lamp': another name.*a\.toml"):
        load_types(str(tmp_path))


def test_a_file_cannot_change_a_shipped_type(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(LAMP.replace("lamp", "recorder"))

    with pytest.raises(BadType, match=r"mine\.toml: name = 'recorder'.*Ordain itself"):
        load_types(str(tmp_path))


@pytest.mark.parametrize(
    ("line", "key", "other"),
    [
        ('answer_suffix = "rbt"', "answer_suffix", "iotee_device"),
        ('command_suffix = "ack"', "command_suffix", ""),
    ],
)
def test_a_type_whose_topics_make_the_broker_hear_its_own_commands_is_refused(
    tmp_path: Path, line: str, key: str, other: str
) -> None:
    answers = "" if key == "answer_suffix" else 'answer_suffix = "said"\n'
    (tmp_path / "lamp.toml").write_text(f"{line}\n{answers}{LAMP}")

    with pytest.raises(BadType, match=rf"lamp\.toml: {key} = .*another suffix: {other}"):
        load_types(str(tmp_path))


OF_ESPHOME = """
name = "mine"
payload = "bare"
command_topic = "{hardware_id}/%s/{name}/command"
state_topics = ["{hardware_id}/%s/{name}/state"]
presence_topic = "{hardware_id}/status"
online = "online"
offline = "offline"
[commands.open]
text = "OPEN"
done_when = "open"
"""


@pytest.mark.parametrize("part", ["cover", "switch"])
def test_a_type_that_shares_topics_with_another_shares_them_with_its_variants_too(
    tmp_path: Path, part: str
) -> None:
    text, file = OF_ESPHOME % (part, part), tmp_path / "mine.toml"
    file.write_text('shares_topics_with = ["esphome_switch"]' + text)
    assert "mine" in load_types(str(tmp_path))
    file.write_text(text)
    with pytest.raises(BadType, match="a device of type esphome_"):
        load_types(str(tmp_path))


def test_a_types_setting_that_is_not_a_directory_is_refused(tmp_path: Path) -> None:
    for place in (tmp_path / "none", tmp_path / "file"):
        (tmp_path / "file").write_text(LAMP)
        with pytest.raises(BadSetting, match=f"types = '{place}'"):
            load_types(str(place))


def test_the_directory_is_a_setting() -> None:
    assert load({}, {"ORDAIN_TYPES": "types"}, None).types == "types"


def test_the_documented_examples_are_valid_types() -> None:
    assert "tasmota_plug" in load_types(str(DOCUMENTED))
