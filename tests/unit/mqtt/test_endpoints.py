"""Addresses of our own MQTT server: the forms that are taken, how they are shown, and what is refused."""

from __future__ import annotations

import pytest

from broker.settings import BadSetting, Settings, listened, load
from devices.mqtt_url import Endpoint, joined, parse_endpoint


@pytest.mark.parametrize(
    ("text", "endpoint"),
    [
        ("127.0.0.1:1883", Endpoint("127.0.0.1", 1883)),
        ("mqtt://localhost:0", Endpoint("localhost", 0)),
        ("mqtts://0.0.0.0:8883", Endpoint("0.0.0.0", 8883, tls=True)),
        ("[::1]:1883", Endpoint("::1", 1883)),
        ("mqtts://[2001:db8::1]:8883", Endpoint("2001:db8::1", 8883, tls=True)),
    ],
)
def test_an_address_is_read_and_shown_with_brackets(text: str, endpoint: Endpoint) -> None:
    assert parse_endpoint(text) == endpoint
    assert parse_endpoint(str(endpoint)) == endpoint
    assert text.rpartition("//")[2] == joined(endpoint.host, endpoint.port)


@pytest.mark.parametrize(
    "text",
    ["", "1883", ":1883", "host", "host:x", "host:65536", "::1:1883", "[host]:1", "http://h:1", "mqtt://h"],
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must be"):
        parse_endpoint(text)


def test_several_addresses_are_a_list_or_a_text_with_commas() -> None:
    both = [Endpoint("127.0.0.1", 1883), Endpoint("::", 8883, tls=True)]
    assert listened(Settings(mqtt_listen=["127.0.0.1:1883", "mqtts://[::]:8883"])) == both
    assert listened(Settings(mqtt_listen="127.0.0.1:1883, mqtts://[::]:8883")) == both


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"mqtt_listen": "mqtts://127.0.0.1:8883"}, "needs tls_certificate"),
        ({"https": "127.0.0.1:8443"}, "needs tls_certificate"),
        ({"mqtt_listen": "127.0.0.1:1,127.0.0.1:2", "mqtt_server": "mosquitto"}, "one address"),
        ({"mqtt_listen": "mqtt://"}, "mqtt_listen = 'mqtt://'"),
    ],
)
def test_settings_that_cannot_be_served_are_named(flags: dict[str, str], words: str) -> None:
    with pytest.raises(BadSetting, match=words):
        load(flags, {}, None)
