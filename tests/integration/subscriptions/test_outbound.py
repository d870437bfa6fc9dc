"""Requests to addresses chosen by customers: real servers get them, and no private address is reached."""

from __future__ import annotations

import asyncio
import ssl
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from broker.seams import of_project
from broker.subscriptions.outbound import HttpOutbound, Lookups, Refused, is_public, target_of
from tests.integration.core_support import until
from tests.integration.subscriptions.receiver import Receiver, receiving
from tests.streams import stream_server
from tests.stretches import LONGEST_SEC, Stretches

HERE = "127.0.0.0/8"
NAME = "hooks.example"
LONGEST_WAIT_SEC = 60
WITHIN_SEC = 60


class Names:
    """A resolver that returns its answers in turn and repeats the last one."""

    def __init__(self, *answers: Sequence[str]) -> None:
        self.answers = list(answers)
        self.asked: list[str] = []

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        self.asked.append(host)
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


@asynccontextmanager
async def outbound(
    *allow: str, lookup: Names | None = None, verify: ssl.SSLContext | None = None
) -> AsyncIterator[HttpOutbound]:
    made = HttpOutbound(allow, lookup, verify)
    try:
        yield made
    finally:
        await made.aclose()


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with receiving() as made:
        yield made


async def test_body_and_headers_arrive_and_the_answer_is_returned(receiver: Receiver) -> None:
    receiver.reply = lambda _: (429, {"Retry-After": "7"})
    async with outbound(HERE) as out:
        answer = await out.post(receiver.url + "?a=b", {"webhook-id": "x"}, b"{}", WITHIN_SEC)

    assert (answer.status, answer.error, answer.retry_after) == (429, None, "7")
    (got,) = receiver.got
    assert (got.path, got.body, got.headers["webhook-id"]) == ("/hook?a=b", b"{}", "x")
    assert got.headers["host"] == f"127.0.0.1:{receiver.port}"


async def test_a_connection_is_reused(receiver: Receiver) -> None:
    async with outbound(HERE) as out:
        for _ in range(3):
            assert (await out.post(receiver.url, {}, b"", WITHIN_SEC)).status == 204

    assert (len(receiver.got), receiver.connections) == (3, 1)


@pytest.mark.parametrize("turns", range(1, 13))
async def test_a_request_that_is_cancelled_in_any_turn_leaves_no_connection_open(turns: int) -> None:
    """The pool closes connections that their server has ended when the next request comes."""
    together, answered, ended, closed = asyncio.Barrier(4), asyncio.Event(), asyncio.Barrier(5), list[int]()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while head := (await reader.read(1_000)):
            if not head.startswith(b"POST /together"):
                continue  # the request that is cancelled
            await together.wait()
            writer.write(b"HTTP/1.1 204 No Content\r\n\r\n")
            await answered.wait()
            writer.write_eof()
            await ended.wait()
        closed.append(1)
        writer.close()

    async with stream_server(serve) as port, outbound(HERE) as out:
        url = f"http://127.0.0.1:{port}"
        posts = (out.post(f"{url}/together", {}, b"", WITHIN_SEC) for _ in range(4))
        assert {each.status for each in await asyncio.gather(*posts)} == {204}
        answered.set()
        await ended.wait()
        late = asyncio.create_task(out.post(f"{url}/late", {}, b"", WITHIN_SEC))
        for _ in range(turns):
            await asyncio.sleep(0)
        late.cancel()
        with suppress(asyncio.CancelledError):
            await late
        await until(lambda: len(closed) >= 4)


async def test_no_redirect_is_followed(receiver: Receiver) -> None:
    async with receiving() as secret:
        receiver.reply = lambda _: (307, {"Location": secret.url})
        async with outbound(HERE) as out:
            assert (await out.post(receiver.url, {}, b"", WITHIN_SEC)).status == 307

    assert secret.connections == 0


async def test_no_proxy_of_the_environment_is_used(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with receiving() as proxy:
        for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.url)
        async with outbound(HERE) as out:
            assert (await out.post(receiver.url, {}, b"", WITHIN_SEC)).status == 204

    assert (len(receiver.got), proxy.connections) == (1, 0)


async def test_a_server_that_does_not_answer_times_out(receiver: Receiver) -> None:
    receiver.gate.clear()
    async with outbound(HERE) as out:
        answer = await out.post(receiver.url, {}, b"", 0.2)

    assert (answer.status, answer.error) == (None, "no answer within 0.2 s")


HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("head", "again", "status"),
    [
        (HEAD, b"1000\r\n" + b"x" * 4_096 + b"\r\n", 200),
        (HEAD, b"1\r\nx\r\n" * 2_000, 200),
        (b"", b"HTTP/1.1 100 \r\n\r\n" * 1_000, None),
        (b"HTTP/1.1 200 OK\r\n", b"a:\r\n" * 4_000, None),
    ],
    ids=["large chunks", "tiny chunks", "1xx responses", "headers"],
)
async def test_an_endless_answer_is_cut_off_and_holds_the_loop_up_for_no_more_than_a_moment(
    head: bytes, again: bytes, status: int | None
) -> None:
    async def endless(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(head)
            while True:
                writer.write(again)
                await writer.drain()
        writer.close()

    async with stream_server(endless) as port, outbound(HERE) as out, Stretches() as longest:
        url = f"http://127.0.0.1:{port}/"
        answers = await asyncio.gather(*(out.post(url, {}, b"", 60) for _ in range(20)))

    assert {answer.status for answer in answers} == {status}
    assert longest.cpu_sec < LONGEST_SEC


async def test_a_refused_connection_and_a_non_http_answer_are_errors_and_no_exceptions(
    free_port: int,
) -> None:
    async def rude(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 smtp.example ready\r\n")
        writer.close()

    async with stream_server(rude) as port, outbound(HERE) as out:
        nobody = await out.post(f"http://127.0.0.1:{free_port}/", {}, b"", WITHIN_SEC)
        nonsense = await out.post(f"http://127.0.0.1:{port}/", {}, b"", WITHIN_SEC)

    assert nobody.status is None
    assert "ConnectError" in (nobody.error or "")
    assert nonsense.status is None
    assert "ProtocolError" in (nonsense.error or "")


# --- TLS -------------------------------------------------------------------------------------------


def certificate(directory: Path, *names: str) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """A certificate for these names, and a TLS context that trusts it."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name) for name in names]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = directory / "server.pem"
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.write_bytes(secret + made.public_bytes(serialization.Encoding.PEM))
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(path)
    return server, ssl.create_default_context(cafile=str(path))


async def test_tls_checks_the_name_while_the_connection_goes_to_the_address(tmp_path: Path) -> None:
    server, client = certificate(tmp_path, NAME)
    asked: list[str | None] = []
    server.sni_callback = lambda _socket, name, _context: asked.append(name)
    names = Names(["127.0.0.1"])
    async with receiving(context=server) as receiver, outbound(HERE, lookup=names, verify=client) as out:
        answer = await out.post(f"https://{NAME}:{receiver.port}/x", {}, b"", WITHIN_SEC)

        assert (answer.status, answer.error) == (204, None)
        assert asked == [NAME]
        assert receiver.got[0].headers["host"] == f"{NAME}:{receiver.port}"


@pytest.mark.parametrize("trusted", [True, False])
async def test_a_certificate_of_another_name_or_an_unknown_issuer_gets_no_request(
    tmp_path: Path, trusted: bool
) -> None:
    server, client = certificate(tmp_path, "other.example" if trusted else NAME)
    names = Names(["127.0.0.1"])
    verify = client if trusted else None
    async with receiving(context=server) as receiver, outbound(HERE, lookup=names, verify=verify) as out:
        answer = await out.post(f"https://{NAME}:{receiver.port}/x", {}, b"", WITHIN_SEC)

        assert "CERTIFICATE_VERIFY_FAILED" in (answer.error or "")
        assert receiver.got == []


# --- allowed addresses -----------------------------------------------------------------------------


async def test_no_local_address_is_reached_unless_allowed(receiver: Receiver) -> None:
    async with outbound() as out:
        for host in (
            "127.0.0.1",
            "localhost",
            "2130706433",
            "0x7f000001",
            "0x7f.1",
            "0177.0.0.1",
            "127.1",
            "0",
            "0.0.0.0",
            "[::1]",
            "[::]",
            "[::ffff:127.0.0.1]",
            "[::ffff:7f00:1]",
            "[64:ff9b::7f00:1]",
            "[2002:7f00:1::]",
        ):
            for scheme in ("http", "https"):
                url = f"{scheme}://{host}:{receiver.port}/"
                fault = await out.fault(url)
                answer = await out.post(url, {}, b"", WITHIN_SEC)
                assert fault is not None, url
                assert "public internet" in fault, url
                assert "public internet" in (answer.error or ""), url

    assert receiver.connections == 0


async def test_the_address_is_checked_at_connection_time() -> None:
    """DNS rebinding: the checked address is the one that is connected to."""
    async with receiving("127.0.0.2") as open_one, receiving("127.0.0.1", port=open_one.port) as inner:
        url = f"http://{NAME}:{open_one.port}/"
        names = Names(["127.0.0.2"], ["127.0.0.2"], ["127.0.0.1"])
        async with outbound("127.0.0.2/32", lookup=names) as out:
            assert await out.fault(url) is None
            assert (await out.post(url, {"connection": "close"}, b"", WITHIN_SEC)).status == 204
            assert len(names.asked) == 2, "one DNS look-up per connection"
            answer = await out.post(url, {}, b"", WITHIN_SEC)

        assert "127.0.0.1" in (answer.error or "")
        assert (len(open_one.got), inner.connections) == (1, 0)


async def test_one_private_address_among_several_refuses_the_request() -> None:
    async with outbound(lookup=Names(["93.184.215.14", "10.0.0.1"])) as out:
        assert "10.0.0.1" in (await out.fault(f"https://{NAME}/") or "")


async def test_plain_http_is_allowed_only_for_allowed_networks(receiver: Receiver) -> None:
    async with outbound(HERE, lookup=Names(["93.184.215.14"])) as out:
        assert "https" in (await out.fault(f"http://{NAME}/") or "")
        assert await out.fault(f"https://{NAME}/") is None
        assert await out.fault(receiver.url) is None


async def test_an_unknown_host_name_is_an_error() -> None:
    async with outbound() as out:
        assert await out.fault("https://nobody.invalid/") == "the host nobody.invalid cannot be looked up"
        answer = await out.post("https://nobody.invalid/", {}, b"", WITHIN_SEC)
    assert "cannot be looked up" in (answer.error or "")


PRIVATE = (
    "0.0.0.0 0.1.2.3 10.0.0.1 100.64.0.1 127.0.0.1 127.255.255.254 169.254.169.254 172.16.0.1 "
    "172.31.255.255 192.0.0.1 192.0.2.1 192.168.1.1 198.18.0.1 198.51.100.1 203.0.113.1 224.0.0.1 "
    "239.255.255.255 240.0.0.1 255.255.255.255 :: ::1 ::127.0.0.1 ::ffff:10.0.0.1 "
    "::ffff:169.254.169.254 64:ff9b::a9fe:a9fe 64:ff9b:1::1 100::1 2001::1 2001:db8::1 2002:a00:1:: "
    "2002:a9fe:a9fe:: fc00::1 fd00:ec2::254 fe80::1 fec0::1 ff02::1 ::ffff:0:127.0.0.1 "
    "192.0.0.192 168.63.129.16 ::ffff:168.63.129.16 64:ff9b::c000:c0 3fff::1 "
)
PUBLIC = (
    "1.1.1.1 93.184.215.14 8.8.8.8 100.63.255.255 172.32.0.1 2606:4700:4700::1111 64:ff9b::808:808 "
    "::ffff:8.8.8.8 2002:808:808:: "
)


@pytest.mark.parametrize("text", PRIVATE.split())
def test_non_public_addresses_are_recognised(text: str) -> None:
    assert not is_public(ip_address(text))


@pytest.mark.parametrize("text", PUBLIC.split())
def test_public_addresses_are_allowed(text: str) -> None:
    assert is_public(ip_address(text))


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("", "printable"),
        ("hooks.example/x", "https"),
        ("ftp://hooks.example/", "https"),
        ("file:///etc/passwd", "https"),
        ("https://", "host"),
        ("https:///x", "host"),
        ("https://user@hooks.example/", "user"),
        ("https://user:pass@hooks.example/", "user"),
        ("https://hooks.example@127.0.0.1/", "user"),
        ("https://hooks.example\\@127.0.0.1/", "printable"),
        ("https://hooks.example/a b", "printable"),
        ("https://hooks.example/\r\nX: y", "printable"),
        ("https://hooks.example/#x", "fragment"),
        ("https://hooks.example:0/", "host"),
        ("https://hooks.example:99999/", "URL"),
        ("https://hooks.example:x/", "URL"),
        ("https://[::1/", "URL"),
        ("https://[fe80::1%25lo]/", "host"),
        ("https://①②⑦.0.0.1/", "xn--"),
        ("https://bücher.example/", "xn--"),
        ("https://hooks.exam%70le/", "host"),
        ("https://" + "a" * 2_050, "longer"),
    ],
)
def test_an_unsupported_url_is_refused_with_a_reason(url: str, why: str) -> None:
    with pytest.raises(Refused, match=why):
        target_of(url)


def test_a_plain_url_is_parsed() -> None:
    assert target_of("https://xn--bcher-kva.example") == (True, "xn--bcher-kva.example", 443, "/")
    assert target_of("http://[2606:4700::1]:81/a%20b?c=d&e") == (False, "2606:4700::1", 81, "/a%20b?c=d&e")


async def test_names_of_one_project_that_never_resolve_delay_no_other_project() -> None:
    released = threading.Event()
    asked: list[str] = []

    def resolve(host: str, port: int, **_: object) -> list[tuple[object, ...]]:
        asked.append(host)
        if host.startswith("never"):
            released.wait(LONGEST_WAIT_SEC)
            raise OSError
        return [(0, 0, 0, "", ("93.184.215.14", port))]

    lookups = Lookups(in_all=10, per_project=3, resolve=resolve)

    async def look(project: str, host: str) -> object:
        of_project.set(project)
        return await lookups(host, 443)

    try:
        stuck = [asyncio.create_task(look("bad", f"never-{number}.example")) for number in range(20)]
        await until(lambda: lookups.under_way == 3)
        assert await asyncio.create_task(look("good", "fine.example")) == ["93.184.215.14"]
        for task in stuck[1:]:
            task.cancel()
    finally:
        released.set()
    assert await stuck[0] == []
    await until(lambda: lookups.under_way == 0)
    with pytest.raises(OSError, match="some seconds ago"):
        await asyncio.create_task(look("good", "never-0.example"))
    assert len(asked) == 4
