"""Ordain behind reverse proxies with the files of docs/deploy, and client certificates in both directions."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import httpx2
import pytest

from tests.conftest import unused_port
from tests.integration.mqtt.test_sockets import Authority
from tests.system.conftest import NewBroker
from tests.system.support import WITHIN_SEC, Broker, Process, until

DEPLOY = Path(__file__).parents[2] / "docs" / "deploy"
NGINX = shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/usr/bin")
CADDY = shutil.which("caddy")
HTTP = """
pid {home}/pid;
error_log {home}/error.log;
events {{}}
http {{
    access_log off;
    client_body_temp_path {home}/body;
    proxy_temp_path {home}/proxy;
    fastcgi_temp_path {home}/fastcgi;
    uwsgi_temp_path {home}/uwsgi;
    scgi_temp_path {home}/scgi;
    include {home}/site.conf;
}}
"""
# What the web recommends for WebSockets, for all paths: every client may ask for an Upgrade.
USUAL = """
proxy_set_header Upgrade $http_upgrade;
        proxy_set_header Connection "upgrade";
"""
WEBSOCKET = (
    "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
    "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Protocol: mqtt\r\n"
)


class Proxy:
    """A running proxy. `url`: its https address."""

    def __init__(self, port: int, authority: Authority) -> None:
        self.port = port
        self.url = f"https://127.0.0.1:{port}"
        self.trusting = ssl.create_default_context(cafile=authority.file)

    def http(self, method: str, path: str, **headers: str) -> httpx2.Response:
        with httpx2.Client(verify=self.trusting, timeout=WITHIN_SEC, trust_env=False) as client:
            return client.request(method, self.url + path, headers=headers)

    def raw(self, sent: bytes) -> ssl.SSLSocket:
        client = socket.create_connection(("127.0.0.1", self.port), timeout=WITHIN_SEC)
        wrapped = self.trusting.wrap_socket(client, server_hostname="127.0.0.1")
        wrapped.sendall(sent)
        return wrapped


@contextmanager
def proxied(kind: str, broker: Broker, home: Path, *, usual: bool = False) -> Iterator[Proxy]:
    program = NGINX if kind == "nginx" else CADDY
    if program is None:
        pytest.skip(f"{kind} is not installed")
    authority, port = Authority(home), unused_port()
    certificate, key = authority.issue("server")
    text = (DEPLOY / ("nginx.conf" if kind == "nginx" else "Caddyfile")).read_text()
    for old, new in (
        ("listen 443 ssl", f"listen 127.0.0.1:{port} ssl"),
        ("ordain.example.org {", f"https://127.0.0.1:{port} {{\n\tbind 127.0.0.1"),
        ("127.0.0.1:8080", broker.url.removeprefix("http://")),
        ("/etc/ssl/ordain.crt", certificate),
        ("/etc/ssl/ordain.key", key),
        ('proxy_set_header Connection "";', USUAL if usual else 'proxy_set_header Connection "";'),
    ):
        text = text.replace(old, new)
    if kind == "nginx":
        (home / "site.conf").write_text(text)
        (home / "nginx.conf").write_text(HTTP.format(home=home))
        command = [program, "-c", str(home / "nginx.conf"), "-p", str(home), "-g", "daemon off;"]
    else:
        (home / "Caddyfile").write_text("{\n\tadmin off\n\tauto_https disable_redirects\n}\n" + text)
        command = [program, "run", "--config", str(home / "Caddyfile"), "--adapter", "caddyfile"]
    process = Process(*command, cwd=home)
    proxy = Proxy(port, authority)

    def serves() -> bool:
        try:
            return proxy.http("GET", "/healthz").status_code == 200
        except httpx2.TransportError:
            return False

    try:
        until(serves, process.err.so_far)
        yield proxy
    finally:
        process.signal(signal.SIGTERM)  # nginx killed would leave its workers, and they the port
        process.wait()


@pytest.fixture
def behind(new_broker: NewBroker, tmp_path: Path) -> Broker:
    """A broker that trusts proxies on this machine."""
    config = tmp_path / "config.toml"
    config.write_text('http_trusted_proxies = ["127.0.0.0/8"]\n')
    return new_broker("--config", str(config)).start()


@pytest.mark.parametrize("kind", ["nginx", "caddy"])
def test_the_proxies_of_docs_deploy_pass_on_the_api_streams_and_mqtt(
    kind: str, behind: Broker, tmp_path: Path
) -> None:
    (home := tmp_path / kind).mkdir()
    behind.device("lamp")
    with proxied(kind, behind, home) as proxy:
        forged = {"X-Forwarded-For": "198.51.100.7", "X-API-Key": behind.key}
        assert proxy.http("DELETE", "/v1/devices/lamp", **forged).status_code == 200
        audited = behind.operator("GET", "/v1/audit?limit=100").json()["data"]
        assert audited[-1]["action"] == "device.deleted"
        peer = audited[-1]["peer"]
        # Both connect from this machine, whose addresses are all trusted here, so the last stranger is the
        # forged address: Caddy drops it, nginx adds to it.
        assert peer == ("198.51.100.7" if kind == "nginx" else "127.0.0.1")
        host = f"Host: 127.0.0.1:{proxy.port}\r\n"
        request = f"GET /v1/events?after=0 HTTP/1.1\r\n{host}X-API-Key: {behind.key}\r\n"
        with proxy.raw(f"{request}Accept: text/event-stream\r\n\r\n".encode()) as stream:
            heard = b""
            while b"ordain.device.deleted.v1" not in heard:
                heard += stream.recv(4_096) or pytest.fail(str(heard))
        with proxy.raw(f"GET /mqtt HTTP/1.1\r\n{host}{WEBSOCKET}\r\n".encode()) as socket_:
            assert socket_.recv(12) == b"HTTP/1.1 101"


def test_from_a_stranger_forwarded_headers_are_ignored(broker: Broker) -> None:
    broker.device("lamp")
    deleted = broker.http("DELETE", "/v1/devices/lamp", **{"X-Forwarded-For": "198.51.100.7"})
    assert deleted.status_code == 200
    assert broker.operator("GET", "/v1/audit?limit=100").json()["data"][-1]["peer"] == "127.0.0.1"


def test_no_request_is_smuggled_through_nginx_with_its_usual_websocket_block(
    behind: Broker, tmp_path: Path
) -> None:
    behind.device("victim")
    hidden = "DELETE /v1/devices/victim HTTP/1.1\r\nHost: a\r\nX-Ignored: "
    attack = f"POST /v1/devices HTTP/1.1\r\nHost: a\r\n{WEBSOCKET}Content-Length: {len(hidden)}\r\n\r\n"
    attack += hidden
    with proxied("nginx", behind, tmp_path, usual=True) as proxy:
        for _ in range(6):
            with proxy.raw(attack.encode()) as attacker:
                assert attacker.recv(12) == b"HTTP/1.1 400"
            shown = proxy.http("GET", "/v1/devices/victim", **{"X-API-Key": behind.key})
            assert (shown.status_code, shown.json()["hardware_id"]) == (200, "victim")


def test_https_can_ask_every_client_for_a_certificate(new_broker: NewBroker, tmp_path: Path) -> None:
    authority, stranger = Authority(tmp_path), Authority(tmp_path, "another authority")
    certificate, key = authority.issue("server")
    port = unused_port()
    config = tmp_path / "config.toml"
    config.write_text(
        f'https = "127.0.0.1:{port}"\ntls_certificate = "{certificate}"\ntls_key = "{key}"\n'
        f'https_client_ca = "{authority.file}"\n'
    )
    broker = new_broker("--config", str(config)).start()
    broker.device("lamp")
    url, headers = f"https://127.0.0.1:{port}/v1/devices/lamp", {"X-API-Key": broker.key}
    for pair in (None, stranger.issue("other"), authority.issue("service")):
        trusting = authority.client(pair)
        with httpx2.Client(verify=trusting, timeout=WITHIN_SEC, trust_env=False) as client:
            if pair is not None and "service" in pair[0]:
                assert client.get(url, headers=headers).status_code == 200
                assert client.get(url).status_code == 401, "the certificate is no key"
            else:
                with pytest.raises(httpx2.TransportError):
                    client.get(url, headers=headers)


def test_a_webhook_receiver_can_ask_the_broker_for_its_certificate(
    new_broker: NewBroker, tmp_path: Path
) -> None:
    authority = Authority(tmp_path)
    server, client = authority.issue("receiver"), authority.issue("ordain")
    got: list[tuple[str, bytes]] = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert isinstance(self.connection, ssl.SSLSocket)
            shown = self.connection.getpeercert() or {}
            body = self.rfile.read(int(self.headers["Content-Length"]))
            got.append((str(shown["subject"]), body))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=authority.file)
    context.load_cert_chain(*server)
    context.verify_mode = ssl.CERT_REQUIRED
    config = tmp_path / "config.toml"
    config.write_text(
        f'webhook_allow = ["127.0.0.0/8"]\nwebhook_ca = "{authority.file}"\n'
        f'webhook_certificate = "{client[0]}"\nwebhook_key = "{client[1]}"\n'
    )
    broker = new_broker("--config", str(config)).start()
    with HTTPServer(("127.0.0.1", 0), Receiver) as receiver:
        receiver.socket = context.wrap_socket(receiver.socket, server_side=True)
        thread = threading.Thread(target=receiver.serve_forever, daemon=True)
        thread.start()
        made = broker.http("POST", "/v1/webhooks", {"url": f"https://127.0.0.1:{receiver.server_port}/"})
        assert made.status_code == 201, made.text
        broker.device("lamp")
        until(lambda: got, broker.said)
        receiver.shutdown()
        thread.join()
    assert "ordain" in got[0][0]
    assert json.loads(got[0][1])["type"] == "ordain.device.registered.v1"
