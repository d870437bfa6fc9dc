"""Clients without a key: the log lines that they can cause, and the effects of their broken connections."""

from __future__ import annotations

import socket
import ssl
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2

from broker.settings import MqttLimits
from tests.conftest import unused_port
from tests.integration.mqtt.test_sockets import Authority
from tests.system.conftest import NewBroker
from tests.system.support import WITHIN_SEC, Broker, Device

CONNECT = bytes.fromhex("101000044d5154540402003c00046c616d70")  # client id lamp, no password


@contextmanager
def reset(port: int) -> Iterator[socket.socket]:
    """A connection that ends with a TCP reset."""
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.settimeout(WITHIN_SEC)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        yield client


def port_of(broker: Broker) -> int:
    return int(broker.url.rpartition(":")[2])


def test_refusals_of_strangers_are_short_escaped_masked_and_counted(broker: Broker) -> None:
    secret = "dtok_" + "s" * 30
    for path in ("/v1/devices/" + "n" * 300, "/v1/devices/%1b%5b2J%0aforged", f"/v1/devices/{secret}"):
        assert broker.http("GET", path, Authorization="Bearer sk_live_nobody").status_code == 401
    with httpx2.Client(base_url=broker.url, timeout=WITHIN_SEC, trust_env=False) as client:
        assert {client.get("/v1/devices").status_code for _ in range(100)} == {401}
    assert Device(broker.mqtt_port, "u" * 300, secret).say("online", suffix="status") != 0
    broker.run.err.wait("event=mqtt.refused")

    said = broker.said()
    assert 10 <= said.count("event=http.refused") < 100
    assert "\x1b" not in said
    assert "n" * 65 not in said
    assert "u" * 65 not in said
    assert secret not in said
    assert "dtok_…" in said


def test_a_reset_of_a_connection_leaves_no_traceback(new_broker: NewBroker, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    certificate, key = authority.issue("server")
    https, mqtts = unused_port(), unused_port()
    config = tmp_path / "config.toml"
    config.write_text(f'https = "127.0.0.1:{https}"\ntls_certificate = "{certificate}"\ntls_key = "{key}"\n')
    listening = f"127.0.0.1:0,mqtts://127.0.0.1:{mqtts}"
    broker = new_broker("--config", str(config), "--mqtt-listen", listening).start()
    broker.device("lamp")
    http, mqtt = port_of(broker), broker.mqtt_port
    get = b"GET /v1/events HTTP/1.1\r\nHost: a\r\nAccept: text/event-stream\r\n"
    get += f"X-API-Key: {broker.key}\r\n\r\n".encode()
    post = b"POST /v1/devices HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n"
    post += f"X-API-Key: {broker.key}\r\nContent-Type: application/json\r\n\r\n{{".encode()
    for port in (http, https, mqtt, mqtts):
        for sent in (b"", b"\x16\x03\x01", b"GET / HTTP", post, get, CONNECT[:5], CONNECT, b"\xff" * 100):
            with reset(port) as client:
                client.sendall(sent)
    with reset(http) as client:  # in the middle of an answer
        client.sendall(get)
        assert client.recv(12) == b"HTTP/1.1 200"
    trusting = ssl.create_default_context(cafile=authority.file)
    for port in (https, mqtts):
        with reset(port) as client, trusting.wrap_socket(client, server_hostname="127.0.0.1") as wrapped:
            wrapped.sendall(get if port == https else CONNECT)
            wrapped.recv(1)
    assert broker.http("GET", "/healthz").status_code == 200
    assert broker.end() == 0
    assert "Traceback" not in broker.run.err.all()


def test_a_stream_and_an_mqtt_connection_end_when_their_key_is_revoked(broker: Broker) -> None:
    made = broker.operator("POST", "/v1/keys", {"project": "default", "scopes": ["events:read"]}).json()
    name, key = b"service", made["key"].encode()
    asked = b"GET /v1/events HTTP/1.1\r\nHost: a\r\nAccept: text/event-stream\r\nX-API-Key: %s\r\n\r\n" % key
    body = b"\x00\x04MQTT\x04\xc2\x00\x00\x00\x00" + b"".join(
        len(text).to_bytes(2, "big") + text for text in (name, key)
    )
    with reset(port_of(broker)) as stream, reset(broker.mqtt_port) as mqtt:
        stream.sendall(asked)
        assert stream.recv(12) == b"HTTP/1.1 200"
        mqtt.sendall(b"\x10" + bytes([len(body)]) + body)
        assert mqtt.recv(4) == b"\x20\x02\x00\x00"
        assert broker.operator("DELETE", f"/v1/keys/{made['id']}").status_code == 200
        heard = b""
        while not heard.endswith(b"0\r\n\r\n"):  # the end of a chunked body
            heard += stream.recv(4_096)
        while mqtt.recv(4_096):
            pass
    assert MqttLimits().tick_sec <= 1, "the listener looks at the keys of its clients once a tick"
