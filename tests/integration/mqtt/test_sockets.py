"""TLS, client certificates, proxies and WebSocket in front of the listener, with real clients."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
import ssl
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aiomqtt
import pytest
import uvicorn
import uvloop
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from structlog.testing import capture_logs

from broker.http.edge.protocol import Bounded
from broker.mqtt import packets as p
from broker.mqtt.listener import Listener
from broker.mqtt.packets import Reason
from broker.mqtt.tls import Certificates
from broker.mqtt.websocket import upgrades
from devices.mqtt_url import Endpoint
from tests.integration.mqtt.listener_support import (
    ACK,
    RLS,
    TOKENS,
    V5,
    V311,
    Owner,
    Raw,
    Server,
    connect,
    device,
    listening,
    subscribe,
)
from tests.integration.mqtt.test_link import DEADLINE_SEC, until_logged

Key = ec.EllipticCurvePrivateKey
UNNOTICED_SEC = 2  # aiomqtt does not notice that its certificate was refused
TLS = (Endpoint("127.0.0.1", 0, tls=True),)


class Authority:
    """Signs certificates and writes them, with their keys, into a directory."""

    def __init__(self, home: Path, name: str = "an authority") -> None:
        self.home = home
        self.file = str(home / f"{name}.pem")
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self._key = ec.generate_private_key(ec.SECP256R1())
        constraints = x509.BasicConstraints(ca=True, path_length=None)
        usage = x509.KeyUsage(True, False, False, False, False, True, True, False, False)
        mine = self._builder(self._name, self._key).add_extension(constraints, critical=True)
        mine = mine.add_extension(usage, critical=True)
        self._write(self.file, mine.sign(self._key, hashes.SHA256()))

    def issue(self, common: str, *, dns: str | None = None, file: str | None = None) -> tuple[str, str]:
        """Certificate and key files for a name."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])
        names: list[x509.GeneralName] = [x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        if dns is not None:
            names.append(x509.DNSName(dns))
        builder = self._builder(subject, key).add_extension(
            x509.SubjectAlternativeName(names), critical=False
        )
        certificate, private = self.home / f"{file or common}.crt", self.home / f"{file or common}.key"
        self._write(str(certificate), builder.sign(self._key, hashes.SHA256()))
        plain = (serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        private.write_bytes(key.private_bytes(serialization.Encoding.PEM, *plain))
        return str(certificate), str(private)

    def _builder(self, subject: x509.Name, key: Key) -> x509.CertificateBuilder:
        now, day = datetime.now(UTC), timedelta(days=1)
        builder = x509.CertificateBuilder(self._name, subject, key.public_key(), x509.random_serial_number())
        # Python 3.13 and later refuse a certificate that does not name the key that signed it.
        signer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        own = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
        builder = builder.add_extension(signer, critical=False).add_extension(own, critical=False)
        return builder.not_valid_before(now - day).not_valid_after(now + day)

    def _write(self, file: str, certificate: x509.Certificate) -> None:
        Path(file).write_bytes(certificate.public_bytes(serialization.Encoding.PEM))

    def client(self, pair: tuple[str, str] | None = None, **more: Any) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=self.file)
        if pair is not None:
            context.load_cert_chain(*pair)
        for name, value in more.items():
            setattr(context, name, value)
        return context


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


def test_tls_serves_both_versions_and_nothing_older(authority: Authority) -> None:
    async def main() -> None:
        owner = Owner()
        certificates = Certificates(*authority.issue("server"))
        async with listening(owner, endpoints=TLS, certificates=certificates) as server:
            for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
                context = authority.client(minimum_version=version, maximum_version=version)
                context.set_alpn_protocols(["mqtt"])
                async with device(server, tls_context=context) as door:
                    await door.subscribe(RLS, qos=1)
                    owner.send(b"1")
                    assert (await anext(aiter(door.messages))).payload == b"1"
                    await door.publish(ACK, b"x" * 200_000, qos=1)
            assert [len(payload) for payload in owner.payloads] == [200_000, 200_000]
            assert certificates.for_mqtt.minimum_version == ssl.TLSVersion.TLSv1_2
            async with asyncio.timeout(DEADLINE_SEC):
                reader, writer = await asyncio.open_connection(server.host, server.port)
                writer.write(b"\x10\x00" * 10)
                with contextlib.suppress(ConnectionError):
                    await reader.read()
                writer.close()
                with contextlib.suppress(ConnectionError):
                    await writer.wait_closed()

    uvloop.run(main())


@pytest.mark.parametrize("field", ["cn", "san"])
def test_a_client_certificate_stands_for_the_device_it_names(authority: Authority, field: str) -> None:
    async def main() -> None:
        owner = Owner()
        certificates = Certificates(*authority.issue("server"), client_ca=authority.file)
        names = {"cn": {"common": "door", "dns": "other"}, "san": {"common": "other", "dns": "door"}}[field]
        pair = authority.issue(**names, file="device")
        stranger = Authority(authority.home, "a stranger").issue("door", dns="door", file="forged")
        async with listening(owner, endpoints=TLS, certificates=certificates, identity_field=field) as server:
            mine = authority.client(pair)
            async with device(server, tls_context=mine, username=None, password=None) as door:
                await door.publish(ACK, b"ok", qos=1)
            assert (owner.certified, owner.payloads) == (["door"], [b"ok"])
            async with device(server, tls_context=mine):  # a token that is sent must be right too
                assert server.connected == 1
            for wrong in (
                {"password": "guess"},
                {"identifier": "gate", "username": "gate", "password": TOKENS["gate"]},
                {"username": None, "password": None, "identifier": "gate"},
            ):
                with pytest.raises(aiomqtt.MqttError):
                    async with device(server, tls_context=mine, **wrong):
                        pytest.fail("it was let in")
            async with device(server, tls_context=authority.client()):  # without one the token is enough
                assert server.connected == 1
            with pytest.raises((aiomqtt.MqttError, ssl.SSLError)):
                async with device(server, tls_context=authority.client(stranger), timeout=UNNOTICED_SEC):
                    pytest.fail("it was let in")
            await owner.until(lambda: server.listener.counts["not_begun"] == 1)

    uvloop.run(main())


async def test_a_certificate_is_read_again_when_it_changes_and_a_broken_one_is_not(
    authority: Authority,
) -> None:
    certificate, key = authority.issue("first", file="server")
    certificates = Certificates(certificate, key)

    async def subject(server: Server) -> Any:
        reader, writer = await asyncio.open_connection(
            server.host, server.port, ssl=authority.client(check_hostname=False)
        )
        found = writer.get_extra_info("peercert")["subject"][0][0][1]
        writer.close()
        with contextlib.suppress(ssl.SSLError, ConnectionError):
            await writer.wait_closed()
        del reader
        return found

    with capture_logs() as logs:
        async with listening(Owner(), endpoints=TLS, certificates=certificates) as server:
            assert await subject(server) == "first"
            certificates.look()
            assert logs == []
            authority.issue("second", file="server")
            certificates.look()
            await until_logged(logs, "tls.reloaded")
            assert await subject(server) == "second"
            Path(certificate).write_text("nonsense")
            certificates.look()
            await until_logged(logs, "tls.not_reloaded")
            assert await subject(server) == "second"


async def test_a_client_ca_that_was_removed_is_not_accepted_any_more(authority: Authority) -> None:
    other = Authority(authority.home, "another")
    pair = authority.issue("door", file="device")
    certificates = Certificates(*authority.issue("server"), client_ca=authority.file)
    owner = Owner()
    async with listening(owner, endpoints=TLS, certificates=certificates) as server:
        settings: dict[str, Any] = {"username": None, "password": None}
        settings["tls_context"] = authority.client(pair)
        async with device(server, **settings):
            assert server.connected == 1
        Path(authority.file).write_bytes(Path(other.file).read_bytes())
        certificates.look()
        with pytest.raises((aiomqtt.MqttError, ssl.SSLError)):
            async with device(server, timeout=UNNOTICED_SEC, **settings):
                pytest.fail("it was let in")
        await owner.until(lambda: server.listener.counts["not_begun"] == 1)


async def test_connections_in_a_tls_handshake_are_bounded_and_end_in_time(authority: Authority) -> None:
    owner = Owner()
    certificates = Certificates(*authority.issue("server"))
    async with listening(
        owner, endpoints=TLS, certificates=certificates, strangers_per_address=3, connect_sec=600.0
    ) as server:
        silent = [await asyncio.open_connection(server.host, server.port) for _ in range(5)]
        await owner.until(lambda: server.listener.counts["turned_away"] == 2)
        for _, writer in silent:
            writer.close()
        await owner.until(lambda: server.listener.crowd.strangers == 0)
        async with device(server, tls_context=authority.client()):
            assert server.connected == 1
    async with listening(owner, endpoints=TLS, certificates=certificates, connect_sec=0.2) as server:
        silent = [await asyncio.open_connection(server.host, server.port) for _ in range(3)]
        async with asyncio.timeout(DEADLINE_SEC):
            for reader, writer in silent:
                with contextlib.suppress(ConnectionError):
                    assert await reader.read() == b""
                writer.close()
        await owner.until(lambda: server.listener.counts["not_begun"] == 3)


# --- behind a proxy


def header(command: int = 0x21, family: int = 0x11, body: bytes = b"\xc0\x00\x02\x07" + bytes(8)) -> bytes:
    return b"\r\n\r\n\0\r\nQUIT\n" + bytes((command, family)) + len(body).to_bytes(2, "big") + body


V6 = b"\x20\x01\x0d\xb8" + bytes(11) + b"\x09" + bytes(20)


@pytest.mark.parametrize("tls", [False, True])
def test_the_header_of_a_trusted_proxy_gives_the_address_of_the_client(
    authority: Authority, tls: bool
) -> None:
    async def main() -> None:
        owner = Owner()
        certificates = Certificates(*authority.issue("server")) if tls else None
        endpoints = (Endpoint("127.0.0.1", 0, tls=tls),)
        loop = asyncio.get_running_loop()
        async with listening(
            owner, endpoints=endpoints, certificates=certificates, trusted_proxies=("127.0.0.0/8",)
        ) as server:
            for sent, seen in (
                (header(), "192.0.2.7"),
                (header(0x21, 0x21, V6), "2001:db8::9"),
                (header(0x20, 0x00, b""), "127.0.0.1"),
                (header(body=b"\xc0\x00\x02\x07" + bytes(8) + b"\x03\x00\x04abcd"), "192.0.2.7"),
            ):
                reader, writer = await asyncio.open_connection(server.host, server.port)
                for byte in sent:  # cut at every byte
                    writer.write(bytes((byte,)))
                    await asyncio.sleep(0)
                if tls:
                    await writer.drain()
                    protocol = writer.transport.get_protocol()
                    started = await loop.start_tls(writer.transport, protocol, authority.client())
                    assert started is not None
                    writer._transport = started  # type: ignore[attr-defined]
                client = Raw(reader, writer, 5)
                client.say(connect())
                assert isinstance(await client.hear(), p.Connack)
                assert server.listener.peers["door"].address == seen
                writer.close()
                await owner.until(lambda: server.connected == 0)

    uvloop.run(main())


@pytest.mark.parametrize(
    "sent",
    [
        b"\x10\x10" + bytes(16),
        header(0x31),
        header(body=b"\x01\x02"),
        header(body=bytes(3_000)),
        b"PROXY TCP4 1.2.3.4",
    ],
    ids=["none", "version 3", "too short", "too long", "version 1"],
)
async def test_a_trusted_proxy_must_send_its_header(sent: bytes) -> None:
    async with listening(Owner(), trusted_proxies=("127.0.0.1/32",)) as server:
        reader, writer = await asyncio.open_connection(server.host, server.port)
        writer.write(sent)
        async with asyncio.timeout(DEADLINE_SEC):
            with contextlib.suppress(ConnectionError):
                assert await reader.read() == b""
        writer.close()
        assert server.listener.connections == 0


async def test_other_addresses_need_no_header() -> None:
    async with listening(Owner(), trusted_proxies=("192.0.2.0/24",)) as server, device(server):
        assert server.connected == 1


# --- WebSocket


async def nothing(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 404, "headers": []})
    await send({"type": "http.response.body", "body": b"plain"})


@contextlib.asynccontextmanager
async def over_http(listener: Listener, origins: tuple[str, ...] = ()) -> AsyncIterator[int]:
    """uvicorn as the broker runs it, on a free port."""
    config = uvicorn.Config(
        nothing,
        loop="none",
        http=Bounded,
        ws=upgrades(listener, origins),  # type: ignore[arg-type]
        lifespan="off",
        log_config=None,
    )
    server = uvicorn.Server(config)
    bound = socket.create_server(("127.0.0.1", 0))
    serving = asyncio.create_task(server._serve([bound]))
    while not server.started:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    try:
        yield bound.getsockname()[1]
    finally:
        server.should_exit = True
        await serving


@pytest.mark.parametrize("version", [V311, V5], ids=["3.1.1", "5"])
def test_mqtt_over_websocket_makes_the_round_trip(version: Any) -> None:
    async def main() -> None:
        owner = Owner()
        async with listening(owner) as server, over_http(server.listener) as port:
            server.port = port
            async with device(
                server, transport="websockets", websocket_path="/mqtt", protocol=version
            ) as door:
                await door.subscribe(RLS, qos=1)
                owner.send(b"y" * 60_000)
                assert (await anext(aiter(door.messages))).payload == b"y" * 60_000
                for number in range(50):
                    await door.publish(ACK, b"%d" % number + b"x" * 20_000, qos=1)
            assert len(owner.messages) == 50
            await owner.until(lambda: owner.presence == ["door online", "door offline"])

    uvloop.run(main())


async def upgrade(port: int, path: str = "/mqtt", protocol: str = "mqtt", *more: str) -> Raw:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    lines = [f"GET {path} HTTP/1.1", f"Host: 127.0.0.1:{port}", "Connection: Upgrade", "Upgrade: websocket"]
    lines += ["Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", *more]
    lines += [f"Sec-WebSocket-Protocol: {protocol}"] if protocol else []
    writer.write("\r\n".join([*lines, "", ""]).encode("latin-1"))
    return Raw(reader, writer, 5)


@pytest.mark.parametrize(
    ("path", "protocol", "origin", "status"),
    [
        ("/mqtt", "mqtt", "", b"101"),
        ("/mqtt", "mqttv3.1, mqtt", "", b"101"),
        ("/mqtt", "mqtt", "http://127.0.0.1", b"101"),
        ("/mqtt", "mqtt", "https://console.example.org", b"101"),
        ("/mqtt", "mqtt", "https://evil.example.org", b"403"),
        ("/mqtt", "", "", b"400"),
        ("/mqtt", "graphql-ws", "", b"400"),
        ("/mqtt", "mqtt\xe9", "", b"400"),
    ],
)
async def test_only_mqtt_from_known_pages_is_upgraded(
    path: str, protocol: str, origin: str, status: bytes
) -> None:
    async with (
        listening(Owner()) as server,
        over_http(server.listener, ("https://console.example.org",)) as port,
    ):
        own = origin and f"Origin: {origin}" + (f":{port}" if origin.endswith("127.0.0.1") else "")
        client = await upgrade(port, path, protocol, *([own] if own else []))
        async with asyncio.timeout(DEADLINE_SEC):
            head = await client.reader.readuntil(b"\r\n\r\n")
            assert head.split()[1] == status
            if status != b"101":
                assert b'{"error":{"code":' in await client.reader.read()
        client.writer.close()


def frame(data: bytes, opcode: int = 2) -> bytes:
    """A masked frame as clients send it; the mask is zero. Source: RFC 6455, section 5.2."""
    assert len(data) < 65_536
    length = bytes((0x80 | len(data),)) if len(data) < 126 else b"\xfe" + len(data).to_bytes(2, "big")
    return bytes((0x80 | opcode,)) + length + bytes(4) + data


async def test_a_packet_may_be_cut_into_frames_anywhere_and_text_is_refused() -> None:
    from broker.mqtt.codec import encode

    owner = Owner()
    async with listening(owner) as server, over_http(server.listener) as port:
        client = await upgrade(port)
        await client.reader.readuntil(b"\r\n\r\n")
        stream = encode(connect(), 5) + encode(subscribe(), 5)
        client.writer.write(b"".join(frame(stream[each : each + 1]) for each in range(len(stream))))
        await owner.until(lambda: owner.presence == ["door online"])
        client.writer.write(frame(b"", 9) + frame(b"hello", 1))
        async with asyncio.timeout(DEADLINE_SEC):
            rest = await client.reader.read()
        assert b"\x8a\x00" in rest  # a pong
        assert b"\x03\xebMQTT needs binary frames" in rest
        await owner.until(lambda: server.connected == 0)
        client.writer.close()


async def test_a_flood_of_tiny_frames_does_not_stop_the_loop() -> None:
    owner = Owner()
    async with listening(owner) as server, over_http(server.listener) as port:
        client = await upgrade(port)
        await client.reader.readuntil(b"\r\n\r\n")
        client.writer.write(frame(b"") * 100_000)
        longest = 0.0
        for _ in range(200):
            before = time.thread_time()  # not the clock: other processes on the machine do not count
            await asyncio.sleep(0)
            longest = max(longest, time.thread_time() - before)
        assert longest < 1.0
        client.writer.transport.abort()
        await owner.until(lambda: server.listener.connections == 0)


@pytest.mark.parametrize(
    ("wrong", "status"),
    [
        ({"Sec-WebSocket-Version": "8"}, b"426"),
        ({"Sec-WebSocket-Key": None}, b"400"),
        ({"Host": "xn--0"}, b"400"),
    ],
)
async def test_a_wrong_websocket_handshake_is_answered(wrong: dict[str, str | None], status: bytes) -> None:
    headers = {"Host": "localhost", "Connection": "Upgrade", "Upgrade": "websocket"}
    headers |= {"Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ=="}
    lines = [f"{name}: {value}" for name, value in (headers | wrong).items() if value is not None]
    async with listening(Owner()) as server, over_http(server.listener) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write("\r\n".join(["GET /mqtt HTTP/1.1", *lines, "", ""]).encode())
        async with asyncio.timeout(DEADLINE_SEC):
            answer = await reader.read()
        assert answer.split()[1] == status
        assert b'{"error":{"code":"invalid_request"' in answer
        writer.close()


@pytest.mark.parametrize("opcode", [2, 9], ids=["empty", "ping"])
async def test_websocket_frames_beyond_the_rate_slow_their_client_down(opcode: int) -> None:
    owner = Owner()
    async with (
        listening(owner, packets_per_sec=100, burst_sec=0.1) as server,
        over_http(server.listener) as port,
    ):
        client = await upgrade(port)
        await client.reader.readuntil(b"\r\n\r\n")
        client.writer.write(frame(b"", opcode) * 10_000)
        await owner.until(lambda: server.listener.counts["slowed"] > 0)
        client.writer.transport.abort()
        await owner.until(lambda: server.listener.connections == 0)


async def test_the_close_of_a_websocket_is_answered_and_is_the_end() -> None:
    owner = Owner()
    async with listening(owner) as server, over_http(server.listener) as port:
        client = await upgrade(port)
        await client.reader.readuntil(b"\r\n\r\n")
        assert server.listener.connections == 1
        client.writer.write(frame(b"\x03\xe8", 8))
        async with asyncio.timeout(DEADLINE_SEC):
            assert await client.reader.read() == b"\x88\x02\x03\xe8"
        await owner.until(lambda: server.listener.connections == 0)
        client.writer.close()
        assert server.listener.refusals[Reason.SUCCESS] == 0
