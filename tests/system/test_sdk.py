"""Both SDKs against a real broker: thousands of devices, and connections cut in the middle."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest

from tests.sdk_driver import LANGUAGES, Sdk, sdk
from tests.system.support import Broker

languages = pytest.mark.parametrize("language", LANGUAGES)


def client(broker: Broker, language: str, url: str = "") -> Sdk:
    broker.http("GET", "/v1/types")  # makes the key
    return sdk(language, url or broker.url, broker.key, backoff_sec=0.05)


def commands_of(broker: Broker, hardware_id: str) -> list[str]:
    answer = broker.http("GET", f"/v1/devices/{hardware_id}/commands?limit=100")
    return [command["id"] for command in answer.json()["data"]]


# --- send and history ------------------------------------------------------------------------------


@languages
def test_thousands_of_devices_in_one_call_each_have_their_answer(broker: Broker, language: str) -> None:
    known = [f"door-{number}" for number in (0, 4_999, 9_999, 10_000, 12_344)]
    for hardware_id in known:
        broker.device(hardware_id)
    idents = [f"door-{number}" for number in range(12_345)]
    order = {"name": "unlock", "device_ident": idents, "data": [1, {"two": None}]}
    sent = asyncio.run(client(broker, language).send(order)).answer
    assert set(sent) == set(idents)
    assert [ident for ident in idents if sent[ident]["sent"]] == known
    assert sent["door-1"] == {"sent": False, "error": "Device not found"}
    for hardware_id in known:
        assert commands_of(broker, hardware_id) == [sent[hardware_id]["command_id"]]
        assert broker.command(sent[hardware_id]["command_id"])["params"] == [1, {"two": None}]


class Proxy:
    """Between SDK and broker. The first connections are cut, each in its own way; the rest are left alone."""

    def __init__(self, broker: Broker, *cuts: str) -> None:
        host, _, port = broker.url.removeprefix("http://").partition(":")
        self._broker = host, int(port)
        self.cuts = list(cuts)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            cut = self.cuts.pop(0) if self.cuts else "nothing"
            request = await message(reader)
            from_broker, to_broker = await asyncio.open_connection(*self._broker)
            to_broker.write(request[:-20] if cut == "the request" else request)
            await to_broker.drain()
            if cut != "the request":
                answer = await message(from_broker)
                writer.write(answer if cut == "nothing" else answer[:-20] if cut == "the answer" else b"")
                await writer.drain()
            to_broker.close()
        writer.close()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[str]:
        async with await asyncio.start_server(self._serve, "127.0.0.1", 0) as server:
            yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def message(reader: asyncio.StreamReader) -> bytes:
    """One whole HTTP request or answer."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = next(
        (
            int(line.split(b":")[1])
            for line in head.lower().split(b"\r\n")
            if line.startswith(b"content-length:")
        ),
        0,
    )
    return head + await reader.readexactly(length)


@languages
async def test_a_connection_cut_anywhere_in_a_send_gives_no_double(broker: Broker, language: str) -> None:
    idents = ["door-1", "door-2", "door-99"]
    for hardware_id in idents[:2]:
        broker.device(hardware_id)
    proxy = Proxy(broker, "the request", "before the answer", "the answer")
    async with proxy.running() as url:
        cut = await client(broker, language, url).send({"name": "unlock", "device_ident": idents})
    assert proxy.cuts == []
    assert cut.answer["door-99"] == {"sent": False, "error": "Device not found"}
    for hardware_id in idents[:2]:
        made = commands_of(broker, hardware_id)
        assert made == [cut.answer[hardware_id]["command_id"]]


@languages
async def test_what_was_given_up_is_completed_with_the_key_of_its_error(
    broker: Broker, language: str
) -> None:
    broker.device("door-1")
    order = {"name": "unlock", "device_ident": ["door-1"]}
    proxy = Proxy(broker, *["before the answer"] * 3)
    async with proxy.running() as url:
        unsure = client(broker, language, url)
        given_up = await Sdk(language, url, unsure.key, unsure.options | {"retries": 2}).send(order)
    assert given_up.error["name"] == "Unavailable"
    key = given_up.error["idempotency_key"]
    later = await client(broker, language).send(order | {"idempotency_key": key})
    assert commands_of(broker, "door-1") == [later.answer["door-1"]["command_id"]]


@languages
async def test_refusals_of_the_real_broker_are_typed(broker: Broker, language: str) -> None:
    app = client(broker, language)
    order = {"name": "unlock", "device_ident": ["door-1"]}
    wrong = await app.send(order | {"colour": "red"})
    text = await app.send(order | {"device_ident": "door-1"})
    when = await app.history({"name": "unlock", "device_idents": ["door-1"], "start": "yesterday"})
    stranger = await sdk(language, broker.url, "sk_live_" + "x" * 32).send(order)
    assert [each.error["name"] for each in (wrong, text, when)] == ["InvalidRequest"] * 3
    assert [each.error["details"]["field"] for each in (wrong, text, when)] == [
        "colour", "device_ident", "start",
    ]  # fmt: skip
    assert stranger.error["name"] == "Unauthorized"
