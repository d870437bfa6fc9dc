"""Both SDKs against a real broker: cut connections, a broker killed under a stream, devices that answer, fail
or never connect, and a page in a real browser."""

from __future__ import annotations

import asyncio
import re
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing, suppress
from functools import partial
from itertools import count
from typing import Any

import pytest
from playwright.sync_api import Page

from devices.agent import Agent, Call, CommandFailed
from tests.conftest import unused_port
from tests.sdk_driver import LANGUAGES, Outcome, Sdk, sdk
from tests.streams import stream_server
from tests.system.conftest import NewBroker
from tests.system.support import SECRET, WITHIN_SEC, Broker, running, until

DOORS = count()
languages = pytest.mark.parametrize("language", LANGUAGES)


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """One broker for all tests that do not kill it; each test has its own devices."""
    home = tmp_path_factory.mktemp("broker")
    broker = Broker(home / "data", cwd=home).start()
    yield broker
    broker.kill()
    assert not SECRET.search(broker.said())


@pytest.fixture
def door(broker: Broker) -> str:
    """A device of this test only."""
    name = f"door_{next(DOORS)}"
    broker.device(name)
    return name


def client(broker: Broker, language: str, url: str = "") -> Sdk:
    broker.http("GET", "/v1/types")  # creates the broker's key
    return sdk(language, url or broker.url, broker.key, backoff_sec=0.05)


def agent(broker: Broker, hardware_id: str, token: str) -> Agent:
    made = Agent(hardware_id, token, f"mqtt://127.0.0.1:{broker.mqtt_port}", grants="none")

    @made.command("unlock")
    async def unlock(call: Call) -> dict[str, Any]:
        if call.params == {"jam": True}:
            raise CommandFailed("jammed", "the bolt does not move")
        return {"locked": False}

    return made


def commands_of(broker: Broker, hardware_id: str) -> list[str]:
    answer = broker.http("GET", f"/v1/devices/{hardware_id}/commands?limit=100")
    return [command["id"] for command in answer.json()["data"]]


# --- send and history ------------------------------------------------------------------------------


@languages
def test_one_call_with_thousands_of_devices_answers_for_each(broker: Broker, language: str) -> None:
    known = [f"{language}-{number}" for number in (0, 4_999, 9_999, 10_000, 12_344)]
    for hardware_id in known:
        broker.device(hardware_id)
    idents = [f"{language}-{number}" for number in range(12_345)]
    order = {"name": "unlock", "device_ident": idents, "data": [1, {"two": None}]}
    sent = asyncio.run(client(broker, language).send(order)).answer
    assert set(sent) == set(idents)
    assert [ident for ident in idents if sent[ident]["sent"]] == known
    assert sent[idents[1]] == {"sent": False, "error": "Device not found"}
    for hardware_id in known:
        assert commands_of(broker, hardware_id) == [sent[hardware_id]["command_id"]]
        assert broker.command(sent[hardware_id]["command_id"])["params"] == [1, {"two": None}]


class Proxy:
    """A proxy between SDK and broker. Cuts the first connections, each as listed in `cuts`; later ones pass
    unchanged."""

    def __init__(self, broker: Broker, *cuts: str) -> None:
        host, _, port = broker.url.removeprefix("http://").partition(":")
        self._broker = host, int(port)
        self.cuts = list(cuts)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with closing(writer), suppress(ConnectionError, asyncio.IncompleteReadError):
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

    @asynccontextmanager
    async def running(self) -> AsyncIterator[str]:
        async with stream_server(self._serve) as port:
            yield f"http://127.0.0.1:{port}"


async def message(reader: asyncio.StreamReader) -> bytes:
    """One whole HTTP request or answer."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = re.search(rb"\r\ncontent-length: *(\d+)", head, re.IGNORECASE)
    return head + await reader.readexactly(int(length[1]) if length else 0)


@languages
async def test_a_connection_cut_anywhere_in_a_send_makes_no_duplicate(
    broker: Broker, door: str, language: str
) -> None:
    proxy = Proxy(broker, "the request", "before the answer", "the answer")
    async with proxy.running() as url:
        cut = await client(broker, language, url).send({"name": "unlock", "device_ident": [door, "no-door"]})
    assert proxy.cuts == []
    assert cut.answer["no-door"] == {"sent": False, "error": "Device not found"}
    assert commands_of(broker, door) == [cut.answer[door]["command_id"]]


@languages
async def test_an_unfinished_send_is_completed_with_the_key_of_its_error(
    broker: Broker, door: str, language: str
) -> None:
    order = {"name": "unlock", "device_ident": [door]}
    async with Proxy(broker, *["before the answer"] * 3).running() as url:
        unsure = client(broker, language, url)
        given_up = await Sdk(language, url, unsure.key, unsure.options | {"retries": 2}).send(order)
    assert given_up.error["name"] == "Unavailable"
    key = given_up.error["idempotency_key"]
    later = await client(broker, language).send(order | {"idempotency_key": key})
    assert commands_of(broker, door) == [later.answer[door]["command_id"]]


@languages
async def test_refusals_of_the_real_broker_are_typed_errors(broker: Broker, language: str) -> None:
    app = client(broker, language)
    order = {"name": "unlock", "device_ident": ["no-door"]}
    wrong = await app.send(order | {"colour": "red"})
    text = await app.send(order | {"device_ident": "no-door"})
    when = await app.history({"name": "unlock", "device_idents": ["no-door"], "start": "yesterday"})
    stranger = await sdk(language, broker.url, "sk_live_" + "x" * 32).send(order)
    unknown = await app.wait("cmd_00000000000000000000000000", 5)
    assert [each.error["name"] for each in (wrong, text, when)] == ["InvalidRequest"] * 3
    assert [each.error["details"]["field"] for each in (wrong, text, when)] == [
        "colour", "device_ident", "start",
    ]  # fmt: skip
    assert (stranger.error["name"], unknown.error["name"]) == ("Unauthorized", "NotFound")


# --- wait ------------------------------------------------------------------------------------------


@languages
async def test_wait_returns_the_closed_command_for_every_end(
    broker: Broker, door: str, language: str
) -> None:
    app = client(broker, language)
    present = f"{door}-present"
    token = broker.device(present)
    done, failed = [broker.create(present, "unlock", params={"jam": jam}) for jam in (False, True)]
    expired = broker.create(door, "unlock", ttl_sec=1)
    cancelled = broker.create(door, "unlock")
    waits = [asyncio.create_task(app.wait(each, WITHIN_SEC)) for each in (done, failed, expired, cancelled)]
    with running(lambda: agent(broker, present, token)):
        path = f"/v1/devices/{door}/commands/{cancelled}"
        assert broker.http("DELETE", path).status_code == 200
        closed = [(await wait).answer for wait in waits]
    assert [each["id"] for each in closed] == [done, failed, expired, cancelled]
    assert [each["state"] for each in closed] == ["executed", "failed", "expired", "cancelled"]
    assert closed[0]["result"] == {"locked": False}
    assert closed[1]["error"]["code"] == "jammed"
    again = await app.wait(done, WITHIN_SEC)
    assert {**again.answer, "grant_token": None} == {**closed[0], "grant_token": None}


@languages
async def test_wait_times_out_and_leaves_the_command_open(broker: Broker, door: str, language: str) -> None:
    command_id = broker.create(door, "unlock")
    outcome = await client(broker, language).wait(command_id, 0.5)
    assert outcome.error["name"] == "Timeout"
    assert broker.command(command_id)["state"] == "pending"


# --- events ----------------------------------------------------------------------------------------


def has(seen: Outcome, command_id: str) -> bool:
    return any(event["subject"] == command_id for event in seen.events)


@languages
async def test_a_stream_misses_and_repeats_no_event_when_the_broker_is_killed(
    new_broker: NewBroker, language: str
) -> None:
    address = f"127.0.0.1:{unused_port()}"
    broker = new_broker("--http", address).start()
    broker.device("door-1")
    app = client(broker, language)
    seen = Outcome()
    following = asyncio.create_task(app.events(31, into=seen, after=0))
    made: list[str] = []
    for life in range(3):
        made += [broker.create("door-1", "unlock", params={"life": life})]
        await asyncio.to_thread(until, partial(has, seen, made[-1]))
        # When the broker dies, the stream has seen some or none of these.
        made += [broker.create("door-1", "unlock", params={"life": life}) for _ in range(9)]
        if life < 2:
            broker.end(signal.SIGKILL)
            broker.start()
    await following
    logged = broker.http("GET", "/v1/events?after=0&limit=1000").json()["data"]
    assert seen.events == logged
    assert [event["subject"] for event in seen.events[1:]] == made


@languages
async def test_a_stream_without_a_position_starts_now_and_misses_no_later_event(
    new_broker: NewBroker, language: str
) -> None:
    """The broker is killed before the first event; events during the break must not be lost."""
    address = f"127.0.0.1:{unused_port()}"
    broker = new_broker("--http", address).start()
    broker.device("door-1")
    before = broker.create("door-1", "unlock")
    app = client(broker, language)
    following = asyncio.create_task(app.events(1))
    await asyncio.to_thread(until, lambda: streams(broker) == 1, lambda: streams(broker))
    broker.end(signal.SIGKILL)
    broker.start()
    first = broker.create("door-1", "unlock")
    (event,) = (await following).events
    assert event["subject"] == first != before


def streams(broker: Broker) -> float:
    """The number of open event streams."""
    text = broker.http("GET", "/metrics").text
    found = [line for line in text.splitlines() if line.startswith("ordain_event_streams ")]
    return float(found[0].rpartition(" ")[2])


# --- in a browser ----------------------------------------------------------------------------------

IN_A_PAGE = """
async ([url, key, door]) => {
  const { App, NotFound } = await import(`${url}/sdk/app.mjs`);
  const app = new App(url, key);
  const events = [];
  const following = (async () => {
    for await (const event of app.command.events({ after: 0, event: "executed", device: door })) {
      events.push(event);
      if (events.length === 2) return;
    }
  })();
  const sent = await app.command.send({ name: "unlock", device_ident: [door], data: { first: true } });
  const id = sent[door].command_id;
  const command = await app.command.wait(id, 300);
  await app.command.send({ name: "unlock", device_ident: [door] });
  await following;
  const asked = { name: "unlock", device_idents: [door], start: "2026-01-01" };
  const history = await app.command.history(asked);
  const refused = await app.command.wait("cmd_none", 5).catch((error) => error instanceof NotFound);
  return { sent, command, subjects: events.map((event) => event.subject), history, refused };
}
"""


def in_a_page(broker: Broker, page: Page, page_from: str) -> dict[str, Any]:
    """The program's result in a page that was loaded from `page_from`."""
    token = broker.device("front-door")
    with running(lambda: agent(broker, "front-door", token)):
        page.goto(f"{page_from}/healthz")
        seen: dict[str, Any] = page.evaluate(IN_A_PAGE, [broker.url, broker.key, "front-door"])
    return seen


def test_a_page_in_a_browser_sends_waits_and_follows(broker: Broker, page: Page) -> None:
    seen = in_a_page(broker, page, page_from=broker.url)
    assert seen["sent"]["front-door"]["sent"] is True
    assert (seen["command"]["state"], seen["command"]["params"]) == ("executed", {"first": True})
    assert seen["subjects"] == [record["command_id"] for record in seen["history"]["front-door"]]
    assert seen["refused"] is True


def test_a_page_from_another_origin_works_if_the_settings_allow_it(new_broker: NewBroker, page: Page) -> None:
    port = unused_port()
    elsewhere = f"http://localhost:{port}"
    broker = new_broker("--http", f"127.0.0.1:{port}")
    settings = broker.cwd / "ordain.toml"
    settings.write_text(f'cors_origins = ["{elsewhere}"]\n')
    broker.start("--config", str(settings))
    seen = in_a_page(broker, page, page_from=elsewhere)
    assert (seen["command"]["state"], seen["refused"]) == ("executed", True)
