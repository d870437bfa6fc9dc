"""Settings that are wrong: the error names the file, the key and the value, and says what would be right."""

from __future__ import annotations

from pathlib import Path

import pytest

from broker.settings import BadSetting, Settings, load, within_files


def refused(tmp_path: Path, text: str) -> str:
    file = tmp_path / "ordain.toml"
    file.write_text(text)
    with pytest.raises(BadSetting) as refusal:
        load({}, {}, str(file))
    assert len(str(refusal.value)) < 500
    return str(refusal.value)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("trusted_proxies = [1]", "trusted_proxies = [1]: must be text"),
        (
            'mqtt_listen = ["127.0.0.1:1883", ["x"]]',
            "mqtt_listen = ['127.0.0.1:1883', ['x']]: must be text",
        ),
        ("cors_origins = [{a = 1}]", "cors_origins = [{'a': 1}]: must be text"),
        ("[projects.acme]\nparams_bytes = [1]", "projects.acme.params_bytes = [1]: must be a whole number"),
    ],
)
def test_a_wrong_item_of_a_list_names_the_list(tmp_path: Path, text: str, named: str) -> None:
    assert named in refused(tmp_path, text)


@pytest.mark.parametrize(
    "value", ["9" * 5_000, "0x" + "f" * 5_000, "9223372036854775808", "-9223372036854775809"]
)
def test_a_number_of_more_than_64_bits_is_refused(tmp_path: Path, value: str) -> None:
    assert "64 bits" in refused(tmp_path, f"[limits]\nqueue_per_name = {value}")
    assert "64 bits" in refused(tmp_path, f"mqtt_listen = [{{a = {value}}}]")


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_number_that_is_not_finite_is_refused(tmp_path: Path, value: str) -> None:
    assert "webhook_timeout_sec" in refused(tmp_path, f"webhook_timeout_sec = {value}")
    assert "mqtt_limits.burst_sec" in refused(tmp_path, f"[mqtt_limits]\nburst_sec = {value}")


def test_a_deeply_nested_file_is_refused(tmp_path: Path) -> None:
    assert "nested" in refused(tmp_path, "data = " + "[" * 5_000 + "]" * 5_000)
    assert "nested" in refused(tmp_path, "data = " + "[" * 200 + "]" * 200)


def test_an_mqtt_url_is_never_shown(tmp_path: Path) -> None:
    for value in ('"mqtt://u:secret\\u0000@host"', '["mqtt://u:secret@host"]'):
        assert "secret" not in refused(tmp_path, f"mqtt_url = {value}")


@pytest.mark.parametrize("key", ["data", "types", "tls_key", "mqtt_ca"])
def test_a_text_with_a_nul_is_refused(tmp_path: Path, key: str) -> None:
    assert f"{key} = 'a\\x00b'" in refused(tmp_path, f'{key} = "a\\u0000b"')


def test_metrics_are_one_of_three_words_or_an_address(tmp_path: Path) -> None:
    assert "HOST:PORT" in refused(tmp_path, 'metrics = "closed"')
    for value in ("open", "key", "off", "127.0.0.1:9100"):
        (tmp_path / "right.toml").write_text(f'metrics = "{value}"')
        assert load({}, {}, str(tmp_path / "right.toml")).metrics == value


def test_bounds_of_connections_stay_within_the_limit_of_open_files() -> None:
    assert within_files(Settings(), 1_048_576) == Settings()
    few = within_files(Settings(), 1_024)
    assert few.mqtt_limits.connections + few.limits.strangers < 1_024
    assert few.limits.strangers_per_address < few.limits.strangers


def test_one_of_several_nodes_needs_what_all_of_them_share(tmp_path: Path) -> None:
    file = tmp_path / "ordain.toml"
    lines = ['advertise = "10.0.0.1:8080"']
    for key, value in (
        ("log", "postgresql://ordain@db/ordain"),
        ("mqtt_url", "mqtt://mqtt:1883"),
        ("cluster_secret_file", "/etc/ordain/secret"),
        ("key_pepper_file", "/etc/ordain/pepper"),
    ):
        assert f"advertise = '10.0.0.1:8080': needs {key}, " in refused(tmp_path, "\n".join(lines))
        lines.append(f'{key} = "{value}"')
    file.write_text("\n".join(lines))
    assert load({}, {}, str(file)).advertise == "10.0.0.1:8080"
    assert "node = 'one': needs advertise" in refused(tmp_path, 'node = "one"')
    assert "advertise = 'here': must be HOST:PORT" in refused(tmp_path, 'advertise = "here"')
